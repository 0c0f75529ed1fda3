"""The exact statistics of a residual stream: the k largest magnitudes and the lower median, per sequence.

The rules (design of the measurement): NaN are left out and counted; ±inf are the largest; of equal magnitudes the
lowest flat index comes first; the median is the lower middle value, as ``torch.median``. Magnitudes are compared in
float32, which holds every float16 and bfloat16 exactly.

Two back ends give the same answers: Triton's kernels on a CUDA device, and PyTorch everywhere. Both bracket the median
by a sample and then only count, and neither copies the activations.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ma_monitor.errors import ModelError

Backend = Literal["triton", "torch"]

_LOGGER = logging.getLogger("ma_monitor")
_LEFT_OUT = -1.0
"""Stands for an entry that must not be chosen: below every magnitude."""
_SAMPLE = 8192
"""Entries drawn from a sequence to bracket its median."""
_MARGIN = 4 * math.sqrt(_SAMPLE) / 2
"""Ranks of the sample from its median to either end of the bracket: four standard deviations."""
_PIECE = 2**18
"""Entries looked at at once, about: 1 MB in float32, which stays in a cache."""


@dataclass(frozen=True)
class Statistics:
    """The statistics of one residual stream, on its device.

    Attributes:
        packed: Everything in one tensor ``[n, 2k + 3]`` int64, so that one transfer reads all layers: the bits of the
            float32 ``top``, then ``index``, the bits of the float32 ``median``, ``nan``, ``inf``.
        k: How many of the largest entries.
    """

    packed: Tensor
    k: int

    @property
    def top(self) -> Tensor:
        """Signed values of the k largest magnitudes, ``[n, k]`` float32; NaN past the entries that are not NaN."""
        return self.packed[:, : self.k].int().view(torch.float32)

    @property
    def index(self) -> Tensor:
        """Their flat index ``position · d + channel``, ``[n, k]`` int64; -1 where ``top`` is NaN."""
        return self.packed[:, self.k : 2 * self.k]

    @property
    def median(self) -> Tensor:
        """Lower median of the magnitudes, ``[n]`` float32; NaN where every entry is NaN."""
        return self.packed[:, 2 * self.k].int().view(torch.float32)

    @property
    def nan(self) -> Tensor:
        """Number of NaN, ``[n]`` int64."""
        return self.packed[:, 2 * self.k + 1]

    @property
    def inf(self) -> Tensor:
        """Number of infinite entries, ``[n]`` int64."""
        return self.packed[:, 2 * self.k + 2]


def pack(top: Tensor, index: Tensor, median: Tensor, nan: Tensor, inf: Tensor) -> Statistics:
    """The statistics whose parts these are, in the shapes and types that ``Statistics`` gives them."""
    counts = [median.view(torch.int32).long(), nan, inf]
    return Statistics(torch.cat([top.view(torch.int32).long(), index, torch.stack(counts, dim=1)], dim=1), top.shape[1])


def activation_statistics(hidden: Tensor, k: int, *, backend: Backend | None = None) -> Statistics:
    """Exact top-k and median of abs(h), per sequence.

    The result stays on the device of ``hidden``. With Triton nothing waits for the device: reading the result is the
    caller's one synchronisation for all layers.

    Args:
        hidden: Residual stream ``[n, S, d]``, any floating type.
        k: How many of the largest entries.
        backend: For tests; None takes Triton's kernels where they can read ``hidden``, else PyTorch.

    Raises:
        ModelError: If ``hidden`` is not a floating tensor of three axes.
    """
    if hidden.ndim != 3 or not hidden.is_floating_point():
        raise ModelError(
            "a residual stream must be a floating tensor [sequence, token, channel], "
            f"got {hidden.dtype} of shape {tuple(hidden.shape)}"
        )
    hidden = hidden.detach()
    if backend != "torch" and (backend == "triton" or (hidden.is_cuda and _has_triton())):
        from ma_monitor.measure import kernels

        if kernels.supports(hidden):
            return Statistics(kernels.packed_statistics(hidden, k), k)
    rows = [_of_sequence(sequence, k) for sequence in hidden]
    return pack(*(torch.stack(column) for column in zip(*rows, strict=True)))


@functools.cache
def _has_triton() -> bool:
    """Whether Triton's kernels can be built and run here, tried once: that takes a compiler, a cache folder, a GPU."""
    try:
        from ma_monitor.measure import kernels

        for dtype in kernels.DTYPES:
            kernels.packed_statistics(torch.zeros(1, 1, 2, dtype=dtype, device="cuda"), 1)
        torch.cuda.synchronize()
    except Exception as error:
        _LOGGER.warning("ma_monitor: Triton's kernels cannot be used here, PyTorch's slower ones are: %s", error)
        return False
    return True


def _of_sequence(sequence: Tensor, k: int) -> tuple[Tensor, ...]:
    """``top [k]``, ``index [k]``, ``median``, ``nan`` and ``inf`` of one sequence ``[S, d]``."""
    per_token, nan = [], torch.zeros((), dtype=torch.long, device=sequence.device)
    for magnitude in _pieces(sequence):
        largest = magnitude.amax(dim=1)
        if largest.isnan().any():
            missing = magnitude.isnan()
            nan += missing.sum()
            largest = magnitude.masked_fill_(missing, _LEFT_OUT).amax(dim=1)
        per_token.append(largest)
    highest = torch.cat(per_token)
    top, index = _largest(sequence, highest, k)
    inf = torch.zeros_like(nan)
    if top[0].isinf():
        inf += sum(magnitude.eq(torch.inf).sum() for magnitude in _pieces(sequence))
    return top, index, _median(sequence, sequence.numel() - int(nan)), nan, inf


def _pieces(sequence: Tensor) -> Iterator[Tensor]:
    """The magnitudes of ``[S, d]`` in float32, some whole tokens at a time, ``[s, d]``.

    All in one buffer: a piece is gone once the next is taken, and may be written to until then.
    """
    tokens, width = sequence.shape
    step = max(1, _PIECE // max(width, 1))
    buffer = torch.empty(min(step, tokens), width, dtype=torch.float32, device=sequence.device)
    for start in range(0, tokens, step):
        piece = sequence[start : start + step]
        yield torch.abs(piece.float(), out=buffer[: len(piece)])


def _largest(sequence: Tensor, highest: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``[S, d]`` and their flat indices, given each token's largest magnitude, which is used up.

    Touches one token a rank. ``max`` promises the first of several equal entries (``topk`` promises nothing), so the
    first token and its first channel is the lowest flat index.
    """
    width = sequence.shape[1]
    taken: dict[int, list[int]] = {}
    top = torch.full((k,), torch.nan, device=sequence.device)
    index = torch.full((k,), -1, device=sequence.device)
    for rank in range(min(k, sequence.numel())):
        value, token = highest.max(dim=0)
        if value < 0:
            break
        row = int(token)
        magnitude = sequence[row].float().abs().nan_to_num_(nan=_LEFT_OUT, posinf=torch.inf)
        magnitude[taken.setdefault(row, [])] = _LEFT_OUT
        channel = int(magnitude.argmax())
        taken[row].append(channel)
        top[rank], index[rank] = sequence[row, channel], row * width + channel
        magnitude[channel] = _LEFT_OUT
        highest[row] = magnitude.max()
    return top, index


def _median(sequence: Tensor, known: int) -> Tensor:
    """Lower median of the magnitudes of ``[S, d]``, of which ``known`` are not NaN."""
    if known == 0:
        return torch.full((), torch.nan, device=sequence.device)
    rank = (known - 1) // 2
    margin = _MARGIN
    while True:
        lo, hi = _bracket(sequence, margin)
        up_to_lo, between = 0, []
        for magnitude in _pieces(sequence):
            between.append(_between(magnitude, lo, hi))
            up_to_lo += _number_at_most(magnitude, lo)
        inside = torch.cat(between)
        if up_to_lo <= rank < up_to_lo + len(inside):
            return inside.kthvalue(rank - up_to_lo + 1).values
        # Many equal values, or the sample misled; in the end the bracket holds everything.
        if up_to_lo - sum(int(m.eq(lo).sum()) for m in _pieces(sequence)) <= rank < up_to_lo:
            return sequence.new_tensor(lo, dtype=torch.float32)
        if up_to_lo <= rank < sum(_number_at_most(m, hi) for m in _pieces(sequence)):
            return sequence.new_tensor(hi, dtype=torch.float32)
        margin *= 4


def _number_at_most(magnitude: Tensor, value: float) -> int:
    """How many entries of a piece are at most ``value``; the piece is used up.

    As a sum of ones and zeros in float32, several times faster than in bool, and exact below 2²⁴.
    """
    return int(torch.le(magnitude, value, out=magnitude).sum())


def _between(magnitude: Tensor, lo: float, hi: float) -> Tensor:
    """The entries of a piece strictly between two values."""
    if magnitude.is_cpu:  # where numpy compares and selects several times faster
        values = magnitude.numpy().ravel()
        return torch.from_numpy(np.compress((values > lo) & (values < hi), values))
    return magnitude[(magnitude > lo) & (magnitude < hi)]


def _bracket(sequence: Tensor, margin: float) -> tuple[float, float]:
    """Two values that the median of the magnitudes lies between, but for one case in 10⁴ at the usual margin."""
    drawn = torch.take(sequence, _places(sequence.numel()).to(sequence.device)).float().abs().cpu().numpy()
    drawn = drawn[~np.isnan(drawn)]
    middle = (len(drawn) - 1) // 2
    if sequence.numel() <= _SAMPLE and margin == _MARGIN:
        margin = 0  # what is drawn is everything
    low, high = int(middle - margin), int(middle + margin)
    if low < 0 or high >= len(drawn):
        return _LEFT_OUT, math.inf
    ordered = np.partition(drawn, (low, high))
    return float(ordered[low]), float(ordered[high])


@functools.lru_cache(maxsize=4)
def _places(size: int) -> Tensor:
    """Where the sample of so many entries is drawn: at a random place of each of as many stretches.

    An even step would fall on few channels.
    """
    if size <= _SAMPLE:
        return torch.arange(size)
    draw = torch.arange(_SAMPLE)
    return draw * size // _SAMPLE + draw * 2654435761 % 2**32 * (size // _SAMPLE) // 2**32
