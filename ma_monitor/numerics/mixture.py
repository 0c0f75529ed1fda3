"""How the members are weighed, and how wrong they have been: from their own earlier forecasts in this run.

The members are asked again at a few earlier origins, with nothing measured later, and compared with what came.
Axes as in ``members``; ``J`` origins, ``P`` sampled paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.clock import Clock, step_clock
from ma_monitor.numerics.members import INDEPENDENT, TINY, CurveGrid, horizon, member_names, member_paths, reach
from ma_monitor.numerics.values import interpolate

Floats = NDArray[np.float64]

ORIGINS = (1.25, 1.6, 2.5, 5.0)
"""Earlier origins: where the leading clock showed its present time divided by each."""
ORIGIN_POINTS = 10
"""An origin needs so many points before it."""
SCORED_POINTS = 48
"""At most so many later points are compared, evenly chosen."""
PRIOR = {"curve": 1.0, "log_trend": 1.0, "damped_trend": 1.0, "last_value": 0.5}
"""Weights before a run has shown anything. Heavier damping serves short runs better and long ones worse, which still
rise when little has been seen; what past runs teach corrects the short ones."""
PRIOR_DRIFT = 0.35
"""Standard deviation of the error in ln ratio per e-fold of time, before a run has shown its own."""
NOISE_FLOOR = 1e-3
"""Least standard deviation of a measured ln ratio."""
NOISE_STRIDES = (1, 2, 4, 8)
"""Points between which noise is read off, in numbers of measurements: a lag-1 correlation of .74 is .09 at 8."""
CURVE_PARAMETERS = 5
"""What a curve takes from the independent points it is fitted to."""
PATHS = 256
TAIL = 5
"""Degrees of freedom of the errors' distribution: its scale comes from few origins."""
_WAVES = np.array([0.5, 1.5, 3.0])
"""Frequencies of the sampled errors, in radians an e-fold of time: they bend over an e-fold or so, no faster."""


@dataclass(frozen=True, eq=False)
class Correction:
    """What is known from elsewhere of a mixture's forecast: its median is moved and its band stretched.

    Between knots it is interpolated in e-folds of time, beyond them the last holds; nothing moves now.

    Attributes:
        ahead: Knots, in e-folds of the leading clock from now, ascending, ``[K]``.
        shift: Of the median, in ln ratio, ``[L, K]``.
        below: Factor on distances below the median, ``[L, K]``.
        above: Factor on distances above it, ``[L, K]``.
        weight: Share of what is known from elsewhere in the forecast.
        words: What led to that.
    """

    ahead: Floats
    shift: Floats
    below: Floats
    above: Floats
    weight: float
    words: str

    @staticmethod
    def none(words: str) -> Correction:
        """No correction, and why."""
        nothing = np.zeros((0, 0))
        return Correction(np.zeros(0), nothing, nothing, nothing, 0.0, words)

    def apply(self, paths: Floats, ahead: Floats) -> Floats:
        """Sampled paths ``[L, G, P]`` at steps so far ``ahead [G]``, corrected."""
        if not self.ahead.size:
            return paths
        middle = np.median(paths, axis=2, keepdims=True)
        away = paths - middle

        shift = interpolate(ahead, np.append(0.0, self.ahead), np.pad(self.shift, ((0, 0), (1, 0))))
        below, above = (interpolate(ahead, self.ahead, knots) for knots in (self.below, self.above))
        away *= np.where(away < 0, below[:, :, None], above[:, :, None])
        away += middle + shift[:, :, None]
        return np.asarray(away)


@dataclass(frozen=True)
class Mixture:
    """Everything needed to forecast any later step; made of nothing but what was seen.

    Attributes:
        clock: The leading clock.
        steps: Steps seen, ``[T]``.
        values: Ratios, ``[L, T]``.
        weights: Weights of the members, of sum 1, ``[M, L]``.
        drift: Standard deviation of the error per e-fold of time, ``[L]``.
        noise: Standard deviation of a measured ln ratio, ``[L]``.
        curves: The Eq. 14 members' curves, in the order of the members.
    """

    clock: Clock
    steps: Floats
    values: Floats
    weights: Floats
    drift: Floats
    noise: Floats
    curves: tuple[CurveGrid, ...]

    def sample(self, future: Floats) -> Floats:
        """Whole paths of ln ratio, ``[L, G, P]``.

        A path follows one member, chosen with its weight, plus an error that grows with the horizon and bends slowly,
        plus an error of level. The random numbers are always the same ones and belong to a path, not to a step: what a
        path says of a step does not depend on which other steps are asked for.
        """
        members, _ = member_paths(self.clock, self.steps, self.values, future)
        ahead = horizon(self.clock, self.steps[-1], future)
        draws = _draws()
        below = np.cumsum(self.weights, axis=0)[:-1]
        chosen = (draws.member > below[:, :, None]).sum(axis=0)
        bends = np.concatenate([np.cos(ahead[:, None] * _WAVES), np.sin(ahead[:, None] * _WAVES)], axis=1)
        error = (bends @ draws.bend) * (ahead / np.sqrt(_WAVES.size))[:, None]
        paths = np.empty((len(self.values), future.size, PATHS))
        lowest, highest = reach(np.log(self.values), ahead)
        for i, path in enumerate(paths):
            np.multiply(self.drift[i], error, out=path)
            path += members[:, i].T[:, chosen[i]]
            path += self.noise[i] * draws.level
            np.clip(path, lowest[i][:, None], highest[i][:, None], out=path)
        return paths

    def asymptotes(self) -> Floats:
        """Sampled K of the Eq. 14 members, ``[L, P]``, in units of the ratio, not below 0.

        The spread is that of the curves, with the error of a forecast half an e-fold ahead: no curve is the truth.
        """
        draws = _draws()
        parts = [curves.asymptotes() for curves in self.curves]
        shares = [w[:, None] * c.weights for w, c in zip(self.weights, self.curves, strict=False)]
        share = np.cumsum(np.concatenate(shares, axis=1), axis=1)
        value, spread = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        rows = range(len(share))
        node = np.stack([np.searchsorted(share[i, :-1], draws.node * share[i, -1]) for i in rows])
        chosen, width = (np.take_along_axis(part, node, axis=1) for part in (value, spread))
        sampled = np.maximum(chosen + width * draws.level, 0.0)
        return np.asarray(sampled * np.exp(np.clip(0.5 * self.drift[:, None] * draws.bend[0], -1.0, 1.0)))


def make_mixture(clock: Clock, steps: Floats, values: Floats, until: float) -> Mixture:
    """Weighs the members for a forecast up to step ``until``, from ``steps [T]`` and ``values [L, T]`` alone."""
    now = steps[-1]
    _, curves = member_paths(clock, steps, values, steps[-1:])
    ahead = float(horizon(clock, now, np.array([until]))[0])
    prior = _prior(clock, np.log1p(until) - np.log1p(now))
    noise = _noise(clock, steps, values, curves)
    cuts, nearness = _origins(clock, steps, ahead)
    if not cuts:
        layers = len(values)
        weights = np.repeat((prior / prior.sum())[:, None], layers, axis=1)
        return Mixture(clock, steps, values, weights, np.full(layers, PRIOR_DRIFT), noise, curves)
    errors = [_errors(clock, steps, values, cut) for cut in cuts]
    size = np.stack([np.abs(error).mean(axis=2) for error, _ in errors]) + NOISE_FLOOR
    relative = np.einsum("j,jml->ml", nearness, size / size.mean(axis=1, keepdims=True))
    weights = prior[:, None] / _shrunk(relative)
    weights /= weights.sum(axis=0)
    squares = [(np.einsum("ml,mlg->lg", weights, error) ** 2).mean(axis=1) / (far**2).mean() for error, far in errors]
    own = _shrunk(np.einsum("j,jl->l", nearness, np.stack(squares))[None])[0]
    drift = np.sqrt((2 * own + PRIOR_DRIFT**2) / 3)
    return Mixture(clock, steps, values, weights, drift, noise, curves)


def _prior(clock: Clock, step_horizon: float) -> Floats:
    """Weights before a run has shown anything, ``[M]``: ``PRIOR``.

    Where the schedule is known, members in steps count less, and the less the nearer the end: they cannot see the rate
    fall, and that is what comes late. Curves in steps count half of that: they extrapolate worst.
    """
    names = member_names(clock)
    weights = np.array([PRIOR[name.removesuffix("_step").removesuffix("_learning_rate")] for name in names])
    if clock.name == "learning_rate":
        blind = step_horizon / (1 + step_horizon)
        weights *= [{"curve_step": 0.5 * blind, "log_trend_step": blind}.get(name, 1.0) for name in names]
    return weights


def _origins(clock: Clock, steps: Floats, ahead: float) -> tuple[list[int], Floats]:
    """Points before each usable origin, and how near its horizon is to that of the forecast (of sum 1, ``[J]``)."""
    times = clock.time(steps)
    found: dict[int, float] = {}
    for back in ORIGINS:
        cut = int(np.searchsorted(times, times[-1] / back, side="right"))
        if ORIGIN_POINTS <= cut < steps.size and np.unique(times[:cut]).size >= ORIGIN_POINTS:
            found.setdefault(cut, float(np.exp(-1.5 * abs(np.log(back) - ahead))))
    nearness = np.array(list(found.values()))
    return list(found), nearness / nearness.sum() if found else nearness


def _errors(clock: Clock, steps: Floats, values: Floats, cut: int) -> tuple[Floats, Floats]:
    """Errors in ln ratio ``[M, L, G]`` of the forecast from the first ``cut`` points, and their horizons ``[G]``."""
    later = np.arange(cut, steps.size)
    if later.size > SCORED_POINTS:
        later = later[np.linspace(0, later.size - 1, SCORED_POINTS).astype(int)]
    paths, _ = member_paths(clock, steps[:cut], values[:, :cut], steps[later])
    return paths - np.log(values[:, later]), horizon(clock, steps[cut - 1], steps[later])


def _shrunk(values: Floats) -> Floats:
    """``[…, L]`` drawn half way to the mean over layers: one layer's past is a small sample."""
    return np.asarray(0.5 * values + 0.5 * values.mean(axis=-1, keepdims=True))


def _noise(clock: Clock, steps: Floats, values: Floats, curves: tuple[CurveGrid, ...]) -> Floats:
    """Standard deviation of the measured ln ratio over the last half of the points, ``[L]``.

    Neighbours' noise is alike in real runs and cancels in their differences, so that points farther apart are compared
    too and the largest answer counts. The bend of the curve enlarges that; what the best curve leaves, which its misfit
    enlarges, is the other answer. The smaller counts, but never less than neighbours show.
    """
    half = np.log(values[:, steps.size // 2 :])
    by_stride = np.stack([_from_differences(half, apart) for apart in NOISE_STRIDES])
    times = [c.time(steps[steps.size // 2 :]) for c in (clock, step_clock())]
    paths = [np.log(np.maximum(c.average(t), TINY)) for c, t in zip(curves, times, strict=False)]
    left = np.min([((path - half) ** 2).mean(axis=1) for path in paths], axis=0)
    independent = INDEPENDENT * steps.size
    left *= independent / max(1.0, independent - CURVE_PARAMETERS)
    return np.asarray(np.maximum(np.minimum(by_stride.max(axis=0), np.sqrt(left)), by_stride[0]))


def _from_differences(log_values: Floats, apart: int) -> Floats:
    """Standard deviation ``[L]`` of what second differences of points so far ``apart`` show, not below the least."""
    if log_values.shape[1] <= 2 * apart:
        return np.full(len(log_values), NOISE_FLOOR)
    bend = log_values[:, 2 * apart :] - 2 * log_values[:, apart:-apart] + log_values[:, : -2 * apart]
    return np.asarray(np.maximum(1.4826 * np.median(np.abs(bend), axis=1) / np.sqrt(6), NOISE_FLOOR))


@dataclass(frozen=True)
class _Draws:
    """The random numbers of every path: member and node uniform ``[P]``, level ``[P]``, bend ``[2·waves, P]``."""

    member: Floats
    node: Floats
    level: Floats
    bend: Floats


@cache
def _draws() -> _Draws:
    """The same numbers always, in pairs of opposite sign, with errors that follow Student's t."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((PATHS // 2, 1 + 2 * _WAVES.size))
    normal /= np.sqrt((normal**2).mean(axis=0))
    scale = np.sqrt(TAIL / rng.chisquare(TAIL, (PATHS // 2, 1)))
    errors = np.concatenate([normal * scale, -normal * scale])
    strata = (np.arange(PATHS) + 0.5) / PATHS
    return _Draws(rng.permutation(strata), rng.permutation(strata), errors[:, 0], errors[:, 1:].T)
