"""How noisy a trajectory is: its independent points, and where along it the noise is larger than elsewhere."""

from __future__ import annotations

import numpy as np

from ma_monitor.numerics.projection import Floats, Problem, flat_time, to_b

PARAMETERS = 5
_MOST_TAKEN = 1 / 3
"""Largest share of the noise that the curve is taken to follow, where few points leave it open."""
_LEAST_LEVEL = 0.05
"""Levels below this share of the highest count as that much, where noise is taken to grow with the level."""


def noise_variance(problem: Problem, residual: Floats) -> Floats:
    """Noise variance at each point relative to its mean, ``[L, n]``, from the scaled residuals ``[L, n]`` of the fit.

    A ratio's noise is often proportional to it. The variance is a mixture of an even one and one that grows with the
    square of the fitted level, by the likelihood that each gives the residuals.
    """
    weights = problem.root**2
    level = np.abs(problem.mean[:, None] + problem.scale[:, None] * (problem.y / problem.root - residual))
    level = np.maximum(level, _LEAST_LEVEL * level.max(axis=1, keepdims=True))
    level /= level.max(axis=1, keepdims=True)
    tiny = np.finfo(float).tiny
    even = np.log((weights * residual**2).sum(axis=1) + tiny)
    growing = np.log((weights * (residual / level) ** 2).sum(axis=1) + tiny)
    growing += 2 * (weights * np.log(level)).sum(axis=1)
    points = len(np.unique(problem.s))
    share = 1 / (1 + np.exp(np.clip(0.5 * points * (growing - even), -50, 50)))[:, None]
    return np.asarray(1 - share + share * level**2 / (weights * level**2).sum(axis=1, keepdims=True))


def effective_points(s: Floats, residual: Floats) -> Floats:
    """Number of independent points worth as much as these: n·(1 - ρ)/(1 + ρ), ``[L]``.

    ρ is the correlation of neighbouring errors. That of the residuals ``[L, n]`` (each in units of its own noise) is
    lower: each of the curve's five parameters takes up a share φ/5 = (1 + ρ)/(1 - ρ)/n of the slow part of the noise,
    so that theirs is (ρ - φ)/(1 - φ), less the 2ρ/n by which any estimate of it falls short (Kendall 1954). This is
    inverted; ρ is never below 0. Points at equal times s count as one.
    """
    _, start = np.unique(s, return_index=True)
    count = np.diff(np.append(start, len(s)))
    residual = np.add.reduceat(residual, start, axis=1) / count
    n = len(count)
    square = (residual**2).sum(axis=1)
    seen = (residual[:, 1:] * residual[:, :-1]).sum(axis=1) / np.where(square > 0, square, 1.0)
    rho = np.clip(seen, 0.0, 0.9)
    for _ in range(20):
        taken = np.minimum(PARAMETERS * (1 + rho) / (1 - rho) / n, _MOST_TAKEN)
        rho = np.clip(seen + taken * (1 - seen) + 2 * rho / n, 0.0, 0.9)
    return np.asarray(n * (1 - rho) / (1 + rho))


def noise_factors(problem: Problem, point: Floats, coefficients: Floats, variance: Floats) -> Floats:
    """How much larger than under even noise the variances of K, of the peak's step and of its height are, ``[3, L]``.

    What hangs on the noisier points is less certain than an unweighted fit's formulas say. The factor is the mean of
    the noise's variance under the squared influence of the points.

    Args:
        problem: The problem, of ``L`` series.
        point: Optimum (u, v), ``[L, 2]``.
        coefficients: a0, a1, a2, ``[L, 3]``.
        variance: Relative noise variance at each point, ``[L, n]``.
    """
    b, c = to_b(point[:, 0]), np.exp(point[:, 1])
    weighted = _jacobian(problem.s, b, c, coefficients) * problem.root[:, :, None]
    size = np.linalg.norm(weighted, axis=1, keepdims=True)
    weighted /= np.where(size > 0, size, 1.0)
    inverse = np.linalg.pinv(weighted.transpose(0, 2, 1) @ weighted, rcond=1e-10, hermitian=True)
    factors = []
    for gradient in _gradients(float(problem.s[-1]), b, c, coefficients):
        influence = (weighted @ (inverse @ (gradient / np.where(size > 0, size, np.inf)[:, 0])[:, :, None]))[..., 0]
        total = (influence**2).sum(axis=1)
        share = (influence**2 * variance).sum(axis=1) / np.where(total > 0, total, 1.0)
        factors.append(np.where(total > 0, share, 1.0))
    return np.stack(factors)


def _jacobian(s: Floats, b: Floats, c: Floats, coefficients: Floats) -> Floats:
    """Derivatives of the scaled curve by a0, a1, a2, b and ln c at the times ``s [n]``: ``[L, n, 5]``."""
    b, c = b[:, None], c[:, None]
    _, a1, a2 = coefficients.T[:, :, None]
    decay, share = np.exp(-b * s), s / (c + s)
    x2 = decay * np.log1p(s / c)
    return np.stack([np.ones_like(x2), -np.expm1(-b * s), x2, s * (a1 * decay - a2 * x2), -a2 * share * decay], axis=2)


def _gradients(end: float, b: Floats, c: Floats, coefficients: Floats) -> tuple[Floats, Floats, Floats]:
    """Directions ``[L, 5]`` in which K, the peak's time and its height change (up to a factor).

    The height moves as the curve does at the peak; the time as the curve's slope does there. Without a peak in the
    window, the window's end takes its place.
    """
    _, a1, a2 = coefficients.T
    time = flat_time(b, c, a1, a2)
    s = np.where((a2 > 0) & (time >= 0) & (time <= end), time, end)
    decay, share = np.exp(-b * s), s / (c + s)
    x2 = decay * np.log1p(s / c)
    slope2 = decay / (s + c) - b * x2
    zero, one = np.zeros_like(s), np.ones_like(s)
    by_b = a1 * decay * (1 - b * s) - a2 * (x2 + s * slope2)
    by_c = -a2 * decay * (c / (c + s) ** 2 - b * share)
    height = [one, -np.expm1(-b * s), x2, s * (a1 * decay - a2 * x2), -a2 * share * decay]
    return (
        np.stack([one, one, zero, zero, zero], axis=1),
        np.stack([zero, b * decay, slope2, by_b, by_c], axis=1),
        np.stack(height, axis=1),
    )
