"""Activations that are hard on a selection: ties, one exponent, denormals, infinities, NaN, two far groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ma_monitor.measure.statistics import _places

Maker = Callable[[int, int, int], Tensor]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _massive(*shape: int) -> Tensor:
    hidden = _normal(*shape)
    hidden[:, 0, shape[2] // 3] = -3000
    hidden[:, 5, 1] = 900
    return hidden


def _not_finite(*shape: int) -> Tensor:
    hidden = _normal(*shape)
    hidden[0, :3] = torch.nan
    hidden[-1, 4, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf])
    return hidden


def _chosen(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


SEQUENCES: dict[str, Maker] = {
    "ordinary": _normal,
    "massive": _massive,
    "not finite": _not_finite,
    "mostly NaN": lambda *shape: torch.where(_chosen(*shape) < 0.999, torch.nan, _normal(*shape)),
    "all NaN": lambda *shape: torch.full(shape, torch.nan),
    "all infinite": lambda *shape: torch.full(shape, -torch.inf),
    "all equal": lambda *shape: torch.full(shape, -2.5),
    "two values": lambda *shape: (_chosen(*shape) > 0.5).float() + 1,
    "few values": lambda *shape: (_chosen(*shape) * 7).floor(),
    "one exponent": lambda *shape: 1 + _chosen(*shape) * 0.99,
    "half zero": lambda *shape: _normal(*shape) * (_chosen(*shape) > 0.5),
    "tiny and ordinary": lambda *shape: _normal(*shape) * torch.where(_chosen(*shape) > 0.5, 1, 1e-30),
    "denormal": lambda *shape: _normal(*shape) * 1e-40,
    "every magnitude": lambda *shape: (_normal(*shape) * 20).exp(),
    "ascending": lambda *shape: torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape).float(),
    "channels apart": lambda *shape: _normal(*shape) * torch.logspace(-3, 3, shape[2]),
}
"""Each makes a tensor ``[n, S, d]``."""


def misleading(*shape: int) -> Tensor:
    """Small wherever the sample is drawn, large elsewhere: the median is above all that the sample shows."""
    hidden = 5 + _chosen(*shape)
    hidden.flatten(1)[:, _places(shape[1] * shape[2])] = 1.0
    return hidden
