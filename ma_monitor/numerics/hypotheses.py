"""The other hypotheses of the paper's Methods, and the criteria that compare them with the curve.

Each hypothesis is one shape φ(t; θ) with one or two non-linear parameters, times an amplitude, with or without a free
offset: a separable problem again. As printed (Eq. 15 to 18) the step responses start at 0, which ratios do not; the
variants with an offset repair that. The logarithm and the power law always have one; with T the last time they are

    offset + amplitude·ln((t + tau)/T)    and    offset + amplitude·(((t + tau)/T)^exponent - 1)/exponent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ma_monitor.numerics.projection import Floats

_ROUNDS = 20
"""Gauss-Newton steps from the best node."""
_SCREEN = 256
"""Points that the search works on at most (every k-th); amplitude, offset and residuals take them all."""


@dataclass(frozen=True)
class HypothesisFits:
    """One hypothesis fitted to ``L`` series.

    Attributes:
        name: Such as ``second_order_overdamped_offset``.
        count: Number of parameters, linear and non-linear.
        parameters: Name → values ``[L]``, in units of the series and of its time.
        sse: Residual sums of squares, ``[L]``.
    """

    name: str
    count: int
    parameters: dict[str, Floats]
    sse: Floats


@dataclass(frozen=True)
class _Axis:
    """A non-linear parameter: its name, the nodes tried, and whether it is searched as a power of ten.

    ``time`` is the power of the last time T that brings the scaled parameter to units of time.
    """

    name: str
    low: float
    high: float
    nodes: int
    power_of_ten: bool = True
    time: int = 0

    def value(self, coordinate: Floats) -> Floats:
        return np.asarray(10.0**coordinate if self.power_of_ten else coordinate)


@dataclass(frozen=True)
class _Family:
    """A shape φ(s; θ): times s = t/T ``[n]`` and coordinates ``[..., d]`` give ``[..., n]``.

    ``variants`` says which hypotheses share it: name → whether the offset is free.
    """

    variants: dict[str, bool]
    axes: tuple[_Axis, ...]
    shape: Callable[..., Floats]

    def evaluate(self, s: Floats, coordinates: Floats) -> Floats:
        values = [axis.value(coordinates[..., i, None]) for i, axis in enumerate(self.axes)]
        with np.errstate(all="ignore"):
            return np.nan_to_num(self.shape(s, *values), nan=0.0, posinf=0.0, neginf=0.0)


def _first_order(s: Floats, tau: Floats) -> Floats:
    """Eq. 15."""
    return -np.expm1(-s / tau)


def _underdamped(s: Floats, omega: Floats, zeta: Floats) -> Floats:
    """Eq. 16."""
    damped = np.sqrt(1 - zeta**2)
    return np.asarray(1 - np.exp(-zeta * omega * s) * np.sin(omega * damped * s + np.arccos(zeta)) / damped)


def _critically_damped(s: Floats, omega: Floats) -> Floats:
    """Eq. 17."""
    return np.asarray(1 - np.exp(-omega * s) * (1 + omega * s))


def _overdamped(s: Floats, slow: Floats, ratio: Floats) -> Floats:
    """Eq. 18 by its two rates, -r₁ = ``slow`` and -r₂ = ``slow·ratio``: along ωₙ and ζ the valley is bent and long."""
    return np.asarray(1 - (ratio * np.exp(-slow * s) - np.exp(-slow * ratio * s)) / (ratio - 1))


def _logarithm(s: Floats, tau: Floats) -> Floats:
    return np.log(s + tau)


def _power(s: Floats, tau: Floats, exponent: Floats) -> Floats:
    """((s + τ)^p - 1)/p, which passes through ln(s + τ) at p = 0."""
    log = np.log(s + tau)
    return np.where(np.abs(exponent) < 1e-9, log, np.expm1(exponent * log) / exponent)


def _families() -> tuple[_Family, ...]:
    def both(name: str) -> dict[str, bool]:
        return {name: False, f"{name}_offset": True}

    tau = _Axis("tau", -5.0, 2.0, 71, time=1)
    omega = _Axis("omega", -2.0, 5.0, 71, time=-1)
    slow = _Axis("rate", -3.0, 5.0, 41, time=-1)
    ratio = _Axis("ratio", 0.02, 6.0, 16)
    omega_swinging = _Axis("omega", -1.0, 4.0, 101, time=-1)
    zeta = _Axis("zeta", 0.0, 0.999, 9, power_of_ten=False)
    start = _Axis("tau", -6.0, 1.5, 39, time=1)
    exponent = _Axis("exponent", -3.0, 3.0, 13, power_of_ten=False)
    return (
        _Family(both("first_order"), (tau,), _first_order),
        _Family(both("second_order_underdamped"), (omega_swinging, zeta), _underdamped),
        _Family(both("second_order_critically_damped"), (omega,), _critically_damped),
        _Family(both("second_order_overdamped"), (slow, ratio), _overdamped),
        _Family({"logarithm": True}, (start,), _logarithm),
        _Family({"power_law": True}, (start, exponent), _power),
    )


FAMILIES = _families()


def fit_hypotheses(t: Floats, y: Floats, families: Sequence[_Family] = FAMILIES) -> tuple[HypothesisFits, ...]:
    """Fits the constant, then these hypotheses, to series ``y [L, n]`` at times ``t [n]`` by least squares."""
    last = float(t[-1])
    mean = y.mean(axis=1)
    constant = HypothesisFits("constant", 1, {"K": mean}, ((y - mean[:, None]) ** 2).sum(axis=1))
    scale = np.maximum(np.abs(y).max(axis=1), np.finfo(float).tiny)
    fits = [constant]
    for family in families:
        for name, best in _fit_family(family, t / last, y / scale[:, None]).items():
            fits.append(_in_units(name, family, best, scale, last))
    return tuple(fits)


def aicc(sse: Floats, parameters: int, points: int, effective: Floats) -> Floats:
    """Akaike's corrected criterion of a least-squares fit, NaN where it is not defined.

    The noise variance counts as a parameter. The points count as ``effective`` many independent ones: residuals of real
    trajectories are autocorrelated, and the plain number would favour the larger model.
    """
    k = parameters + 1
    with np.errstate(all="ignore"):
        value = effective * np.log(sse / points) + 2 * k + 2 * k * (k + 1) / (effective - k - 1)
    return np.where((effective > k + 1) & np.isfinite(value), value, np.nan)


@dataclass(frozen=True)
class _Best:
    """Best coordinates ``[L, d]``, amplitude, offset (None: fixed at 0) and residual sum ``[L]`` of one hypothesis."""

    coordinates: Floats
    amplitude: Floats
    offset: Floats | None
    sse: Floats


def _fit_family(family: _Family, s: Floats, y: Floats) -> dict[str, _Best]:
    """For each variant: the best node of the family's grid, Gauss-Newton steps from it, then all points."""
    stride = -(-len(s) // _SCREEN)
    s_few, y_few = s[::stride], y[:, ::stride]
    axes = [np.linspace(axis.low, axis.high, axis.nodes) for axis in family.axes]
    nodes = np.array(list(product(*axes)))
    shapes = family.evaluate(s_few, nodes)
    cell = np.array([axis[1] - axis[0] for axis in axes])
    fits = {}
    for name, offset in family.variants.items():
        start = nodes[_residuals(shapes, y_few, offset).argmin(axis=1)]
        fits[name] = _finish(family, s, y, _descend(family, s_few, y_few, start, cell, offset), offset)
    return fits


def _residuals(shapes: Floats, y: Floats, offset: bool) -> Floats:
    """Residual sums ``[L, G]`` of series ``[L, n]`` with the best amplitude (and offset) of the shapes ``[G, n]``."""
    if offset:
        shapes = shapes - shapes.mean(axis=1, keepdims=True)
        y = y - y.mean(axis=1, keepdims=True)
    square = (shapes**2).sum(axis=1)
    return np.asarray((y**2).sum(axis=1)[:, None] - (y @ shapes.T) ** 2 / np.where(square > 0, square, np.inf))


def _descend(family: _Family, s: Floats, y: Floats, place: Floats, cell: Floats, offset: bool) -> Floats:
    """Damped Gauss-Newton steps (amplitude and offset projected out) from ``place [L, d]``; never uphill."""
    low, high = (np.array([getattr(axis, edge) for axis in family.axes]) for edge in ("low", "high"))
    nudge = 1e-5 * cell
    moves = np.concatenate([np.zeros((1, len(cell))), np.diag(nudge)])
    if offset:
        y = y - y.mean(axis=1, keepdims=True)
    best, value, damping = place, np.full(len(y), np.inf), np.full(len(y), 1e-3)
    matrix = np.zeros((len(y), len(cell), len(cell)))
    slope, step = np.zeros_like(place), np.zeros_like(place)
    for _ in range(_ROUNDS):
        trial = np.clip(best + step, low, high - nudge)
        shapes = family.evaluate(s, trial[:, None] + moves)
        if offset:
            shapes = shapes - shapes.mean(axis=2, keepdims=True)
        base = shapes[:, :1]
        square = np.maximum((base**2).sum(axis=2), np.finfo(float).tiny)
        amplitude = (base[:, 0] * y).sum(axis=1)[:, None] / square
        residual = y - amplitude * base[:, 0]
        change = amplitude[:, :, None] * (shapes[:, 1:] - base) / nudge[:, None]
        change -= (change * base).sum(axis=2, keepdims=True) / square[:, :, None] * base
        better = (residual**2).sum(axis=1) < value
        matrix[better] = (change @ change.transpose(0, 2, 1))[better]
        slope[better] = (change @ residual[:, :, None])[better, :, 0]
        best = np.where(better[:, None], trial, best)
        value = np.where(better, (residual**2).sum(axis=1), value)
        damping = damping * np.where(better, 0.2, 10.0)
        size = np.einsum("lii->li", matrix)
        ridge = damping[:, None] * size + 1e-12 * size.max(axis=1, keepdims=True) + np.finfo(float).tiny
        step = np.linalg.solve(matrix + ridge[:, :, None] * np.eye(len(cell)), slope[:, :, None])[..., 0]
        step = np.clip(step, -cell, cell)
    return best


def _finish(family: _Family, s: Floats, y: Floats, place: Floats, offset: bool) -> _Best:
    """Amplitude, offset and residuals on all points."""
    shape = family.evaluate(s, place)
    centre, level = (values.mean(axis=1) if offset else np.zeros(len(y)) for values in (shape, y))
    centred = shape - centre[:, None]
    square = (centred**2).sum(axis=1)
    amplitude = (centred * (y - level[:, None])).sum(axis=1) / np.where(square > 0, square, np.inf)
    constant = level - amplitude * centre
    residual = y - amplitude[:, None] * shape - constant[:, None]
    return _Best(place, amplitude, constant if offset else None, (residual**2).sum(axis=1))


def _in_units(name: str, family: _Family, best: _Best, scale: Floats, last: float) -> HypothesisFits:
    """Back to the units of the series and of time (the logarithm and the power law stay functions of t/T)."""
    parameters = {"amplitude": best.amplitude * scale}
    for i, axis in enumerate(family.axes):
        parameters[axis.name] = axis.value(best.coordinates[:, i]) * last**axis.time
    if "ratio" in parameters:
        rate, ratio = parameters.pop("rate"), parameters.pop("ratio")
        parameters |= {"omega": rate * np.sqrt(ratio), "zeta": (1 + ratio) / (2 * np.sqrt(ratio))}
    if best.offset is not None:
        parameters["offset"] = best.offset * scale
    return HypothesisFits(name, len(parameters), parameters, best.sse * scale**2)
