from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config, GPTNeoXConfig

from ma_monitor import Run
from ma_monitor.analysis import forecast_run
from ma_monitor.architecture.prediction import write_prior
from ma_monitor.learned.correction import Corrections, save_prior, with_prior
from ma_monitor.learned.prior import LEVELS, Prior
from ma_monitor.numerics.clock import learning_rate_clock
from ma_monitor.numerics.mixture import Correction, Mixture, make_mixture
from ma_monitor.runs.documents import PRIOR
from ma_monitor.runs.records import Plan
from tests.learned.past import LR, STEPS, TOTAL, past_run
from tests.test_monitor import META, made_up

TIMES = np.linspace(0, 1, 11)
SPAN = float(learning_rate_clock(LR).time(TOTAL))


def _prior(layers: int, level: float, spread: float) -> Prior:
    """Every layer at one level of ln ratio at all times, with a Gaussian's quantiles."""
    z = np.array([-1.96, -1.2816, -0.6745, 0, 0.6745, 1.2816, 1.96])
    return Prior(TIMES, np.broadcast_to((level + spread * z)[:, None], (layers, len(LEVELS), TIMES.size)).copy())


def _mixture(points: int) -> Mixture:
    run = past_run(100)
    return make_mixture(learning_rate_clock(LR), STEPS[:points], run.ratios[:, :points], float(TOTAL))


def _end(mixture: Mixture, correction: Correction) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """10, 50 and 90 % quantiles at the planned end, ``[3, L]``."""
    knots = np.array([float(TOTAL)])
    ahead = np.log1p(mixture.clock.time(knots)) - np.log1p(mixture.clock.time(mixture.steps[-1:]))
    return np.asarray(np.quantile(correction.apply(mixture.sample(knots), ahead), (0.1, 0.5, 0.9), axis=2)[:, :, 0])


def test_a_sure_prior_leads_early_and_an_unsure_one_never() -> None:
    none = Correction.none("alone")
    for points, most in ((10, 0.5), (50, 0.2)):
        mixture = _mixture(points)
        alone = _end(mixture, none)[1]
        recent = np.log(mixture.values[:, -5:]).mean(axis=1)
        sure = _end(mixture, with_prior(none, mixture, TOTAL, _prior(3, float(recent.mean()) + 1, 0.05)))
        unsure = _end(mixture, with_prior(none, mixture, TOTAL, _prior(3, 9.0, 50.0)))
        np.testing.assert_allclose(unsure[1], alone, atol=most)
        assert (np.diff(sure, axis=0) >= 0).all()
    early, late = (
        np.abs(_end(m, with_prior(none, m, TOTAL, _prior(3, 20.0, 0.1)))[1] - _end(m, none)[1]).mean()
        for m in (_mixture(10), _mixture(54))
    )
    assert late < 0.3 * early


def test_what_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    mixture = _mixture(20)
    plain = Corrections(tmp_path)(mixture, TOTAL)
    save_prior(_prior(3, 2.0, 0.1), TOTAL, SPAN, tmp_path)
    weighed = Corrections(tmp_path)(mixture, TOTAL)
    assert "with what the architecture let expect" in weighed.words
    assert (weighed.shift != plain.shift).any()
    assert "counts less" not in weighed.words
    save_prior(replace(_prior(3, 2.0, 0.1), trust=0.1), TOTAL, SPAN, tmp_path)
    doubted = Corrections(tmp_path)(mixture, TOTAL)
    assert doubted.words.endswith("let expect, which counts less: such a training was not seen")
    told = weighed.shift != plain.shift
    assert (np.abs(doubted.shift - plain.shift) < np.abs(weighed.shift - plain.shift))[told].all()
    document = json.loads((tmp_path / PRIOR).read_text())
    assert document.pop("trust") == 0.1
    (tmp_path / PRIOR).write_text(json.dumps(document))  # as it was written before there was trust
    np.testing.assert_array_equal(Corrections(tmp_path)(mixture, TOTAL).shift, weighed.shift)
    for trust, why in ((2, "between 0 and 1, got 2"), (None, "float()"), ([1], "float()"), (float("nan"), "NaN")):
        (tmp_path / PRIOR).write_text(json.dumps(document | {"trust": trust}))
        assert why in Corrections(tmp_path)(mixture, TOTAL).words
    save_prior(_prior(3, 2.0, 0.1), TOTAL, SPAN, tmp_path)
    assert "architecture" not in Corrections(tmp_path, expected=False)(mixture, TOTAL).words
    assert "the plan has changed" in Corrections(tmp_path)(mixture, TOTAL + 1).words
    save_prior(_prior(4, 2.0, 0.1), TOTAL, SPAN, tmp_path)  # of another model
    missing = Corrections(tmp_path)(mixture, TOTAL)
    np.testing.assert_array_equal(missing.shift, plain.shift)
    assert "a layer is missing" in missing.words
    save_prior(_prior(3, 6.0, 0.1), TOTAL, SPAN, tmp_path)  # a trained model's ratios are not those of a new one
    assert "did not start as its architecture lets expect" in Corrections(tmp_path)(mixture, TOTAL).words
    for text in ("", "[]", '{"time": [0, 1], "quantiles": [[[1]]]}', '{"time": [], "quantiles": []}'):
        (tmp_path / PRIOR).write_text(text)
        broken = Corrections(tmp_path)(mixture, TOTAL)
        assert "prior.json cannot be used" in broken.words
        np.testing.assert_array_equal(broken.shift, plain.shift)


def test_a_monitor_writes_what_the_shape_lets_expect(tmp_path: Path) -> None:
    config = GPTNeoXConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)
    write_prior(config, Plan(0, TOTAL, 1e-3 * LR, 8, "linear"), tmp_path)
    first = (tmp_path / PRIOR).read_bytes()
    assert b"quantiles" in first
    for plan in (Plan(0, TOTAL, None, 8, "unknown"), Plan(0, TOTAL, LR, 8, "held", held=True)):
        (tmp_path / PRIOR).unlink(missing_ok=True)
        write_prior(config, plan, tmp_path)
        assert not (tmp_path / PRIOR).exists()
    write_prior(object(), Plan(0, TOTAL, 1e-3 * LR, 8, "linear"), tmp_path)
    assert not (tmp_path / PRIOR).exists()
    write_prior(GPT2Config(n_layer=2, n_embd=32, n_head=2), Plan(0, TOTAL, 1e-3 * LR, 8, "linear"), tmp_path)
    assert (tmp_path / PRIOR).exists()


def test_a_copy_holds_what_forecasts_rest_on(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", META, Plan(0, 100, np.linspace(1.0, 0.1, 101), 8, "linear")) as run:
        for step in range(0, 51, 2):
            run.append(made_up(step))
        first = float(np.log(run.ratios()[:, 0]).mean())
        save_prior(_prior(len(run.ratios()), first, 0.3), 100, 55.45, run.path)
        run.copy_to(tmp_path / "copy")
    ours, theirs = (forecast_run(Run.open(tmp_path / name)) for name in ("run", "copy"))
    assert "architecture" in ours.rests_on
    assert ours.to_dict() == theirs.to_dict()
    assert "architecture" not in forecast_run(Run.open(tmp_path / "run"), rank=2).rests_on
    changed = forecast_run(Run.open(tmp_path / "run"), plan=Plan(0, 100, np.ones(101), 8, "constant"))
    assert "architecture" not in changed.rests_on


def test_rates_that_are_held_widen_the_band(tmp_path: Path) -> None:
    rates = np.full(101, 1e-3)
    widths = []
    for held in (False, True):
        with Run.create(tmp_path / str(held), META, Plan(0, 100, rates, 8, "made up", held=held)) as run:
            for step in range(0, 51, 2):
                run.append(made_up(step))
            forecast = forecast_run(run)
            assert ("rates to come are not known" in forecast.rests_on) == held
            widths.append([np.ptp(np.log(layer.quantiles[[1, 5], -1])) for layer in forecast.layers])
    assert np.mean(widths[1]) > 1.1 * np.mean(widths[0])


@pytest.mark.parametrize("points", [8, 30, 55])
def test_bands_stay_ordered(points: int) -> None:
    mixture = _mixture(points)
    correction = with_prior(Correction.none("alone"), mixture, TOTAL, _prior(3, 4.0, 0.2))
    assert (correction.below >= 0).all()
    assert (correction.above >= 0).all()
