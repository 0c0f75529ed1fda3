"""The loss of each document with and without a change, and what the difference is worth over documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ma_monitor.errors import ModelError
from ma_monitor.measure.forward import undisturbed_forward

Floats = NDArray[np.float64]
DRAWS = 10_000
"""Resamplings of the documents behind an interval."""
SEED = 0


def document_loss(model: nn.Module, ids: Tensor) -> float:
    """Mean cross entropy in nats of the tokens of a document ``[S]``, each given those before it.

    Raises:
        ModelError: If the model gives no logits over its vocabulary.
    """
    scored = _Scored(model)
    undisturbed_forward(scored, ids[None])
    return scored.loss


class _Scored(nn.Module):
    """A model whose forward keeps the loss: the probe's own forward asks for the logits of one position alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = math.nan

    def forward(self, input_ids: Tensor) -> None:
        logits = getattr(self.model(input_ids, use_cache=False), "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] != input_ids.shape[1]:
            raise ModelError(
                "a loss needs a causal language model, which gives logits for every token; "
                f"{type(self.model).__name__} gives none"
            )
        self.loss = float(cross_entropy(logits[0, :-1].float(), input_ids[0, 1:].to(logits.device)))


@dataclass(frozen=True)
class Estimate:
    """A mean over documents, with its 95 % percentile interval of the bootstrap over documents."""

    mean: float
    low: float
    high: float


def estimate(differences: Floats, *, seed: int = SEED) -> Estimate:
    """The mean of paired differences ``[n]``; documents are resampled, so that the pairing stays.

    With few documents such an interval is too narrow: at 10 of a Gaussian it holds about 90 % where it says 95 %.
    """
    draws = np.random.default_rng(seed).integers(0, len(differences), (DRAWS, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), (0.025, 0.975))
    return Estimate(float(differences.mean()), float(low), float(high))


def effect_size(differences: Floats) -> float:
    """Mean difference over the unbiased standard deviation of the differences (Cohen's d_z); NaN where that is zero."""
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return float(differences.mean()) / spread if spread > 0 else math.nan


def perplexity(losses: Sequence[float] | Floats) -> float:
    """Exponential of the mean loss, in which every document counts alike; infinite where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(losses)))


def scores_head(model: nn.Module, stored: Mapping[str, Callable[[], Tensor]]) -> bool:
    """Whether the weights that give logits are among those that a checkpoint holds, or are the input's own.

    Looked for by their values: checkpoints and models may call them by different names.

    Args:
        model: Has been loaded from the checkpoint.
        stored: Name → what reads that tensor.
    """
    embeddings = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    taken, head = (getattr(part, "weight", None) for part in embeddings)
    if not isinstance(head, Tensor):
        return False
    if isinstance(taken, Tensor) and taken.data_ptr() == head.data_ptr():
        return True
    head = head.detach().cpu()
    return any(
        one.shape == head.shape and torch.equal(one.to(head), head) for one in (read() for read in stored.values())
    )
