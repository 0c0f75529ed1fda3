"""Clocks: what the curve's time is. Arrays in, arrays out.

``step`` counts updates. ``learning_rate`` weighs each with its planned rate, C(S) = Σ_{s<S} lr[s] / max lr, so that one
unit is one update at the peak rate. Both are 0 at step 0 and never run backwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Name = Literal["step", "learning_rate"]


@dataclass(frozen=True, eq=False)
class Clock:
    """A map between steps and time, piecewise linear between whole steps.

    Attributes:
        name: ``step`` or ``learning_rate``.
        ticks: Time at steps 0 … N, ``[N + 1]``, not decreasing.
        rate: Time per step after step N: the last planned rate is held (0 where the schedule ends at rate 0, and then
            time stands still).
    """

    name: Name
    ticks: NDArray[np.float64]
    rate: float

    def time(self, steps: ArrayLike) -> NDArray[np.float64]:
        """Time at steps ≥ 0 of any shape."""
        at = np.asarray(steps, dtype=np.float64)
        last = self.ticks.size - 1
        below = np.clip(at, 0, last).astype(np.int64)  # not np.interp: it would list every planned step each time
        tick = self.ticks[below]
        inside = tick + (self.ticks[np.minimum(below + 1, last)] - tick) * np.clip(at - below, 0.0, 1.0)
        return inside + np.maximum(at - last, 0.0) * self.rate

    def step(self, times: ArrayLike) -> NDArray[np.float64]:
        """First step at which the clock shows each time; NaN where it never does (not within the schedule).

        Args:
            times: Times of any shape. Negative ones and NaN give NaN.
        """
        wanted = np.asarray(times, dtype=np.float64)
        last = self.ticks.size - 1
        upper = np.clip(np.searchsorted(self.ticks, wanted, side="left"), 1, max(1, last))
        lower = self.ticks[upper - 1]
        width = self.ticks[np.minimum(upper, last)] - lower
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inside = upper - 1 + np.where(wanted > lower, (wanted - lower) / width, 0.0)
            after = last + (wanted - self.ticks[-1]) / self.rate
        found = np.where(wanted <= self.ticks[-1], inside, after)
        return np.where((wanted >= 0) & np.isfinite(found), found, np.nan)


def step_clock() -> Clock:
    """The clock that counts updates."""
    return Clock("step", np.zeros(1), 1.0)


def learning_rate_clock(lr: ArrayLike) -> Clock:
    """The clock of a planned schedule.

    Args:
        lr: Rate of the update from s to s + 1 for s = 0 … planned end, ``[N + 1]``, finite, ≥ 0 and not all 0.

    Raises:
        ValueError: If ``lr`` is something else.
    """
    rates = np.asarray(lr, dtype=np.float64)
    if rates.ndim != 1 or not (np.isfinite(rates).all() and (rates >= 0).all() and (rates > 0).any()):
        raise ValueError(
            f"rates must be one finite list, not negative and not all 0, got shape {rates.shape}; check the schedule"
        )
    relative = rates / rates.max()
    ticks = np.concatenate([[0.0], np.cumsum(relative[:-1])])
    return Clock("learning_rate", ticks, float(relative[-1]))
