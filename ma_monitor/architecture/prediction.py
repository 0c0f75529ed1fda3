"""What a configuration will do: the trajectory of every layer before training, in the form of a forecast.

`prior` gives plain arrays for the live forecast; `predict` gives peak, asymptote, crossings and warnings besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ma_monitor.architecture.features import Shape, shape_of
from ma_monitor.architecture.predictor import (
    OF_MODEL,
    TIMES,
    Predictor,
    Recipe,
    coordinates,
    load_predictor,
    recipe_of,
)
from ma_monitor.errors import ConfigError
from ma_monitor.learned.correction import save_prior
from ma_monitor.learned.prior import Prior
from ma_monitor.numerics.batch import fit_curves
from ma_monitor.numerics.clock import learning_rate_clock
from ma_monitor.numerics.events import Peak, first_crossing
from ma_monitor.numerics.forecast import FORECAST, THRESHOLDS, Asymptote, LayerForecast
from ma_monitor.runs.records import Plan

Floats = NDArray[np.float64]

INTERVAL = np.array([0.1, 0.5, 0.9])
FARTHEST = 20.0
"""An asymptote above so many times the path's largest ratio has no bound: the path still rises."""
NOTHING = np.zeros(0)
"""Steps and ratios seen before training."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is expected of a shape.

    Attributes:
        shape: The shape.
        layers: Trajectories by step, in the form of a forecast made before step 0.
        distance: From the nearest shape learned from, in standard deviations of the coordinates over those.
        usual: The largest such distance among those themselves.
        warnings: What makes the prediction doubtful, in words.
    """

    shape: Shape
    layers: tuple[LayerForecast, ...]
    distance: float
    usual: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys of a forecast's document and some more."""
        told = {"distance": self.distance, "usual_distance": self.usual, "warnings": list(self.warnings)}
        layers = [layer.to_dict() for layer in self.layers]
        return {"shape": self.shape.to_dict(), **told, "at": 0, "clock": "learning_rate", "layers": layers}


@lru_cache(maxsize=1)
def packaged() -> Predictor:
    """The packaged predictor."""
    return load_predictor()


def prior(config: Any, total_steps: int, lr: ArrayLike | None = None, predictor: Predictor | None = None) -> Prior:
    """What is expected of every layer before training, as plain arrays for the live forecast.

    Args:
        config: A transformers configuration, or a `Shape`.
        total_steps: Planned updates, at least 1.
        lr: Planned rate of the update from s to s + 1, ``[total_steps + 1]``; the sweep's schedule and rate where None.
        predictor: Another than the packaged one.

    Raises:
        ConfigError: If the configuration lacks a number, or the rates are not those of such a plan.
    """
    teacher = predictor or packaged()
    shape = config if isinstance(config, Shape) else shape_of(config)
    recipe = recipe_of(_rates(teacher, total_steps, lr))
    return Prior(TIMES, teacher.quantiles(shape, recipe), teacher.trust(shape, recipe))


def write_prior(config: Any, plan: Plan, folder: Path) -> None:
    """Writes what is expected of a training into its run's directory, where forecasts find it.

    Nothing is written where the plan is not known, or the configuration is none that the sweep can say anything of.
    """
    if plan.lr is None or plan.held or not plan.total_steps or not plan.lr.max() > 0:
        return
    try:
        expected = prior(config, plan.total_steps, plan.lr)
    except (ConfigError, AttributeError):  # an own model's configuration may be anything
        return
    span = float(learning_rate_clock(plan.lr).time(plan.total_steps))
    save_prior(expected, plan.total_steps, span, folder)


def predict(
    config: Any, total_steps: int | None = None, lr: ArrayLike | None = None, predictor: Predictor | None = None
) -> Prediction:
    """What a shape will do; arguments as for `prior`, with the length of the sweep's trainings where it is None.

    Raises:
        ConfigError: As `prior` does.
    """
    teacher = predictor or packaged()
    shape = config if isinstance(config, Shape) else shape_of(config)
    total = teacher.steps if total_steps is None else total_steps
    rates = _rates(teacher, total, lr)
    recipe, clock = recipe_of(rates), learning_rate_clock(rates)
    steps = np.nan_to_num(clock.step(TIMES * clock.time(total)), nan=float(total))
    quantiles = np.exp(teacher.quantiles(shape, recipe))
    center = teacher.center(shape, recipe)
    paths = center[:, None] + teacher.scale(shape, recipe) * teacher.surprises  # [L, PATHS, G]
    settled = fit_curves(TIMES, np.exp(paths).reshape(-1, TIMES.size)).K.reshape(paths.shape[:2])
    grid = np.rint(steps).astype(np.int64)
    layers = tuple(
        LayerForecast(
            layer=number,
            steps=grid,
            quantiles=quantiles[row],
            end_step=total,
            end=quantiles[row, :, -1],
            peak=_peak(paths[row], steps),
            asymptote=_asymptote(settled[row], paths[row]),
            crossings={t: first_crossing(NOTHING, NOTHING, steps, paths[row].T, t) for t in THRESHOLDS},
            led_by="architecture",
            status=FORECAST,
        )
        for row, number in enumerate(range(1, shape.layers + 1))
    )
    distance, usual = teacher.familiarity(shape, recipe)
    warnings = _warnings(teacher, shape, recipe, distance, usual)
    return Prediction(shape, layers, distance, usual, warnings)


def _rates(teacher: Predictor, total_steps: int, lr: ArrayLike | None) -> Floats:
    """The planned rates ``[total_steps + 1]``.

    Raises:
        ConfigError: If they are not rates of so many updates.
    """
    if total_steps < 1:
        raise ConfigError(f"a training has at least 1 update, got {total_steps}; give the planned number")
    if lr is None:
        at = np.linspace(0, 1, total_steps + 1)
        relative = np.interp(at, np.linspace(0, 1, len(teacher.schedule)), teacher.schedule)
        return np.asarray(teacher.recipe.rate * relative, dtype=np.float64)
    rates: Floats = np.asarray(lr, dtype=np.float64)
    if rates.shape != (total_steps + 1,) or not (np.isfinite(rates).all() and (rates >= 0).all() and rates.any()):
        raise ConfigError(
            f"`lr` must hold total_steps + 1 = {total_steps + 1} finite rates of at least 0, not all 0, got shape "
            f"{rates.shape}; give the rate of every update and of the end"
        )
    return rates


def _peak(paths: Floats, steps: Floats) -> Peak:
    """Where whole paths of ln ratio ``[P, G]`` are largest."""
    places = steps[paths.argmax(axis=1)]
    end = float(steps[-1])
    low, middle, high = (float(q) for q in np.quantile(places, INTERVAL, method="higher"))
    probability = float((places < end).mean())
    if middle >= end:
        return Peak(None, None, low if low < end else None, None, False, probability, "not_within_schedule")
    if middle <= steps[0]:
        return Peak(None, None, None, None, False, probability, "none")
    height = float(np.exp(np.median(paths.max(axis=1)[places < end])))
    identified = high < end and high - low < middle / 2
    return Peak(middle, height, low, high if high < end else None, identified, probability, "ahead")


def _asymptote(settled: Floats, paths: Floats) -> Asymptote:
    """The level that the paths tend to, from curves fitted to each: ``[P]`` and their ln ratios ``[P, G]``."""
    most = FARTHEST * float(np.exp(np.median(paths.max(axis=1))))
    known = np.where(settled > 1, np.minimum(settled, most), 1.0)  # a ratio is at least 1; False for NaN
    low, middle, high = (float(q) for q in np.quantile(known, INTERVAL))
    bounded = low > 1 and high < most
    identified = bounded and high - low < middle / 2
    return Asymptote(middle if bounded else None, low if low > 1 else None, high if high < most else None, identified)


def _warnings(teacher: Predictor, shape: Shape, recipe: Recipe, distance: float, usual: float) -> tuple[str, ...]:
    """What makes a prediction doubtful: coordinates outside of what was seen, and a far shape."""
    out = []
    place = coordinates(shape, recipe)
    for name, value, low, high in zip(
        OF_MODEL, place, teacher.shapes.min(axis=0), teacher.shapes.max(axis=0), strict=True
    ):
        tolerance = 0.05
        if not low - tolerance <= value <= high + tolerance:
            of = (lambda x: x) if name in ("rotary share", "RMS norm") else np.exp
            seen = f"{of(low):.3g}" if low == high else f"{of(low):.3g} to {of(high):.3g}"
            effect = "; what it does is not known" if low == high else ""
            out.append(f"{name} {of(value):.3g} lies outside of what was seen ({seen}){effect}")
    if distance > usual:
        out.append(
            f"no shape learned from is near: the nearest is {distance:.1f} standard deviations away, "
            f"among themselves they are at most {usual:.1f}"
        )
    return tuple(out)
