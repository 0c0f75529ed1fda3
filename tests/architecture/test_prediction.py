"""Predictions in the form of forecasts: peaks, asymptotes and crossings of known paths, and the warnings."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig

from ma_monitor.architecture import prediction
from ma_monitor.architecture.features import shape_of
from ma_monitor.architecture.prediction import predict, prior
from ma_monitor.architecture.predictor import TIMES, Predictor, recipe_of
from ma_monitor.architecture.sweep import Training
from ma_monitor.errors import ConfigError
from ma_monitor.learned.prior import LEVELS
from ma_monitor.numerics.clock import learning_rate_clock
from ma_monitor.numerics.events import first_crossing
from tests.architecture.made import LR, SHAPE, TOTAL, make_shape

STEPS = 1000 * TIMES


def test_prior_is_plain_arrays(predictor: Predictor) -> None:
    found = prior(SHAPE, TOTAL, LR, predictor)
    np.testing.assert_array_equal(found.time, TIMES)
    np.testing.assert_array_equal(found.quantiles, predictor.quantiles(SHAPE, recipe_of(LR)))
    usual = prior(SHAPE, TOTAL, predictor=predictor)
    np.testing.assert_allclose(usual.quantiles, found.quantiles, atol=1e-6)


def test_prediction_is_a_forecast_from_step_0(predictor: Predictor) -> None:
    made = predict(SHAPE, TOTAL, LR, predictor)
    quantiles = np.exp(predictor.quantiles(SHAPE, recipe_of(LR)))
    clock = learning_rate_clock(LR)
    for row, layer in enumerate(made.layers):
        assert (layer.layer, layer.end_step, layer.led_by) == (row + 1, TOTAL, "architecture")
        np.testing.assert_array_equal(layer.quantiles, quantiles[row])
        np.testing.assert_array_equal(layer.end, quantiles[row, :, -1])
        # steps are whole: half of one is at most half of the share of an update at the highest rate
        assert layer.steps[-1] == TOTAL
        np.testing.assert_allclose(clock.time(layer.steps) / clock.time(TOTAL), TIMES, atol=0.5 / TOTAL * 2)
    document = made.to_dict()
    json.dumps(document, allow_nan=False)
    assert document["layers"][0]["end"]["median"] == quantiles[0, LEVELS.index(0.5), -1]
    assert document["shape"]["width"] == SHAPE.width
    assert document["warnings"] == []


def test_the_packaged_one_answers_by_default() -> None:
    shape = shape_of(LlamaConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256))
    made = predict(shape)
    assert made.layers[0].end_step == prediction.packaged().steps
    assert all(np.isfinite(layer.quantiles).all() for layer in made.layers)
    assert prior(shape, 500).quantiles.shape == (3, len(LEVELS), TIMES.size)


@pytest.mark.parametrize(
    ("total", "lr", "words"),
    [
        (0, None, "a training has at least 1 update, got 0"),
        (10, np.ones(10), r"must hold total_steps \+ 1 = 11 finite rates .* got shape \(10,\)"),
        (2, [1.0, np.nan, 1.0], "must hold"),
        (2, [1.0, -1.0, 1.0], "must hold"),
        (2, [0.0, 0.0, 0.0], "must hold"),
    ],
)
def test_plans_refused(predictor: Predictor, total: int, lr: list[float] | None, words: str) -> None:
    for ask in (prior, predict):
        with pytest.raises(ConfigError, match=words):
            ask(SHAPE, total, lr, predictor)


def test_familiar_and_strange_shapes(predictor: Predictor, sweep: list[Training]) -> None:
    seen = predict(sweep[0].shape, TOTAL, LR, predictor)
    assert seen.distance == pytest.approx(0, abs=1e-6)
    assert seen.warnings == ()
    huge = predict(make_shape(48, 4096, 32), 143_000, predictor=predictor)
    assert huge.distance > huge.usual
    words = "\n".join(huge.warnings)
    assert "depth 48 lies outside of what was seen (3 to 8)" in words
    assert "width 4.1e+03 lies outside of what was seen (64 to 256)" in words
    assert "updates" in words
    assert "what it does is not known" in words
    assert f"the nearest is {huge.distance:.1f} standard deviations away" in words
    middle = predict(replace(SHAPE, rotary_share=0.5), TOTAL, LR, predictor)
    assert middle.warnings == (), "a share between those seen"


def paths(*rows: list[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Paths of ln ratio that go straight between values at equal parts of the time, ``[P, G]``."""
    return np.stack([np.interp(TIMES, np.linspace(0, 1, len(row)), row) for row in rows])


def test_peaks_of_known_paths() -> None:
    rising = prediction._peak(paths([0, 1, 2]), STEPS)
    assert (rising.step, rising.status, rising.probability) == (None, "not_within_schedule", 0)
    falling = prediction._peak(paths([2, 1, 0]), STEPS)
    assert (falling.step, falling.status) == (None, "none")
    turning = prediction._peak(paths([0, 3, 1], [0, 2.5, 1], [0, 2.8, 1]), STEPS)
    assert turning.status == "ahead"
    assert turning.step == STEPS[np.abs(TIMES - 0.5).argmin()]
    assert turning.height == pytest.approx(np.exp(2.8), rel=0.1)  # between two of TIMES
    assert turning.identified
    mixed = prediction._peak(paths([0, 3, 1], [0, 3, 1], [0, 1, 3]), STEPS)
    assert (mixed.high, mixed.identified) == (None, False)
    assert mixed.probability == pytest.approx(2 / 3)


def test_crossings_of_known_paths() -> None:
    both = paths([0, np.log(200)], [0, np.log(50)])
    found = first_crossing(prediction.NOTHING, prediction.NOTHING, STEPS, both.T, 100.0)
    assert found.probability == 0.5
    assert found.step == STEPS[TIMES >= np.log(100) / np.log(200)][0]
    assert first_crossing(prediction.NOTHING, prediction.NOTHING, STEPS, both.T, 1000.0).step is None


def test_asymptotes() -> None:
    some = paths([1, 2])
    known = prediction._asymptote(np.array([10.0, 11.0, 12.0]), some)
    assert known.identified
    assert known.value == pytest.approx(11)
    rising = prediction._asymptote(np.array([10.0, 1e6, 1e6, 1e6]), some)
    assert (rising.value, rising.high, rising.identified) == (None, None, False)
    assert rising.low is not None
    nothing = prediction._asymptote(np.array([np.nan, -5.0, 0.5, 20.0]), some)
    assert (nothing.value, nothing.low, nothing.identified) == (None, None, False)
