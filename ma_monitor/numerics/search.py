"""The search for the global optimum over (β, τ₀): a grid over the box, a path along its valley, exact Newton steps.

Cold and deterministic: nothing is carried from one fit to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.projection import (
    GRID,
    Floats,
    Index,
    Problem,
    State,
    grid_nodes,
    grid_residuals,
    project,
    to_b,
    to_u,
)

_PATH_POINTS, _POINTS = 150, 400
"""Points that the path along the valley and the steps from it work on (bins beyond that); the last steps take all."""
_PATH_STEPS = 2
"""Newton steps in b for each node of the valley."""
_MINIMA, _BESIDE = 6, 2
"""Newton steps start from at most this many minima of the path, and this many nodes on both sides of the lowest."""
_FINALISTS = 4
"""Basins of each series that are followed on all its points."""
_HARDLY_ANY = 1e-2
"""Up to this b times the window's length, b = 0 is tried too."""
_SHARP, _SHARP_DENSITY = 1e-4, 3
"""Where less than this share of the variance is left (hardly any noise), basins are narrow and lie close together: the
valley is then followed on a denser grid, and every node is started from."""
_STEP_MAX = np.array([1.0, 2.0])
"""Longest step in u and in v."""


@dataclass(frozen=True)
class Optimum:
    """The best place of each series; arrays lead with ``L``.

    The curve is ``mean + scale·(a0 + a1·X₁ + a2·X₂)`` of the problem's columns.

    Attributes:
        point: (u, v), ``[L, 2]``.
        b: βT.
        c: (τ₀ + t_min)/T.
        coefficients: a0, a1, a2, ``[L, 3]``.
        at_edge: Whether b or c sits on the edge of the box.
        valley: (u, v) of the best b for each of ``V`` nodes in c, ``[L, V, 2]``.
    """

    point: Floats
    b: Floats
    c: Floats
    coefficients: Floats
    at_edge: NDArray[np.bool_]
    valley: Floats


def solve(problem: Problem) -> Optimum:
    """The global optimum of every series.

    A sharp diagonal valley hides its several minima from a grid. So for every node in c the best b is followed down
    first (the valley is sharp in b, shallow in c); the lowest minima along that path are where the Newton steps start.
    """
    small = problem.binned(_POINTS)
    valley, value = _valley(problem.binned(_PATH_POINTS), GRID)
    rows, nodes = np.nonzero(_promising(value))
    point = valley[rows, nodes]
    point, state = descend(small, rows, point, small.low, small.high, 30, prune_from=3)
    best = np.full(len(problem.y), np.inf)
    np.minimum.at(best, rows, state.value)
    sharp = np.flatnonzero(2 * best < _SHARP * (small.y**2).sum(axis=1))
    if len(sharp):
        dense, _ = _valley(small.take(sharp), _SHARP_DENSITY * GRID)
        rows = np.concatenate([rows, np.repeat(sharp, dense.shape[1])])
        point = np.concatenate([point, dense.reshape(-1, 2)])
        point, state = descend(small, rows, point, small.low, small.high, 30, prune_from=3)
    rows, point = _best(rows, point, state, len(problem.y), _FINALISTS)
    point, state = descend(problem, rows, point, problem.low, problem.high, 30, prune_from=1)
    rows, point = _best(rows, point, state, len(problem.y), 1)
    point = _try_zero(problem, point)
    final = project(problem, rows, point)
    edge = np.any((point <= problem.low + 1e-9) | (point >= problem.high - 1e-9), axis=1)
    return Optimum(point, to_b(point[:, 0]), np.exp(point[:, 1]), final.coefficients, np.asarray(edge), valley)


def _valley(problem: Problem, size: int) -> tuple[Floats, Floats]:
    """The best b for each of ``size`` nodes in c: places (u, v) ``[L, C, 2]`` and half the residual sums ``[L, C]``."""
    b, c = grid_nodes(problem, size)
    series = len(problem.y)
    rows = np.repeat(np.arange(series), size)
    u = _lowest(to_u(b), grid_residuals(problem, b, c))
    point = np.stack([u.ravel(), np.tile(np.log(c), series)], axis=1)
    low, high = point.copy(), point.copy()
    low[:, 0], high[:, 0] = problem.low[0], problem.high[0]
    point, state = descend(problem, rows, point, low, high, _PATH_STEPS)
    return point.reshape(series, size, 2), state.value.reshape(series, size)


def _promising(value: Floats) -> NDArray[np.bool_]:
    """Nodes of the valley ``[L, C]`` to start from: its lowest local minima, and some on both sides of the lowest.

    The valley may bend so sharply that several minima lie between two nodes.
    """
    padded = np.pad(value, ((0, 0), (1, 1)), constant_values=np.inf)
    minimum = (value <= padded[:, :-2]) & (value <= padded[:, 2:])
    rank = np.argsort(np.argsort(np.where(minimum, value, np.inf), axis=1, kind="stable"), axis=1)
    beside = np.abs(np.arange(value.shape[1]) - value.argmin(axis=1)[:, None]) <= _BESIDE
    return np.asarray((minimum & (rank < _MINIMA)) | beside)


def _lowest(u: Floats, residuals: Floats) -> Floats:
    """The u ``[L, C]`` where the parabola through the lowest node and its neighbours along the axis ``B`` is lowest."""
    middle = np.clip(residuals.argmin(axis=1), 1, len(u) - 2)
    x0, x1, x2 = u[middle - 1], u[middle], u[middle + 1]
    f0, f1, f2 = (np.take_along_axis(residuals, (middle + i)[:, None], axis=1)[:, 0] for i in (-1, 0, 1))
    left, right = (f1 - f0) / (x1 - x0), (f2 - f1) / (x2 - x1)
    bend = right - left
    vertex = 0.5 * (x0 + x1) - 0.5 * left * (x2 - x0) / np.where(bend > 0, bend, 1.0)
    return np.asarray(np.where(bend > 0, np.clip(vertex, x0, x2), u[residuals.argmin(axis=1)]))


def _try_zero(problem: Problem, point: Floats) -> Floats:
    """Moves the series that ended at hardly any decay to b = 0 where that is better."""
    rows = np.flatnonzero(to_b(point[:, 0]) * problem.s[-1] <= _HARDLY_ANY)
    if not len(rows):
        return point
    below = np.stack([np.full(len(rows), problem.zero), point[rows, 1]], axis=1)
    held = np.full(len(rows), problem.zero)
    low, high = (np.stack([held, np.full(len(rows), edge[1])], axis=1) for edge in (problem.low, problem.high))
    below, state = descend(problem, rows, below, low, high, 30)
    better = state.value < project(problem, rows, point[rows]).value
    moved = point.copy()
    moved[rows[better]] = below[better]
    return moved


def _best(rows: Index, point: Floats, state: State, series: int, most: int) -> tuple[Index, Floats]:
    """The lowest ``most`` problems of each series, best first, ordered by series."""
    order = np.lexsort((state.value, rows))
    rank = np.arange(len(rows)) - np.searchsorted(rows[order], np.arange(series))[rows[order]]
    chosen = order[rank < most]
    return rows[chosen], point[chosen]


def descend(
    problem: Problem,
    rows: Index,
    point: Floats,
    low: Floats,
    high: Floats,
    iterations: int,
    prune_from: int | None = None,
) -> tuple[Floats, State]:
    """Damped Newton steps from ``point [P, 2]`` for the series ``rows [P]``, inside [low, high] and never uphill.

    A problem stops where its next step would gain less than 1e-10 of its residual sum; so does, after ``prune_from``
    steps (None: never), one that is clearly above another problem of its series.
    """
    point = np.clip(point, low, high)
    low, high = np.broadcast_to(low, point.shape), np.broadcast_to(high, point.shape)
    state = project(problem, rows, point)
    total = 0.5 * (problem.y**2).sum(axis=1)[rows]
    damping = np.full(len(rows), 1e-3)
    active = np.arange(len(rows))
    for iteration in range(iterations):
        step, gain = _newton_step(state.take(active), point[active], damping[active], low[active], high[active])
        going = gain > 1e-10 * state.value[active] + 1e-14 * total[active]
        if prune_from is not None and iteration >= prune_from:
            best = np.full(len(problem.y), np.inf)
            np.minimum.at(best, rows, state.value)
            going &= state.value[active] - 5 * gain <= best[rows[active]]
        active, step = active[going], step[going]
        if not len(active):
            break
        target = np.clip(point[active] + step, low[active], high[active])
        trial = project(problem, rows[active], target)
        better = trial.value < state.value[active]
        point[active[better]] = target[better]
        state.write(active[better], trial.take(better))
        damping[active] = np.clip(damping[active] * np.where(better, 0.1, 8.0), 1e-9, 1e9)
    return point, state


def _newton_step(state: State, point: Floats, damping: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Damped Newton steps ``[P, 2]`` that respect the box, and the decrease ``[P]`` that the quadratic model promises.

    Unknowns on an edge that the gradient pushes outwards stay there.
    """
    held = ((point <= low) & (state.gradient > 0)) | ((point >= high) & (state.gradient < 0))
    gradient = np.where(held, 0.0, state.gradient)
    both = ~held[:, :, None] & ~held[:, None, :]
    hessian = np.where(both, state.hessian, np.where(held[:, :, None], np.eye(2), 0.0))
    matrix = _absolute(hessian)
    floor = 1e-14 * (state.value + np.abs(gradient).max(axis=1))[:, None] + 1e-300
    a, d = (np.einsum("pii->pi", matrix) * (1 + damping[:, None]) + floor).T
    b = matrix[:, 0, 1]
    determinant = np.maximum(a * d - b * b, 1e-16 * a * d)
    step = np.stack([b * gradient[:, 1] - d * gradient[:, 0], b * gradient[:, 0] - a * gradient[:, 1]], axis=1)
    step = np.clip(step / np.where(determinant > 0, determinant, np.inf)[:, None], -_STEP_MAX, _STEP_MAX)
    linear = -(gradient * step).sum(axis=1)
    quadratic = 0.5 * np.einsum("pi,pij,pj->p", step, matrix, step)
    return step, np.maximum(linear - quadratic, 0.5 * linear)


def _absolute(matrix: Floats) -> Floats:
    """Symmetric matrices ``[P, 2, 2]`` with their eigenvalues replaced by the absolute ones.

    With these in place of the Hessian, Newton steps lead downhill at saddles and on ridges too.
    """
    trace = np.einsum("pii->p", matrix)[:, None, None]
    determinant = (matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] ** 2)[:, None, None]
    distance = np.sqrt(np.maximum(trace**2 - 4 * determinant, 0.0))
    mixed = (trace * matrix - 2 * determinant * np.eye(2)) / np.where(distance > 0, distance, 1.0)
    return np.where(determinant < 0, mixed, np.where(trace < 0, -matrix, matrix))
