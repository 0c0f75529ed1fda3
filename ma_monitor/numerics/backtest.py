"""How good forecasts were: each run forecast again from earlier cutoffs, beside simple rules, against what came.

| method | what it says of the rest |
|---|---|
| ``forecast`` | the median of the forecast |
| ``last_value`` | the ratio stays where it is |
| ``linear_trend``, ``log_trend`` | regression of ln ratio on t or ln(t + 1) over the last half of the points seen |
| ``curve`` | the paper's method taken literally: Eq. 14 in steps, fitted to all points seen |

A rule has no band of its own. It is given its errors in other runs from the same cutoff on: quantiles for each of
``PARTS`` parts of the rest, every run counting alike, the run's own configuration left out. Where there is no other
configuration it has none. Scores are of ln ratio; the layers of a run move together, so a run is the unit: a score is a
mean over its layers and later measurements, and runs are averaged.

Array axes: ``L`` layers that were forecast, ``G`` later measurements; quantiles at ``QUANTILES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ma_monitor.numerics.batch import fit_curves
from ma_monitor.numerics.forecast import FORECAST, QUANTILES, Forecast, LayerForecast
from ma_monitor.numerics.values import LARGEST

Floats = NDArray[np.float64]
Forecaster = Callable[[int, NDArray[np.int64]], Forecast]
"""A forecast of these steps that uses no measurement after that one."""

CUTOFFS = (10, 20, 40, 60, 80)
"""Percent of the last measured step up to which a run is taken to be seen."""
BASELINES = ("last_value", "linear_trend", "log_trend", "curve")
METHODS = ("forecast", *BASELINES)
PARTS = 4
"""Equal parts of the rest of a run, each with its own errors; fewer later measurements are not scored."""
LEVELS = (np.arange(40) + 0.5) / 40
"""Levels at which a quantile function stands for the whole, alike for every method."""
BANDS = {"in50": (2, 4), "in80": (1, 5), "in95": (0, 6)}
"""Places of the ends of each band among ``QUANTILES``."""
SMOOTH = 7
"""Points of the moving average in which a peak is looked for."""
CLEAR = 3.0
"""A peak is followed by a fall of more than so many standard errors."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One run from one cutoff on: what was said and what came, in ln ratio.

    Attributes:
        run: Its name.
        configuration: Runs that differ in nothing but the seed share it.
        percent: The cutoff.
        at: The last step seen.
        layers: The layers that were forecast.
        came: What came, ``[L, G]``; NaN where it is not finite or not above 0.
        guesses: What each method says, ``[L, G]``.
        bands: The forecast's quantiles, ``[7, L, G]``.
        past_runs: Weight of what past runs teach in the forecast.
    """

    run: str
    configuration: str
    percent: int
    at: int
    layers: tuple[LayerForecast, ...]
    came: Floats
    guesses: dict[str, Floats]
    bands: Floats
    past_runs: float


@dataclass(frozen=True)
class Score:
    """How one method did in one trial; what needs a band is None where the method has none.

    Attributes:
        run: Name of the run.
        configuration: Its configuration.
        percent: The cutoff.
        method: One of ``METHODS``.
        error: Mean abs error of ln ratio.
        crps: Mean continuous ranked probability score of ln ratio (Gneiting and Raftery 2007, section 4.2), as twice
            the mean quantile loss (Gneiting and Ranjan 2011) at ``LEVELS``; quantiles are interpolated between
            ``QUANTILES`` and constant outside them.
        interval: Mean interval score of the 80 % band (Gneiting and Raftery 2007, section 6.2).
        in50: Share of what came inside the 50 % band.
        in80: The same of the 80 % band.
        in95: The same of the 95 % band.
    """

    run: str
    configuration: str
    percent: int
    method: str
    error: float
    crps: float | None = None
    interval: float | None = None
    in50: float | None = None
    in80: float | None = None
    in95: float | None = None


SCORED = ("error", "crps", "interval", *BANDS)
"""The numbers of a score."""


def run_trials(
    steps: ArrayLike,
    values: ArrayLike,
    forecaster: Forecaster,
    *,
    run: str,
    configuration: str | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
) -> list[Trial]:
    """Forecasts a run from each cutoff.

    Args:
        steps: Measured steps, ascending, ``[T]``.
        values: Ratios, ``[L, T]``.
        forecaster: Makes the forecast.
        run: Name of the run.
        configuration: The run's name by default.
        cutoffs: Whole percents of the last measured step. One from which no layer could be forecast, or with fewer
            than ``PARTS`` later measurements, is left out.

    Raises:
        ValueError: If a cutoff is not from 1 to 99.
    """
    if not all(0 < percent < 100 for percent in cutoffs):
        raise ValueError(f"a cutoff is a percentage of the last measured step, from 1 to 99, got {tuple(cutoffs)}")
    at, ratios = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
    trials = []
    for percent in cutoffs:
        seen = int((100 * at <= percent * at[-1:]).sum())
        if not 0 < seen <= at.size - PARTS:
            continue
        made = forecaster(int(at[seen - 1]), at[seen:])
        layers = made.layers
        known = np.array([layer.status == FORECAST for layer in layers], dtype=bool)
        if not known.any():
            continue
        bands = np.log(np.stack([layer.quantiles for layer in layers if layer.status == FORECAST], axis=1))
        rules = _baselines(at[:seen], ratios[known, :seen], at[seen:])
        trials.append(
            Trial(
                run=run,
                configuration=configuration or run,
                percent=percent,
                at=int(at[seen - 1]),
                layers=tuple(layer for layer in layers if layer.status == FORECAST),
                came=_log(ratios[known, seen:]),
                guesses={"forecast": bands[QUANTILES.index(0.5)], **rules},
                bands=bands,
                past_runs=made.past_runs,
            )
        )
    return trials


def score_trials(trials: Sequence[Trial]) -> list[Score]:
    """The score of every method in every trial; rules get their bands from the other trials given."""
    usual = {(i, rule): _usual_errors(trial, rule) for i, trial in enumerate(trials) for rule in BASELINES}
    scores = []
    for trial in trials:
        others = [
            i
            for i, other in enumerate(trials)
            if other.percent == trial.percent and other.configuration != trial.configuration
        ]
        for method in METHODS:
            if method == "forecast":
                bands: Floats | None = trial.bands
            else:
                bands = _rule_bands(trial.guesses[method], [usual[i, method] for i in others])
            scores.append(_score(trial, method, bands))
    return [score for score in scores if np.isfinite(score.error)]


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over runs at each cutoff, and how the forecast's compare with the best rule's there; JSON-ready.

    Returns:
        ``cutoffs``: for each ``percent``, number of ``runs``, ``methods`` (name → mean of every score, None where a
        run has none), ``ratio`` (for ``error``, ``crps`` and ``interval``: the forecast's over the least of any rule);
        ``mean_ratio``: the mean of each ratio over cutoffs.
    """
    cutoffs: list[dict[str, Any]] = []
    for percent in sorted({score.percent for score in scores}):
        means = {
            method: _means([s for s in scores if s.percent == percent and s.method == method]) for method in METHODS
        }
        runs = len({score.run for score in scores if score.percent == percent})
        cutoffs.append({"percent": percent, "runs": runs, "methods": means, "ratio": _ratios(means)})
    names = ("error", "crps", "interval")
    columns = {name: [cutoff["ratio"][name] for cutoff in cutoffs] for name in names}
    mean_ratio = {n: None if not c or None in c else float(np.mean(c)) for n, c in columns.items()}
    return {"cutoffs": cutoffs, "mean_ratio": mean_ratio}


def true_peaks(steps: ArrayLike, values: ArrayLike) -> Floats:
    """Steps of real peaks, ``[L]``; NaN where a layer has none.

    A peak is the maximum of the moving average of ``SMOOTH`` points of ln ratio (of fewer at both ends), if the average
    then falls by more than ``CLEAR`` standard errors until the last point. Noise of neighbours is alike in real runs,
    so a point of the average is taken to be no better known than a measurement.

    Args:
        steps: Measured steps, ascending, ``[T]``.
        values: Ratios, ``[L, T]``.
    """
    at = np.asarray(steps, dtype=np.float64)
    series = _bridged(at, np.asarray(values, dtype=np.float64))
    window = np.ones(min(SMOOTH, at.size))
    weight = np.convolve(np.ones(at.size), window, "same")
    smooth = np.stack([np.convolve(row, window, "same") / weight for row in series])
    noise = 1.4826 * np.median(np.abs(series - smooth), axis=1) / np.sqrt(1 - 1 / SMOOTH)
    fall = smooth.max(axis=1) - smooth[:, -1]
    return np.where(fall > CLEAR * np.sqrt(2) * noise, at[smooth.argmax(axis=1)], np.nan)


def _log(ratios: Floats) -> Floats:
    """The logarithm, NaN where a ratio is not usable."""
    usable = np.isfinite(ratios) & (ratios > 0) & (ratios < LARGEST)
    return np.log(np.where(usable, ratios, np.nan))


def _bridged(steps: NDArray[Any], ratios: Floats) -> Floats:
    """The logarithm ``[L, T]`` with gaps bridged by straight lines; NaN for a layer of nothing else."""
    rows = [(row, np.isfinite(row)) for row in _log(ratios)]
    return np.stack([np.interp(steps, steps[known], row[known]) if known.any() else row for row, known in rows])


def _baselines(steps: NDArray[np.int64], ratios: Floats, later: NDArray[np.int64]) -> dict[str, Floats]:
    """What each rule says of the steps ``later [G]``, from the points seen: ln ratio ``[L, G]``."""
    seen = _bridged(steps, ratios)
    last = np.repeat(seen[:, -1:], later.size, axis=1)
    with np.errstate(all="ignore"):  # a curve may leave the floats, or fall below 0
        curve = fit_curves(steps, np.exp(seen)).evaluate(later)
        floor = np.minimum(1.0, np.exp(seen.min(axis=1)))[:, None]  # a largest over a median value is never below 1
        curve = np.where(np.isfinite(curve), np.log(np.maximum(curve, floor)), last)
    return {
        "last_value": last,
        "linear_trend": _line(steps, seen, later),
        "log_trend": _line(np.log1p(steps), seen, np.log1p(later)),
        "curve": curve,
    }


def _line(x: NDArray[Any], y: Floats, later: NDArray[Any]) -> Floats:
    """The regression of ``y [L, T]`` on ``x [T]`` over the last half of the points, at ``later [G]``: ``[L, G]``."""
    x, y = x[x.size // 2 :].astype(np.float64), y[:, x.size // 2 :]
    centred = x - x.mean()
    slope = y @ centred / max(float(centred @ centred), np.finfo(float).tiny)
    return np.asarray(y.mean(axis=1)[:, None] + slope[:, None] * (later - x.mean()))


def _parts(count: int) -> NDArray[np.int64]:
    """In which part of the rest each of so many later measurements lies."""
    return np.arange(count) * PARTS // count


def _usual_errors(trial: Trial, rule: str) -> list[Floats]:
    """Quantiles at ``LEVELS`` of a rule's errors in each part of the rest; nothing where nothing could be compared."""
    errors, parts = trial.came - trial.guesses[rule], _parts(trial.came.shape[1])
    known = [part[np.isfinite(part)] for part in (errors[:, parts == i] for i in range(PARTS))]
    return [np.quantile(part, LEVELS) if part.size else part for part in known]


def _rule_bands(guess: Floats, usual: Sequence[list[Floats]]) -> Floats | None:
    """A rule's quantiles ``[7, L, G]`` by its errors in other runs; None where there is no other."""
    pooled = [np.concatenate([errors[part] for errors in usual]) if usual else np.empty(0) for part in range(PARTS)]
    if not all(part.size for part in pooled):
        return None
    shift = np.stack([np.quantile(part, QUANTILES) for part in pooled], axis=1)  # [7, PARTS]
    return np.asarray(guess + shift[:, None, _parts(guess.shape[1])])


def _score(trial: Trial, method: str, bands: Floats | None) -> Score:
    known = np.isfinite(trial.came)
    came, guess = trial.came[known], trial.guesses[method][known]
    error = float(np.abs(guess - came).mean()) if came.size else np.nan
    if bands is None or not came.size:
        return Score(trial.run, trial.configuration, trial.percent, method, error)
    own = bands[:, known]
    low, high = own[BANDS["in80"][0]], own[BANDS["in80"][1]]
    outside = np.maximum(low - came, 0) + np.maximum(came - high, 0)
    inside = [float(((own[a] <= came) & (came <= own[b])).mean()) for a, b in BANDS.values()]
    return Score(
        trial.run,
        trial.configuration,
        trial.percent,
        method,
        error,
        _crps(own, came),
        float((high - low + 2 / 0.2 * outside).mean()),
        *inside,
    )


def _crps(bands: Floats, came: Floats) -> float:
    """Mean of twice the quantile loss over ``LEVELS``; ``bands [7, n]``, ``came [n]``."""
    place = np.interp(LEVELS, QUANTILES, np.arange(len(QUANTILES)))
    lower = np.minimum(place.astype(int), len(QUANTILES) - 2)
    guess = bands[lower] + (bands[lower + 1] - bands[lower]) * (place - lower)[:, None]
    missed = came - guess
    return float(2 * np.maximum(LEVELS[:, None] * missed, (LEVELS[:, None] - 1) * missed).mean())


def _means(scores: Sequence[Score]) -> dict[str, float | None]:
    """The mean of every number, None where one lacks it."""
    columns = {name: [getattr(score, name) for score in scores] for name in SCORED}
    return {name: None if not c or None in c else float(np.mean(c)) for name, c in columns.items()}


def _ratios(means: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """The forecast's score over the best rule's."""
    out: dict[str, float | None] = {}
    for name in ("error", "crps", "interval"):
        own, rules = means["forecast"][name], [means[rule][name] for rule in BASELINES]
        known = [rule for rule in rules if rule is not None]
        out[name] = own / min(known) if own is not None and known and min(known) > 0 else None
    return out
