"""Entries of the residual stream: which are massive in a text, which others stand against them, and how to set them.

Every intervention is a context manager: while it is open, forwards of the model run with the change. Hooks are gone
afterwards, weights are as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ma_monitor.errors import ConfigError
from ma_monitor.measure.forward import reading_layers, undisturbed_forward
from ma_monitor.measure.layers import find_layers
from ma_monitor.measure.statistics import activation_statistics


@dataclass(frozen=True)
class Rule:
    """Which entries of a layer's output count as massive, sequence by sequence.

    Attributes:
        top: The so many largest magnitudes; not used where there is a threshold.
        threshold: Those of at least so many times the lower median of the magnitudes.
    """

    top: int = 3
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ConfigError: If a rule picks nothing, or everything.
        """
        if self.top < 1:
            raise ConfigError(f"`top` must be at least 1 entry of a layer, got {self.top}")
        if self.threshold is not None and not 1 < self.threshold < float("inf"):
            raise ConfigError(f"`threshold` must be a finite ratio to the median above 1, got {self.threshold}")

    def indices(self, hidden: Tensor) -> Tensor:
        """Flat indices of the massive entries of ``[S, d]``, and nothing that is NaN."""
        found = activation_statistics(hidden[None], min(self.top, hidden.numel()))
        if self.threshold is None:
            return found.index[0][found.index[0] >= 0]
        return torch.nonzero(hidden.float().abs().flatten() >= self.threshold * found.median[0]).flatten()

    def __str__(self) -> str:
        """The rule in words."""
        if self.threshold is None:
            return f"the {self.top} largest entries of each layer and document"
        return f"entries of at least {self.threshold:g} times the median of their layer and document"


@dataclass(frozen=True)
class Entries:
    """Entries of the residual streams h_1 … h_L of one document; arrays ``[m]``.

    Attributes:
        layer: 1 … L.
        position: Which token.
        channel: Which channel.
        value: What it is, or is to be.
    """

    layer: NDArray[np.int64]
    position: NDArray[np.int64]
    channel: NDArray[np.int64]
    value: NDArray[np.float64]

    def having(self, value: NDArray[np.float64] | float) -> Entries:
        """The same places with other values."""
        return Entries(self.layer, self.position, self.channel, np.broadcast_to(np.float64(value), self.layer.shape))

    def of_layer(self, layer: int) -> Entries:
        """Those of one layer."""
        own = self.layer == layer
        return Entries(self.layer[own], self.position[own], self.channel[own], self.value[own])


@dataclass(frozen=True)
class Reading:
    """What one undisturbed forward of a document ``[S]`` shows.

    Attributes:
        entries: The massive entries of h_1 … h_L.
        token: Position of the massive token: the one that holds the largest entry of all layers.
        random: As many entries of each layer that are not massive, drawn evenly, several times.
        means: Mean of each channel over tokens, ``[L, d]``.
        norms: Euclidean norm of each token, of h_0 … h_L, ``[L + 1, S]``.
    """

    entries: Entries
    token: int
    random: tuple[Entries, ...]
    means: NDArray[np.float64]
    norms: NDArray[np.float64]


def read_document(model: nn.Module, ids: Tensor, rule: Rule, *, draws: int, seed: int) -> Reading:
    """Runs a document ``[S]`` and finds its massive entries on that very text.

    Raises:
        ModelError: If the blocks cannot be found, or give no residual stream.
    """
    generator = np.random.default_rng(seed)
    found: list[list[Entries]] = [[] for _ in range(draws + 1)]
    means, norms, strongest = [], [], (-1.0, 0)

    def read(row: int, value: Any) -> None:
        nonlocal strongest
        hidden = first(value)[0]
        norms.append(hidden.float().norm(dim=1).cpu().numpy().astype(np.float64))
        if row == 0:
            return
        means.append(hidden.float().mean(dim=0).cpu().numpy().astype(np.float64))
        size, index = hidden.float().abs().flatten().max(dim=0)
        strongest = max(strongest, (float(size), int(index) // hidden.shape[1]))
        massive = rule.indices(hidden).cpu().numpy()
        found[0].append(_entries(hidden, row, massive))
        for drawn in found[1:]:
            drawn.append(_entries(hidden, row, others(massive, hidden.numel(), generator)))

    with reading_layers(find_layers(model), read):
        undisturbed_forward(model, ids[None])
    massive, *random = (_joined(parts) for parts in found)
    return Reading(massive, strongest[1], tuple(random), np.stack(means), np.stack(norms))


def _entries(hidden: Tensor, layer: int, index: NDArray[np.int64]) -> Entries:
    """The entries of ``[S, d]`` at these flat indices."""
    value = hidden.flatten()[torch.from_numpy(index).to(hidden.device)].double().cpu().numpy()
    return Entries(np.full_like(index, layer), index // hidden.shape[1], index % hidden.shape[1], value)


def _joined(parts: Sequence[Entries]) -> Entries:
    return Entries(*(np.concatenate([getattr(part, name) for part in parts]) for name in Entries.__annotations__))


def others(taken: NDArray[np.int64], size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """As many of 0 … size − 1 as are taken, or as are left, drawn evenly from those that are not."""
    free = size - len(taken)
    drawn = generator.choice(free, min(len(taken), free), replace=False)
    for index in np.sort(taken):  # what is drawn counts free places: step over those that are taken
        drawn += drawn >= index
    return drawn


@contextmanager
def entries_set(layers: nn.ModuleList, entries: Entries) -> Iterator[None]:
    """While open, these entries of the blocks' outputs have these values, in every sequence of a forward.

    A forward of fewer tokens heeds those that it has.
    """

    def setter(own: Entries) -> Callable[..., Any]:
        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = first(output).clone()
            there = own.position < hidden.shape[1]
            places = (torch.from_numpy(own.position[there]), torch.from_numpy(own.channel[there]))
            hidden[:, places[0], places[1]] = torch.from_numpy(own.value[there]).to(hidden)
            return replaced(output, hidden)

        return change

    with ExitStack() as hooks:
        for layer in np.unique(entries.layer):
            own = entries.of_layer(int(layer))
            hooks.callback(layers[int(layer) - 1].register_forward_hook(setter(own)).remove)
        yield


def first(value: Any) -> Tensor:
    """The hidden states in what a module gives: a tensor, or the first of a tuple."""
    hidden: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return hidden


def replaced(value: Any, hidden: Tensor) -> Any:
    """What a module gives, with other hidden states."""
    return type(value)([hidden, *value[1:]]) if isinstance(value, (tuple, list)) else hidden
