"""The paper's five parameters from features: transforms, held-out predictions and scores, against plain ways."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
from scipy.stats import yeojohnson
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from ma_monitor.architecture import parameters
from ma_monitor.architecture.parameters import (
    PARAMETERS,
    REGRESSORS,
    Samples,
    Split,
    curves,
    make_samples,
    predict_held_out,
    score,
    signed_log1p,
)
from ma_monitor.architecture.sweep import Training
from ma_monitor.errors import ConfigError
from ma_monitor.numerics.curve import Curve
from ma_monitor.numerics.fit import Fit, fit_trajectories


@pytest.fixture(scope="module")
def fits(sweep: list[Training]) -> list[tuple[Fit, ...]]:
    return [fit_trajectories(one.steps, one.ratios, compare=False) for one in sweep]


@pytest.fixture(scope="module")
def samples(sweep: list[Training], fits: list[tuple[Fit, ...]]) -> Samples:
    return make_samples([(one.shape, own) for one, own in zip(sweep, fits, strict=True)])


def test_signed_log1p() -> None:
    positive = np.array([0.0, 0.3, 5.0, 1e9])
    np.testing.assert_array_equal(signed_log1p(positive), np.log1p(positive))
    np.testing.assert_array_equal(signed_log1p(-positive), -np.log1p(positive))


def test_transformed_targets(samples: Samples, fits: list[tuple[Fit, ...]]) -> None:
    flat = [fit for own in fits for fit in own]
    for row, fit in enumerate(flat):
        assert fit.curve is not None
        paper = fit.curve.to_paper()
        values = {"lambda": paper.lambda_, "gamma": paper.gamma, "t0": paper.t0, "A": paper.A}
        for name, value in values.items():
            found = samples.targets[name][row]
            if value is not None:
                assert found == pytest.approx(math.copysign(math.log1p(abs(value)), value), rel=1e-9, abs=1e-12)
            elif name == "A" and paper.log_abs_A is not None:
                assert found == pytest.approx(paper.sign * paper.log_abs_A)
            else:
                assert math.isnan(found)
    level = np.array([math.nan if fit.curve is None else fit.curve.K for fit in flat])
    plain, _ = yeojohnson(level)
    np.testing.assert_allclose(samples.targets["K"], (plain - plain.mean()) / plain.std(), atol=1e-3)


def test_a_layer_without_a_curve(sweep: list[Training]) -> None:
    one = sweep[0]
    own = fit_trajectories(one.steps[:2], one.ratios[:, :2], compare=False)
    with_none = make_samples([(one.shape, own), (one.shape, fit_trajectories(one.steps, one.ratios, compare=False))])
    for name in PARAMETERS:
        assert np.isnan(with_none.targets[name][: one.shape.layers]).all()
        assert np.isfinite(with_none.targets["K"][one.shape.layers :]).all()


def test_curves_come_back(samples: Samples, fits: list[tuple[Fit, ...]], sweep: list[Training]) -> None:
    """Transformed there and back, parameters make the curve they were taken from."""
    steps = sweep[0].steps[5:].astype(float)
    found = curves(samples.targets, samples.level, steps)
    checked = 0
    for row, fit in enumerate(fit for own in fits for fit in own):
        curve = cast(Curve, fit.curve)
        paper = curve.to_paper()
        # log1p(abs A) = ln(1 + abs A): of amplitudes near or above 1e15 the last digits are gone with the transform.
        if None in (paper.A, paper.lambda_, paper.t0) or abs(paper.A or 0) > 1e9:
            continue
        np.testing.assert_allclose(found[row], curve.evaluate(steps), rtol=1e-5)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("split", ["rows", "models"])
def test_held_out_rows_are_predicted_without_themselves(samples: Samples, split: Split) -> None:
    """Ridge by hand for one part, with each setting: the prediction is that of one of them."""
    found = predict_held_out(samples, "K", "Ridge", split)
    folds = list(parameters._folds(split, np.arange(len(samples.model)), samples.model))
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(len(samples.model)))
    _, test = folds[0]
    part = test[samples.model[test] == samples.model[test][0]] if split == "models" else test
    if split == "models":
        assert set(part) == set(np.flatnonzero(samples.model == samples.model[part[0]])), "all of a model at once"
    rest = np.setdiff1d(np.arange(len(samples.model)), part)
    scaler = StandardScaler().fit(samples.features[rest])
    x, new = scaler.transform(samples.features[rest]), scaler.transform(samples.features[part])
    tried = [
        Ridge(alpha=alpha).fit(x, samples.targets["K"][rest]).predict(new) for alpha in REGRESSORS["Ridge"][1]["alpha"]
    ]
    assert any(np.allclose(found[part], one) for one in tried)


def test_rows_without_the_parameter_are_not_learned_from(samples: Samples) -> None:
    holes = samples.targets["K"].copy()
    holes[samples.model == 0] = np.nan
    partly = Samples(samples.features, {**samples.targets, "K": holes}, samples.model, samples.level)
    found = predict_held_out(partly, "K", "Lasso", "models")
    assert np.isfinite(found).all()
    assert score(partly, "K", found).rows == np.isfinite(holes).sum()


def test_too_few_models(samples: Samples) -> None:
    some = samples.model < 5
    few = Samples(samples.features[some], {"K": samples.targets["K"][some]}, samples.model[some], samples.level)
    with pytest.raises(ConfigError, match="needs more than 5 models with a fitted K, got 5"):
        predict_held_out(few, "K", "Ridge", "rows")


def test_score_by_hand(samples: Samples) -> None:
    y = samples.targets["K"]
    predicted = y + np.where(samples.model == 2, 1.0, 0.1)
    found = score(samples, "K", predicted)
    residual = predicted - y
    assert found.r2 == pytest.approx(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum())
    assert found.mae == pytest.approx(np.abs(residual).mean())
    assert found.rmse == pytest.approx(np.sqrt((residual**2).mean()))
    assert found.bias == pytest.approx(residual.mean())
    assert found.worst == 2
    assert found.r2_low < found.r2 < found.r2_high
    # Draws of models, slowly.
    rng = np.random.default_rng(1)
    names = np.unique(samples.model)
    drawn = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(samples.model == m) for m in rng.choice(names, len(names))])
        drawn.append(1 - (residual[rows] ** 2).sum() / ((y[rows] - y[rows].mean()) ** 2).sum())
    np.testing.assert_allclose((found.r2_low, found.r2_high), np.quantile(drawn, (0.1, 0.9)), atol=0.03)  # other draws


@pytest.mark.slow
def test_every_regressor_learns_what_there_is(samples: Samples) -> None:
    """A target that the features give: all find it for models that they have not seen."""
    target = {"K": samples.features[:, 4] * 20 + samples.features[:, 0]}
    known = Samples(samples.features, target, samples.model, samples.level)
    for name in REGRESSORS:
        assert score(known, "K", predict_held_out(known, "K", name, "models")).r2 > 0.5, name
