"""The exact statistics of a residual stream: the k largest magnitudes and the lower median, per sequence.

The rules (design of the measurement): NaN are left out and counted; ±inf are the largest; of equal magnitudes the
lowest flat index comes first; the median is the lower middle value, as ``torch.median``. Magnitudes are compared in
float32, which holds every float16 and bfloat16 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ma_monitor.errors import ModelError

_LEFT_OUT = -1.0
"""Stands for an entry that must not be chosen: below every magnitude."""


@dataclass(frozen=True)
class Statistics:
    """The statistics of one residual stream, on its device.

    Attributes:
        top: Signed values of the k largest magnitudes, ``[n, k]`` float32; NaN past the entries that are not NaN.
        index: Their flat index ``position · d + channel``, ``[n, k]`` int64; -1 where ``top`` is NaN.
        median: Lower median of the magnitudes, ``[n]`` float32; NaN where every entry is NaN.
        nan: Number of NaN, ``[n]`` int64.
        inf: Number of infinite entries, ``[n]`` int64.
    """

    top: Tensor
    index: Tensor
    median: Tensor
    nan: Tensor
    inf: Tensor


def activation_statistics(hidden: Tensor, k: int) -> Statistics:
    """Exact top-k and median of abs(h), per sequence.

    The result stays on the device of ``hidden``: reading it is the caller's one synchronisation for all layers.

    Args:
        hidden: Residual stream ``[n, S, d]``, any floating type.
        k: How many of the largest entries.

    Raises:
        ModelError: If ``hidden`` is not a floating tensor of three axes.
    """
    if hidden.ndim != 3 or not hidden.is_floating_point():
        raise ModelError(
            "a residual stream must be a floating tensor [sequence, token, channel], "
            f"got {hidden.dtype} of shape {tuple(hidden.shape)}"
        )
    values = hidden.detach().float()
    magnitude = values.abs()
    is_nan = magnitude.isnan()
    # Without `dim`: the form that also gives places is refused on CUDA under deterministic algorithms.
    median = torch.stack([sequence.nanmedian() for sequence in magnitude])
    inf = (magnitude == torch.inf).sum(dim=(1, 2))
    magnitude.masked_fill_(is_nan, _LEFT_OUT)
    largest, index = _take_largest(magnitude, min(k, magnitude[0].numel()))
    missing = largest < 0
    return Statistics(
        top=_padded(values.flatten(1).gather(1, index).masked_fill(missing, torch.nan), k, torch.nan),
        index=_padded(index.masked_fill(missing, -1), k, -1),
        median=median,
        nan=is_nan.sum(dim=(1, 2)),
        inf=inf,
    )


def _take_largest(magnitude: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and flat indices of the k largest entries of each sequence, ``[n, k]``; overwrites those entries.

    One read of ``magnitude [n, S, d]`` gives each token's maximum; the rest touches one token a rank. ``max`` promises
    the first of several equal entries (``topk`` promises nothing), so the first token and its first channel is the
    lowest flat index.
    """
    rows = torch.arange(len(magnitude), device=magnitude.device)
    per_token = magnitude.amax(dim=2)
    values, indices = [], []
    for _ in range(k):
        value, token = per_token.max(dim=1)
        channel = magnitude[rows, token].max(dim=1).indices
        values.append(value)
        indices.append(token * magnitude.shape[2] + channel)
        magnitude[rows, token, channel] = _LEFT_OUT
        per_token[rows, token] = magnitude[rows, token].amax(dim=1)
    return torch.stack(values, dim=1), torch.stack(indices, dim=1)


def _padded(values: Tensor, k: int, fill: float) -> Tensor:
    """``values [n, j]`` widened to ``[n, k]`` where a sequence has fewer than k entries."""
    return torch.nn.functional.pad(values, (0, k - values.shape[1]), value=fill)
