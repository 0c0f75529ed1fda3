"""What decides a predicted number: importances, Shapley values and partial dependence of gradient-boosted trees.

Shapley values are those of XGBoost's own exact algorithm for trees (Lundberg and others, From local explanations to
global understanding with explainable AI for trees, 2020). They explain the regressor, not the world: a feature that
moves with another among the models learned from may get what the other did, which `Explanation.alike` names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from xgboost import DMatrix

from ma_monitor.architecture.features import FEATURES
from ma_monitor.architecture.parameters import Samples, predict_held_out, score, tuned

Floats = NDArray[np.float64]
POINTS = 24
"""Values of a feature at which its partial dependence is told."""
ALIKE = 0.9
"""Features whose rank correlation over the rows is larger than this cannot be told apart."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What an XGBoost regressor of one target rests on.

    Attributes:
        target: Name of what is predicted, in its transformed units.
        models: Number of different models behind it.
        values: Features of the rows, ``[N, F]``, columns as in ``FEATURES``.
        base: What is predicted where nothing is known.
        contributions: Shapley values: ``base`` and a row's sum are its prediction, ``[N, F]``.
        importance: The trees' own: share of the gain of all splits, ``[F]``.
        grid: Values of each feature, ``[F, POINTS]``.
        dependence: Mean prediction over all rows with that feature set to them, ``[F, POINTS]``.
        r2: Explained variance of whole models held out.
        alike: For each feature those that cannot be told apart from it.
    """

    target: str
    models: int
    values: Floats
    base: float
    contributions: Floats
    importance: Floats
    grid: Floats
    dependence: Floats
    r2: float
    alike: tuple[tuple[str, ...], ...]

    @property
    def size(self) -> Floats:
        """Mean absolute Shapley value of each feature, ``[F]``."""
        return np.asarray(np.abs(self.contributions).mean(axis=0))

    @property
    def direction(self) -> Floats:
        """Rank correlation of each feature with its Shapley value, 0 where either is constant: ``[F]``."""
        pairs = zip(self.values.T, self.contributions.T, strict=True)
        return np.array([_correlation(value, part) for value, part in pairs])


def explain(samples: Samples, target: str) -> Explanation:
    """Explains the regressor of a target, tuned and fitted on all rows that have it.

    Raises:
        ConfigError: If too few models have the target.
    """
    y = samples.targets[target]
    held_out = score(samples, target, predict_held_out(samples, target, "XGBoost", "models"))
    rows = np.flatnonzero(np.isfinite(y))
    x = samples.features[rows]
    # Trees need no scaler: it is left out, so that thresholds and dependences are in the features' own units.
    model = tuned(samples, y, rows, "XGBoost", "models")[-1].fit(x, y[rows])
    parts = model.get_booster().predict(DMatrix(x), pred_contribs=True).astype(np.float64)
    grid = np.stack([np.linspace(column.min(), column.max(), POINTS) for column in x.T])
    return Explanation(
        target=target,
        models=len(np.unique(samples.model[rows])),
        values=x,
        base=float(parts[0, -1]),
        contributions=parts[:, :-1],
        importance=model.feature_importances_.astype(np.float64),
        grid=grid,
        dependence=np.stack([partial_dependence(model.predict, x, i, at) for i, at in enumerate(grid)]),
        r2=held_out.r2,
        alike=_alike(x),
    )


def partial_dependence(predict: Callable[[Floats], Any], x: Floats, feature: int, at: Floats) -> Floats:
    """Mean prediction over the rows ``x [N, F]`` with one feature set to each of some values: ``[len(at)]``."""
    tiled = np.tile(x, (len(at), 1))
    tiled[:, feature] = np.repeat(at, len(x))
    return np.asarray(np.reshape(predict(tiled), (len(at), -1)).mean(axis=1), dtype=np.float64)


def _correlation(one: Floats, other: Floats) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(spearmanr(one, other).statistic)


def _alike(x: Floats) -> tuple[tuple[str, ...], ...]:
    """For each feature the names of those with nearly its order of rows."""
    out = []
    for i, column in enumerate(x.T):
        others = (j for j in range(len(FEATURES)) if j != i)
        out.append(tuple(FEATURES[j] for j in others if abs(_correlation(column, x[:, j])) > ALIKE))
    return tuple(out)


def reading(explanation: Explanation, count: int = 3) -> str:
    """An explanation in plain words: the features that matter most, in which direction, and how far to believe it."""
    e = explanation
    order = np.argsort(-e.size)[:count]
    told = []
    for i in order:
        way = e.direction[i]
        verb = "raises" if way > 0.5 else "lowers" if way < -0.5 else "moves"
        both = " in either direction" if verb == "moves" else ""
        twins = f" (not to be told apart from {', '.join(e.alike[i])})" if e.alike[i] else ""
        told.append(f"a larger {FEATURES[i]} {verb} it by {e.size[i]:.2g} on average{both}{twins}")
    if e.r2 > 0:
        belief = f"Of models held out it explains {e.r2:.0%} of the variance"
    else:
        belief = "Of models held out it explains nothing (R² below 0): what follows describes these models, no others"
    return (
        f"{e.target}, from {len(e.values)} layers of {e.models} models, which are {e.models} samples and not "
        f"{len(e.values)}. {belief}. In its transformed units, {'; '.join(told)}."
    )
