"""What the data leave open: the profile likelihood of Eq. 14 over (β, τ₀), and the intervals read off it.

A set of parameters is *admissible* at a level such as 80 % if its residual sum of squares is at most S·(1 + w·F/ν): S
that of the best curve, F the level's quantile of the F distribution with 1 and ν degrees of freedom, ν = effective
points - 5 parameters, and w a factor for noise that is not even along the trajectory (see ``noise``). The admissible
set is walked with a net of (β, τ₀) nodes: along the valley of the best β for each τ₀, and across it. At each node the
problem is linear, the admissible coefficients are a disc (in orthonormal coordinates), and what can be said of a linear
form or of a ratio of coefficients is exact. An interval is the union over the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from ma_monitor.numerics.noise import PARAMETERS, noise_factors
from ma_monitor.numerics.projection import BLOCK, Floats, Index, Problem, columns, dots, flat_time, project, to_b
from ma_monitor.numerics.search import Optimum, descend

LEVELS = 0.8, 0.95
"""Probabilities of the intervals: the one that is reported, and one that must be bounded too for a quantity to count
as identified; else those narrow by luck would be picked out, and hold the truth far less often than they claim."""
_POINTS = 100
"""Points that the profile works on (bins beyond that): an interval needs fewer digits than an optimum."""
_NEAR = 1.6 * np.sinh(np.linspace(-2.5, 2.5, 21)) / np.sinh(2.5)
"""Nodes around the optimum, in half widths of the interval that the curvature there suggests: the nearer, the closer
together, since the admissible sets of the quantities differ in size."""
_ACROSS = np.sinh(np.linspace(-2.0, 2.0, 11)) / np.sinh(2.0)
"""Nodes across the valley, in half widths of the admissible set there."""
MATERIAL = 0.05
"""A maximum inside the window counts as one where it stands out above both ends by this share of the curve's range."""
_ANGLES = np.linspace(-1.0, 1.0, 15)
"""Directions tried within the admissible arc, in half widths of it."""
_PROBES = np.array([0.0, 0.01, 0.03, 0.1, 0.3, 0.6])
"""Times, as a share of the window, at which the curve is compared with its end."""
_FLOOR = 1e-13
"""Residual sums below this share of the total cannot be told apart in floats."""


@dataclass(frozen=True)
class Evidence:
    """What the admissible curves of each series have in common; arrays ``[L]``, in scaled units unless said.

    A bound is infinite where no data speak against any value on that side.

    Attributes:
        asymptote: Lowest and highest K, ``[2, L]``.
        peak_time: Earliest and latest maximum, as a share s of T since t_min, ``[2, L]``; infinite where some
            admissible curve never turns, below 0 where one falls from the start.
        peak_height: Lowest and highest maximum, ``[2, L]``.
        highest_first: Some admissible curve is largest at the first point (but for less than ``MATERIAL``).
        highest_inside: Some admissible curve stands out inside the window.
        highest_last: Some admissible curve is largest at the last point (but for less than ``MATERIAL``).
        change: Upper bound of the change between the end and any earlier time.
    """

    asymptote: Floats
    peak_time: Floats
    peak_height: Floats
    highest_first: NDArray[np.bool_]
    highest_inside: NDArray[np.bool_]
    highest_last: NDArray[np.bool_]
    change: Floats


def examine(problem: Problem, optimum: Optimum, effective: Floats, variance: Floats) -> tuple[Evidence, ...]:
    """Walks the admissible sets of every series: one result for each of ``LEVELS``.

    Args:
        problem: The problem, of ``L`` series.
        optimum: Its solution.
        effective: Effective number of points, ``[L]``.
        variance: Relative noise variance at each point, ``[L, n]``.
    """
    small = problem.binned(_POINTS)
    series = len(problem.y)
    best = project(small, np.arange(series), optimum.point)
    freedom = np.maximum(effective - PARAMETERS, 1e-3)
    lost = (problem.y**2).sum(axis=1) - (small.y**2).sum(axis=1)  # within the bins
    factors = noise_factors(problem, optimum.point, optimum.coefficients, variance)
    unit = factors * (2 * best.value + lost) / freedom
    floor = 2 * best.value + _FLOOR * (problem.y**2).sum(axis=1)
    limits = [floor + unit * f_quantile(level, freedom) for level in LEVELS]
    rows, point = _net(small, optimum, limits[-1].max(axis=0))
    tallies = [_Tally(series) for _ in LEVELS]
    size = max(1, BLOCK // len(small.s))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        _examine_block(small.take(rows[part]), rows[part], point[part], limits, tallies)
    unknown = effective - PARAMETERS < 1
    return tuple(tally.evidence(unknown) for tally in tallies)


def f_quantile(level: float, freedom: Floats) -> Floats:
    """The quantile of F with 1 and ``freedom`` degrees of freedom: the square of a two-sided Student's t."""
    return np.asarray(stdtrit(freedom, 0.5 + level / 2) ** 2)


def _net(problem: Problem, optimum: Optimum, limit: Floats) -> tuple[Index, Floats]:
    """Nodes that cover the admissible set: series ``[P]`` and places (u, v) ``[P, 2]``."""
    series = len(problem.y)
    state = project(problem, np.arange(series), optimum.point)
    spare = np.maximum(limit - 2 * state.value, 0.0)
    (huu, huv), (_, hvv) = state.hessian.transpose(1, 2, 0)
    huu = np.maximum(huu, 1e-300)
    curvature = np.maximum(hvv - huv**2 / huu, 1e-300)
    reach = np.minimum(np.sqrt(spare / curvature), 20.0)
    near = np.repeat(optimum.point[:, None], len(_NEAR), axis=1)
    near[:, :, 1] += reach[:, None] * _NEAR
    near[:, :, 0] -= np.clip((huv / huu)[:, None] * reach[:, None] * _NEAR, -1.0, 1.0)
    near = np.clip(near, problem.low, problem.high)
    start = np.concatenate([optimum.valley, near], axis=1)
    rows, start = np.repeat(np.arange(series), start.shape[1]), start.reshape(-1, 2)
    hopeful = 2 * project(problem, rows, start).value <= 4 * limit[rows]
    rows, start = rows[hopeful], start[hopeful]
    low, high = start.copy(), start.copy()
    low[:, 0], high[:, 0] = problem.low[0], problem.high[0]
    point, state = descend(problem, rows, start, low, high, 2)
    spare = limit[rows] - 2 * state.value
    inside = spare >= 0
    rows, point, spare, state = rows[inside], point[inside], spare[inside], state.take(inside)
    width = np.minimum(np.sqrt(spare / np.maximum(state.hessian[:, 0, 0], 1e-300)), 3.0)
    net = np.repeat(point[:, None], len(_ACROSS), axis=1)
    net[:, :, 0] = np.clip(net[:, :, 0] + width[:, None] * _ACROSS, problem.low[0], problem.high[0])
    return np.repeat(rows, len(_ACROSS)), net.reshape(-1, 2)


class _Tally:
    """The running union over nodes, per series."""

    def __init__(self, series: int) -> None:
        self.asymptote, self.peak_time, self.peak_height = (
            np.stack([np.full(series, np.inf), np.full(series, -np.inf)]) for _ in range(3)
        )
        self.shapes = np.zeros((3, series), dtype=bool)
        self.change = np.zeros(series)

    def evidence(self, unknown: NDArray[np.bool_]) -> Evidence:
        """The union, with nothing ruled out for series that are ``unknown``."""
        for low, high in (self.asymptote, self.peak_time, self.peak_height):
            low[unknown], high[unknown] = -np.inf, np.inf
        self.shapes[:, unknown] = True
        self.change[unknown] = np.inf
        first, inside, last = self.shapes
        return Evidence(self.asymptote, self.peak_time, self.peak_height, first, inside, last, self.change)

    @staticmethod
    def widen(bounds: Floats, rows: Index, low: Floats, high: Floats) -> None:
        """Takes more intervals into a union; NaN counts as nothing."""
        np.fmin.at(bounds[0], rows, low)
        np.fmax.at(bounds[1], rows, high)


def _examine_block(problem: Problem, rows: Index, point: Floats, limits: list[Floats], tallies: list[_Tally]) -> None:
    """Adds what the nodes at ``point [P, 2]`` (of the series ``rows``) admit at each level, by limits ``[3, L]``."""
    at = columns(problem, point[:, 0], point[:, 1])
    residual = dots(at.residual, at.residual)
    whole = _Node(to_b(point[:, 0]), np.exp(point[:, 1]), at.triangle, at.along, residual)
    end = float(problem.s[-1])
    for limit, tally in zip(limits, tallies, strict=True):
        (k_node, k_rows), (node, time_rows), (top_node, top_rows) = (whole.within(room[rows], rows) for room in limit)
        one = np.ones(len(k_rows))
        tally.widen(tally.asymptote, k_rows, *k_node.interval(one, one, 0 * one))
        early, late, shapes = node.shapes(end)
        tally.widen(tally.peak_time, time_rows, early, late)
        for flag, found in zip(tally.shapes, shapes, strict=True):
            np.logical_or.at(flag, time_rows, found)
        np.maximum.at(tally.change, time_rows, node.change(end))
        tally.widen(tally.peak_height, top_rows, *top_node.height())


@dataclass(frozen=True)
class _Node:
    """Nodes of the net; arrays ``[P]`` (triangle ``[5, P]``, along ``[2, P]``: see ``Columns``).

    ``spare`` is how much the residual sum may grow: the squared radius of the disc of admissible coefficients.
    """

    b: Floats
    c: Floats
    triangle: Floats
    along: Floats
    spare: Floats

    def within(self, limit: Floats, rows: Index) -> tuple[_Node, Index]:
        """The nodes whose residual sum, held in ``spare``, is below ``limit``, with what is left; and their series."""
        room = limit - self.spare
        inside = room >= 0
        node = _Node(self.b[inside], self.c[inside], self.triangle[:, inside], self.along[:, inside], room[inside])
        return node, rows[inside]

    def interval(self, k0: Floats, k1: Floats, k2: Floats) -> tuple[Floats, Floats]:
        """Lowest and highest admissible value of k0·a0 + k1·a1 + k2·a2."""
        r01, r02, r11, r12, r22 = self.triangle
        z1 = (k1 - r01 * k0) / r11
        z2 = (k2 - r02 * k0 - r12 * z1) / r22
        centre = z1 * self.along[0] + z2 * self.along[1]
        radius = np.sqrt(self.spare * (k0**2 + z1**2 + z2**2))
        return centre - radius, centre + radius

    def basis(self, s: Floats) -> tuple[Floats, Floats]:
        """X₁ and X₂ at the scaled times s (broadcast against ``[P]``)."""
        return -np.expm1(-self.b * s), np.exp(-self.b * s) * np.log1p(s / self.c)

    def shapes(self, end: float) -> tuple[Floats, Floats, tuple[NDArray[np.bool_], ...]]:
        """Earliest and latest maximum, and whether the maximum over [0, end] may be at its start, inside, at its end.

        Shape depends on the direction of (a1, a2) only. Seen from the origin the disc fills an arc of directions.
        """
        _, _, r11, r12, r22 = self.triangle
        distance = np.hypot(*self.along)
        radius = np.sqrt(self.spare)
        half = np.where(distance > radius, np.arcsin(np.minimum(radius / np.maximum(distance, 1e-300), 1.0)), np.pi)
        angle = np.arctan2(self.along[1], self.along[0]) + half * _ANGLES[:, None]
        a2 = np.sin(angle) / r22
        a1 = (np.cos(angle) - r12 * a2) / r11
        at = flat_time(self.b, self.c, a1, a2)
        first, last = self.basis(np.full_like(self.b, end))
        final = a1 * first + a2 * last  # relative to the start, as is all of what follows
        first, last = self.basis(np.where((at > 0) & (at < end), at, np.nan))
        turn = a1 * first + a2 * last
        highest, lowest = np.fmax(np.maximum(final, 0.0), turn), np.fmin(np.minimum(final, 0.0), turn)
        lead = MATERIAL * (highest - lowest)
        inside = highest - np.maximum(final, 0.0) > lead
        shapes = (~inside & (final <= 0)), inside, (~inside & (final > 0))
        time = np.where(a2 > 0, at, np.where(final > 0, np.inf, -np.inf))
        return time.min(axis=0), time.max(axis=0), tuple(shape.any(axis=0) for shape in shapes)

    def height(self) -> tuple[Floats, Floats]:
        """Lowest and highest admissible maximum: that of the node's own best curve, to first order; NaN if it has none.

        The height changes with the peak's time only to second order, so it is a linear form of the coefficients.
        """
        _, _, r11, r12, r22 = self.triangle
        a2 = self.along[1] / r22
        a1 = (self.along[0] - r12 * a2) / r11
        time = flat_time(self.b, self.c, a1, a2)
        time = np.where((a2 > 0) & (time > 0) & np.isfinite(time), time, np.nan)
        return self.interval(np.ones_like(time), *self.basis(time))

    def change(self, end: float) -> Floats:
        """Largest admissible absolute difference between the curve's end and its value at the probe times."""
        last = self.basis(np.full_like(self.b, end))
        most = np.zeros_like(self.b)
        for share in _PROBES:
            first, second = self.basis(np.full_like(self.b, share * end))
            low, high = self.interval(np.zeros_like(first), last[0] - first, last[1] - second)
            most = np.maximum(most, np.maximum(-low, high))
        return most
