"""The paper's way: the five fitted parameters of every layer, predicted from its features by five regressors (Table 3).

Scores are of transformed targets, as the paper's are: log1p of A, λ, γ and t₀, Yeo-Johnson of K. The first four may be
-1 or less in global optima, where log1p has no value: sign·log1p(abs) is the same from 0 up and its mirror image below.
An amplitude that overflows is held by log abs(A). Rows whose parameter is undefined are left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ma_monitor.architecture.features import Shape, layer_features
from ma_monitor.errors import ConfigError, MissingExtraError
from ma_monitor.numerics.fit import Fit

try:
    from sklearn.base import clone
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
    from sklearn.linear_model import Lasso, Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold, KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PowerTransformer, StandardScaler
    from xgboost import XGBRegressor
except ImportError as error:
    raise MissingExtraError("scikit-learn or xgboost", "predict") from error

Floats = NDArray[np.float64]

PARAMETERS = ("A", "lambda", "gamma", "t0", "K")
Split = Literal["rows", "models"]
FOLDS = 5
TREES = 30
SEED = 0
SHUFFLED = KFold(FOLDS, shuffle=True, random_state=SEED)

REGRESSORS: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "Ridge": (Ridge(), {"alpha": [1.0, 10.0, 100.0]}),
    "Lasso": (Lasso(max_iter=20_000), {"alpha": [0.01, 0.1, 0.3]}),
    "random forest": (
        RandomForestRegressor(TREES, random_state=SEED, max_features=0.5),
        {"min_samples_leaf": [1, 4]},
    ),
    "gradient boosting": (
        GradientBoostingRegressor(n_estimators=TREES, random_state=SEED, subsample=0.7, max_features=0.5),
        {"max_depth": [2, 4]},
    ),
    "XGBoost": (
        XGBRegressor(n_estimators=TREES, random_state=SEED, subsample=0.7, learning_rate=0.1, n_jobs=1),
        {"max_depth": [2, 4]},
    ),
}
"""Name → regressor and what is tuned of it, by cross-validation within the rows it learns from."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Layers of fitted models.

    Attributes:
        features: ``[N, len(FEATURES)]``.
        targets: Parameter → transformed value, NaN where it is undefined, ``[N]``.
        model: Number of the row's model; seeds of one shape are one model, ``[N]``.
        level: The transform of K, learned from all rows.
    """

    features: Floats
    targets: Mapping[str, Floats]
    model: NDArray[np.int64]
    level: PowerTransformer


@dataclass(frozen=True)
class Score:
    """How well a parameter is predicted on rows that were held out, in the transformed target's units.

    Attributes:
        r2: Share of variance explained; below 0 is worse than the mean.
        r2_low: 10 % quantile over bootstrap draws of whole models.
        r2_high: 90 % quantile.
        mae: Mean absolute error.
        rmse: Root of the mean squared error.
        bias: Mean residual, predicted - fitted.
        worst: Number of the model with the largest mean absolute residual.
        rows: Rows scored; the others have no such parameter.
    """

    r2: float
    r2_low: float
    r2_high: float
    mae: float
    rmse: float
    bias: float
    worst: int
    rows: int


def signed_log1p(values: Floats) -> Floats:
    """sign(v)·log1p(abs(v)): log1p from 0 up, and its mirror image below."""
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))


def make_samples(models: Sequence[tuple[Shape, Sequence[Fit]]]) -> Samples:
    """Rows of models' fits, a row a layer; equal shapes are one model."""
    shapes = list(dict.fromkeys(shape for shape, _ in models))
    rows = [_targets(fit) for _, fits in models for fit in fits]
    targets = {name: np.array([row[name] for row in rows]) for name in PARAMETERS}
    level = PowerTransformer(method="yeo-johnson")
    targets["K"] = level.fit_transform(targets["K"][:, None])[:, 0]
    return Samples(
        np.concatenate([layer_features(shape) for shape, _ in models]),
        targets,
        np.concatenate([np.full(shape.layers, shapes.index(shape)) for shape, _ in models]),
        level,
    )


def _targets(fit: Fit) -> dict[str, float]:
    """Parameters of a fit, all but K transformed; NaN where undefined."""
    paper = None if fit.curve is None else fit.curve.to_paper()
    if paper is None:
        return dict.fromkeys(PARAMETERS, math.nan)
    times = [math.nan if v is None else v for v in (paper.lambda_, paper.gamma, paper.t0)]
    size = math.nan if paper.log_abs_A is None else float(np.logaddexp(0, paper.log_abs_A))  # log1p(abs A), finite
    values = (paper.sign * size, *signed_log1p(np.array(times)).tolist(), math.nan if paper.K is None else paper.K)
    return dict(zip(PARAMETERS, values, strict=True))


def curves(predicted: Mapping[str, Floats], level: PowerTransformer, steps: Floats) -> Floats:
    """The curve of Eq. 9 for every row's predicted parameters: ``[N, T]``, NaN where they make none.

    Args:
        predicted: Parameter → transformed value, ``[N]``.
        level: The transform of K.
        steps: Times of the curves, ``[T]``.
    """
    logs = {name: predicted[name] for name in PARAMETERS[:4]}
    lambda_, gamma, t0 = (np.sign(logs[name]) * np.expm1(np.abs(logs[name])) for name in PARAMETERS[1:4])
    k = level.inverse_transform(predicted["K"][:, None])[:, 0]
    with np.errstate(all="ignore"):
        x = gamma[:, None] * steps + t0[:, None]
        size = np.exp(np.abs(logs["A"])[:, None] - lambda_[:, None] * x) - np.exp(-lambda_[:, None] * x)
        return np.asarray(np.where(x > 0, np.sign(logs["A"])[:, None] * size * np.log(x) + k[:, None], np.nan))


def predict_held_out(samples: Samples, parameter: str, regressor: str, split: Split) -> Floats:
    """Every row's parameter predicted by a regressor that was fitted and tuned without it.

    Args:
        samples: The rows.
        parameter: Which.
        regressor: Name of one of ``REGRESSORS``.
        split: ``rows`` holds out 20 % of all layers at random, five times, which leaves layers of the same model among
            those learned from (the paper's Table 3 is one such split); ``models`` holds out one model at a time.

    Returns:
        What was predicted, transformed, ``[N]``, also for rows whose own parameter is undefined.

    Raises:
        ConfigError: If no more models than folds have the parameter.
    """
    target = samples.targets[parameter]
    known = np.isfinite(target)
    if len(np.unique(samples.model[known])) <= FOLDS:
        count = len(np.unique(samples.model[known]))
        raise ConfigError(f"a score needs more than {FOLDS} models with a fitted {parameter}, got {count}; add some")
    out = np.empty(len(target))
    everything = np.arange(len(target))
    for learn, test in _folds(split, everything, samples.model):
        best = tuned(samples, target, learn[known[learn]], regressor, split)
        # A model's own rows are all of what it is predicted without; its fold's other models had no part in the tuning.
        parts = (
            [test[samples.model[test] == m] for m in np.unique(samples.model[test])] if split == "models" else [test]
        )
        for part in parts:
            rows = np.setdiff1d(everything[known], part)
            out[part] = clone(best).fit(samples.features[rows], target[rows]).predict(samples.features[part])
    return out


def tuned(samples: Samples, target: Floats, rows: NDArray[Any], regressor: str, split: Split) -> Any:
    """The regressor behind a standard scaler, with the settings that cross-validation within these rows prefers."""
    model, grid = REGRESSORS[regressor]
    prefix = type(model).__name__.lower()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), model),
        {f"{prefix}__{key}": values for key, values in grid.items()},
        scoring="neg_mean_squared_error",
        cv=list(_folds(split, rows, samples.model[rows])),
        refit=False,
    )
    search.fit(samples.features[rows], target[rows])
    return make_pipeline(StandardScaler(), model).set_params(**search.best_params_)


def _folds(split: Split, rows: NDArray[Any], models: NDArray[np.int64]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Five parts, each held out once: of rows at random, or of whole models (fewer where there are fewer models)."""
    parts = GroupKFold(min(FOLDS, len(np.unique(models))))
    yield from parts.split(rows, groups=models) if split == "models" else SHUFFLED.split(rows)


DRAWS = 500


def score(samples: Samples, parameter: str, predicted: Floats) -> Score:
    """Scores predictions ``[N]`` of a parameter; its interval is over draws of whole models, not of layers."""
    known = np.isfinite(samples.targets[parameter])
    y, model = samples.targets[parameter][known], samples.model[known]
    residual = predicted[known] - y
    names, place = np.unique(model, return_inverse=True)
    sums = np.stack([np.bincount(place, weights) for weights in (np.ones(len(y)), y, y**2, residual**2)])
    draws = np.random.default_rng(SEED).multinomial(len(names), np.full(len(names), 1 / len(names)), DRAWS)
    count, first, second, squared = sums @ draws.T
    low, high = np.quantile(1 - squared / (second - first**2 / count), (0.1, 0.9))
    worst = np.bincount(place, np.abs(residual)) / sums[0]
    return Score(
        r2=float(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()),
        r2_low=float(low),
        r2_high=float(high),
        mae=float(np.abs(residual).mean()),
        rmse=float(np.sqrt((residual**2).mean())),
        bias=float(residual.mean()),
        worst=int(names[worst.argmax()]),
        rows=len(y),
    )
