"""From a shape to trajectories: regressions over measured trainings, calibrated on whole models held out.

What is predicted is ln ratio of every layer over relative time, not the five parameters of its curve: many sets of
those make one curve. Boosted trees and a ridge regression each say it, and their mean is taken: trees go in steps where
shapes are few, straight lines miss what bends. Layers of one training are not independent: every error the predictor is
judged or calibrated by is that of shapes it had not seen, all seeds of a shape together.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.architecture.features import Shape, layer_features
from ma_monitor.architecture.sweep import UNREADABLE, Training
from ma_monitor.errors import ConfigError, SourceError
from ma_monitor.learned.boosting import Trees, import_xgboost, read_trees
from ma_monitor.learned.prior import LEVELS
from ma_monitor.numerics.clock import learning_rate_clock

Floats = NDArray[np.float64]

PACKAGED = Path(__file__).with_name("data") / "predictor.npz"
TIMES = np.linspace(0, 1, 31) ** 2
"""Relative times at which trajectories are predicted: shares of all updates, each weighed by its rate."""
SMOOTH = 5
"""Measurements of the moving average of ln ratio that is predicted: a single one carries its batch's noise."""
OF_MODEL = ("depth", "width", "head size", "MLP / width", "vocabulary", "rotary share", "RMS norm", "rate", "updates")
"""Columns of a model's coordinates; all but rotary share and norm as logarithms."""

UNVARIED = 1e-6
"""Coordinates with a smaller standard deviation count as alike in all trainings."""
UNIT = 0.08
"""What then stands for the standard deviation, 8 %. Nothing is known of what such a coordinate does: the farther off it
is, the less sure is the answer. Chosen so that 80 % intervals held on twelve trainings of other recipes; on thirty
(``benchmarks/predictor.py prior``) they hold 79 %."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, as far as the predictor heeds it.

    Attributes:
        rate: Highest learning rate.
        updates: Sum over all updates of rate / highest rate.
    """

    rate: float
    updates: float


def coordinates(shape: Shape, recipe: Recipe) -> Floats:
    """A model's and its recipe's place among all, ``[len(OF_MODEL)]``."""
    sizes = (shape.layers, shape.width, shape.head_size, shape.mlp / shape.width, shape.vocabulary)
    return np.array([*np.log(sizes), shape.rotary_share, shape.rms_norm, *np.log(astuple(recipe))], dtype=np.float64)


def places(layers: int) -> Floats:
    """A layer's place in the depth, ``[L, 3]``: relative, and how near to either end, where layers differ most."""
    layer = np.arange(1, layers + 1)
    return np.stack([2 * layer / layers, 2 / layer, 2 / (layers + 1 - layer)], axis=1)


def recipe_of(lr: Floats) -> Recipe:
    """The recipe of a schedule ``lr[s]``, s = 0 … planned end."""
    clock = learning_rate_clock(lr)
    return Recipe(float(np.max(lr)), float(clock.time(len(lr) - 1)))


def log_trajectories(training: Training) -> Floats:
    """The ln ratio of every layer at ``TIMES``, from a moving average over measurements: ``[L, len(TIMES)]``."""
    values = np.log(training.ratios)
    reach = SMOOTH // 2
    padded = np.pad(values, ((0, 0), (reach, reach)), mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, SMOOTH, axis=1).mean(axis=2)
    out = np.stack([np.interp(TIMES, training.clock, row) for row in smooth])
    out[:, 0] = values[:, 0]  # the rise is steepest right after the start, whose own value is known well
    return out


@dataclass(frozen=True, eq=False)
class Table:
    """Trainings as rows, a row a layer.

    Attributes:
        features: What both regressions see, ``[N, F]``.
        models: Coordinates, ``[N, len(OF_MODEL)]``.
        group: Number of the row's shape, alike for its seeds, ``[N]``.
        training: Number of the row's training, ``[N]``.
        values: ln ratio at ``TIMES``, ``[N, len(TIMES)]``.
    """

    features: Floats
    models: Floats
    group: NDArray[np.int64]
    training: NDArray[np.int64]
    values: Floats

    @property
    def shapes(self) -> Floats:
        """Coordinates of every shape, once each, ``[shapes, len(OF_MODEL)]``."""
        return self.models[np.unique(self.group, return_index=True)[1]]

    @property
    def weights(self) -> Floats:
        """Weights of the rows: each shape counts once, ``[N]``."""
        _, inverse, counts = np.unique(self.group, return_inverse=True, return_counts=True)
        return np.asarray(1 / counts[inverse] / len(counts))


def row_features(shape: Shape, recipe: Recipe) -> Floats:
    """What is seen of every layer: the paper's features, its place from either end, and the recipe: ``[L, F]``."""
    own = np.tile(np.log(astuple(recipe)), (shape.layers, 1))
    return np.hstack([layer_features(shape), places(shape.layers), own])


def make_table(trainings: Sequence[Training]) -> Table:
    """Trainings as a table; those of equal coordinates are seeds of one shape."""
    known: dict[bytes, int] = {}
    parts = []
    for number, one in enumerate(trainings):
        recipe = recipe_of(one.lr)
        place = coordinates(one.shape, recipe)
        group = known.setdefault(np.round(place, 6).tobytes(), len(known))
        rows = one.shape.layers
        parts.append(
            (
                row_features(one.shape, recipe),
                np.tile(place, (rows, 1)),
                np.full(rows, group),
                np.full(rows, number),
                log_trajectories(one),
            )
        )
    return Table(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Predictor:
    """What trainings teach about a shape.

    Attributes:
        trees: XGBoost's model, an output a time; as JSON.
        slopes: Those of the ridge regression, an output a time, ``[F, G]``.
        level: What it says where all features are 0, ``[G]``.
        ends: Least and largest value of every feature learned from: lines are not drawn beyond, ``[2, F]``.
        shapes: Coordinates of the shapes learned from, ``[shapes, len(OF_MODEL)]``.
        surprises: Errors on shapes held out as whole trajectories, over their scale, each shape alike: ``[P, G]``.
        spread: How far quantiles at ``LEVELS`` lie from the center, at a scale of 1, ``[len(LEVELS), G]``.
        schedule: Rates of the usual schedule relative to its highest, at equal shares of its steps, ``[SHARES]``.
        steps: Updates of the usual training.
    """

    trees: bytes
    slopes: Floats
    level: Floats
    ends: Floats
    shapes: Floats
    surprises: Floats
    spread: Floats
    schedule: Floats
    steps: int

    @cached_property
    def _model(self) -> Trees:
        document = json.loads(self.trees)
        return read_trees(document, int(document["learner"]["learner_model_param"]["num_feature"]))

    @property
    def recipe(self) -> Recipe:
        """The usual recipe: medians over the shapes."""
        return Recipe(*np.exp(np.median(self.shapes[:, -2:], axis=0)).tolist())

    def center(self, shape: Shape, recipe: Recipe) -> Floats:
        """What is expected of ln ratio, before errors are looked at: ``[L, G]``."""
        x = row_features(shape, recipe)
        return (self._model.predict(x) + on_lines(x, self.slopes, self.level, self.ends)) / 2

    def familiarity(self, shape: Shape, recipe: Recipe) -> tuple[float, float]:
        """Distance from the nearest shape learned from, and the largest such distance among those themselves."""
        nearest = distances(coordinates(shape, recipe)[None], self.shapes).min()
        return float(nearest), usual_distance(self.shapes)

    def scale(self, shape: Shape, recipe: Recipe) -> float:
        """By how much errors are held to be larger than at a distance of 0."""
        distance, usual = self.familiarity(shape, recipe)
        return 1 + distance / usual

    def trust(self, shape: Shape, recipe: Recipe) -> float:
        """What this is worth beside a forecast: 1 within the usual distance, less the farther off."""
        return min(1.0, 2 / self.scale(shape, recipe)) ** 2

    def quantiles(self, shape: Shape, recipe: Recipe) -> Floats:
        """Quantiles of ln ratio at ``LEVELS``, ``[L, len(LEVELS), G]``, as wide as errors on shapes held out were."""
        return self.center(shape, recipe)[:, None] + self.scale(shape, recipe) * self.spread


def on_lines(x: Floats, slopes: Floats, level: Floats, ends: Floats) -> Floats:
    """What lines say of features ``[N, F]``, those beyond the ends as at the ends: ``[N, G]``."""
    return np.asarray(np.clip(x, *ends) @ slopes + level)


def distances(models: Floats, shapes: Floats) -> Floats:
    """From coordinates ``[M, len(OF_MODEL)]`` to shapes', in standard deviations over the shapes: ``[M, shapes]``."""
    spread = shapes.std(axis=0)
    units = (models[:, None] - shapes) / np.where(spread > UNVARIED, spread, UNIT)
    return np.asarray(np.sqrt((units**2).sum(axis=2)))


def usual_distance(shapes: Floats) -> float:
    """The largest distance of a shape from the nearest of the others."""
    among = distances(shapes, shapes)
    np.fill_diagonal(among, np.inf)
    return float(among.min(axis=1).max())


def weighted_quantile(values: Floats, weights: Floats, levels: Floats) -> Floats:
    """Quantiles of values ``[N]`` of which each counts by its weight."""
    order = np.argsort(values)
    shares = np.cumsum(weights[order]) - weights[order] / 2
    return np.interp(levels, shares / weights.sum(), values[order])


SHARES = 201
FOLDS = 8
"""Parts of the shapes that are held out in turn to learn how large errors are."""
PATHS = 48
"""Errors that are kept as whole trajectories."""
SETTINGS = {"n_estimators": 60, "max_depth": 3, "learning_rate": 0.1, "subsample": 0.7, "n_jobs": 1, "random_state": 0}
"""Of the trees: usual ones for few rows. They were written down before the sweep was seen, and not tuned to it."""
RIDGE = 10.0
"""Weight of the slopes' squares, of standardized features; not tuned either."""


def fit_predictor(trainings: Sequence[Training]) -> Predictor:
    """A predictor of these trainings, with intervals from its errors on shapes held out in turn.

    Intervals reach as far on either side as that share of the errors' absolute values, each shape weighing alike and
    the share larger by 1/shapes, since a new shape is one more (conformal prediction). The median is what trees and
    lines say: of so few shapes the errors' own middle is mostly chance. The schedule of most trainings becomes the
    usual one.

    Raises:
        ConfigError: If there are fewer than two shapes.
        MissingExtraError: If xgboost is not installed.
    """
    table = make_table(trainings)
    count = len(table.shapes)
    if count < 2:
        raise ConfigError(f"a predictor needs trainings of at least 2 shapes, to hold one out, got {count}")
    usual = np.frombuffer(statistics.mode(one.lr.tobytes() for one in trainings))
    schedule = np.interp(np.linspace(0, 1, SHARES), np.linspace(0, 1, len(usual)), usual / usual.max())
    surprises = held_out_errors(table)
    side = 2 * np.asarray(LEVELS) - 1
    inside = np.minimum(np.abs(side) * (1 + 1 / count), 1)
    reach = np.stack([weighted_quantile(column, table.weights, inside) for column in np.abs(surprises).T], axis=1)
    spread = np.sign(side)[:, None] * reach
    shares = np.cumsum(table.weights)
    kept = np.searchsorted(shares, (np.arange(PATHS) + 0.5) / PATHS * shares[-1])
    trees = bytes(_trees(table.features, table.values).get_booster().save_raw("json"))
    lines = _lines(table.features, table.values)
    return Predictor(trees, *lines, table.shapes, surprises[kept], spread, schedule, len(usual) - 1)


def held_out_errors(table: Table) -> Floats:
    """Errors of rows whose shape was held out with some others, over the scale of its distance: ``[N, G]``."""
    out = np.empty_like(table.values)
    order = np.random.default_rng(0).permutation(len(table.shapes))
    for part in np.array_split(order, min(FOLDS, len(order))):
        test = np.isin(table.group, part)
        x, y = table.features[~test], table.values[~test]
        asked = table.features[test]
        predicted = (_trees(x, y).predict(asked) + on_lines(asked, *_lines(x, y))) / 2
        rest = np.delete(table.shapes, part, axis=0)
        far = distances(table.models[test], rest).min(axis=1) / usual_distance(table.shapes)
        out[test] = (table.values[test] - predicted) / (1 + far)[:, None]
    return out


def _trees(x: Floats, y: Floats) -> Any:
    return import_xgboost().XGBRegressor(**SETTINGS).fit(x, y)


def _lines(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Slopes ``[F, G]``, level ``[G]`` and ends ``[2, F]`` of a ridge regression of standardized features."""
    middle, spread = x.mean(axis=0), x.std(axis=0)
    scaled = (x - middle) / np.where(spread > UNVARIED, spread, 1)
    slopes = np.linalg.solve(scaled.T @ scaled + RIDGE * np.eye(x.shape[1]), scaled.T @ (y - y.mean(axis=0)))
    slopes /= np.where(spread > UNVARIED, spread, np.inf)[:, None]  # what never varied is not heeded
    return slopes, y.mean(axis=0) - middle @ slopes, np.stack([x.min(axis=0), x.max(axis=0)])


_ARRAYS = ("slopes", "level", "ends", "shapes", "surprises", "spread", "schedule")


def save_predictor(predictor: Predictor, path: Path = PACKAGED) -> None:
    """Writes XGBoost's JSON and plain arrays, which `load_predictor` reads without unpickling anything."""
    arrays = {name: getattr(predictor, name).astype(np.float32) for name in _ARRAYS}
    trees = np.frombuffer(predictor.trees, dtype=np.uint8)
    np.savez_compressed(path, allow_pickle=False, trees=trees, steps=predictor.steps, **arrays)


def load_predictor(path: Path = PACKAGED) -> Predictor:
    """The predictor of a file that `save_predictor` wrote; by default the packaged one.

    Raises:
        SourceError: If the file is not there or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name].astype(np.float64) for name in _ARRAYS}
            return Predictor(trees=data["trees"].tobytes(), steps=int(data["steps"]), **arrays)
    except UNREADABLE as error:
        raise SourceError(
            f"{path}: a predictor is an .npz that this package wrote, and this is none ({error})"
        ) from error
