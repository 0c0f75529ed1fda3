"""Regressions and their intervals: against what is written out, and on a sweep whose rules are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from xgboost import XGBRegressor

from ma_monitor.architecture.predictor import (
    OF_MODEL,
    RIDGE,
    SETTINGS,
    TIMES,
    UNIT,
    UNVARIED,
    Predictor,
    coordinates,
    distances,
    fit_predictor,
    held_out_errors,
    load_predictor,
    log_trajectories,
    make_table,
    places,
    recipe_of,
    save_predictor,
    usual_distance,
    weighted_quantile,
)
from ma_monitor.architecture.sweep import Training, load_sweep
from ma_monitor.errors import ConfigError, MissingExtraError, SourceError
from ma_monitor.learned.prior import LEVELS
from tests.architecture.made import LR, SHAPE, TOTAL, level, make_shape, make_training


def test_errors_are_those_of_shapes_held_out(sweep: list[Training]) -> None:
    """Every part refitted by hand without its shapes, seeds included."""
    table = make_table([*sweep[:4], *sweep[-2:]])
    found = held_out_errors(table)
    shapes = table.shapes
    assert len(shapes) == 4, "or other parts than these would be held out"  # the last two are seeds of the first
    for group in range(len(shapes)):
        own = table.group == group
        x, y, asked = table.features[~own], table.values[~own], table.features[own]
        trees = XGBRegressor(**SETTINGS).fit(x, y).predict(asked)
        ridge = make_pipeline(StandardScaler(), Ridge(RIDGE)).fit(x, y)
        lines = ridge.predict(np.clip(asked, x.min(axis=0), x.max(axis=0)))
        rest = np.delete(shapes, group, axis=0)
        units = [rest[:, i].std() if rest[:, i].std() > UNVARIED else UNIT for i in range(shapes.shape[1])]
        gaps = [[(a - b) / unit for a, b, unit in zip(shapes[group], other, units, strict=True)] for other in rest]
        nearest = min(np.sqrt(sum(gap**2 for gap in row)) for row in gaps)
        error = table.values[own] - (trees + lines) / 2
        np.testing.assert_allclose(found[own], error / (1 + nearest / usual_distance(shapes)), atol=1e-6)


def test_what_is_predicted_of_shapes_not_seen(predictor: Predictor) -> None:
    """Half way between shapes that were seen; the rules' own last value is known."""
    for width, ratio in ((96, 4), (180, 3)):
        shape = make_shape(5, width, 4, ratio)
        place = np.arange(1, 6) / 5
        truth = 1.7 + (level(shape) - 2 * (place - 0.5) ** 2) * (1 - np.exp(-5)) - 0.3 * place
        found = predictor.center(shape, recipe_of(LR))
        assert np.abs(found[:, -1] - truth).mean() < 0.25  # over shapes it ranges over 1.4; trees go in steps


def test_intervals_hold_as_often_as_they_say(sweep: list[Training], predictor: Predictor) -> None:
    """On trainings of shapes that had no part in it, of the same rules."""
    quantiles = predictor.quantiles(sweep[0].shape, recipe_of(LR))
    assert quantiles.shape == (sweep[0].shape.layers, len(LEVELS), TIMES.size)
    assert (np.diff(quantiles, axis=1) >= 0).all()
    inside = []
    for layers, width, heads, ratio in ((4, 96, 2, 4), (6, 192, 4, 2), (5, 128, 2, 8), (7, 80, 4, 4), (3, 224, 4, 4)):
        one = make_training(make_shape(layers, width, heads, ratio), 9)
        of = predictor.quantiles(one.shape, recipe_of(LR))
        low, high = (of[:, LEVELS.index(level)] for level in (0.1, 0.9))
        truth = log_trajectories(one)
        inside.append(((low <= truth) & (truth <= high)).mean())
    assert 0.6 < np.mean(inside) <= 1  # five shapes tell no more


def test_intervals_are_quantiles_of_those_errors(sweep: list[Training]) -> None:
    fitted = fit_predictor(sweep[:6])
    table = make_table(sweep[:6])
    errors = held_out_errors(table)
    share = 0.8 * (1 + 1 / 6)  # as if a seventh shape had been held out
    reach = weighted_quantile(np.abs(errors[:, -1]), table.weights, np.array([share]))[0]
    ends = fitted.spread[:, -1]
    assert ends[LEVELS.index(0.9)] == pytest.approx(reach)
    assert ends[LEVELS.index(0.5)] == 0
    np.testing.assert_allclose(ends, -ends[::-1])
    assert all(any(np.array_equal(path, error) for error in errors) for path in fitted.surprises)


def test_farther_is_less_sure(predictor: Predictor, sweep: list[Training]) -> None:
    recipe = recipe_of(LR)
    assert predictor.scale(sweep[0].shape, recipe) == pytest.approx(1)
    far = make_shape(48, 4096, 32)
    distance, usual = predictor.familiarity(far, recipe)
    assert predictor.scale(far, recipe) == pytest.approx(1 + distance / usual)
    assert distance > usual


def test_lines_end_where_shapes_were_seen(predictor: Predictor) -> None:
    """Nothing grows with a feature beyond its range, of which a layer's place alone has none."""
    recipe = recipe_of(LR)
    large, larger = (predictor.center(make_shape(6, width, 4), recipe) for width in (2**14, 2**17))
    np.testing.assert_allclose(large, larger, atol=1e-9)


def test_trust_is_whole_within_the_usual_distance(predictor: Predictor, sweep: list[Training]) -> None:
    recipe = recipe_of(LR)
    assert predictor.trust(sweep[0].shape, recipe) == 1
    far = make_shape(48, 4096, 32)
    distance, usual = predictor.familiarity(far, recipe)
    assert predictor.trust(far, recipe) == pytest.approx(4 / (1 + distance / usual) ** 2)
    assert predictor.trust(make_shape(96, 8192, 32), recipe) < predictor.trust(far, recipe) < 0.5


def test_distances_written_out() -> None:
    shapes = np.array([[0.0, 1.0, 5.0], [2.0, 1.0, 5.0], [4.0, 4.0, 5.0]])
    one, two = np.std([0, 2, 4]), np.std([1, 1, 4])
    found = distances(np.array([[1.0, 2.0, 5.0], [0.0, 1.0, 7.0]]), shapes)
    assert found[1, 0] == pytest.approx(2 / UNIT)
    np.testing.assert_allclose(
        found[0], [np.hypot(1 / one, 1 / two), np.hypot(1 / one, 1 / two), np.hypot(3 / one, 2 / two)]
    )
    assert usual_distance(shapes) == pytest.approx(np.hypot(2 / one, 3 / two))


def test_seeds_are_one_shape(sweep: list[Training]) -> None:
    table = make_table(sweep)
    assert len(np.unique(table.training)) == len(sweep) == len(table.shapes) + 2
    assert table.weights.sum() == pytest.approx(1)
    by_shape = np.bincount(table.group, table.weights)
    np.testing.assert_allclose(by_shape, by_shape[0])
    with pytest.raises(ConfigError, match="needs trainings of at least 2 shapes, to hold one out, got 1"):
        fit_predictor([sweep[0], *sweep[-2:]])


def test_coordinates() -> None:
    place = dict(zip(OF_MODEL, coordinates(SHAPE, recipe_of(LR)), strict=True))
    assert place["depth"] == pytest.approx(np.log(4))
    assert place["head size"] == pytest.approx(np.log(32))
    assert place["MLP / width"] == pytest.approx(np.log(4))
    assert (place["rotary share"], place["RMS norm"]) == (0.25, 0)
    assert place["rate"] == pytest.approx(np.log(1e-3))
    assert place["updates"] == pytest.approx(np.log(LR[:-1].sum() / 1e-3))
    np.testing.assert_allclose(places(2), [[1, 2, 1], [2, 1, 2]])


def test_a_coordinate_that_never_varied_is_not_heeded(predictor: Predictor) -> None:
    recipe = recipe_of(LR)
    shape = replace(SHAPE, vocabulary=100_000)  # 4096 throughout
    np.testing.assert_array_equal(predictor.center(shape, recipe), predictor.center(SHAPE, recipe))
    assert predictor.scale(shape, recipe) > predictor.scale(SHAPE, recipe), "but it makes the answer less sure"


def test_log_trajectories_are_smooth_and_start_where_measured() -> None:
    one = make_training(SHAPE, 0)
    found = log_trajectories(one)
    np.testing.assert_allclose(found[:, 0], np.log(one.ratios[:, 0]))
    own = np.log(one.ratios)
    t = len(one.steps) // 2
    u = one.clock[t]
    between = np.array([np.interp(u, TIMES, row) for row in found])
    np.testing.assert_allclose(between, own[:, t - 2 : t + 3].mean(axis=1), atol=0.02)  # TIMES are not the steps


def test_weighted_quantile(rng: np.random.Generator) -> None:
    values = rng.normal(size=31)
    levels = np.array([0.1, 0.5, 0.77])
    equal = weighted_quantile(values, np.full(31, 0.2), levels)
    np.testing.assert_allclose(equal, np.quantile(values, levels, method="hazen"))
    assert weighted_quantile(np.array([1.0, 5.0]), np.array([1.0, 0.0]), np.array([0.4]))[0] == pytest.approx(1.0)


def test_saved_as_plain_arrays(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.npz"
    save_predictor(predictor, path)
    with np.load(path, allow_pickle=False) as data:
        assert all(array.dtype.kind in "fiu" for array in data.values())
        assert json.loads(data["trees"].tobytes())["learner"]["objective"]["name"] == "reg:squarederror"
    again = load_predictor(path)
    assert again.steps == predictor.steps == TOTAL
    one, other = (p.quantiles(SHAPE, recipe_of(LR)) for p in (predictor, again))
    np.testing.assert_allclose(one, other, atol=1e-4)  # kept as float32


@pytest.mark.parametrize("content", [None, b"nothing"])
def test_unreadable(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "predictor.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match="a predictor is an .npz that this package wrote"):
        load_predictor(path)


@pytest.mark.slow
def test_packaged_is_what_the_packaged_sweep_teaches() -> None:
    trainings = [one for one in load_sweep() if one.kind == "gpu"]
    made, packaged = fit_predictor(trainings), load_predictor()
    np.testing.assert_allclose(made.shapes, packaged.shapes, atol=1e-5)  # kept as float32
    one = trainings[0]
    expected, found = (p.quantiles(one.shape, recipe_of(one.lr)) for p in (made, packaged))
    np.testing.assert_allclose(found, expected, atol=1e-3)  # trees of another machine differ in the last digits


def test_only_fitting_needs_xgboost(monkeypatch: pytest.MonkeyPatch, sweep: list[Training]) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(MissingExtraError, match=r"xgboost is not installed; run: pip install 'ma_monitor\[predict\]'"):
        fit_predictor(sweep)
    assert load_predictor().steps > 0


def test_fit_takes_the_usual_schedule(sweep: list[Training]) -> None:
    other = replace(sweep[3], lr=np.ones(11), steps=np.arange(11), means=sweep[3].means[:11])
    fitted = fit_predictor([other, *sweep[:3]])
    assert fitted.steps == TOTAL
    np.testing.assert_allclose(fitted.schedule, np.interp(np.linspace(0, TOTAL, 201), np.arange(TOTAL + 1), LR / 1e-3))
