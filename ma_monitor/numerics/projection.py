"""The separable least-squares problem of Eq. 14, for many series at once (variable projection, Golub & Pereyra 1973).

Given (β, τ₀) the curve is linear in (A₁, A₂, K), so only two unknowns are searched for. All work is in scaled form:
s = (t - t_min)/T with T the last time, b = βT, c = (τ₀ + t_min)/T, and for each (b, c) the columns

    1,   X₁ = 1 - e^(-bs),   X₂ = e^(-bs)·ln(1 + s/c)

which span the same functions as 1, e^(-βt), e^(-βt)·ln(t + τ₀), but stay apart where those fall together: as b → 0
X₁ becomes s (not a second constant), as c → ∞ X₂ becomes e^(-bs)·s, as c → 0 it becomes a single first point.
The search runs in u = ln(1 + b/knee) and v = ln c.

Array axes: ``L`` series, ``P`` problems (one place in the box for one series), ``n`` points, ``B``, ``C`` grid nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import wrightomega

Floats = NDArray[np.float64]
Index = NDArray[np.intp]

B_MAX = 1e3
"""Upper edge of b = βT."""
C_MIN, C_MAX = 1e-6, 30.0
"""Edges of c = (τ₀ + t_min)/T."""
_B_SPAN_MIN = 1e-5
"""Lowest b that is searched: below, the derivatives by b drown in rounding errors of the order of 1/b²."""
_B_SPAN_ZERO = 3e-9
"""Stands for b = 0, tried where the search ends on its lowest b: the curve is then a logarithm plus a straight line to
eight digits, while A₂ and K, which grow as 1/b, still cancel cleanly in floats."""
_B_SHIFT_MAX = 400.0
"""Largest b·t_min/T: A₁ and A₂ carry the factor e^(b·t_min/T), which must leave room in a float."""
_B_KNEE = 0.05
"""u is linear in b below this (the optimum may sit on the edge b = 0), logarithmic above."""
RANK = 1e-9
"""A column whose part orthogonal to the others is below this (root mean square) is left out: its coefficient would
be so large that the curve, evaluated in floats, would be noise."""
GRID = 36
"""Nodes of the grid in b and in c."""
BLOCK = 24_000
"""Floats in one array of a block of places: what a processor's cache holds of several such arrays."""
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
    def low(self) -> Floats:
        """Lower edges of (u, v)."""
        return np.array([to_u(np.float64(_B_SPAN_MIN) / self.s[-1]), np.log(C_MIN)])

    @property
    def zero(self) -> float:
        """The u that stands for b = 0."""
        return float(to_u(np.float64(_B_SPAN_ZERO) / self.s[-1]))

    @property
    def high(self) -> Floats:
        """Upper edges of (u, v)."""
        b = B_MAX if self.first <= 0 else min(B_MAX, _B_SHIFT_MAX * self.last / self.first)
        return np.array([to_u(np.float64(b)), np.log(C_MAX)])

    def take(self, rows: Index) -> Problem:
        """The problem with these series only (repeated where an index is)."""
        root = self.root if len(self.root) == 1 else self.root[rows]
        return replace(self, root=root, y=self.y[rows], mean=self.mean[rows], scale=self.scale[rows])

    def binned(self, most: int) -> Problem:
        """The problem on about ``most`` points: neighbours close in ln(s) are averaged.

        The curve moves little within such a bin, so the residual sum changes by a constant per series and little else.
        """
        if len(self.s) <= most:
            return self
        gap = np.diff(np.log(np.maximum(self.s, self.s[self.s > 0][0])))
        low, high = 0.0, float(gap.sum())  # of a bin's width in ln(s); a gap wider than that stays as it is
        for _ in range(50):
            width = 0.5 * (low + high)
            low, high = (width, high) if np.minimum(gap / width, 1.0).sum() > most else (low, width)
        cell = np.floor(np.cumsum(np.minimum(gap / high, 1.0)) + 1e-9)
        starts = 1 + np.flatnonzero(np.diff(cell, prepend=0.0))
        starts = np.union1d(starts, [0, 1, len(self.s) - 1])
        weight = np.add.reduceat(self.root**2, starts, axis=1)
        mean = self.root.mean(axis=0) ** 2
        s = np.add.reduceat(mean * self.s, starts) / np.add.reduceat(mean, starts)
        return replace(
            self, s=s, root=np.sqrt(weight), y=np.add.reduceat(self.root * self.y, starts, axis=1) / np.sqrt(weight)
        )


def make_problem(t: Floats, y: Floats, weights: Floats | None) -> Problem:
    """Scales series ``y [L, n]`` at times ``t [n]`` (ascending, not all equal); weights ``[L, n]``, None for equal."""
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


def to_u(b: Floats | np.float64) -> Floats:
    """The search's first coordinate."""
    return np.asarray(np.log1p(b / _B_KNEE))


def to_b(u: Floats) -> Floats:
    """Back to b from the search's first coordinate."""
    return np.asarray(_B_KNEE * np.expm1(u))


def grid_nodes(problem: Problem, size: int) -> tuple[Floats, Floats]:
    """Nodes in b ``[B]`` (both edges; the first stands for 0) and in c ``[C]``, log-spaced, ``size`` of each."""
    low, high = float(to_b(problem.low[0])), float(to_b(problem.high[0]))
    spread = np.geomspace(min(0.02, high / 2), high, size - 1)
    return np.concatenate([[low], spread]), np.geomspace(C_MIN, C_MAX, size)


def grid_residuals(problem: Problem, b: Floats, c: Floats) -> Floats:
    """Residual sums of squares of the projected problem at every (b, c), ``[L, B, C]``, from shared matrix products."""
    size = max(1, _CHUNK // (len(b) * len(problem.s))) if len(problem.root) == 1 else 1
    log = np.log1p(problem.s / c[:, None])
    decay = np.exp(-b[:, None] * problem.s)
    parts = []
    for start in range(0, len(problem.y), size):
        root = problem.root[0] if len(problem.root) == 1 else problem.root[start]
        parts.append(_grid_part(problem.s, root, problem.y[start : start + size], b, decay, log))
    return np.concatenate(parts)


def _grid_part(s: Floats, root: Floats, y: Floats, b: Floats, decay: Floats, log: Floats) -> Floats:
    """Residual sums of squares ``[L, B, C]`` of series ``y [L, n]`` that share the weights root² ``[n]``.

    X₂ is a function of b times one of c, so each of its inner products over all (b, c) is one matrix product.
    """
    weights = root**2
    first = -np.expm1(-b[:, None] * s)
    first -= (first @ weights)[:, None]
    norm = np.sqrt(first**2 @ weights)
    first /= np.where(norm > 0, norm, 1.0)[:, None]
    weighted = decay * weights
    mean = weighted @ log.T
    square = (weighted * decay) @ (log**2).T
    cross = (weighted * first) @ log.T
    y_first = y @ (first * root).T
    y_second = ((decay * root)[None] * y[:, None]).reshape(-1, len(s)) @ log.T
    y_second = y_second.reshape(len(y), len(b), -1)
    apart = square - mean**2 - cross**2
    independent = apart > np.maximum(1e-11 * square, RANK**2)
    gain = (y_second - y_first[:, :, None] * cross) ** 2 / np.where(independent, apart, np.inf)
    return np.asarray((y**2).sum(axis=1)[:, None, None] - y_first[:, :, None] ** 2 - gain)


@dataclass(frozen=True)
class Columns:
    """The columns X at one (b, c) per problem, orthonormalised: X = QR with Q = (root, q1, q2).

    Attributes:
        q1: First orthonormal column, ``[P, n]``.
        q2: Second one, ``[P, n]``.
        residual: What they leave of y, ``[P, n]``.
        decay: e^(-bs), times ``root``, ``[P, n]``.
        second: X₂, times ``root``, ``[P, n]``.
        triangle: r01, r02, r11, r12, r22, ``[5, P]``; infinite on the diagonal for a column that is left out.
        along: Components of y along q1 and q2, ``[2, P]``.
    """

    q1: Floats
    q2: Floats
    residual: Floats
    decay: Floats
    second: Floats
    triangle: Floats
    along: Floats


@dataclass(frozen=True)
class State:
    """The projected problem at one (u, v) per problem; arrays lead with ``P``.

    Attributes:
        value: Half the residual sum of squares.
        gradient: By (u, v), ``[P, 2]``.
        hessian: Exact, ``[P, 2, 2]``.
        coefficients: a0, a1, a2 of the columns 1, X₁, X₂, ``[P, 3]``.
    """

    value: Floats
    gradient: Floats
    hessian: Floats
    coefficients: Floats

    def take(self, rows: Index | NDArray[np.bool_]) -> State:
        """The state of these problems only."""
        return State(*(getattr(self, field.name)[rows] for field in fields(self)))

    def write(self, rows: Index, other: State) -> None:
        """Writes the other's entries, in order, at these indices."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)


def columns(problem: Problem, u: Floats, v: Floats) -> Columns:
    """The columns at one (u, v) per series of the problem; modified Gram-Schmidt with one second pass."""
    s, root, y = problem.s, problem.root, problem.y
    q1 = -to_b(u)[:, None] * s
    np.expm1(q1, out=q1)
    decay = (q1 + 1) * root
    q1 *= -root
    second = np.log1p(s / np.exp(v)[:, None])
    second *= decay
    q2 = second.copy()
    r01, r02 = dots(q1, root), dots(q2, root)
    q1 -= r01[:, None] * root
    q2 -= r02[:, None] * root
    r11 = np.sqrt(dots(q1, q1))
    r11[r11 == 0] = np.inf
    q1 /= r11[:, None]
    r12 = dots(q1, q2)
    q2 -= r12[:, None] * q1
    rest = dots(q1, q2)
    q2 -= rest[:, None] * q1
    r22 = np.sqrt(dots(q2, q2))
    r22[r22 < RANK] = np.inf
    q2 /= r22[:, None]
    g1, g2 = dots(q1, y), dots(q2, y)
    residual = y - g1[:, None] * q1
    residual -= g2[:, None] * q2
    return Columns(q1, q2, residual, decay, second, np.stack([r01, r02, r11, r12 + rest, r22]), np.stack([g1, g2]))


def project(problem: Problem, rows: Index, point: Floats) -> State:
    """Value, exact gradient and exact Hessian of half the projected residual sum.

    Args:
        problem: The problem.
        rows: Series of each place, ``[P]``.
        point: Places (u, v), ``[P, 2]``.
    """
    size = max(1, BLOCK // len(problem.s))
    parts = [
        _project_block(problem.take(rows[i : i + size]), *point[i : i + size].T) for i in range(0, len(rows), size)
    ]
    return State(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(State)))


def _project_block(problem: Problem, u: Floats, v: Floats) -> State:
    """``project`` for a block of places, one per series of the problem.

    With F(θ) = min over a of ½·|y - X(θ)a|² and fᵢ = (∂X/∂θᵢ)a: ∂F/∂θᵢ = -r·fᵢ, and the Hessian is the Schur complement
    of the full five-parameter one, fᵢ·fⱼ - r·fᵢⱼ - mᵢ·mⱼ with X = QR and mᵢ = Qᵀfᵢ - R⁻ᵀ(∂X/∂θᵢ)ᵀr.
    """
    at = columns(problem, u, v)
    r01, r02, r11, r12, r22 = at.triangle
    a2 = at.along[1] / r22
    a1 = (at.along[0] - r12 * a2) / r11
    s, root, residual = problem.s, problem.root, at.residual
    share = s / (np.exp(v)[:, None] + s)
    by_b1, by_b2, by_v2 = s * at.decay, -s * at.second, -share * at.decay  # ∂X₁/∂b, ∂X₂/∂b, ∂X₂/∂ln c
    fb, fv = a1[:, None] * by_b1 + a2[:, None] * by_b2, a2[:, None] * by_v2
    r_b1, r_b2, r_v2 = dots(residual, by_b1), dots(residual, by_b2), dots(residual, by_v2)
    z1 = r_b1 / r11
    z2 = (r_b2 - r12 * z1) / r22
    mb = dots(fb, root), dots(at.q1, fb) - z1, dots(at.q2, fb) - z2
    mv = dots(fv, root), dots(at.q1, fv), dots(at.q2, fv) - r_v2 / r22
    # The second derivatives of X bring factors of -s and of share - 1: r·f_bb = -(rs)·f_b, and so on.
    turned = residual * s
    bb = dots(fb, fb) + dots(turned, fb) - sum(m * m for m in mb)
    bv = dots(fb, fv) + dots(turned, fv) - sum(m * n for m, n in zip(mb, mv, strict=True))
    vv = dots(fv, fv) + dots(residual * (1 - share), fv) - sum(m * m for m in mv)
    by_u = to_b(u) + _B_KNEE  # db/du, and also d²b/du²
    slope = -(a1 * r_b1 + a2 * r_b2)
    uu = bb * by_u**2 + slope * by_u
    return State(
        value=0.5 * dots(residual, residual),
        gradient=np.stack([slope * by_u, -a2 * r_v2], axis=1),
        hessian=np.stack([uu, bv * by_u, bv * by_u, vv], axis=1).reshape(-1, 2, 2),
        coefficients=np.stack([-(r01 * a1 + r02 * a2), a1, a2], axis=1),
    )


def flat_time(b: Floats, c: Floats, a1: Floats, a2: Floats) -> Floats:
    """Scaled time where the curve with these coefficients is flat; infinite beyond the range of floats."""
    with np.errstate(all="ignore"):
        omega = np.real(wrightomega(-a1 / a2 - np.log(b * c)))
        return np.asarray(1 / (b * omega) - c)


def dots(a: Floats, b: Floats) -> Floats:
    """Inner products along the last axis, with broadcasting."""
    if b.ndim == 2 and len(b) == 1 and a.ndim == 2:
        return np.asarray(a @ b[0])
    return np.asarray((a[..., None, :] @ b[..., :, None])[..., 0, 0])
