"""The forecast: where every layer's ratio goes, how sure that is, and what it rests on.

A mixture of simple members (``members``), weighed by their own earlier errors in this run (``mixture``), sampled as
whole paths. Strictly causal: nothing measured after ``at`` is used, only the planned schedule and length are. The same
points give the same forecast, bit for bit, live and later; nothing here is random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ma_monitor.html import table
from ma_monitor.numerics.clock import Clock, learning_rate_clock, step_clock
from ma_monitor.numerics.events import Crossing, Peak, find_peak, first_crossing, smoothed
from ma_monitor.numerics.members import horizon, member_names
from ma_monitor.numerics.mixture import Correction, Mixture, make_mixture
from ma_monitor.numerics.values import LARGEST, MIN_POINTS, none_if_not_finite

Floats = NDArray[np.float64]

QUANTILES = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
KEYS = ("p2_5", "p10", "p25", "median", "p75", "p90", "p97_5")
THRESHOLDS = (100.0, 1000.0)
"""Ratios whose first crossing is forecast unless others are asked for."""
GRID = 50
"""Steps of the grid where none is given."""
NODES = 40
"""Equal parts of the time until the scheduled end in which peaks and crossings are told apart."""
HELD = 1.5
"""How many times as fast the error grows where rates to come are not known."""
FORECAST = "forecast"
"""Status of a layer whose forecast is known."""
UNBOUNDED = 100.0
"""An asymptote above so many times the largest ratio seen has no bound that the data support."""


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
        past_runs: Share of what past runs teach in the median; the run's own mixture has the rest.
        rests_on: The same in words, and why.
    """

    at: int
    clock: str
    layers: tuple[LayerForecast, ...]
    past_runs: float
    rests_on: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as ``ma-monitor forecast --json`` prints it."""
        return {
            "at": self.at,
            "clock": self.clock,
            "past_runs": round(self.past_runs, 3),
            "rests_on": self.rests_on,
            "layers": [layer.to_dict() for layer in self.layers],
        }

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
    thresholds: Sequence[float] = THRESHOLDS,
    correct: Callable[[Mixture, int | None], Correction] | None = None,
    held: bool = False,
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
        correct: What is known from elsewhere, as a correction of the mixture up to the planned end (None if unknown).
        held: Whether the rates to come are not known, and a known one stands in their place: then ``correct`` is not
            asked, and the error grows ``HELD`` times as fast.

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
    correction = Correction.none("the in-run mixture alone")
    if known.any():
        rows = np.flatnonzero(known)
        bridged = np.stack([_bridged(seen, ratios[i]) for i in rows])
        mixture = make_mixture(clock, seen, bridged, float(_horizon_end(now, end)))
        if held:
            mixture = replace(mixture, drift=HELD * mixture.drift)
            correction = Correction.none("the in-run mixture alone, with a wider band: rates to come are not known")
        elif correct is not None:
            correction = correct(mixture, end)
        for layer in _known_layers(mixture, correction, rows + 1, future, end, thresholds):
            layers[layer.layer - 1] = layer
    return Forecast(now, clock.name, tuple(layers), correction.weight, correction.words)


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
    correction: Correction,
    numbers: NDArray[np.intp],
    future: NDArray[np.int64],
    end: int | None,
    thresholds: Sequence[float],
) -> list[LayerForecast]:
    """The forecast of every layer of a mixture."""
    now = int(mixture.steps[-1])
    last = _horizon_end(now, end)
    nodes = np.unique(np.ceil(np.linspace(now, last, NODES + 1)[1:]))
    asked = np.concatenate([nodes, [last], future]).astype(np.float64)
    paths = correction.apply(mixture.sample(asked), horizon(mixture.clock, mixture.steps[-1], asked))
    ahead = paths[:, : nodes.size]
    bands = np.exp(_quantiles(paths[:, nodes.size :], QUANTILES))
    past = smoothed(np.log(mixture.values))
    settled, leaders, names = _asymptotes(mixture), mixture.weights.argmax(axis=0), member_names(mixture.clock)
    return [
        LayerForecast(
            layer=int(number),
            steps=future,
            quantiles=bands[i, :, 1:],
            end_step=end,
            end=None if end is None else bands[i, :, 0],
            peak=find_peak(mixture.steps, past[i], float(mixture.noise[i]), nodes, ahead[i]),
            asymptote=settled[i],
            crossings={t: first_crossing(mixture.steps, mixture.values[i], nodes, ahead[i], t) for t in thresholds},
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
