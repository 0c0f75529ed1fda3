"""The exact statistics of a residual stream that is spread over processes, without gathering it.

Under sequence-parallel tensor parallelism a block gives a `DTensor` of which each process holds some tokens. Every
process finds its own k largest entries, and the k largest of those of all processes are the answer, in the order of
their places in the whole. The median is found by counting: magnitudes in float32, read as whole numbers, are in the
same order, so the sum over processes of a histogram of their upper 16 bits, and then one of the lower 16 bits within
the bin that holds the median, give it to the bit. The answers are those of ``activation_statistics`` of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ma_monitor.errors import ModelError
from ma_monitor.measure.statistics import Statistics, activation_statistics, pack

_HALF = 16
_BINS = 1 << _HALF
_PIECE = 2**18
"""Entries counted at once, about."""


@dataclass(frozen=True)
class _Part:
    """What this process holds of a tensor ``[n, S, d]``.

    Attributes:
        local: Its part ``[b, s, c]``.
        start: Where that begins on each axis of the whole.
        size: The shape that it must have.
        groups: The process groups over which the whole is spread.
        slot: Number of this part among all.
        slots: How many parts there are.
    """

    local: Tensor
    start: tuple[int, ...]
    size: tuple[int, ...]
    groups: tuple[Any, ...]
    slot: int
    slots: int


def statistics_of(hidden: Tensor, k: int) -> Statistics:
    """The statistics of a residual stream ``[n, S, d]``, as ``activation_statistics``; of a `DTensor` as a whole.

    A `DTensor` makes this a collective operation over its mesh, in which a process takes part to the end even where it
    fails.

    Raises:
        ModelError: As ``activation_statistics``; and if a `DTensor` is spread in a way that is not known.
    """
    if not hasattr(hidden, "placements"):
        return activation_statistics(hidden, k)
    from torch.distributed.tensor import Partial, Shard

    spread: Any = hidden.detach()
    if any(isinstance(placement, Partial) for placement in spread.placements):
        sharded = [Shard(1) if isinstance(p, Partial) else p for p in spread.placements]
        spread = spread.redistribute(placements=sharded)
    part = _part_of(spread)
    if not part.groups:
        return activation_statistics(part.local, k)
    return _merged(part, tuple(spread.shape), k)


def _part_of(spread: Any) -> _Part:
    """What this process holds, by the placements, which are the same on every process."""
    from torch.distributed.tensor import Shard

    start, size = [0, 0, 0], list(spread.shape)
    groups: list[Any] = []
    slot, slots = 0, 1
    coordinate = spread.device_mesh.get_coordinate()
    for axis, placement in enumerate(spread.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard or len(size) != len(start):
            raise ModelError(
                "a residual stream spread over processes must be a [sequence, token, channel] tensor that is "
                f"replicated, partial or sharded, got shape {tuple(spread.shape)} with {spread.placements}"
            )
        parts, mine, dim = spread.device_mesh.size(axis), coordinate[axis], placement.dim % len(size)
        chunk = -(-size[dim] // parts)  # as torch.chunk, the rule of DTensor: the last parts may be smaller or empty
        offset = min(size[dim], chunk * mine)
        start[dim] += offset
        size[dim] = min(chunk, size[dim] - offset)
        groups.append(spread.device_mesh.get_group(axis))
        slot, slots = slot * parts + mine, slots * parts
    return _Part(spread.to_local().detach(), tuple(start), tuple(size), tuple(groups), slot, slots)


def _merged(part: _Part, shape: tuple[int, ...], k: int) -> Statistics:
    """Three sums over the processes: candidates and counts, and two histograms.

    What this process finds goes into zeros that are made beforehand, so that it can be short of its own results and
    yet take part; its fault is raised after the last sum.
    """
    n, faults, device = shape[0], list[Exception](), part.local.device
    rows = slice(part.start[0], part.start[0] + part.size[0])

    def summed(zeros: Tensor, fill: Callable[[Tensor], None]) -> Tensor:
        try:
            fill(zeros[rows])
        except Exception as fault:
            faults[:] = faults or [fault]
        for group in part.groups:
            dist.all_reduce(zeros, group=group)
        return zeros

    found = summed(
        torch.zeros(n, part.slots, 2 * k + 3, dtype=torch.long, device=device),
        lambda mine: _fill_candidates(mine[:, part.slot], part, shape, k),
    )
    nan, inf = found[..., 2 * k].sum(1), found[..., 2 * k + 1].sum(1)
    rank = (shape[1] * shape[2] - nan - 1).clamp(min=0) // 2  # of the lower median, counted from 0
    counts = torch.zeros(n, _BINS, dtype=torch.long, device=device)
    upper, rank = _bin_of(summed(counts, lambda mine: _fill_upper(mine, part.local)), rank)
    counts = torch.zeros(n, _BINS, dtype=torch.long, device=device)
    lower, _ = _bin_of(summed(counts, lambda mine: _fill_lower(mine, part.local, upper[rows])), rank)
    if faults:
        raise faults[0]
    median = ((upper << _HALF) | lower).int().view(torch.float32)
    top, index = _largest(found, k)
    return pack(top, index, median.masked_fill(nan == shape[1] * shape[2], torch.nan), nan, inf)


def _fill_candidates(mine: Tensor, part: _Part, shape: tuple[int, ...], k: int) -> None:
    """Into ``mine [b, 2k + 3]``: this part's k largest entries, their places in the whole, counts, and "filled"."""
    if part.local.shape != part.size:
        raise ModelError(
            f"a residual stream must be spread in equal chunks, as torch.chunk does, so {part.size} here, "
            f"got {tuple(part.local.shape)}"
        )
    if part.local.numel() == 0:
        return
    statistics = activation_statistics(part.local, k)
    width = part.local.shape[2]
    token, channel = statistics.index // width + part.start[1], statistics.index % width + part.start[2]
    mine[:, :k] = statistics.top.view(torch.int32).long()
    mine[:, k : 2 * k] = torch.where(statistics.index < 0, -1, token * shape[2] + channel)
    mine[:, 2 * k], mine[:, 2 * k + 1], mine[:, 2 * k + 2] = statistics.nan, statistics.inf, 1


def _largest(found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the candidates ``[n, parts, 2k + 3]`` the k largest, of equal ones the lowest index first; ``[n, k]`` each."""
    filled = found[..., 2 * k + 2, None] > 0
    index = torch.where(filled, found[..., k : 2 * k], -1).flatten(1)
    value = found[..., :k].int().view(torch.float32).flatten(1)
    value = value.masked_fill(index < 0, torch.nan)
    order = index.argsort(dim=1)
    magnitude = value.abs().nan_to_num(nan=-1.0, posinf=torch.inf).gather(1, order)
    order = order.gather(1, magnitude.argsort(dim=1, descending=True, stable=True))[:, :k]
    return value.gather(1, order), index.gather(1, order)


def _fill_upper(counts: Tensor, local: Tensor) -> None:
    """Into ``counts [b, 65536]``: how many magnitudes have each pattern of upper 16 bits."""
    for count, sequence in zip(counts, local, strict=True):
        for bits in _bits(sequence):
            count += torch.bincount(bits >> _HALF, minlength=_BINS)


def _fill_lower(counts: Tensor, local: Tensor, upper: Tensor) -> None:
    """Into ``counts [b, 65536]``: how many of those whose upper bits are ``upper [b]`` have each lower 16 bits."""
    for count, sequence, high in zip(counts, local, upper, strict=True):
        for bits in _bits(sequence):
            count += torch.bincount(bits[bits >> _HALF == high] & (_BINS - 1), minlength=_BINS)


def _bits(sequence: Tensor) -> Iterator[Tensor]:
    """The magnitudes of ``[s, c]`` that are not NaN, in float32, as whole numbers in the same order, piece by piece."""
    for piece in sequence.split(max(1, _PIECE // max(1, sequence.shape[1]))):
        magnitude = piece.float().abs().flatten()
        yield magnitude[~magnitude.isnan()].view(torch.int32)


def _bin_of(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of ``counts [n, 65536]`` that holds the entry number ``rank [n]``, and that entry's number within it."""
    until = counts.cumsum(1)
    chosen = (until <= rank[:, None]).sum(1).clamp(max=_BINS - 1)
    before = (until - counts).gather(1, chosen[:, None])[:, 0]
    return chosen, rank - before
