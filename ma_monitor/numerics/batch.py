"""Eq. 14 fitted to many series at once by globally optimal least squares: the curves alone.

Where asked, by Huber's loss, which outlying points pull on with a bounded force (P. J. Huber, Robust estimation of a
location parameter, Annals of Mathematical Statistics 35, 1964).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ma_monitor.numerics.curve import evaluate
from ma_monitor.numerics.projection import Floats, Problem, make_problem
from ma_monitor.numerics.search import Optimum, solve
from ma_monitor.numerics.values import LARGEST, MIN_POINTS

Loss = Literal["squares", "huber"]
HUBER_ITERATIONS = 10
"""Weighted fits after the first: where a few points are ten times too high, ten more of them move a curve by less than
a hundredth of its noise."""
_HUBER_BEND = 1.345
"""Where Huber's loss turns from squares to absolute values, in standard deviations: it then loses 5 % of the efficiency
of least squares on Gaussian noise."""
_MEDIAN_TO_DEVIATION = 1.4826
"""Standard deviation of Gaussian noise over its median absolute value."""
_HUBER_NOISE = 1e-12
"""Least standard deviation, as a share of the series' largest deviation: more than half of the residuals may vanish."""


@dataclass(frozen=True)
class CurveFits:
    """The best curve of each of ``L`` series; arrays ``[L]``, NaN where a series has too few usable points.

    Attributes:
        beta: β of Eq. 14, per unit of time.
        tau0: τ₀, in units of time.
        A1: A₁, in units of the series.
        A2: A₂, in units of the series.
        K: K, in units of the series.
        sse: Sum of squared residuals of the curve as it evaluates in floats, with the weights given, whatever the loss.
        at_bound: Whether β or τ₀ sits on the edge of the box.
    """

    beta: Floats
    tau0: Floats
    A1: Floats
    A2: Floats
    K: Floats
    sse: Floats
    at_bound: NDArray[np.bool_]

    def evaluate(self, t: ArrayLike) -> Floats:
        """All curves at the times ``t [M]``: ``[L, M]``."""
        columns = (self.beta, self.tau0, self.A1, self.A2, self.K)
        return evaluate(np.asarray(t, dtype=np.float64), *(column[:, None] for column in columns))


def fit_curves(t: ArrayLike, y: ArrayLike, *, weights: ArrayLike | None = None, loss: Loss = "squares") -> CurveFits:
    """Fits Eq. 14 to every series by globally optimal least squares, or by Huber's loss.

    ``huber`` minimises Σ w·ρ(r/σ) with ρ(x) = x²/2 up to 1.345 and linear from there (Huber 1964), σ being 1.4826 times
    the weighted median absolute residual. It repeats the weighted fit with w·min(1, 1.345·σ/abs(r)), each time from the
    residuals before; each of the fits is globally optimal, their limit need not be.

    Args:
        t: Times ``[T]``, finite, not negative, ascending (equal neighbours allowed); steps, or another clock.
        y: Series ``[L, T]``; points that are not finite, or beyond ±1e100, are left out of their series.
        weights: Weights of the squared residuals, ``[T]`` or ``[L, T]``; a weight of 0 leaves a point out.
            Those of Huber's loss multiply them.
        loss: ``squares``, or ``huber`` for series with outlying points.

    Raises:
        ValueError: If the shapes do not match, times or weights break the rules above, or the loss is another one.
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss must be one of {get_args(Loss)}, got {loss!r}")
    fit = fit_group if loss == "squares" else fit_group_huber
    times, series, weight = _checked(t, y, weights)
    out = np.full((6, len(series)), np.nan)
    at_bound = np.zeros(len(series), dtype=bool)
    usable = np.abs(series) <= LARGEST  # False for NaN
    if weight is not None:
        usable &= weight > 0
    patterns, pattern_of = np.unique(usable, axis=0, return_inverse=True)
    for index, pattern in enumerate(patterns):
        if len(np.unique(times[pattern])) < MIN_POINTS:
            continue
        rows = np.flatnonzero(pattern_of.ravel() == index)
        cut = None if weight is None else weight[rows][:, pattern]
        group = fit(times[pattern], series[rows][:, pattern], cut)
        out[:5, rows], at_bound[rows] = group.parameters, group.optimum.at_edge
        out[5, rows] = (group.residual**2 * (1.0 if cut is None else cut)).sum(axis=1)
    beta, tau0, a1, a2, k, sse = out
    return CurveFits(beta, tau0, a1, a2, k, sse, at_bound)


@dataclass(frozen=True)
class Group:
    """Series that share their times, fitted.

    Attributes:
        problem: The scaled problem.
        optimum: Its solution.
        parameters: β, τ₀, A₁, A₂, K, ``[5, L]``.
        residual: Series minus curve as it evaluates in floats, ``[L, n]``.
    """

    problem: Problem
    optimum: Optimum
    parameters: Floats
    residual: Floats


# At the degenerate corners of the box intermediate values overflow to infinity and are ruled out as such.
@np.errstate(all="ignore")
def fit_group(t: Floats, y: Floats, weights: Floats | None) -> Group:
    """Fits series ``y [L, n]``, all finite, at times ``t [n]`` with at least ``MIN_POINTS`` different ones."""
    problem = make_problem(t, y, weights)
    best = solve(problem)
    beta, tau0 = best.b / problem.last, best.c * problem.last - problem.first
    growth = problem.scale * np.exp(beta * problem.first)
    _, first, second = best.coefficients.T
    a1 = second * growth
    a2 = -(first + second * np.log(best.c * problem.last)) * growth
    # A2 and K nearly cancel as b goes to 0 and are then far larger than the series: K is fitted last, to what is left.
    near = np.where(best.b < 1, -a2, 0.0)
    shape = evaluate(t, *(column[:, None] for column in (beta, tau0, a1, a2, near)))
    k = (problem.root**2 * (y - shape)).sum(axis=1) + near
    parameters = np.stack([beta, tau0, a1, a2, k])
    return Group(problem, best, parameters, y - evaluate(t, *parameters[:, :, None]))


def fit_group_huber(t: Floats, y: Floats, weights: Floats | None) -> Group:
    """``fit_group`` by Huber's loss: iteratively reweighted least squares."""
    given = np.ones_like(y) if weights is None else weights
    group = fit_group(t, y, weights)
    for _ in range(HUBER_ITERATIONS):
        size = np.abs(group.residual)
        least = np.maximum(_HUBER_NOISE * group.problem.scale, np.finfo(float).tiny)
        deviation = np.maximum(_MEDIAN_TO_DEVIATION * _weighted_median(size, given), least)
        bend = _HUBER_BEND * deviation[:, None]
        group = fit_group(t, y, given * (bend / np.maximum(size, bend)))
    return group


def _weighted_median(values: Floats, weights: Floats) -> Floats:
    """The least of each row ``[L, n]`` that, with all below it, has half of the row's weight: ``[L]``."""
    order = np.argsort(values, axis=1, kind="stable")
    share = np.cumsum(np.take_along_axis(weights / weights.max(axis=1, keepdims=True), order, axis=1), axis=1)
    middle = (share >= 0.5 * share[:, -1:]).argmax(axis=1)
    place = np.take_along_axis(order, middle[:, None], axis=1)
    return np.asarray(np.take_along_axis(values, place, axis=1)[:, 0])


def _checked(t: ArrayLike, y: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, Floats | None]:
    """The arguments of ``fit_curves`` as arrays ``[T]``, ``[L, T]``, ``[L, T]`` or None."""
    times, series = np.asarray(t, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if times.ndim != 1 or series.ndim != 2 or series.shape[1] != len(times):
        raise ValueError(f"times must be [T] and series [L, T], got shapes {times.shape} and {series.shape}")
    if not (np.isfinite(times).all() and (times >= 0).all() and (np.diff(times) >= 0).all()):
        raise ValueError("times must be finite, not negative and ascending; sort the points by time first")
    if weights is None:
        return times, series, None
    weight = np.asarray(weights, dtype=np.float64)
    if weight.shape not in (times.shape, series.shape):
        raise ValueError(f"weights must be [T] or [L, T] = {series.shape}, got {weight.shape}")
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("weights must be finite and not negative")
    return times, series, np.array(np.broadcast_to(weight, series.shape))
