"""The other hypotheses of the paper's Methods, and the criteria that compare them with the curve.

Each hypothesis is one shape φ(t; θ) with one or two non-linear parameters, times an amplitude, with or without a free
offset: a separable problem again. As printed (Eq. 15 to 18) the step responses start at 0, which ratios do not; the
variants with an offset repair that. The logarithm and the power law have an offset always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from ma_monitor.numerics.projection import Floats

_CHUNK = 2_000_000
_ROUNDS = 12
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
    """A shape φ(s; θ): times s = t/T ``[n]`` and coordinates ``[..., d]`` give ``[..., n]``."""

    name: str
    axes: tuple[_Axis, ...]
    shape: Callable[..., Floats]
    offset: bool

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


def _overdamped(s: Floats, omega: Floats, beyond: Floats) -> Floats:
    """Eq. 18 with ζ = 1 + ``beyond``; r₁ = -ω/(ζ + √(ζ² - 1)), which does not cancel."""
    spread = np.sqrt(beyond * (2 + beyond))
    fast = -omega * (1 + beyond + spread)
    slow = -omega / (1 + beyond + spread)
    return np.asarray(1 - (fast * np.exp(slow * s) - slow * np.exp(fast * s)) / (fast - slow))


def _logarithm(s: Floats, tau: Floats) -> Floats:
    return np.log(s + tau)


def _power(s: Floats, tau: Floats, exponent: Floats) -> Floats:
    """((s + τ)^p - 1)/p, which passes through ln(s + τ) at p = 0."""
    log = np.log(s + tau)
    return np.where(np.abs(exponent) < 1e-9, log, np.expm1(exponent * log) / exponent)


def _families() -> tuple[_Family, ...]:
    tau = _Axis("tau", -5.0, 2.0, 141, time=1)
    omega = _Axis("omega", -2.0, 5.0, 57, time=-1)
    swing = _Axis("omega", -1.0, 2.5, 85, time=-1)
    zeta = _Axis("zeta", 0.0, 0.999, 15, power_of_ten=False)
    beyond = _Axis("zeta_minus_1", -3.0, 2.0, 21)
    tau_log = _Axis("tau", -6.0, 1.5, 76, time=1)
    exponent = _Axis("exponent", -3.0, 3.0, 25, power_of_ten=False)
    printed = (
        _Family("first_order", (tau,), _first_order, False),
        _Family("second_order_underdamped", (swing, zeta), _underdamped, False),
        _Family(
            "second_order_critically_damped", (_Axis("omega", -2.0, 5.0, 141, time=-1),), _critically_damped, False
        ),
        _Family("second_order_overdamped", (omega, beyond), _overdamped, False),
    )
    with_offset = tuple(_Family(f"{f.name}_offset", f.axes, f.shape, True) for f in printed)
    own = (
        _Family("logarithm", (tau_log,), _logarithm, True),
        _Family("power_law", (tau_log, exponent), _power, True),
    )
    return (*printed, *with_offset, *own)


FAMILIES = _families()


def fit_hypotheses(t: Floats, y: Floats) -> tuple[HypothesisFits, ...]:
    """Fits every hypothesis to series ``y [L, n]`` at times ``t [n]`` by least squares; the constant comes first."""
    last = float(t[-1])
    mean = y.mean(axis=1)
    constant = HypothesisFits("constant", 1, {"K": mean}, ((y - mean[:, None]) ** 2).sum(axis=1))
    scale = np.maximum(np.abs(y).max(axis=1), 1e-300)
    fits = (_fit_family(family, t / last, y / scale[:, None]) for family in FAMILIES)
    return (constant, *(_in_units(family, fit, scale, last) for family, fit in zip(FAMILIES, fits, strict=True)))


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
    """Best coordinates ``[L, d]``, amplitude, offset and residual sum ``[L]`` of one family."""

    coordinates: Floats
    amplitude: Floats
    offset: Floats
    sse: Floats


def _fit_family(family: _Family, s: Floats, y: Floats) -> _Best:
    """The best node of the family's grid, then a shrinking net around it, then the linear parameters on all points."""
    stride = -(-len(s) // _SCREEN)
    s_few, y_few = s[::stride], y[:, ::stride]
    axes = [np.linspace(axis.low, axis.high, axis.nodes) for axis in family.axes]
    nodes = np.array(list(product(*axes)))
    best = np.full(len(y), np.inf)
    chosen = np.zeros(len(y), dtype=np.intp)
    size = max(1, _CHUNK // len(s_few))
    for start in range(0, len(nodes), size):
        residual = _residuals(family.evaluate(s_few, nodes[start : start + size]), y_few[:, None], family.offset)
        index = residual.argmin(axis=1)
        value = residual[np.arange(len(y)), index]
        chosen = np.where(value < best, start + index, chosen)
        best = np.minimum(best, value)
    place = nodes[chosen]
    step = np.array([axis[1] - axis[0] for axis in axes])
    low, high = np.array([a[0] for a in axes]), np.array([a[-1] for a in axes])
    stencil = np.array(list(product((0.0, -1.0, -0.5, 0.5, 1.0), repeat=len(axes))))
    for _ in range(_ROUNDS):
        around = np.clip(place[:, None] + stencil * step, low, high)
        residual = _residuals(family.evaluate(s_few, around), y_few[:, None], family.offset)
        place = around[np.arange(len(y)), residual.argmin(axis=1)]
        step = step / 2
    return _linear(family, family.evaluate(s, place), place, y)


def _residuals(shape: Floats, y: Floats, offset: bool) -> Floats:
    """Residual sums ``[L, G]`` of the best amplitude (and offset) for shapes ``[G, n]`` or ``[L, G, n]``."""
    if offset:
        shape = shape - shape.mean(axis=-1, keepdims=True)
        y = y - y.mean(axis=-1, keepdims=True)
    square = (shape**2).sum(axis=-1)
    cross = (shape @ y[:, 0].T).T if shape.ndim == 2 else (shape @ y.transpose(0, 2, 1))[..., 0]
    return np.asarray((y**2).sum(axis=-1) - cross**2 / np.where(square > 0, square, np.inf))


def _linear(family: _Family, shape: Floats, place: Floats, y: Floats) -> _Best:
    centre = shape.mean(axis=1) if family.offset else np.zeros(len(y))
    level = y.mean(axis=1) if family.offset else np.zeros(len(y))
    centred = shape - centre[:, None]
    square = (centred**2).sum(axis=1)
    amplitude = (centred * (y - level[:, None])).sum(axis=1) / np.where(square > 0, square, np.inf)
    offset = level - amplitude * centre
    residual = y - amplitude[:, None] * shape - offset[:, None]
    return _Best(place, amplitude, offset, (residual**2).sum(axis=1))


def _in_units(family: _Family, best: _Best, scale: Floats, last: float) -> HypothesisFits:
    """Back to the units of the series and of time (the shape itself stays one of t/T for the last two families)."""
    parameters = {"amplitude": best.amplitude * scale}
    for i, axis in enumerate(family.axes):
        parameters[axis.name] = axis.value(best.coordinates[:, i]) * last**axis.time
    if family.offset:
        parameters["offset"] = best.offset * scale
    return HypothesisFits(family.name, len(parameters), parameters, best.sse * scale**2)
