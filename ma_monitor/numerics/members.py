"""The members of the forecast: what each simple model says of a layer's future, in ln ratio.

| member | what it does |
|---|---|
| ``curve_learning_rate``, ``curve_step`` | Eq. 14 in that clock, averaged over a grid of (β, τ₀) by its likelihood |
| ``log_trend_learning_rate``, ``log_trend_step`` | regression of ln ratio on ln(t + 1), last half of the points |
| ``damped_trend`` | the log trend of the leading clock, dying away within ``DAMPING`` e-folds of time |
| ``last_value`` | the ratio stays where it is |

Each but the last is shifted in ln ratio so that it agrees on average with the last points seen. A single best curve
extrapolates wildly while little is seen; its average over all curves that fit about as well does not.

Array axes: ``L`` layers, ``T`` points seen, ``G`` steps to forecast, ``N`` grid nodes, ``M`` members.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.clock import Clock, step_clock

Floats = NDArray[np.float64]

MAX_POINTS = 64
"""A longer history enters the curve as the means of so many blocks of neighbours, so that its cost stays bounded."""
ANCHOR = 5
"""Points on which a member's shift is averaged."""
INDEPENDENT = 0.35
"""Share of the points that count as independent: residuals of real trajectories have a lag-1 correlation near .5."""
DAMPING = 0.4
"""Time, in e-folds, in which a damped trend loses all but 1/e of its slope (Gardner and McKenzie 1985)."""
GUARD = (1.0, 3.0)
"""No member leaves what was seen by more than GUARD[0] + GUARD[1]·horizon in ln ratio (horizon in e-folds of time)."""
TINY = 1e-300
"""Stands for 0 where something is divided by a residual."""
_NODE_B, _NODE_C = (
    nodes.ravel()
    for nodes in np.meshgrid(
        np.concatenate([[1e-6], np.geomspace(0.05, 100.0, 15)]), np.geomspace(1e-5, 30.0, 10), indexing="ij"
    )
)
"""b and c of every node, ``[N]`` each; the first b stands for 0."""


@dataclass(frozen=True)
class CurveGrid:
    """Eq. 14 on a grid of (b, c) = (βT, (τ₀ + t_min)/T) with its linear coefficients, and a weight for each node.

    A node's curve is ``mean + first·q₁ + second·q₂`` with q₁, q₂ orthonormal on the points seen; they span, with a
    constant, 1 - e^(-bs) and e^(-bs)·ln(1 + s/c) for s = (t - t_min)/T.

    Attributes:
        start: t_min.
        span: T, the last time.
        mean: Mean of each layer, ``[L]``.
        weights: Likelihood of each node, of sum 1, ``[L, N]``.
        first: Coefficients of q₁, ``[L, N]``.
        second: Coefficients of q₂, ``[L, N]``.
        spread: Standard deviation of every coefficient; over the root of ``points``, of the mean, ``[L]``.
        points: Number of points.
        norms: What makes q₁, q₂ orthonormal: means of both columns, their product, both lengths, ``[5, N]``.
    """

    start: float
    span: float
    mean: Floats
    weights: Floats
    first: Floats
    second: Floats
    spread: Floats
    points: int
    norms: Floats

    def average(self, times: Floats) -> Floats:
        """The weighted mean of all nodes' curves at ``times [G]``: ``[L, G]``, in units of the ratio."""
        q1, q2 = self._basis(*_columns((times - self.start) / self.span))
        return self.mean[:, None] + (self.weights * self.first) @ q1 + (self.weights * self.second) @ q2

    def asymptotes(self) -> tuple[Floats, Floats]:
        """K of every node ``[L, N]`` (huge where b ≈ 0: no decay, no limit) and its standard deviation ``[L, N]``."""
        limit = -1 / np.expm1(-_NODE_B)[:, None]
        q1, q2 = (q[:, 0] for q in self._basis(limit, np.zeros_like(limit)))
        value = self.mean[:, None] + self.first * q1 + self.second * q2
        return value, self.spread[:, None] * np.sqrt(1 / self.points + q1**2 + q2**2)

    def _basis(self, x1: Floats, x2: Floats) -> tuple[Floats, Floats]:
        mean1, mean2, product, length1, length2 = self.norms[:, :, None]
        q1 = (x1 - mean1) / length1
        return q1, (x2 - mean2 - product * q1) / length2


def weigh_curves(times: Floats, values: Floats) -> CurveGrid:
    """Eq. 14 at every node of the grid, by least squares of the ratio, weighed by its likelihood.

    Args:
        times: Ascending, not all equal, ``[T]``.
        values: Ratios, finite, ``[L, T]``.
    """
    times, values = _blocks(times, values)
    n, start, span = times.size, float(times[0]), float(times[-1])
    x1, x2 = _columns((times - start) / span)
    mean1, mean2 = x1.mean(axis=1), x2.mean(axis=1)
    q1, length1 = _unit(x1 - mean1[:, None], x1)
    product = np.einsum("nt,nt->n", x2, q1)
    q2, length2 = _unit(x2 - mean2[:, None] - product[:, None] * q1, x2)
    mean = values.mean(axis=1)
    centred = values - mean[:, None]
    first, second = centred @ q1.T, centred @ q2.T
    total = (centred**2).sum(axis=1)
    residual = np.maximum(total[:, None] - first**2 - second**2, 1e-12 * total[:, None] + TINY)
    best = residual.min(axis=1, keepdims=True)
    free = max(1.0, INDEPENDENT * n - 5)  # what is left of the independent points after five parameters
    log_likelihood = -0.5 * free * (residual / best - 1)
    weights = np.exp(log_likelihood)
    weights /= weights.sum(axis=1, keepdims=True)
    spread = np.sqrt(best[:, 0] / free)
    return CurveGrid(
        start, span, mean, weights, first, second, spread, n, np.stack([mean1, mean2, product, length1, length2])
    )


def log_trend(times: Floats, log_values: Floats, future: Floats) -> Floats:
    """A line in ln(t + 1) through ln ratio ``[L, T]``: regression over the last half, at ``future [G]``: ``[L, G]``."""
    half = slice(times.size // 2, None)
    x, y = np.log1p(times[half]), log_values[:, half]
    centred = x - x.mean()
    power = (centred**2).sum()
    slope = (y @ centred) / power if power > 0 else np.zeros(len(y))
    return np.asarray(y.mean(axis=1)[:, None] + slope[:, None] * (np.log1p(future) - x.mean()))


def member_names(clock: Clock) -> tuple[str, ...]:
    """Names of the members under a leading clock, in the order of ``member_paths``."""
    clocks = ("step",) if clock.name == "step" else ("learning_rate", "step")
    return (*(f"curve_{c}" for c in clocks), *(f"log_trend_{c}" for c in clocks), "damped_trend", "last_value")


def member_paths(clock: Clock, steps: Floats, values: Floats, future: Floats) -> tuple[Floats, tuple[CurveGrid, ...]]:
    """What every member says from the points seen.

    Args:
        clock: The leading clock; members in steps come beside those of another clock.
        steps: Steps seen, ascending, ``[T]``.
        values: Ratios, finite and above 0, ``[L, T]``.
        future: Steps to forecast, ``[G]``.

    Returns:
        ln ratio ``[M, L, G]``, and the curves behind the members that are Eq. 14.
    """
    seen = np.log(values)
    at = np.concatenate([steps[-ANCHOR:], future])
    clocks = (clock,) if clock.name == "step" else (clock, step_clock())
    curves = tuple(weigh_curves(c.time(steps), values) for c in clocks)
    tiny = seen.min(axis=1)[:, None] - GUARD[0]
    paths = [np.log(np.maximum(f.average(c.time(at)), np.exp(tiny))) for f, c in zip(curves, clocks, strict=True)]
    paths += [log_trend(c.time(steps), seen, c.time(at)) for c in clocks]
    shifted = [p[:, ANCHOR:] + (seen[:, -ANCHOR:] - p[:, :ANCHOR]).mean(axis=1)[:, None] for p in paths]
    ahead = horizon(clock, steps[-1], future)
    now = seen[:, -ANCHOR:].mean(axis=1)[:, None]
    damped = now + (shifted[len(clocks)] - now) * (-np.expm1(-ahead / DAMPING) / np.maximum(ahead / DAMPING, TINY))
    last = np.repeat(seen[:, -1:], future.size, axis=1)
    return np.clip(np.stack([*shifted, damped, last]), *reach(seen, ahead)), curves


def horizon(clock: Clock, now: float, future: Floats) -> Floats:
    """How far ahead steps are, in e-folds of the leading clock's time since step 0 (0 for the past)."""
    return np.asarray(np.maximum(np.log1p(clock.time(future)) - np.log1p(clock.time(now)), 0.0))


def reach(seen: Floats, ahead: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest ln ratio ``[L, G]`` of any forecast, from those seen ``[L, T]`` and the horizon ``[G]``."""
    span = GUARD[0] + GUARD[1] * ahead
    return seen.min(axis=1)[:, None] - span, seen.max(axis=1)[:, None] + span


def _columns(s: Floats) -> tuple[Floats, Floats]:
    """(1 - e^(-bs))/(1 - e^(-b)) and e^(-bs)·ln(1 + s/c) at scaled times ``s [G]``: ``[N, G]`` each."""
    decay = -_NODE_B[:, None] * s
    return np.expm1(decay) / np.expm1(-_NODE_B)[:, None], np.exp(decay) * np.log1p(s / _NODE_C[:, None])


def _unit(columns: Floats, like: Floats) -> tuple[Floats, Floats]:
    """Columns ``[N, T]`` at unit length, and the lengths; infinite where little of ``like`` is left (rank is lost)."""
    length = np.linalg.norm(columns, axis=1)
    length = np.where(length > 1e-7 * np.linalg.norm(like, axis=1), length, np.inf)
    return columns / length[:, None], length


def _blocks(times: Floats, values: Floats) -> tuple[Floats, Floats]:
    """A long history as the means of ``MAX_POINTS`` blocks of neighbours."""
    if times.size <= MAX_POINTS:
        return times, values
    edges = np.linspace(0, times.size, MAX_POINTS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, times.size))
    return np.add.reduceat(times, edges) / sizes, np.add.reduceat(values, edges, axis=1) / sizes
