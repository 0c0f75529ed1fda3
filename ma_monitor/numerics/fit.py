"""The fit of a run: Eq. 14 for every layer, the other hypotheses beside it, and what the data can and cannot say.

The objective is the paper's, so that figures compare: unweighted least squares of the ratio against the step. Fits are
always computed cold and are deterministic. Nothing raises on data: every result is a value with a status.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ma_monitor.html import table
from ma_monitor.numerics.batch import Group, fit_group
from ma_monitor.numerics.classes import TrajectoryClass, classify
from ma_monitor.numerics.curve import Curve
from ma_monitor.numerics.hypotheses import FAMILIES, HypothesisFits, aicc, fit_hypotheses
from ma_monitor.numerics.noise import PARAMETERS, effective_points, noise_variance
from ma_monitor.numerics.profile import LEVELS, Evidence, examine, f_quantile
from ma_monitor.numerics.projection import Floats, Problem
from ma_monitor.numerics.values import LARGEST, MIN_POINTS, none_if_not_finite

_NARROW = 0.5
"""An identified quantity's interval is narrower than this share of its value."""
_UNBOUNDED = 100.0
"""Bounds further out than this many windows (of time) or ranges (of the ratio) count as unbounded."""


class FitStatus(str, Enum):
    """Whether and how a trajectory was fitted, in words."""

    FITTED = "fitted"
    PARTLY = "fitted to the finite points only"
    NEGATIVE = "fitted, though some values are negative, which a ratio cannot be"
    CONSTANT = "all values are equal: there is nothing to fit"
    TOO_FEW = f"not fitted: fewer than {MIN_POINTS} different steps with a finite value"


class PeakStatus(str, Enum):
    """Where the best curve's maximum lies.

    ``past``: at or before the last measured step; ``ahead``: after it; ``not_within_schedule``: after the planned end;
    ``none``: there is none (the curve falls from the start, has a trough instead, or never turns).
    """

    PAST = "past"
    AHEAD = "ahead"
    NONE = "none"
    NOT_WITHIN_SCHEDULE = "not_within_schedule"


@dataclass(frozen=True)
class Peak:
    """The maximum of the curve, with 80 % intervals. None: unknown, or unbounded on that side.

    ``identified``: the interval of the step lies after the first measured step, is narrower than half the step, and at
    95 % it is still bounded. To turn it true the data must show the rise before the maximum and enough of the fall, or
    of the bend, after it. Where it is false, ``step`` and ``height`` are given only if their interval is bounded.
    """

    status: PeakStatus
    step: float | None
    height: float | None
    low: float | None
    high: float | None
    height_low: float | None
    height_high: float | None
    identified: bool


@dataclass(frozen=True)
class Asymptote:
    """K, the level the curve tends to, with its 80 % interval. None: unknown, or unbounded on that side.

    ``identified``: the interval is narrower than half the value, and at 95 % it is still bounded. To turn it true the
    data must show the decay towards K: a curve that still rises is explained by any K above, or by no decay at all. The
    box's edge at β = 0 is such an unbounded side; its edges in τ₀ are not, since beyond them the curve hardly changes.
    """

    value: float | None
    low: float | None
    high: float | None
    identified: bool


@dataclass(frozen=True)
class Hypothesis:
    """Another hypothesis fitted to the same points; None where a number is not defined."""

    r2: float | None
    aicc: float | None
    parameters: dict[str, float | None]


_NO_PEAK = Peak(PeakStatus.NONE, None, None, None, None, None, None, False)
_NO_ASYMPTOTE = Asymptote(None, None, None, False)


@dataclass(frozen=True)
class Fit:
    """What the measurements of one layer say.

    Attributes:
        status: Whether and how the trajectory was fitted.
        curve: Eq. 14; None where too few points are usable.
        r2: Coefficient of determination; None for a constant series.
        sse: Sum of squared residuals, in squared units of the ratio.
        aicc: Akaike's corrected criterion with the effective number of points.
        n: Points used.
        n_effective: Independent points that carry as much, by the residuals' autocorrelation from point to point.
        at_bound: The optimum sits on the edge of the box of β and τ₀: the curve degenerates (to a logarithm plus a
            line, to t·e^(-βt), …) and its single parameters mean little.
        trajectory_class: How the ratio develops.
        peak: The maximum.
        asymptote: The limit.
        hypotheses: Name → other hypothesis; the constant alone where they were not compared.
    """

    status: FitStatus
    curve: Curve | None
    r2: float | None
    sse: float | None
    aicc: float | None
    n: int
    n_effective: float | None
    at_bound: bool
    trajectory_class: TrajectoryClass
    peak: Peak
    asymptote: Asymptote
    hypotheses: dict[str, Hypothesis]

    def to_dict(self) -> dict[str, Any]:
        """The fit as JSON has it: None for whatever is unbounded, unknown or not finite."""
        curve = self.curve
        paper = None if curve is None else curve.to_paper()
        peak, asymptote = self.peak, self.asymptote
        return {
            "A": paper and paper.A,
            "log_abs_A": paper and paper.log_abs_A,
            "lambda": paper and paper.lambda_,
            "gamma": paper and paper.gamma,
            "t0": paper and paper.t0,
            "K": paper and paper.K,
            **{name: curve and none_if_not_finite(getattr(curve, name)) for name in ("beta", "tau0", "A1", "A2")},
            "r2": self.r2,
            "sse": self.sse,
            "aicc": self.aicc,
            "n": self.n,
            "n_effective": self.n_effective,
            "at_bound": self.at_bound,
            "status": self.status.value,
            "class": self.trajectory_class.value,
            "peak": {
                "step": peak.step,
                "height": peak.height,
                "low": peak.low,
                "high": peak.high,
                "height_low": peak.height_low,
                "height_high": peak.height_high,
                "identified": peak.identified,
                "status": peak.status.value,
            },
            "asymptote": {
                "value": asymptote.value,
                "low": asymptote.low,
                "high": asymptote.high,
                "identified": asymptote.identified,
            },
            "hypotheses": {
                name: {"r2": other.r2, "aicc": other.aicc, **other.parameters}
                for name, other in self.hypotheses.items()
            },
        }

    def _repr_html_(self) -> str:
        shown = ("class", "r2", "A", "lambda", "gamma", "t0", "K", "peak", "asymptote")
        document = self.to_dict()
        return table(f"Eq. 9: {self.status.value}", [{name: document[name] for name in shown}])


# At the degenerate corners of the box intermediate values overflow to infinity and are ruled out as such.
@np.errstate(all="ignore")
def fit_trajectories(
    steps: ArrayLike, values: ArrayLike, *, total_steps: float | None = None, compare: bool = True
) -> tuple[Fit, ...]:
    """Fits every layer of a run.

    Args:
        steps: Steps of the measurements, ``[T]``, finite and not negative, in any order, repeats allowed.
        values: Ratios, ``[L, T]``; points that are not finite are left out of their layer.
        total_steps: Planned number of updates, where known: a peak beyond it is ``not_within_schedule``.
        compare: Whether to fit the other hypotheses too, which takes longer than all the rest.

    Returns:
        One fit a layer, in order.

    Raises:
        ValueError: If the shapes do not match or a step is negative or not finite.
    """
    times, series = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if times.ndim != 1 or series.ndim != 2 or series.shape[1] != len(times):
        raise ValueError(f"steps must be [T] and values [L, T], got shapes {times.shape} and {series.shape}")
    if not (np.isfinite(times).all() and (times >= 0).all()):
        raise ValueError("steps must be finite and not negative")
    order = np.argsort(times, kind="stable")
    times, series = times[order], series[:, order]
    usable = np.abs(series) <= LARGEST  # False for NaN
    fits: dict[int, Fit] = {}
    patterns, pattern_of = np.unique(usable, axis=0, return_inverse=True)
    for index, pattern in enumerate(patterns):
        rows = np.flatnonzero(pattern_of.ravel() == index)
        fitted = _fit_pattern(times[pattern], series[rows][:, pattern], bool(pattern.all()), total_steps, compare)
        fits.update(zip(rows.tolist(), fitted, strict=True))
    return tuple(fits[row] for row in range(len(series)))


def _fit_pattern(t: Floats, y: Floats, whole: bool, total_steps: float | None, compare: bool) -> list[Fit]:
    """Fits layers that share their usable points ``t [n]``, ``y [L, n]``."""
    if len(np.unique(t)) < MIN_POINTS:
        return [_without_curve(FitStatus.TOO_FEW, row) for row in y]
    equal = np.ptp(y, axis=1) <= 4 * np.finfo(float).eps * np.abs(y).max(axis=1)
    fits = [_without_curve(FitStatus.CONSTANT, row) for row in y]
    moving = np.flatnonzero(~equal)
    if len(moving):
        for row, fit in zip(moving, _fit_moving(t, y[moving], whole, total_steps, compare), strict=True):
            fits[row] = fit
    return fits


def _without_curve(status: FitStatus, y: Floats) -> Fit:
    """The result for a layer with nothing to fit."""
    curve, name, asymptote = None, TrajectoryClass.UNDETERMINED, _NO_ASYMPTOTE
    if status is FitStatus.CONSTANT:
        level = float(y.mean())
        curve = Curve(0.0, 1.0, 0.0, 0.0, level)
        asymptote = Asymptote(level, level, level, True)
        name = TrajectoryClass.of_steady(level)
    sse = None if curve is None else 0.0
    return Fit(status, curve, None, sse, None, len(y), None, False, name, _NO_PEAK, asymptote, {})


def _fit_moving(t: Floats, y: Floats, whole: bool, total_steps: float | None, compare: bool) -> list[Fit]:
    """Fits layers whose values differ."""
    group = fit_group(t, y, None)
    scale = group.problem.scale
    residual = group.residual / scale[:, None]
    variance = noise_variance(group.problem, residual)
    effective = effective_points(t, residual / np.sqrt(variance))
    evidence, wide = examine(group.problem, group.optimum, effective, variance)
    others = fit_hypotheses(t, y / scale[:, None], FAMILIES if compare else ())
    sse = (residual**2).sum(axis=1)
    total = ((group.problem.y / group.problem.root) ** 2).sum(axis=1)
    criterion = aicc(sse, PARAMETERS, len(t), effective)
    judged = _Judged(t, scale, total, effective)
    constant_does = judged.criterion(others[0]) <= criterion
    change = np.where(constant_does, _trend_bound(group, effective), evidence.change)
    classes = classify(evidence, change * scale, group.problem.mean)
    fits = []
    for row in range(len(y)):
        curve = Curve(*(float(value) for value in group.parameters[:, row]))
        status = FitStatus.NEGATIVE if (y[row] < 0).any() else FitStatus.FITTED if whole else FitStatus.PARTLY
        fits.append(
            Fit(
                status=status,
                curve=curve,
                r2=none_if_not_finite(1 - sse[row] / total[row]),
                sse=none_if_not_finite(sse[row] * scale[row] ** 2),
                aicc=none_if_not_finite(criterion[row] + judged.units[row]),
                n=len(t),
                n_effective=none_if_not_finite(effective[row]),
                at_bound=bool(group.optimum.at_edge[row]),
                trajectory_class=classes[row],
                peak=_peak(curve, group, evidence, wide, row, total_steps),
                asymptote=_asymptote(curve, group, evidence, wide, row),
                hypotheses={other.name: judged.hypothesis(other, row) for other in others},
            )
        )
    return fits


@dataclass(frozen=True)
class _Judged:
    """What turns residual sums of scaled series into R² and AICc; arrays ``[L]``."""

    t: Floats
    scale: Floats
    total: Floats
    effective: Floats

    @property
    def units(self) -> Floats:
        """What AICc gains when the series goes from scaled units to its own."""
        return np.asarray(2 * self.effective * np.log(self.scale))

    def criterion(self, other: HypothesisFits) -> Floats:
        """AICc in scaled units."""
        return aicc(other.sse, other.count, len(self.t), self.effective)

    def hypothesis(self, other: HypothesisFits, row: int) -> Hypothesis:
        """One layer's fit of another hypothesis, in units of its series."""
        in_units = ("amplitude", "offset", "K")
        parameters = {
            name: none_if_not_finite(column[row] * (self.scale[row] if name in in_units else 1.0))
            for name, column in other.parameters.items()
        }
        criterion = self.criterion(other)[row] + self.units[row]
        r2 = 1 - other.sse[row] / self.total[row]
        return Hypothesis(none_if_not_finite(r2), none_if_not_finite(criterion), parameters)


def _trend_bound(group: Group, effective: Floats) -> Floats:
    """Largest change over the window that a straight or logarithmic trend may hide, ``[L]``, in scaled units.

    For series in which a constant explains all there is: the curve's own bound would follow single noisy points.
    """
    problem = group.problem
    y = problem.y / problem.root
    freedom = np.maximum(effective - 2, 1e-3)
    most = np.zeros(len(y))
    for x in (problem.s, np.log1p(problem.s / (0.01 * problem.s[-1]))):
        centred = x - x.mean()
        slope = y @ centred / (centred**2).sum()
        residual = ((y - slope[:, None] * centred) ** 2).mean(axis=1)
        error = np.sqrt(residual / freedom / (centred**2).mean() * f_quantile(LEVELS[0], freedom))
        most = np.maximum(most, (np.abs(slope) + error) * np.ptp(x))
    return most


def _bounded(value: float, centre: float, reach: float) -> float | None:
    """The value, or None where it lies so far out that it means no bound at all."""
    return none_if_not_finite(value) if abs(value - centre) <= reach else None


def _peak(curve: Curve, group: Group, likely: Evidence, wide: Evidence, row: int, total_steps: float | None) -> Peak:
    """The maximum of one layer's curve with its intervals in steps and in units of the ratio."""
    problem = group.problem
    point = curve.peak()
    if point is None or point[0] <= problem.first:
        return _NO_PEAK
    step, height = point
    status = PeakStatus.PAST if step <= problem.last else PeakStatus.AHEAD
    if total_steps is not None and step > total_steps:
        status = PeakStatus.NOT_WITHIN_SCHEDULE
    low, high = _time_bounds(problem, likely, row)
    if low is None or high is None:
        return Peak(status, None, None, low, high, None, None, False)
    mean, scale = float(problem.mean[row]), float(problem.scale[row])
    heights = [none_if_not_finite(mean + scale * float(h)) for h in likely.peak_height[:, row]]
    identified = high - low < _NARROW * step and None not in (*_time_bounds(problem, wide, row), *heights)
    return Peak(status, step, height, low, high, heights[0], heights[1], identified)


def _time_bounds(problem: Problem, evidence: Evidence, row: int) -> tuple[float | None, float | None]:
    """Bounds of the peak's step; None where the peak may be before the first step, or out of sight or absent."""
    low, high = (problem.first + float(s) * problem.last for s in evidence.peak_time[:, row])
    return (
        low if problem.first < low < math.inf else None,
        _bounded(high, problem.last, _UNBOUNDED * problem.last),
    )


def _asymptote(curve: Curve, group: Group, likely: Evidence, wide: Evidence, row: int) -> Asymptote:
    """K of one layer with its interval."""
    low, high = _level_bounds(group.problem, likely, row)
    if low is None or high is None:
        return Asymptote(None, low, high, False)
    identified = high - low < _NARROW * abs(curve.K) and None not in _level_bounds(group.problem, wide, row)
    return Asymptote(curve.K, low, high, identified)


def _level_bounds(problem: Problem, evidence: Evidence, row: int) -> tuple[float | None, float | None]:
    """Bounds of K; None where no data bound it."""
    mean, scale = float(problem.mean[row]), float(problem.scale[row])
    low, high = (_bounded(mean + scale * float(k), mean, _UNBOUNDED * scale) for k in evidence.asymptote[:, row])
    return low, high
