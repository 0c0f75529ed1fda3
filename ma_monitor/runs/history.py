"""The measurements of a run as stacked arrays that grow cheaply, and the ratios of Eq. 6 to 8 on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.runs.codec import FIELDS
from ma_monitor.runs.records import Measurements, Ratio, Readings


@dataclass(frozen=True)
class Stack:
    """All measurements of a run, in step order. The arrays are views that cannot be written to.

    Attributes:
        steps: ``[T]``.
        top: Signed values, ``[T, R, n, k]``; likewise ``position``, ``token`` and ``channel``.
        median: ``[T, R, n]``; likewise the counts ``nan`` and ``inf``.
    """

    steps: NDArray[np.int64]
    top: NDArray[np.float64]
    position: NDArray[np.int32]
    token: NDArray[np.int32]
    channel: NDArray[np.int32]
    median: NDArray[np.float64]
    nan: NDArray[np.int64]
    inf: NDArray[np.int64]

    def at(self, index: int) -> Measurements:
        """The measurements of one step."""
        return Measurements(int(self.steps[index]), **{name: getattr(self, name)[index] for name in FIELDS})

    def take(self, rows: Any) -> Stack:
        """These rows of every array: a view for a slice, else a copy."""
        return Stack(*(getattr(self, field.name)[rows] for field in fields(self)))


def sequence_ratio(top: NDArray[np.float64], median: NDArray[np.float64], ratio: Ratio) -> NDArray[np.float64]:
    """Reduces the sequences of a probe to one ratio (paper, Eq. 8 or Eq. 6 and 7).

    ``ratio_of_means`` divides the mean of abs(top) by the mean of the medians; ``mean_of_ratios`` takes the mean of
    abs(top)/median. A sequence whose top or median is NaN (it had no numbers) or whose median is infinite says
    nothing and is left out of both means; one whose median is 0 has no ratio, so ``mean_of_ratios`` leaves it out too,
    while it counts in the means of ``ratio_of_means``. An infinite top gives an infinite ratio.

    Args:
        top: Values of one rank, sign ignored, ``[..., n]``.
        median: ``[..., n]``.
        ratio: Which of the two.

    Returns:
        ``[...]``; NaN where no sequence is left or the mean median is 0.
    """
    magnitude = np.abs(top)
    usable = ~np.isnan(magnitude) & np.isfinite(median)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if ratio == "mean_of_ratios":
            usable &= median > 0
            each = np.where(usable, magnitude / median, 0.0)
            return np.asarray(each.sum(axis=-1) / usable.sum(axis=-1))
        below = np.where(usable, median, 0.0).sum(axis=-1)
        above = np.where(usable, magnitude, 0.0).sum(axis=-1)
        return np.where(below > 0, above / below, np.nan)


class History:
    """Measurements in step order, one for each step.

    Adding a later step than all before is O(1) amortised. Rows once shown are never written to again, so a `Stack`
    stays what it was when it was taken; what is out of order or superseded is rebuilt in new arrays.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        """Starts empty; ``besides`` holds, by step, what was read besides the measurements.

        Args:
            shape: ``(R, n, k)`` of every measurement.
        """
        self._buffers = _empty(shape, 0)
        self._count = 0
        self._ratios: dict[tuple[int, Ratio], NDArray[np.float64]] = {}
        self.besides: dict[int, Mapping[str, NDArray[np.float64]]] = {}

    def stack(self) -> Stack:
        """All measurements."""
        stack = self._buffers.take(slice(0, self._count))
        for field in fields(stack):
            getattr(stack, field.name).flags.writeable = False
        return stack

    def measurements(self) -> list[Measurements]:
        """All measurements, with what was read besides them."""
        stack = self.stack()
        each = map(stack.at, range(len(stack.steps)))
        return [replace(m, phenomena=self.besides.get(m.step, {})) for m in each]

    def readings(self) -> dict[str, Readings]:
        """What was read besides, by name. Of several widths in one run (another model's heads) the last one's count."""
        found: dict[str, dict[int, NDArray[np.float64]]] = {}
        for step in self.stack().steps.tolist():
            for name, values in self.besides.get(step, {}).items():
                found.setdefault(name, {})[step] = values
        alike = {
            name: {step: one for step, one in each.items() if one.shape == next(reversed(each.values())).shape}
            for name, each in found.items()
        }
        return {
            name: Readings(np.array(list(each), dtype=np.int64), np.stack(list(each.values())))
            for name, each in sorted(alike.items())
        }

    def load(self, measurements: Iterable[Measurements]) -> None:
        """Takes many measurements, whose steps rise and come after all before, at once."""
        for m in measurements:
            self._put(m)

    def add(self, m: Measurements) -> None:
        """Takes one more measurement; one of the same step is superseded."""
        if self._count and m.step <= self._buffers.steps[self._count - 1]:
            held = self.stack()
            before, after = held.take(held.steps < m.step), held.take(held.steps > m.step)
            besides = self.besides
            self._restart(before)
            self._put(m)
            self.load(
                replace(later, phenomena=besides.get(later.step, {}))
                for later in map(after.at, range(len(after.steps)))
            )
        else:
            self._put(m)

    def rewind(self, step: int) -> int:
        """Drops what was measured after this step, and says how many steps that were."""
        held = self.stack()
        kept = held.take(held.steps <= step)
        dropped = self._count - len(kept.steps)
        if dropped:
            self._restart(kept)
        return dropped

    def ratios(self, rank: int, ratio: Ratio) -> NDArray[np.float64]:
        """The ratio of every layer row and step, ``[R, T]``; only what is new since the last call is computed."""
        known = self._ratios.get((rank, ratio))
        start = 0 if known is None else known.shape[1]
        if known is None or start < self._count:
            new = self._buffers.take(slice(start, self._count))
            tail = sequence_ratio(new.top[..., rank - 1], new.median, ratio).T
            known = np.ascontiguousarray(tail) if known is None else np.concatenate([known, tail], axis=1)
            known.flags.writeable = False
            self._ratios[rank, ratio] = known
        return known

    def _restart(self, kept: Stack) -> None:
        held = set(kept.steps.tolist())
        self.besides = {step: values for step, values in self.besides.items() if step in held}
        self._buffers = kept
        self._count = len(kept.steps)
        self._ratios.clear()

    def _put(self, m: Measurements) -> None:
        if self._count == len(self._buffers.steps):
            larger = _empty(self._buffers.top.shape[1:], max(16, 2 * self._count))
            for field in fields(larger):
                getattr(larger, field.name)[: self._count] = getattr(self._buffers, field.name)[: self._count]
            self._buffers = larger
        self._buffers.steps[self._count] = m.step
        for name in FIELDS:
            getattr(self._buffers, name)[self._count] = getattr(m, name)
        if m.phenomena:
            self.besides[m.step] = m.phenomena
        self._count += 1


def _empty(shape: tuple[int, ...], rows: int) -> Stack:
    arrays = {name: np.empty((rows, *(shape if wide else shape[:2])), kind) for name, (kind, wide) in FIELDS.items()}
    return Stack(steps=np.empty(rows, np.int64), **arrays)
