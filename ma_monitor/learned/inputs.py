"""What the learned correction sees of a run: numbers without units, which mean the same at every scale.

Changes are of ln ratio, from the mean of the last points seen; times are in e-folds of the learning-rate clock or in
shares of the plan. Nothing counts steps or knows how large the ratio is. Axes: ``L`` layers, ``K`` knots, ``F`` inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.members import ANCHOR, member_names, member_paths
from ma_monitor.numerics.mixture import Mixture
from ma_monitor.numerics.values import interpolate

Floats = NDArray[np.float64]

BACK = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""Times past that are looked at: where the clock showed its present time divided by each."""
RUN_BACK = (1.25, 2.0, 5.0)
"""Those whose mean over the run's layers is an input too."""
LARGEST_CHANGE = 4.0
"""Members' changes are cut off here: an e-fold more means nothing."""
LEAST_RATE = 0.01
"""A rate below this share of the highest counts as that much."""
SCALE = (0.04, 0.4)
"""The scale of a change h e-folds ahead: √(SCALE[0]² + (SCALE[1]·h)²)."""
MEMBERS = ("curve_learning_rate", "curve_step", "log_trend_learning_rate", "log_trend_step", "damped_trend")

_SCHEDULE = (
    "ahead",
    "ahead_in_steps",
    "share_of_plan",
    "share_left",
    "rate_now",
    "rate_then",
    "rate_between",
    "rate_between_by_now",
    "log_rate_drop",
    "clock_seen",
)
_SHAPE = (
    *(f"then_{back:g}" for back in BACK),
    "slope_late",
    "slope_half",
    "above_first",
    "below_highest",
    "above_lowest",
    "highest_at",
    "lowest_at",
    "last_point",
    "below_layer_before",
    "below_layer_after",
    "depth",
    "above_middle_layer",
)
_RUN = (*(f"run_then_{back:g}" for back in RUN_BACK), "run_slope_half", "run_above_first")
NAMES = (*_SCHEDULE, *MEMBERS, "mixture", "run_mixture", "run_damped_trend", "mirrored", *_SHAPE, *_RUN)
"""Names of the inputs, in order."""
_STATE = ("clock_seen", *_SHAPE[: len(BACK) + 7], *_RUN)
STATE = tuple(NAMES.index(name) for name in _STATE)
"""Places of the inputs that tell how alike two runs are, whatever is asked of them."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of every layer at every knot, and what a learned change is added to.

    Attributes:
        values: The inputs, ``[L, K, F]``.
        now: Mean ln ratio of the last points seen, ``[L]``.
        ahead: How far ahead the knots are, in e-folds, ``[K]``.
        scale: Scale of a change at the knots, ``[K]``.
        mixture: 10, 50 and 90 % quantiles of the in-run mixture's ln ratio, ``[3, L, K]``.
        seen: Share of the planned steps that has been seen.
        planned: The planned end.
    """

    values: Floats
    now: Floats
    ahead: Floats
    scale: Floats
    mixture: Floats
    seen: float
    planned: int

    @property
    def state(self) -> Floats:
        """What tells how alike two runs are, ``[L, S]``."""
        return self.values[:, 0, list(STATE)]

    @property
    def movement(self) -> Floats:
        """How far every layer has moved in ln ratio, smoothed, ``[L]``."""
        above, below = (self.values[:, 0, NAMES.index(name)] for name in ("above_lowest", "below_highest"))
        return np.asarray(above - below)


def inputs_of(mixture: Mixture, knots: Floats, end: int) -> Inputs:
    """Inputs from a run's mixture under a learning-rate clock.

    Args:
        mixture: The in-run mixture.
        knots: Steps after the last one seen, ascending, ``[K]``.
        end: The planned end.
    """
    seen, clock = np.log(mixture.values), mixture.clock
    layers, last = len(seen), float(mixture.steps[-1])
    now = seen[:, -ANCHOR:].mean(axis=1)
    times, then = clock.time(mixture.steps), clock.time(knots)
    ahead = np.log1p(then) - np.log1p(times[-1])
    bands = np.quantile(mixture.sample(knots), (0.1, 0.5, 0.9), axis=2)
    by_name: dict[str, Floats] = _schedule(mixture, knots, end) | {"ahead": ahead}
    paths = dict(zip(member_names(clock), member_paths(clock, mixture.steps, mixture.values, knots)[0], strict=True))
    for name in MEMBERS:
        by_name[name] = np.clip(paths[name] - now[:, None], -LARGEST_CHANGE, LARGEST_CHANGE)
    by_name["mixture"] = bands[1] - now[:, None]
    by_name["run_mixture"] = by_name["mixture"].mean(axis=0)
    by_name["run_damped_trend"] = by_name["damped_trend"].mean(axis=0)
    smooth = _smoothed(seen)
    back = times[-1] - np.minimum(then - times[-1], 0.95 * times[-1])
    by_name["mirrored"] = now[:, None] - interpolate(back, times, smooth)
    by_name |= {name: value[:, None] for name, value in _shape(times, seen, smooth, now).items()}
    for name in (*(f"then_{back:g}" for back in RUN_BACK), "slope_half", "above_first"):
        by_name[f"run_{name}"] = by_name[name].mean()
    values = np.stack([np.broadcast_to(by_name[name], (layers, knots.size)) for name in NAMES], axis=-1)
    scale = np.sqrt(SCALE[0] ** 2 + (SCALE[1] * ahead) ** 2)
    return Inputs(values, now, ahead, scale, bands, last / end, end)


def _schedule(mixture: Mixture, knots: Floats, end: int) -> dict[str, Floats]:
    """What the schedule says of the knots, each of one number or ``[K]``."""
    clock, last = mixture.clock, mixture.steps[-1:]
    rate = np.maximum(np.diff(clock.time(np.concatenate([last, last + 1]))), LEAST_RATE)
    rates = np.maximum(clock.time(knots + 1) - clock.time(knots), LEAST_RATE)
    between = (clock.time(knots) - clock.time(last)) / (knots - last)
    return {
        "ahead_in_steps": np.log1p(knots) - np.log1p(last),
        "share_of_plan": knots / end,
        "share_left": 1 - knots / end,
        "rate_now": rate,
        "rate_then": rates,
        "rate_between": between,
        "rate_between_by_now": between / rate,
        "log_rate_drop": np.log(rates / rate),
        "clock_seen": clock.time(last) / clock.time(np.array([float(end)])),
    }


def _shape(times: Floats, seen: Floats, smooth: Floats, now: Floats) -> dict[str, Floats]:
    """The shape of what was seen, a number a layer: ``[L]`` each."""
    logs = np.log1p(times)
    then = interpolate(np.log1p(times[-1] / np.array(BACK)), logs, smooth).T - now
    shape = {f"then_{back:g}": row for back, row in zip(BACK, then, strict=True)}
    for name, back in (("slope_late", 1.3), ("slope_half", 2.0)):
        first = min(int(np.searchsorted(times, times[-1] / back)), times.size - 3)
        x = logs[first:] - logs[first:].mean()
        power = (x**2).sum()
        shape[name] = seen[:, first:] @ x / power if power > 0 else np.zeros(len(seen))
    return shape | {
        "above_first": now - seen[:, 0],
        "below_highest": now - smooth.max(axis=1),
        "above_lowest": now - smooth.min(axis=1),
        "highest_at": logs[smooth.argmax(axis=1)] - logs[-1],
        "lowest_at": logs[smooth.argmin(axis=1)] - logs[-1],
        "last_point": seen[:, -1] - now,
        "below_layer_before": np.append(now[:1], now[:-1]) - now,
        "below_layer_after": np.append(now[1:], now[-1:]) - now,
        "depth": (np.arange(len(now)) + 1) / len(now),
        "above_middle_layer": now - np.median(now),
    }


def _smoothed(seen: Floats) -> Floats:
    """Moving average of five points, the ends repeated, ``[L, T]``."""
    padded = np.pad(seen, ((0, 0), (2, 2)), mode="edge")
    return np.asarray(sum(padded[:, i : i + seen.shape[1]] for i in range(5)) / 5)
