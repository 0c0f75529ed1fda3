"""The forecast: where every layer's ratio goes, how sure that is, and what it rests on.

A mixture of simple members (``members``), weighed by their own earlier errors in this run (``mixture``), sampled as
whole paths. Strictly causal: nothing measured after ``at`` is used, only the planned schedule and length are. The same
points give the same forecast, bit for bit, live and later; nothing here is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ma_monitor.html import table
from ma_monitor.numerics.clock import Clock, learning_rate_clock, step_clock
from ma_monitor.numerics.members import member_names
from ma_monitor.numerics.mixture import Mixture, make_mixture, noise_draws
from ma_monitor.numerics.values import LARGEST, MIN_POINTS, none_if_not_finite

Floats = NDArray[np.float64]

QUANTILES = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
KEYS = ("p2_5", "p10", "p25", "median", "p75", "p90", "p97_5")
GRID = 50
"""Steps of the grid where none is given."""
NODES = 40
"""Equal parts of the time until the scheduled end in which peaks and crossings are told apart."""
SMOOTH = 7
"""Points of the moving average of the past among which a peak is looked for."""
RIVALS = 64
"""At most so many past points are drawn from for the place of a past maximum."""
MARGIN = 3.0
"""Past points lower than the highest by more standard errors of the difference were not the maximum."""
CLEAR = 12.0
"""An identified past maximum is so many above the first and the last point: of lower ones noise makes the place."""
FORECAST = "forecast"
"""Status of a layer whose forecast is known."""
UNBOUNDED = 100.0
"""An asymptote above so many times the largest ratio seen has no bound that the data support."""


@dataclass(frozen=True)
class Peak:
    """Where the whole trajectory, past and future, is largest.

    Attributes:
        step: Median over sampled paths; None where more than half of them are largest at the scheduled end.
        height: Median ratio there; None with the step.
        low: 10 % quantile of the step; None where that lies at the scheduled end.
        high: 90 % quantile of the step; None likewise.
        identified: Whether both ends of that interval lie before the scheduled end, it is narrower than half of the
            step, and a past maximum stands far above the noise, seen from the first point and from the last. More
            points around and after the maximum, or a clear bend before it, turn this true.
        probability: That the maximum comes before the scheduled end.
        status: ``past``, ``ahead``, ``not_within_schedule`` (largest at the scheduled end), or ``none`` (it never
            rose above its first points by more than noise).
    """

    step: float | None
    height: float | None
    low: float | None
    high: float | None
    identified: bool
    probability: float
    status: str


@dataclass(frozen=True)
class Asymptote:
    """Where the ratio would settle if training went on at its peak rate (K of the Eq. 14 members; 80 % interval).

    ``identified`` means that the interval is bounded and narrower than half the value: decay has been seen. Where the
    data bound it only from below, ``value`` and ``high`` are None.
    """

    value: float | None
    low: float | None
    high: float | None
    identified: bool


@dataclass(frozen=True)
class Crossing:
    """First time at or above a threshold, until the scheduled end (80 % interval of the step, if it happens)."""

    probability: float
    step: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, eq=False)
class LayerForecast:
    """The forecast of one layer. Where it is not known the quantiles are NaN and the rest is None.

    Attributes:
        layer: 1 … L.
        steps: Steps of the grid, ``[G]``.
        quantiles: Ratio at ``QUANTILES``, ``[7, G]``.
        end_step: The scheduled end, None where it is unknown.
        end: Ratio at ``QUANTILES`` at the scheduled end, ``[7]``.
        peak: Where it is largest.
        asymptote: Where it would settle.
        crossings: Threshold → first crossing.
        led_by: Name of the member with the largest weight.
        status: ``forecast``, or why it is not known.
    """

    layer: int
    steps: NDArray[np.int64]
    quantiles: Floats
    end_step: int | None
    end: Floats | None
    peak: Peak | None
    asymptote: Asymptote | None
    crossings: dict[float, Crossing | None]
    led_by: str | None
    status: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: null for what is not known."""
        bands = {key: [none_if_not_finite(v) for v in row] for key, row in zip(KEYS, self.quantiles, strict=True)}
        end = None if self.end is None else {key: none_if_not_finite(v) for key, v in zip(KEYS, self.end, strict=True)}
        return {
            "layer": self.layer,
            "steps": self.steps.tolist(),
            **bands,
            "end": None if end is None else {"step": self.end_step, **end},
            "peak": None if self.peak is None else dict(vars(self.peak)),
            "asymptote": None if self.asymptote is None else dict(vars(self.asymptote)),
            "crossings": {f"{t:g}": None if c is None else dict(vars(c)) for t, c in self.crossings.items()},
            "led_by": self.led_by,
            "status": self.status,
        }


@dataclass(frozen=True, eq=False)
class Forecast:
    """The forecast of all layers.

    Attributes:
        at: Last step whose measurement was used; 0 where there was none.
        clock: The leading clock, ``learning_rate`` where the schedule is known.
        layers: One per layer, 1 … L.
    """

    at: int
    clock: str
    layers: tuple[LayerForecast, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as ``ma-monitor forecast --json`` prints it."""
        return {"at": self.at, "clock": self.clock, "layers": [layer.to_dict() for layer in self.layers]}

    def _repr_html_(self) -> str:
        rows = [
            {"layer": one["layer"], **{f"end {key}": (one["end"] or {}).get(key) for key in ("p10", "median", "p90")}}
            | {name: one[name] for name in ("peak", "asymptote", "led_by", "status")}
            for one in self.to_dict()["layers"]
        ]
        return table(f"Forecast made at step {self.at:,}", rows)


def forecast(
    steps: ArrayLike,
    values: ArrayLike,
    *,
    at: int | None = None,
    grid: ArrayLike | None = None,
    until: int | None = None,
    lr: ArrayLike | None = None,
    total_steps: int | None = None,
    thresholds: Sequence[float] = (100.0, 1000.0),
) -> Forecast:
    """Forecasts every layer from what was measured up to step ``at``.

    Args:
        steps: Measured steps, ascending, ``[T]``.
        values: Ratios, ``[L, T]``. Points that are not finite or not above 0 are bridged; a layer with fewer than
            ``MIN_POINTS`` others, more gaps than points or a gap at its end, or a constant one, is not known.
        at: Last step to use; all by default.
        grid: Steps to forecast (those after ``at`` are kept); by default ``GRID`` equal parts up to ``until``.
        until: Last step of that grid: the scheduled end by default, or twice ``at`` where that is past or unknown.
        lr: Planned rate of the update from s to s + 1, ``[total_steps + 1]``. The clock counts steps without it.
        total_steps: The scheduled end; the end of ``lr`` by default.
        thresholds: Ratios, above 0, whose first crossing is asked for.

    Raises:
        ValueError: If the shapes do not match, steps do not ascend from 0 or later, ``lr`` is no list of rates, or a
            threshold is not above 0.
    """
    if not all(threshold > 0 for threshold in thresholds):
        raise ValueError(f"a threshold is a ratio and must be above 0, got {tuple(thresholds)}; leave it out")
    seen, ratios = _seen(steps, values, at)
    clock = _clock(lr, seen)
    now = int(seen[-1]) if seen.size else 0
    planned = total_steps if total_steps is not None or lr is None else np.asarray(lr).size - 1
    end = planned if planned is not None and planned >= now else None
    future = _grid(grid, now, until, end)
    states = [_status(row) for row in ratios]
    known = np.array([status == FORECAST for status in states], dtype=bool)
    nothing = np.full((len(QUANTILES), future.size), np.nan)
    layers = [
        LayerForecast(i, future, nothing, end, None, None, None, dict.fromkeys(thresholds), None, status)
        for i, status in enumerate(states, start=1)
    ]
    if known.any():
        rows = np.flatnonzero(known)
        bridged = np.stack([_bridged(seen, ratios[i]) for i in rows])
        mixture = make_mixture(clock, seen, bridged, float(_horizon_end(now, end)))
        for layer in _known_layers(mixture, rows + 1, future, end, thresholds):
            layers[layer.layer - 1] = layer
    return Forecast(now, clock.name, tuple(layers))


def _horizon_end(now: int, end: int | None) -> int:
    """Where peaks and crossings are looked for up to: the scheduled end, or twice the present step."""
    return end if end is not None else max(2 * now, now + 1)


def _seen(steps: ArrayLike, values: ArrayLike, at: int | None) -> tuple[Floats, Floats]:
    """Steps ``[T]`` and ratios ``[L, T]`` up to ``at``."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or y.ndim != 2 or y.shape[1] != x.size:
        raise ValueError(f"steps must be [T] and values [L, T], got shapes {x.shape} and {y.shape}")
    if x.size and not (np.isfinite(x).all() and x[0] >= 0 and (np.diff(x) > 0).all()):
        raise ValueError("steps must be finite, not negative and ascending; sort the measurements and keep one a step")
    keep = slice(None) if at is None else slice(0, int(np.searchsorted(x, at, side="right")))
    return x[keep], y[:, keep]


def _clock(lr: ArrayLike | None, seen: Floats) -> Clock:
    """The learning-rate clock if it has moved enough to carry a curve, else the step clock."""
    if lr is None:
        return step_clock()
    clock = learning_rate_clock(lr)
    return clock if np.unique(clock.time(seen)).size >= MIN_POINTS else step_clock()


def _grid(grid: ArrayLike | None, now: int, until: int | None, end: int | None) -> NDArray[np.int64]:
    if grid is not None:
        asked = np.unique(np.asarray(grid, dtype=np.int64))
        return asked[asked > now]
    last = until if until is not None else _horizon_end(now, end)
    points = np.linspace(now, max(now, last), GRID + 1)[1:]
    asked = np.unique(np.rint(points).astype(np.int64))
    return asked[asked > now]


def _usable(row: Floats) -> NDArray[np.bool_]:
    return np.isfinite(row) & (row > 1 / LARGEST) & (row < LARGEST)


def _status(row: Floats) -> str:
    """``FORECAST`` if the ratios of a layer ``[T]`` can be forecast, else why not."""
    usable = _usable(row)
    count = int(usable.sum())
    if count < MIN_POINTS:
        return f"not forecast: fewer than {MIN_POINTS} measurements are finite and above 0"
    if 2 * count < row.size:
        return "not forecast: more than half of the measurements are not finite or not above 0"
    if not usable[-1]:
        return "not forecast: the last measurement is not finite or not above 0"
    return FORECAST if np.ptp(row[usable]) > 0 else "not forecast: all values are equal"


def _bridged(steps: Floats, row: Floats) -> Floats:
    """Ratios ``[T]`` with gaps bridged by straight lines in ln ratio."""
    usable = _usable(row)
    return row if usable.all() else np.exp(np.interp(steps, steps[usable], np.log(row[usable])))


def _known_layers(
    mixture: Mixture,
    numbers: NDArray[np.intp],
    future: NDArray[np.int64],
    end: int | None,
    thresholds: Sequence[float],
) -> list[LayerForecast]:
    """The forecast of every layer of a mixture."""
    now = int(mixture.steps[-1])
    last = _horizon_end(now, end)
    nodes = np.unique(np.ceil(np.linspace(now, last, NODES + 1)[1:]))
    paths = mixture.sample(np.concatenate([nodes, [last], future]).astype(np.float64))
    ahead = paths[:, : nodes.size]
    bands = np.exp(_quantiles(paths[:, nodes.size :], QUANTILES))
    past = _smoothed(np.log(mixture.values))
    settled, leaders, names = _asymptotes(mixture), mixture.weights.argmax(axis=0), member_names(mixture.clock)
    return [
        LayerForecast(
            layer=int(number),
            steps=future,
            quantiles=bands[i, :, 1:],
            end_step=end,
            end=None if end is None else bands[i, :, 0],
            peak=_peak(mixture.steps, past[i], float(mixture.noise[i]), nodes, ahead[i]),
            asymptote=settled[i],
            crossings={t: _crossing(mixture.steps, mixture.values[i], nodes, ahead[i], t) for t in thresholds},
            led_by=names[leaders[i]],
            status=FORECAST,
        )
        for i, number in enumerate(numbers)
    ]


def _quantiles(samples: Floats, shares: Sequence[float]) -> Floats:
    """Quantiles over the last axis of ``[L, G, P]``, linear between order statistics: ``[L, shares, G]``."""
    ordered = np.sort(samples, axis=2)
    place = np.asarray(shares) * (samples.shape[2] - 1)
    lower = np.floor(place).astype(int)
    below, above = ordered[:, :, lower], ordered[:, :, np.minimum(lower + 1, samples.shape[2] - 1)]
    return np.asarray((below + (above - below) * (place - lower)).transpose(0, 2, 1))


def _asymptotes(mixture: Mixture) -> list[Asymptote]:
    low, value, high = _quantiles(mixture.asymptotes()[:, None], (0.1, 0.5, 0.9))[:, :, 0].T
    limit = UNBOUNDED * mixture.values.max(axis=1)
    out = []
    for bounds in zip(low, value, high, limit, strict=True):
        p10, median, p90, most = (float(b) for b in bounds)
        identified = p90 < most and p90 - p10 < median / 2
        bounded = p90 < most
        out.append(
            Asymptote(median if bounded else None, p10 if p10 < most else None, p90 if bounded else None, identified)
        )
    return out


def _peak(steps: Floats, past: Floats, noise: float, nodes: Floats, ahead: Floats) -> Peak:
    """The maximum over the smoothed past ``[T]`` and every sampled future ``[nodes, P]``; all in ln ratio.

    Where the past was highest is uncertain too: every point that may have been the highest, but for noise, counts as
    often as drawn noise makes it so. Noise of neighbours is alike in real runs, so that their mean is taken to be no
    better known than each of them.
    """
    error = np.sqrt(2) * noise  # standard error of a difference: smoothing is not counted on to lower it
    before = int(past.argmax())
    rivals = np.flatnonzero(past >= past[before] - MARGIN * error)
    rivals = rivals[np.unique(np.linspace(0, rivals.size - 1, RIVALS).astype(int))]
    drawn = past[rivals, None] + noise * noise_draws(rivals.size, ahead.shape[1])
    place = rivals[drawn.argmax(axis=0)]
    highest = ahead.max(axis=0)
    later = highest > past[before]
    halves = np.concatenate(
        [steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]]
    )  # a point stands for the steps nearby
    first, step, last = (
        np.where(later, nodes[ahead.argmax(axis=0)], own) for own in (halves[place], steps[place], halves[place + 1])
    )
    end = float(nodes[-1])
    quantiles = ((first, 0.1), (step, 0.5), (last, 0.9))
    low, middle, high = (float(np.quantile(places, share, method="higher")) for places, share in quantiles)
    probability = float((step < end).mean())
    if middle >= end:
        return Peak(None, None, low if low < end else None, None, False, probability, "not_within_schedule")
    rose, fell = (past[before] - past[0]) / error, (past[before] - past[-1]) / error
    status = "ahead" if middle > steps[-1] else "past" if rose > MARGIN else "none"
    if status == "none":
        return Peak(None, None, None, None, False, probability, status)
    height = float(np.exp(np.quantile(np.maximum(highest, past[before])[step < end], 0.5)))
    clear = status == "ahead" or min(rose, fell) > CLEAR
    identified = bool(high < end and high - low < middle / 2 and clear)
    return Peak(middle, height, low, high if high < end else None, identified, probability, status)


def _smoothed(log_values: Floats) -> Floats:
    """Centred moving average of ``SMOOTH`` points, of fewer at both ends, ``[L, T]``."""
    total = np.cumsum(np.pad(log_values, ((0, 0), (1, 0))), axis=1)
    at, reach = np.arange(log_values.shape[1]), _reach(log_values.shape[1])
    return np.asarray((total[:, at + reach + 1] - total[:, at - reach]) / (2 * reach + 1))


def _reach(points: int) -> NDArray[np.int64]:
    """How many neighbours on either side the moving average takes, ``[T]``."""
    at = np.arange(points)
    return np.asarray(np.minimum(np.minimum(at, at[::-1]), SMOOTH // 2))


def _crossing(steps: Floats, seen: Floats, nodes: Floats, ahead: Floats, threshold: float) -> Crossing:
    """First crossing of a threshold in the ratios seen ``[T]``, else in sampled futures ``[nodes, P]`` of ln ratio."""
    above = seen >= threshold
    if above.any():
        step = float(steps[above.argmax()])
        return Crossing(1.0, step, step, step)
    hit = ahead >= np.log(threshold)
    reached = hit.any(axis=0)
    if not reached.any():
        return Crossing(0.0, None, None, None)
    first = nodes[hit[:, reached].argmax(axis=0)]
    low, middle, high = (float(q) for q in np.quantile(first, (0.1, 0.5, 0.9), method="higher"))
    return Crossing(float(reached.mean()), middle, low, high)
