"""From a shape to trajectories: a Gaussian process over measured trainings, calibrated on whole models held out.

What is predicted is ln ratio of every layer over relative time, not the five parameters of its curve: many sets of
those make one curve. Layers of one training are not independent; the process says so (a training has its own
deviation, shared by its layers), and every error it is judged or calibrated by is that of models it had not seen, all
seeds of a shape together.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from ma_monitor.architecture.features import Shape
from ma_monitor.architecture.sweep import UNREADABLE, Training
from ma_monitor.errors import SourceError
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


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, as far as the predictor heeds it.

    Attributes:
        rate: Highest learning rate.
        updates: Sum over all updates of rate / highest rate.
    """

    rate: float
    updates: float


@dataclass(frozen=True)
class Kernel:
    """How alike two layers are held to be; variances are shares of the total.

    Attributes:
        reach: Distance between models, in standard deviations, over which they become unlike.
        depth_reach: The same for places in the depth.
        place: Variance of what only the place decides.
        model: Variance of what the model decides for all its layers alike.
        both: Variance of what the model decides by place.
        trend: How much of that goes on beyond the models seen, as straight lines.
        training: Variance of a training's own deviation, all layers alike.
        training_place: The same, by place.
        noise: Variance of single layers.
    """

    reach: float = 3.0
    depth_reach: float = 1.0
    place: float = 0.3
    model: float = 0.3
    both: float = 0.2
    trend: float = 0.1
    training: float = 0.1
    training_place: float = 0.1
    noise: float = 0.03


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
        models: Coordinates, ``[N, len(OF_MODEL)]``.
        places: ``[N, 3]``.
        group: Number of the row's shape, alike for its seeds, ``[N]``.
        training: Number of the row's training, ``[N]``.
        values: ln ratio at ``TIMES``, ``[N, len(TIMES)]``.
    """

    models: Floats
    places: Floats
    group: NDArray[np.int64]
    training: NDArray[np.int64]
    values: Floats

    def rows(self, keep: NDArray[Any]) -> Table:
        """Some of its rows."""
        return Table(*(getattr(self, field.name)[keep] for field in fields(self)))


def make_table(trainings: Sequence[Training]) -> Table:
    """Trainings as a table; those of equal coordinates are seeds of one shape."""
    known: dict[bytes, int] = {}
    parts = []
    for number, one in enumerate(trainings):
        place = coordinates(one.shape, recipe_of(one.lr))
        group = known.setdefault(np.round(place, 6).tobytes(), len(known))
        rows = one.shape.layers
        parts.append(
            (
                np.tile(place, (rows, 1)),
                places(rows),
                np.full(rows, group),
                np.full(rows, number),
                log_trajectories(one),
            )
        )
    return Table(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Predictor:
    """What trainings teach about a shape; everything follows from the table and the kernel.

    Attributes:
        table: The trainings.
        kernel: How alike layers are.
        schedule: Rates of the usual schedule relative to its highest, at equal shares of its steps, ``[SHARES]``.
        steps: Updates of the usual training.
    """

    table: Table
    kernel: Kernel
    schedule: Floats
    steps: int

    @cached_property
    def models(self) -> Floats:
        """Coordinates of every shape, once each, ``[shapes, len(OF_MODEL)]``."""
        return self.table.models[np.unique(self.table.group, return_index=True)[1]]

    def _scaled_models(self, models: Floats) -> Floats:
        """Coordinates in standard deviations; 0 for those that the trainings do not vary: of them nothing is known."""
        spread = self.models.std(axis=0)
        centred = models - self.models.mean(axis=0)
        return np.asarray(np.divide(centred, spread, out=np.zeros_like(centred), where=spread > UNVARIED))

    def distances(self, models: Floats) -> Floats:
        """From other coordinates ``[M, len(OF_MODEL)]`` to every shape, in standard deviations: ``[M, shapes]``."""
        own, other = self._scaled_models(models), self._scaled_models(self.models)
        return np.asarray(np.sqrt(((own[:, None] - other) ** 2).sum(axis=2)))

    @cached_property
    def _level(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation over the rows, each training weighing alike, ``[G]`` each."""
        weights = self.weights
        mean = weights @ self.table.values
        return mean, np.sqrt(weights @ (self.table.values - mean) ** 2)

    @property
    def weights(self) -> Floats:
        """Weights of the rows: each shape counts once, ``[N]``."""
        _, inverse, counts = np.unique(self.table.group, return_inverse=True, return_counts=True)
        return np.asarray(1 / counts[inverse] / len(counts))

    def _covariance(self, models: Floats, where: Floats) -> Floats:
        """Of other rows with the table's, ``[M, N]``, as shares of the variance; nothing that is a training's own."""
        own, other = self._scaled_models(models), self._scaled_models(self.table.models)
        return _covariance(self.kernel, own, other, where, self.table.places)

    @cached_property
    def _full(self) -> Floats:
        """Covariance of the table's rows, all noise included, ``[N, N]``."""
        table, kernel = self.table, self.kernel
        same = table.training[:, None] == table.training
        near = _near(table.places, table.places, kernel.depth_reach)
        own = kernel.training + kernel.training_place * near
        return np.asarray(self._covariance(table.models, table.places) + same * own + kernel.noise * np.eye(len(same)))

    @cached_property
    def _scaled(self) -> Floats:
        mean, unit = self._level
        return np.asarray((self.table.values - mean) / unit)

    @cached_property
    def held_out(self) -> tuple[Floats, Floats]:
        """Every row predicted from the shapes that are not its own: mean and standard deviation, in scaled units.

        In closed form from the inverse of the covariance; each shape's block of it is that shape's precision given all
        others. The kernel is the one chosen with all shapes in view. ``[N, G]`` and ``[N]``.
        """
        inverse = np.linalg.inv(self._full)
        pulled = inverse @ self._scaled
        error, deviation = np.empty_like(self._scaled), np.empty(len(self._scaled))
        for group in np.unique(self.table.group):
            rows = np.flatnonzero(self.table.group == group)
            block = np.linalg.inv(inverse[np.ix_(rows, rows)])
            error[rows] = block @ pulled[rows]
            deviation[rows] = np.sqrt(np.diag(block))
        return self._scaled - error, deviation

    @cached_property
    def surprises(self) -> Floats:
        """Errors of held-out rows in units of the standard deviation stated for them, ``[N, G]``."""
        mean, deviation = self.held_out
        return np.asarray((self._scaled - mean) / deviation[:, None])

    @cached_property
    def _factor(self) -> Any:
        return cho_factor(self._full)

    @property
    def recipe(self) -> Recipe:
        """The usual recipe: medians over the shapes."""
        return Recipe(*np.exp(np.median(self.models[:, -2:], axis=0)).tolist())

    def moments(self, shape: Shape, recipe: Recipe) -> tuple[Floats, Floats]:
        """Mean of ln ratio and its standard deviation, ``[L, G]`` each."""
        model = np.tile(coordinates(shape, recipe), (shape.layers, 1))
        where = places(shape.layers)
        cross = self._covariance(model, where)
        kernel, own = self.kernel, self._scaled_models(model)
        prior = np.diag(_covariance(kernel, own, own, where, where))
        prior = prior + kernel.training + kernel.training_place + kernel.noise
        variance = prior - np.einsum("mn,nm->m", cross, cho_solve(self._factor, cross.T))
        mean, unit = self._level
        return mean + unit * (cross @ cho_solve(self._factor, self._scaled)), np.sqrt(variance)[:, None] * unit

    def quantiles(self, shape: Shape, recipe: Recipe) -> Floats:
        """Quantiles of ln ratio at ``LEVELS``, ``[L, len(LEVELS), G]``, as wide as errors on models held out were."""
        mean, deviation = self.moments(shape, recipe)
        return mean[:, None] + deviation[:, None] * self.spread[None]

    @cached_property
    def spread(self) -> Floats:
        """Quantiles of the surprises at ``LEVELS``, ``[len(LEVELS), G]``.

        Each shape counts once; levels move outward by 1/shapes of their distance from the middle, as a new shape is
        one more (conformal prediction).
        """
        levels = np.clip(0.5 + (np.asarray(LEVELS) - 0.5) * (1 + 1 / len(self.models)), 0, 1)
        return np.stack([weighted_quantile(column, self.weights, levels) for column in self.surprises.T], axis=1)


def weighted_quantile(values: Floats, weights: Floats, levels: Floats) -> Floats:
    """Quantiles of values ``[N]`` of which each counts by its weight."""
    order = np.argsort(values)
    shares = np.cumsum(weights[order]) - weights[order] / 2
    return np.interp(levels, shares / weights.sum(), values[order])


def _near(one: Floats, other: Floats, reach: float) -> Floats:
    """exp(-½ distance² / reach²), ``[M, N]``."""
    square = ((one[:, None] - other) ** 2).sum(axis=2)
    return np.asarray(np.exp(-0.5 * square / reach**2))


def _covariance(kernel: Kernel, own: Floats, other: Floats, where: Floats, elsewhere: Floats) -> Floats:
    depth = _near(where, elsewhere, kernel.depth_reach)
    model = _near(own, other, kernel.reach) + kernel.trend * (own @ other.T)
    return np.asarray(kernel.place * depth + model * (kernel.model + kernel.both * depth))


STEPS = (4.0, 2.0, 1.4)
"""Factors by which each number of the kernel is tried larger and smaller, one pass over all numbers each."""
SHARES = 201


def fit_predictor(trainings: Sequence[Training]) -> Predictor:
    """A predictor whose kernel makes the error on whole shapes held out smallest.

    The search takes one number of the kernel after the other. The schedule of most trainings becomes the usual one.
    """
    usual = statistics.mode(one.lr.tobytes() for one in trainings)
    lr = np.frombuffer(usual)
    schedule = np.interp(np.linspace(0, 1, SHARES), np.linspace(0, 1, len(lr)), lr / lr.max())
    best = Predictor(make_table(trainings), Kernel(), schedule, len(lr) - 1)
    score = held_out_error(best)
    for step, field in itertools.product(STEPS, fields(Kernel)):
        for factor in (step, 1 / step):
            value = getattr(best.kernel, field.name) * factor
            other = replace(best, kernel=replace(best.kernel, **{field.name: value}))
            new = held_out_error(other)
            if new < score:
                best, score = other, new
                break
    return best


def held_out_error(predictor: Predictor) -> float:
    """Negative log density of held-out rows per value, under a Gaussian; infinite where the kernel is degenerate."""
    try:
        mean, deviation = predictor.held_out
    except np.linalg.LinAlgError:
        return math.inf
    if not (np.isfinite(deviation).all() and (deviation > 0).all()):
        return math.inf
    each = 0.5 * ((predictor._scaled - mean) / deviation[:, None]) ** 2 + np.log(deviation)[:, None]
    return float(predictor.weights @ each.mean(axis=1))


def save_predictor(predictor: Predictor, path: Path = PACKAGED) -> None:
    """Writes plain arrays, which `load_predictor` reads without unpickling anything."""
    table = {field.name: getattr(predictor.table, field.name) for field in fields(Table)}
    small = {name: array.astype(np.float32 if array.dtype.kind == "f" else np.int16) for name, array in table.items()}
    kernel, schedule = np.array(astuple(predictor.kernel)), predictor.schedule.astype(np.float32)
    np.savez_compressed(path, allow_pickle=False, kernel=kernel, schedule=schedule, steps=predictor.steps, **small)


def load_predictor(path: Path = PACKAGED) -> Predictor:
    """The predictor of a file that `save_predictor` wrote; by default the packaged one.

    Raises:
        SourceError: If the file is not there or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            floats = {name: data[name].astype(np.float64) for name in ("models", "places", "values")}
            numbers = {name: data[name].astype(np.int64) for name in ("group", "training")}
            kernel, schedule = Kernel(*data["kernel"].tolist()), data["schedule"].astype(np.float64)
            return Predictor(Table(**floats, **numbers), kernel, schedule, int(data["steps"]))
    except UNREADABLE as error:
        raise SourceError(
            f"{path}: a predictor is an .npz that this package wrote, and this is none ({error})"
        ) from error
