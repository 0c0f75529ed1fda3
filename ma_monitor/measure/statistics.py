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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ma_monitor.errors import ModelError

Backend = Literal["triton", "torch"]
_Array = np.ndarray[Any, Any]

_LOGGER = logging.getLogger("ma_monitor")
_LEFT_OUT = -1.0
"""Stands for an entry that must not be chosen: below every magnitude."""
_SAMPLE = 8192
"""Entries drawn from a sequence to bracket its median."""
_MARGIN = 3 * math.sqrt(_SAMPLE) / 2
"""Ranks of the sample from its median to either end of the bracket: three standard deviations."""
_PIECE = {True: 2**17, False: 2**18}
"""Entries looked at at once, about, on a CPU (they stay in a cache) and elsewhere (every piece costs launches)."""


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
    if backend != "torch" and (backend == "triton" or (hidden.is_cuda and _has_triton(hidden.device))):
        from ma_monitor.measure import launch

        if launch.supports(hidden):
            return Statistics(launch.packed_statistics(hidden, k), k)
    rows = np.empty((len(hidden), 2 * k + 3), np.int64)
    for row, sequence in zip(rows, hidden, strict=True):
        _fill(row, sequence, k)
    return Statistics(torch.from_numpy(rows).to(hidden.device), k)


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels can be built and run there, tried once: that takes a compiler, a cache folder, a GPU."""
    try:
        from ma_monitor.measure import launch

        for dtype in launch.DTYPES:
            launch.packed_statistics(torch.zeros(1, 1, 2, dtype=dtype, device=device), 1)
        torch.cuda.synchronize(device)
    except Exception as error:
        _LOGGER.warning("ma_monitor: Triton's kernels cannot be used here, PyTorch's slower ones are: %s", error)
        return False
    return True


def _fill(row: _Array, sequence: Tensor, k: int) -> None:
    """Writes the statistics of one sequence ``[S, d]``, read once, as ``Statistics`` packs them."""
    per_token, counts, nan, inf = [], [], 0, 0
    bracket = _bracket(sequence, _MARGIN)
    for magnitude in _pieces(sequence):
        counts.append(_counted(magnitude, *bracket))
        per_token.append(_host(magnitude.max(1) if isinstance(magnitude, np.ndarray) else magnitude.amax(1)))
    highest = np.concatenate(per_token)
    if not np.isfinite(highest).all():  # NaN spreads in a maximum
        per_token = []
        for piece in _pieces(sequence):
            values = _host(piece)
            missing = np.isnan(values)
            nan += int(missing.sum())
            inf += int(np.isinf(values).sum())
            per_token.append(np.where(missing, _LEFT_OUT, values).max(axis=1))
        highest = np.concatenate(per_token)
    top, row[k : 2 * k] = _largest(sequence, highest, k)
    median = np.array(_median(sequence, sequence.numel() - nan, bracket, counts), np.float32)
    row[:k], row[2 * k :] = top.view(np.int32), (median.view(np.int32), nan, inf)


def _pieces(sequence: Tensor) -> Iterator[Any]:
    """The magnitudes of ``[S, d]`` in float32, some whole tokens at a time, ``[s, d]``.

    Of a tensor on the CPU as numpy's, whose loops are as fast, several times faster where they compare and select, and
    keep to one thread; all in one buffer, so that a piece is gone once the next is taken.
    """
    tokens, width = sequence.shape
    step = max(1, _PIECE[sequence.is_cpu] // max(width, 1))
    buffer = np.empty((min(step, tokens), width), np.float32)
    for start in range(0, tokens, step):
        piece = sequence[start : start + step]
        if not piece.is_cpu:
            yield piece.float().abs()
        elif piece.dtype == torch.bfloat16:  # the upper half of a float32
            bits = buffer[: len(piece)].view(np.uint32)
            np.left_shift(piece.view(torch.int16).numpy(), 16, out=bits, dtype=np.uint32, casting="unsafe")
            yield np.abs(buffer[: len(piece)], out=buffer[: len(piece)])
        else:
            yield np.abs(piece.numpy(), out=buffer[: len(piece)], casting="same_kind")


def _host(values: Any) -> _Array:
    return values if isinstance(values, np.ndarray) else np.asarray(values.cpu())


def _largest(sequence: Tensor, highest: _Array, k: int) -> tuple[_Array, _Array]:
    """The k largest of ``[S, d]`` and their flat indices, given each token's largest magnitude, which is used up.

    Touches one token a rank. ``argmax`` promises the first of several equal entries (``topk`` promises nothing), so the
    first token and its first channel is the lowest flat index.
    """
    width = sequence.shape[1]
    taken: dict[int, list[int]] = {}
    top, index = np.full(k, np.nan, np.float32), np.full(k, -1)
    for rank in range(min(k, sequence.numel())):
        row = int(highest.argmax())
        if highest[row] < 0:
            break
        values = sequence[row].float().cpu().numpy()
        magnitude = np.where(np.isnan(values), _LEFT_OUT, np.abs(values))
        magnitude[taken.setdefault(row, [])] = _LEFT_OUT
        channel = int(magnitude.argmax())
        taken[row].append(channel)
        top[rank], index[rank] = values[channel], row * width + channel
        magnitude[channel] = _LEFT_OUT
        highest[row] = magnitude.max()
    return top, index


def _median(sequence: Tensor, known: int, bracket: tuple[float, float], counts: list[tuple[int, _Array]]) -> float:
    """Lower median of the magnitudes of ``[S, d]``, of which ``known`` are not NaN, given the counts of each piece."""
    if known == 0:
        return math.nan
    rank = (known - 1) // 2
    margin = _MARGIN
    while True:
        lo, hi = bracket
        up_to_lo = sum(count for count, _ in counts)
        between = np.concatenate([inside for _, inside in counts])
        if up_to_lo <= rank < up_to_lo + len(between):
            return float(np.partition(between, rank - up_to_lo)[rank - up_to_lo])
        # Many equal values, or the sample misled; in the end the bracket holds everything.
        if up_to_lo - sum(int((m == lo).sum()) for m in _pieces(sequence)) <= rank < up_to_lo:
            return lo
        if up_to_lo <= rank < sum(int((m <= hi).sum()) for m in _pieces(sequence)):
            return hi
        margin *= 4
        bracket = _bracket(sequence, margin)
        counts = [_counted(magnitude, *bracket) for magnitude in _pieces(sequence)]


def _counted(magnitude: Any, lo: float, hi: float) -> tuple[int, _Array]:
    """How many entries of a piece are at most ``lo``, and those strictly between ``lo`` and ``hi``, on the host."""
    at_most_lo = magnitude <= lo
    inside = (magnitude < hi) > at_most_lo
    if isinstance(magnitude, np.ndarray):
        return int(np.count_nonzero(at_most_lo)), np.compress(inside.ravel(), magnitude.ravel())
    return int(at_most_lo.sum()), _host(magnitude[inside])


def _bracket(sequence: Tensor, margin: float) -> tuple[float, float]:
    """Two values that the median of the magnitudes lies between, but for one case in 400 at the usual margin."""
    drawn = torch.take(sequence, _places(sequence.numel()).to(sequence.device)).float().abs().cpu().numpy()
    if np.isnan(drawn).any():
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
        return torch.arange(size, device="cpu")
    draw = torch.arange(_SAMPLE, device="cpu")
    return draw * size // _SAMPLE + draw * 2654435761 % 2**32 * (size // _SAMPLE) // 2**32
