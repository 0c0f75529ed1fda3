"""Peaks and crossings: events on the whole trajectory, measured past and sampled future. All in ln ratio."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SMOOTH = 7
"""Points of the moving average of the past among which a peak is looked for."""
RIVALS = 64
"""At most so many past points are drawn from for the place of a past maximum."""
MARGIN = 3.0
"""Past points lower than the highest by more standard errors of the difference were not the maximum."""
CLEAR = 12.0
"""An identified past maximum is so many above the first and the last point: of lower ones noise makes the place."""


@dataclass(frozen=True)
class Peak:
    """Where the whole trajectory, past and future, is largest.

    Attributes:
        step: Median over sampled paths; None where more than half of them are largest at the scheduled end.
        height: Median ratio there; None with the step.
        low: 10 % quantile of the step; None where that lies at the scheduled end.
        high: 90 % quantile of the step; None likewise.
        identified: Whether both ends of that interval lie before the scheduled end, it is narrower than half of the
            step, and a past maximum stands far above the noise, seen from the first point and from the last. More
            points around and after the maximum, or a clear bend before it, turn this true.
        probability: That the maximum comes before the scheduled end, with a fall of more than noise after it.
        status: ``past``, ``ahead``, ``not_within_schedule`` (largest at the scheduled end), or ``none`` (it never
            rose above its first points by more than noise).
    """

    step: float | None
    height: float | None
    low: float | None
    high: float | None
    identified: bool
    probability: float
    status: str


@dataclass(frozen=True)
class Crossing:
    """First time at or above a threshold, until the scheduled end (80 % interval of the step, if it happens)."""

    probability: float
    step: float | None
    low: float | None
    high: float | None


def find_peak(steps: Floats, past: Floats, noise: float, nodes: Floats, ahead: Floats) -> Peak:
    """The maximum over the smoothed past ``[T]`` and every sampled future ``[nodes, P]``; all in ln ratio.

    Where the past was highest is uncertain too: every point that may have been the highest, but for noise, counts as
    often as drawn noise makes it so. Noise of neighbours is alike in real runs, so that their mean is taken to be no
    better known than each of them.
    """
    error = np.sqrt(2) * noise  # standard error of a difference: smoothing is not counted on to lower it
    before = int(past.argmax())
    rivals = np.flatnonzero(past >= past[before] - MARGIN * error)
    rivals = rivals[np.unique(np.linspace(0, rivals.size - 1, RIVALS).astype(int))]
    drawn = past[rivals, None] + noise * _noise_draws(rivals.size, ahead.shape[1])
    place = rivals[drawn.argmax(axis=0)]
    highest = ahead.max(axis=0)
    later = highest > past[before]
    halves = np.concatenate(
        [steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]]
    )  # a point stands for the steps nearby
    first, step, last = (
        np.where(later, nodes[ahead.argmax(axis=0)], own) for own in (halves[place], steps[place], halves[place + 1])
    )
    end = float(nodes[-1])
    low, middle, high = (float(_higher(places, q)) for places, q in ((first, 0.1), (step, 0.5), (last, 0.9)))
    fallen = np.maximum(highest, past[before]) - ahead[-1] > MARGIN * error
    probability = float(((step < end) & fallen).mean())
    if middle >= end:
        return Peak(None, None, low if low < end else None, None, False, probability, "not_within_schedule")
    rose, fell = (past[before] - past[0]) / error, (past[before] - past[-1]) / error
    status = "ahead" if middle > steps[-1] else "past" if rose > MARGIN else "none"
    if status == "none":
        return Peak(None, None, None, None, False, probability, status)
    height = float(np.exp(np.quantile(np.maximum(highest, past[before])[step < end], 0.5)))
    clear = status == "ahead" or min(rose, fell) > CLEAR
    identified = bool(high < end and high - low < middle / 2 and clear)
    return Peak(middle, height, low, high if high < end else None, identified, probability, status)


@cache
def _noise_draws(points: int, paths: int) -> Floats:
    """Standard normal noise of every point on every path, ``[points, paths]``: the same numbers always."""
    return np.random.default_rng(1).standard_normal((points, paths))


def smoothed(log_values: Floats) -> Floats:
    """Centred moving average of ``SMOOTH`` points, of fewer at both ends, ``[L, T]``."""
    total = np.cumsum(np.pad(log_values, ((0, 0), (1, 0))), axis=1)
    at, reach = np.arange(log_values.shape[1]), _reach(log_values.shape[1])
    return np.asarray((total[:, at + reach + 1] - total[:, at - reach]) / (2 * reach + 1))


def _reach(points: int) -> NDArray[np.int64]:
    """How many neighbours on either side the moving average takes, ``[T]``."""
    at = np.arange(points)
    return np.asarray(np.minimum(np.minimum(at, at[::-1]), SMOOTH // 2))


def first_crossing(steps: Floats, seen: Floats, nodes: Floats, ahead: Floats, threshold: float) -> Crossing:
    """First crossing of a threshold in the ratios seen ``[T]``, else in sampled futures ``[nodes, P]`` of ln ratio."""
    above = seen >= threshold
    if above.any():
        step = float(steps[above.argmax()])
        return Crossing(1.0, step, step, step)
    hit = ahead >= np.log(threshold)
    reached = hit.any(axis=0)
    if not reached.any():
        return Crossing(0.0, None, None, None)
    first = nodes[hit[:, reached].argmax(axis=0)]
    low, middle, high = (float(_higher(first, q)) for q in (0.1, 0.5, 0.9))
    return Crossing(float(reached.mean()), middle, low, high)


def _higher(values: Floats, share: float) -> np.float64:
    """The quantile ``np.quantile(values, share, method="higher")``, sooner."""
    return np.float64(np.sort(values)[int(np.ceil(share * (values.size - 1)))])
