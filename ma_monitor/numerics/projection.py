"""The separable least-squares problem of Eq. 14, for many series at once (variable projection, Golub & Pereyra 1973).

Given (β, τ₀) the curve is linear in (A₁, A₂, K), so only two unknowns are searched for. All work is in scaled form:
s = (t - t_min)/T with T the last time, b = βT, c = (τ₀ + t_min)/T, and for each (b, c) the columns

    1,   X₁ = 1 - e^(-bs),   X₂ = e^(-bs)·ln(1 + s/c)

which span the same functions as 1, e^(-βt), e^(-βt)·ln(t + τ₀), but stay apart where those fall together: as b → 0
X₁ becomes s (not a second constant), as c → ∞ X₂ becomes e^(-bs)·s, as c → 0 it becomes a single first point.
Array axes: ``L`` series, ``P`` problems (one basin of one series), ``n`` points, ``B`` and ``C`` grid nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

B_MAX = 1e3
"""Upper edge of b = βT."""
C_MIN, C_MAX = 1e-6, 30.0
"""Edges of c = (τ₀ + t_min)/T."""
_B_SPAN_MIN = 1e-9
"""Stands for b = 0: the curve is then a logarithm plus a straight line to nine digits, and A₂ still fits a float."""
_B_SHIFT_MAX = 400.0
"""Largest b·t_min/T: A₁ and A₂ carry the factor e^(b·t_min/T), which must leave room in a float."""
_RANK = 1e-9
"""A column whose part orthogonal to the others is below this (root mean square) is left out: its coefficient would
be so large that the curve, evaluated in floats, would be noise."""
_B_KNEE = 0.05
"""b is searched as ln(1 + b/knee): linear near 0, where the optimum may sit on the edge, logarithmic beyond."""
_GRID_B, _GRID_C = 36, 36
_BASINS = 4
_ITERATIONS = 40
_STEP_MAX = np.array([1.0, 2.0])
_CHUNK = 2_000_000
"""Floats in the largest array of the grid stage; series beyond that are taken in turns."""


@dataclass(frozen=True)
class Problem:
    """Series that share their times, scaled.

    Attributes:
        s: Scaled times (t - t_min)/T, ``[n]``, ascending from 0.
        root: Square roots of the weights, ``[L, n]`` or ``[1, n]``, each row of unit norm.
        y: Series times ``root``, freed of their weighted mean and divided by ``scale``, ``[L, n]``.
        mean: Weighted mean, ``[L]``.
        scale: Largest absolute deviation from it (1 for a constant series), ``[L]``.
        first: t_min.
        last: T.
    """

    s: Floats
    root: Floats
    y: Floats
    mean: Floats
    scale: Floats
    first: float
    last: float

    @property
    def b_range(self) -> tuple[float, float]:
        """Edges of b that are searched."""
        low = _B_SPAN_MIN / self.s[-1]
        high = B_MAX if self.first <= 0 else min(B_MAX, _B_SHIFT_MAX * self.last / self.first)
        return float(low), float(high)

    def take(self, rows: NDArray[np.intp]) -> Problem:
        """The problem with these series only."""
        root = self.root if len(self.root) == 1 else self.root[rows]
        return Problem(self.s, root, self.y[rows], self.mean[rows], self.scale[rows], self.first, self.last)


@dataclass(frozen=True)
class Optimum:
    """Best (b, c) of each series with its linear coefficients in scaled form, arrays ``[L]``.

    The curve is ``mean + scale·(a0 + a1·X₁ + a2·X₂)``. ``at_edge`` says that b or c sits on the edge of the box.
    """

    b: Floats
    c: Floats
    a0: Floats
    a1: Floats
    a2: Floats
    at_edge: NDArray[np.bool_]


def make_problem(t: Floats, y: Floats, weights: Floats | None) -> Problem:
    """Scales series ``y [L, n]`` at times ``t [n]`` (ascending, not all equal), weights ``[L, n]`` or None for equal."""
    first, last = float(t[0]), float(t[-1])
    s = (t - first) / last
    if weights is None:
        root = np.full((1, len(t)), 1 / np.sqrt(len(t)))
    else:
        root = np.sqrt(weights / weights.max(axis=1, keepdims=True))
        root /= np.linalg.norm(root, axis=1, keepdims=True)
    mean = (root**2 * y).sum(axis=1)
    centred = y - mean[:, None]
    scale = np.abs(centred).max(axis=1)
    scale[scale == 0] = 1.0
    scaled = centred / scale[:, None]
    scaled -= (root**2 * scaled).sum(axis=1, keepdims=True)
    return Problem(s, root, scaled * root, mean, scale, first, last)


def solve(problem: Problem) -> Optimum:
    """Globally best (b, c) of every series: a grid over the whole box, then second-order descent from its basins."""
    b_nodes, c_nodes = grid_nodes(problem)
    starts = _basins(grid_residuals(problem, b_nodes, c_nodes))
    rows, b_index, c_index = starts
    u, v = _to_u(b_nodes)[b_index], np.log(c_nodes)[c_index]
    return _refine(problem, rows, u, v)


def grid_nodes(problem: Problem) -> tuple[Floats, Floats]:
    """Nodes in b ``[B]`` (both edges, b ≈ 0 first) and in c ``[C]``."""
    low, high = problem.b_range
    b_nodes = np.concatenate([[low], np.geomspace(min(0.02, high / 2), high, _GRID_B - 1)])
    return b_nodes, np.geomspace(C_MIN, C_MAX, _GRID_C)


def grid_residuals(problem: Problem, b: Floats, c: Floats) -> Floats:
    """Residual sums of squares of the projected problem at every (b, c), ``[L, B, C]``, from shared matrix products."""
    size = max(1, _CHUNK // (len(b) * len(problem.s)))
    if len(problem.root) > 1:
        size = 1
    log = np.log1p(problem.s / c[:, None])
    decay = np.exp(-b[:, None] * problem.s)
    parts = []
    for start in range(0, len(problem.y), size):
        part = slice(start, start + size)
        root = problem.root[0] if len(problem.root) == 1 else problem.root[start]
        parts.append(_grid_part(problem.s, root, problem.y[part], b, decay, log))
    return np.concatenate(parts)


def _grid_part(s: Floats, root: Floats, y: Floats, b: Floats, decay: Floats, log: Floats) -> Floats:
    """Residual sums of squares ``[L, B, C]`` of series ``y [L, n]`` that share the weights root² ``[n]``.

    X₂ is a product of a function of b and one of c, so each of its inner products over all (b, c) is one matrix product.
    """
    weights = root**2
    first = -np.expm1(-b[:, None] * s)
    first -= (first @ weights)[:, None]
    norm = np.sqrt(first**2 @ weights)
    first /= np.where(norm > 0, norm, 1.0)[:, None]
    weighted = decay * weights
    mean = weighted @ log.T
    square = (weighted * decay) @ (log**2).T - mean**2
    cross = (weighted * first) @ log.T
    y_first = y @ (first * root).T
    y_second = ((decay * root)[None] * y[:, None]).reshape(-1, len(s)) @ log.T
    y_second = y_second.reshape(len(y), len(b), -1)
    apart = square - cross**2
    independent = apart > 1e-11 * (square + mean**2)
    gain = (y_second - y_first[:, :, None] * cross) ** 2 / np.where(independent, apart, np.inf)
    return np.asarray((y**2).sum(axis=1)[:, None, None] - y_first[:, :, None] ** 2 - gain)


def _basins(residuals: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Indices (series, b node, c node) of each series' lowest local minima on the grid, at most ``_BASINS`` each."""
    padded = np.pad(residuals, ((0, 0), (1, 1), (1, 1)), constant_values=np.inf)
    lowest = np.full(residuals.shape, True)
    _, nb, nc = residuals.shape
    for i in range(3):
        for j in range(3):
            lowest &= residuals <= padded[:, i : i + nb, j : j + nc]
    ranked = np.where(lowest, residuals, np.inf).reshape(len(residuals), -1)
    order = np.argsort(ranked, axis=1, kind="stable")[:, :_BASINS]
    found = np.isfinite(np.take_along_axis(ranked, order, axis=1))
    rows = np.broadcast_to(np.arange(len(residuals))[:, None], order.shape)[found]
    b_index, c_index = np.unravel_index(order[found], (nb, nc))
    return rows, b_index, c_index


def _to_u(b: Floats) -> Floats:
    return np.log1p(b / _B_KNEE)


def _to_b(u: Floats) -> Floats:
    return _B_KNEE * np.expm1(u)


@dataclass(frozen=True)
class _State:
    """The projected problem at one (u, v) per problem: half the residual sum, its derivatives, the coefficients."""

    value: Floats
    gradient: Floats
    hessian: Floats
    gauss: Floats
    coefficients: Floats

    def replace(self, where: NDArray[np.intp], other: _State) -> None:
        """Writes the other's entries, in order, at these indices."""
        for field in fields(self):
            getattr(self, field.name)[where] = getattr(other, field.name)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> _State:
        """The state of these problems only."""
        return _State(*(getattr(self, field.name)[rows] for field in fields(self)))


def _project(problem: Problem, u: Floats, v: Floats) -> _State:
    """Value, exact gradient and exact Hessian by (u, v) of half the projected residual sum, for one series each.

    With F(θ) = min over a of ½·|y - X(θ)a|² and fᵢ = (∂X/∂θᵢ)a: ∂F/∂θᵢ = -r·fᵢ, and the Hessian is the Schur complement
    of the full five-parameter one, fᵢ·fⱼ - r·fᵢⱼ - mᵢ·mⱼ with X = QR and mᵢ = Qᵀfᵢ - R⁻ᵀ(∂X/∂θᵢ)ᵀr.
    """
    s, root, y = problem.s, problem.root, problem.y
    b, c = _to_b(u), np.exp(v)
    exponent = -b[:, None] * s
    decay = np.exp(exponent) * root
    share = s / (c[:, None] + s)
    stack = np.empty((len(u), 6, len(s)))  # q1, q2, residual, ∂X1/∂b, ∂X2/∂b, ∂X2/∂ln c
    q1, q2, residual, d1, d2, d3 = (stack[:, i] for i in range(6))
    np.multiply(np.expm1(exponent), -root, out=q1)
    np.multiply(np.log1p(s / c[:, None]), decay, out=q2)
    np.multiply(s, decay, out=d1)
    np.multiply(-s, q2, out=d2)
    np.multiply(-share, decay, out=d3)

    triangle, g1, g2 = _orthonormalise(root, q1, q2, y, residual)
    r01, r02, r11, r12, r22 = triangle
    a2 = g2 / r22
    a1 = (g1 - r12 * a2) / r11
    coefficients = np.stack([-(r01 * a1 + r02 * a2), a1, a2], axis=1)

    inner = stack @ stack[:, 3:].transpose(0, 2, 1)  # [P, 6, 3]
    constant = (stack[:, 3:] * root[:, None]).sum(axis=2)
    bent = np.einsum("pn,pkn->pk", residual * s, stack[:, 3:])
    curved = np.einsum("pn,pn->p", residual * (1 - share), d3)

    zero = np.zeros_like(a1)
    along = np.stack([np.stack([a1, a2, zero], 1), np.stack([zero, zero, a2], 1)], 1)  # fᵢ in terms of d1, d2, d3
    fr = np.einsum("pik,pk->pi", along, inner[:, 2])
    gram = along @ inner[:, 3:] @ along.transpose(0, 2, 1)
    qf = np.stack([np.einsum("pik,pk->pi", along, part) for part in (constant, inner[:, 0], inner[:, 1])], 2)
    z1 = np.stack([inner[:, 2, 0] / r11, zero], 1)
    z2 = np.stack([(inner[:, 2, 1] - r12 * z1[:, 0]) / r22, inner[:, 2, 2] / r22], 1)
    m = qf - np.stack([np.zeros_like(z1), z1, z2], 2)
    second = np.empty_like(gram)
    second[:, 0, 0] = -(a1 * bent[:, 0] + a2 * bent[:, 1])
    second[:, 0, 1] = second[:, 1, 0] = -a2 * bent[:, 2]
    second[:, 1, 1] = -a2 * curved
    slope = b + _B_KNEE  # db/du, and d²b/du²
    chain = np.stack([slope, np.ones_like(slope)], 1)
    outer = chain[:, :, None] * chain[:, None, :]
    hessian = (gram - second - m @ m.transpose(0, 2, 1)) * outer
    hessian[:, 0, 0] -= fr[:, 0] * slope
    gauss = (gram - qf @ qf.transpose(0, 2, 1)) * outer
    value = 0.5 * np.einsum("pn,pn->p", residual, residual)
    return _State(value, -fr * chain, hessian, gauss, coefficients)


def _orthonormalise(
    root: Floats, x1: Floats, x2: Floats, y: Floats, residual: Floats
) -> tuple[tuple[Floats, Floats, Floats, Floats, Floats], Floats, Floats]:
    """Turns the columns x1, x2 ``[P, n]`` into q1, q2 in place (modified Gram-Schmidt), and writes y's residual.

    Returns:
        The triangle's entries r01, r02, r11, r12, r22 (infinite on the diagonal for a column that is left out), and
        the components of y along q1 and q2.
    """
    r01, r02 = (x1 * root).sum(axis=1), (x2 * root).sum(axis=1)
    x1 -= r01[:, None] * root
    x2 -= r02[:, None] * root
    r11 = np.sqrt(np.einsum("pn,pn->p", x1, x1))
    r11[r11 == 0] = np.inf
    x1 /= r11[:, None]
    r12 = np.einsum("pn,pn->p", x1, x2)
    x2 -= r12[:, None] * x1
    rest = np.einsum("pn,pn->p", x1, x2)
    x2 -= rest[:, None] * x1
    r22 = np.sqrt(np.einsum("pn,pn->p", x2, x2))
    r22[r22 < _RANK] = np.inf
    x2 /= r22[:, None]
    g1, g2 = np.einsum("pn,pn->p", x1, y), np.einsum("pn,pn->p", x2, y)
    np.subtract(y, g1[:, None] * x1, out=residual)
    residual -= g2[:, None] * x2
    return (r01, r02, r11, r12 + rest, r22), g1, g2


def _refine(problem: Problem, rows: NDArray[np.intp], u: Floats, v: Floats) -> Optimum:
    """Damped Newton from every start (series ``rows[P]`` at ``u, v [P]``) inside the box; the best basin of each series.

    Stops where the next step would gain less than 1e-10 of the residual sum, and drops basins that cannot win.
    """
    low = np.array([_to_u(np.float64(problem.b_range[0])), np.log(C_MIN)])
    high = np.array([_to_u(np.float64(problem.b_range[1])), np.log(C_MAX)])
    point = np.clip(np.stack([u, v], axis=1), low, high)
    state = _project(problem.take(rows), point[:, 0], point[:, 1])
    total = 0.5 * (problem.y[rows] ** 2).sum(axis=1)
    damping = np.full(len(rows), 1e-3)
    active = np.arange(len(rows))
    for iteration in range(_ITERATIONS):
        step, gain = _newton_step(state.take(active), point[active], damping[active], low, high)
        keep = gain > 1e-10 * state.value[active] + 1e-14 * total[active]
        if iteration >= 3:
            best = np.full(len(problem.y), np.inf)
            np.minimum.at(best, rows, state.value)
            keep &= state.value[active] - 5 * gain <= best[rows[active]]
        active, step = active[keep], step[keep]
        if not len(active):
            break
        trial_point = np.clip(point[active] + step, low, high)
        trial = _project(problem.take(rows[active]), trial_point[:, 0], trial_point[:, 1])
        better = trial.value < state.value[active]
        point[active[better]] = trial_point[better]
        state.replace(active[better], trial.take(better))
        damping[active] = np.clip(damping[active] * np.where(better, 0.1, 8.0), 1e-9, 1e9)
    order = np.lexsort((state.value, rows))
    winner = order[np.searchsorted(rows[order], np.arange(len(problem.y)))]
    point = point[winner]
    edge = ((point <= low + 1e-9) | (point >= high - 1e-9)).any(axis=1)
    return Optimum(_to_b(point[:, 0]), np.exp(point[:, 1]), *state.coefficients[winner].T, edge)


def _newton_step(
    state: _State, point: Floats, damping: Floats, low: Floats, high: Floats
) -> tuple[Floats, NDArray[np.float64]]:
    """Damped Newton steps ``[P, 2]`` that respect the box, and the decrease ``[P]`` the undamped model promises.

    Unknowns on an edge that the gradient pushes outwards stay there. Where the Hessian is not positive definite the
    Gauss-Newton matrix takes its place.
    """
    gradient = state.gradient
    held = ((point <= low) & (gradient > 0)) | ((point >= high) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    free = ~held
    both = free[:, :, None] & free[:, None, :]
    eye = np.eye(2)
    hessian = np.where(both, state.hessian, eye * (~both))
    gauss = np.where(both, state.gauss, eye * (~both))
    smallest = np.linalg.eigvalsh(hessian)[:, 0]
    convex = smallest > 1e-12 * np.abs(hessian).max(axis=(1, 2))
    matrix = np.where(convex[:, None, None], hessian, gauss)
    size = np.maximum(np.einsum("pii->pi", matrix), 1e-14 * (2 * state.value + np.abs(gradient).max(axis=1))[:, None] + 1e-300)
    step = _solve_2x2(matrix + damping[:, None, None] * (size[:, :, None] * eye), gradient)
    step = np.clip(step, -_STEP_MAX, _STEP_MAX)
    promised = -(gradient * step).sum(axis=1) - 0.5 * np.einsum("pi,pij,pj->p", step, matrix, step)
    return step, np.where(np.isfinite(promised), np.maximum(promised, 0.5 * -(gradient * step).sum(axis=1)), 0.0)


def _solve_2x2(matrix: Floats, gradient: Floats) -> Floats:
    """-matrix⁻¹·gradient for stacks ``[P, 2, 2]`` of positive definite matrices and ``[P, 2]``."""
    (a, b), (_, d) = matrix.transpose(1, 2, 0)
    determinant = np.maximum(a * d - b * b, 1e-16 * a * d)
    g, h = gradient.T
    return np.stack([-(d * g - b * h) / determinant, -(a * h - b * g) / determinant], axis=1)
