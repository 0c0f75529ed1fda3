from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ma_monitor.numerics.backtest import (
    BASELINES,
    CUTOFFS,
    METHODS,
    PARTS,
    Forecaster,
    Score,
    Trial,
    run_trials,
    score_trials,
    summarize,
    true_peaks,
)
from ma_monitor.numerics.curve import evaluate
from ma_monitor.numerics.forecast import QUANTILES, Forecast, forecast

Floats = NDArray[np.float64]
TOTAL = 1000
STEPS = np.unique(np.concatenate([2 ** np.arange(5), np.arange(0, TOTAL + 1, 25)]))
EXACT = 1e-9
"""Relative: the same sums in another order."""
COARSE = 0.01
"""Relative: forty levels stand for the whole quantile function."""


def _ratios(seed: int = 0, noise: float = 0.02) -> Floats:
    """A layer that rises as a logarithm and one that peaks, ``[2, T]``."""
    t = STEPS / 100.0
    clean = np.stack([8 + 9 * np.log1p(t), 6 + 60 * np.exp(-0.4 * t) * np.log1p(4 * t)])
    return clean * np.exp(noise * np.random.default_rng(seed).standard_normal(clean.shape))


def _forecaster(ratios: Floats, steps: NDArray[np.int64] = STEPS) -> Forecaster:
    def make(at: int, grid: NDArray[np.int64]) -> Forecast:
        return forecast(steps, ratios, at=at, grid=grid, total_steps=TOTAL)

    return make


def _trials(ratios: Floats, name: str = "a", configuration: str | None = None) -> list[Trial]:
    return run_trials(STEPS, ratios, _forecaster(ratios), run=name, configuration=configuration)


def _of(scores: list[Score], method: str, run: str = "a", percent: int = 40) -> Score:
    (found,) = [s for s in scores if (s.method, s.run, s.percent) == (method, run, percent)]
    return found


# ------------------------------------------------------------------------------------------------------------- trials


def test_a_trial_is_cut_at_whole_percents_of_the_last_step() -> None:
    trials = _trials(_ratios())
    assert [trial.percent for trial in trials] == list(CUTOFFS)
    assert [trial.at for trial in trials] == [100, 200, 400, 600, 800]
    trial = trials[2]
    later = STEPS > 400
    assert np.array_equal(trial.came, np.log(_ratios()[:, later]))
    made = forecast(STEPS, _ratios(), at=400, grid=STEPS[later], total_steps=TOTAL)
    for row, layer in enumerate(made.layers):
        assert np.array_equal(trial.bands[:, row], np.log(layer.quantiles))
        assert np.array_equal(trial.guesses["forecast"][row], np.log(layer.quantiles[3]))


def test_ratios_below_one_count_like_any_other() -> None:
    whole, tiny = _trials(_ratios()), _trials(_ratios() / 1000)
    for one, other in zip(whole, tiny, strict=True):
        np.testing.assert_allclose(other.came, one.came - np.log(1000), rtol=EXACT)
        for name in set(one.guesses) - {"curve"}:  # which is kept above 1, as ratios are
            guess = one.guesses[name]
            np.testing.assert_allclose(other.guesses[name] - other.came, guess - one.came, atol=1e-6, err_msg=name)


@settings(max_examples=25)  # two forecasts each
@given(at=st.sampled_from(CUTOFFS), later=st.lists(st.floats(width=32), min_size=1, max_size=5))
def test_nothing_measured_later_changes_what_is_said(at: int, later: list[float]) -> None:
    ratios = _ratios()
    changed = ratios.copy()
    changed[:, 100 * STEPS > at * TOTAL] = np.resize(later, (2, int((100 * STEPS > at * TOTAL).sum())))
    (one,), (other,) = (
        run_trials(STEPS, values, _forecaster(values), run="a", cutoffs=[at]) for values in (ratios, changed)
    )
    assert np.array_equal(one.bands, other.bands)
    assert all(np.array_equal(one.guesses[method], other.guesses[method]) for method in METHODS)


def test_rules_against_a_slow_reference() -> None:
    trial = _trials(_ratios())[2]
    seen = STEPS <= 400
    half = np.flatnonzero(seen)[int(seen.sum()) // 2 :]
    for row, series in enumerate(np.log(_ratios())):
        assert np.array_equal(trial.guesses["last_value"][row], np.full((~seen).sum(), series[seen][-1]))
        for rule, x in (("linear_trend", STEPS.astype(float)), ("log_trend", np.log1p(STEPS))):
            line = np.polynomial.Polynomial.fit(x[half], series[half], 1)
            np.testing.assert_allclose(trial.guesses[rule][row], line(x[~seen]), rtol=EXACT)


def test_the_curve_goes_on_along_eq_14() -> None:
    clean = evaluate(STEPS.astype(float), 0.004, 20.0, 40.0, -100.0, 12.0)[None]
    assert (clean > 1).all()
    for trial in _trials(clean):
        if trial.percent >= 40:
            np.testing.assert_allclose(trial.guesses["curve"], trial.came, atol=1e-4)  # the fit is to 1e-4 or better


def test_a_curve_that_falls_below_one_is_held_there() -> None:
    falling = np.linspace(30, 12, STEPS.size)[None] * np.exp(0.001 * np.cos(STEPS))
    trial = _trials(falling)[1]
    assert trial.guesses["curve"].min() >= 0
    assert np.isfinite(trial.guesses["curve"]).all()


def test_layers_and_points_that_are_not_known_are_left_out() -> None:
    ratios = np.concatenate([_ratios(), np.full((1, STEPS.size), 7.0)])
    ratios[0, -3:] = np.nan, np.inf, -1.0
    ratios[1, 8] = np.nan
    trials = _trials(ratios)
    assert [layer.layer for layer in trials[0].layers] == [1, 2], "a constant layer is not forecast"
    assert np.isnan(trials[0].came[0, -3:]).all()
    whole = _of(score_trials(trials), "last_value").error
    trial = trials[2]
    errors = np.abs(trial.came - trial.guesses["last_value"])
    assert whole == pytest.approx(np.concatenate([errors[0, :-3], errors[1]]).mean(), rel=EXACT)


def test_cutoffs_without_a_forecast_or_a_rest_are_left_out() -> None:
    short = np.arange(0, 12)
    values = 5 + np.random.default_rng(0).random((1, 12))
    trials = run_trials(short, values, _forecaster(values, short), run="a")
    assert [trial.percent for trial in trials] == [60], "six points before, four after"
    assert run_trials(short[:0], values[:, :0], _forecaster(values, short), run="a") == []
    assert run_trials(STEPS, np.ones((2, STEPS.size)), _forecaster(np.ones((2, STEPS.size))), run="a") == []
    for cutoff in (0, 100, -5):
        with pytest.raises(ValueError, match="percentage of the last measured step, from 1 to 99"):
            run_trials(STEPS, _ratios(), _forecaster(_ratios()), run="a", cutoffs=[cutoff])


# ------------------------------------------------------------------------------------------------------------- scores


def test_scores_against_a_slow_reference() -> None:
    trial = _trials(_ratios(noise=0.2))[2]
    score = _of(score_trials([trial]), "forecast")
    levels = (np.arange(4000) + 0.5) / 4000
    crps, interval, errors, inside = [], [], [], []
    for row in range(2):
        for column in range(trial.came.shape[1]):
            came, band = trial.came[row, column], trial.bands[:, row, column]
            quantile = np.interp(levels, QUANTILES, band)
            crps.append(np.mean(2 * ((came < quantile) - levels) * (quantile - came)))
            low, high = band[1], band[5]
            fine = 10 * (low - came) if came < low else 10 * (came - high) if came > high else 0.0
            interval.append(high - low + fine)
            errors.append(abs(band[3] - came))
            inside.append([band[2] <= came <= band[4], low <= came <= high, band[0] <= came <= band[6]])
    assert score.error == pytest.approx(np.mean(errors), rel=EXACT)
    assert score.crps == pytest.approx(np.mean(crps), rel=COARSE)
    assert score.interval == pytest.approx(np.mean(interval), rel=EXACT)
    assert [score.in50, score.in80, score.in95] == pytest.approx(np.mean(inside, axis=0).tolist(), rel=EXACT)
    assert 0 < np.mean(inside) < 1, "nothing to tell right from wrong"


def test_a_band_of_no_width_scores_as_its_error() -> None:
    trial = _trials(_ratios())[2]
    point = replace(trial, bands=np.repeat(trial.guesses["forecast"][None], 7, axis=0))
    score = _of(score_trials([point]), "forecast")
    assert score.crps == pytest.approx(score.error, rel=EXACT)
    assert score.interval == pytest.approx(10 * score.error, rel=EXACT)


def test_rules_get_their_bands_from_other_configurations_alone() -> None:
    mine, twin = _trials(_ratios(), "a", "x"), _trials(_ratios(1), "twin", "x")
    others = [trial for seed in (2, 3) for trial in _trials(_ratios(seed, 0.1), f"o{seed}", f"o{seed}")]
    alone = score_trials([*mine, *twin])
    assert all(s.crps is None and s.in80 is None for s in alone if s.method in BASELINES)
    assert all(s.crps is not None for s in alone if s.method == "forecast")
    scores = score_trials([*mine, *others])
    assert [s for s in score_trials([*mine, *twin, *others]) if s.run == "a"] == [s for s in scores if s.run == "a"]
    trial, rest = mine[2], [other for other in others if other.percent == 40]
    parts = np.arange(trial.came.shape[1]) * PARTS // trial.came.shape[1]
    grid = (np.arange(40) + 0.5) / 40
    inside = []
    for part in range(PARTS):
        errors = [np.quantile((o.came - o.guesses["log_trend"])[:, parts == part], grid) for o in rest]
        low, high = np.quantile(np.concatenate(errors), [0.1, 0.9])
        missed = (trial.came - trial.guesses["log_trend"])[:, parts == part]
        inside.append(((missed >= low) & (missed <= high)).ravel())
    assert _of(scores, "log_trend").in80 == pytest.approx(np.concatenate(inside).mean(), rel=EXACT)


def test_nothing_compared_is_no_score_and_no_band() -> None:
    empty = [replace(trial, came=np.full_like(trial.came, np.nan)) for trial in _trials(_ratios(), "b")]
    scores = score_trials([*_trials(_ratios()), *empty])
    assert {score.run for score in scores} == {"a"}
    assert _of(scores, "last_value").crps is None


# ------------------------------------------------------------------------------------------------------------ summary


def test_summary_averages_over_runs_and_compares_with_the_best_rule() -> None:
    scores = []
    for run, factor in (("a", 1.0), ("b", 3.0)):
        for number, method in enumerate(METHODS):
            one = 0.1 * (number + 1) * factor
            scores += [Score(run, run, percent, method, one, one / 2, one, 0.5, 0.8, 0.9) for percent in (20, 40)]
    scores[-1] = replace(scores[-1], crps=None)
    document = summarize(scores)
    assert [(row["percent"], row["runs"]) for row in document["cutoffs"]] == [(20, 2), (40, 2)]
    first, second = document["cutoffs"]
    assert [first["methods"][m]["error"] for m in METHODS] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert first["methods"]["forecast"]["in80"] == pytest.approx(0.8)
    assert first["ratio"] == pytest.approx({"error": 0.5, "crps": 0.5, "interval": 0.5})
    assert second["methods"]["curve"]["crps"] is None
    assert document["mean_ratio"] == pytest.approx({"error": 0.5, "crps": 0.5, "interval": 0.5})
    assert summarize([]) == {"cutoffs": [], "mean_ratio": {"error": None, "crps": None, "interval": None}}


def test_no_ratio_without_a_rule_to_compare_with() -> None:
    document = summarize(score_trials(_trials(_ratios())))
    ratio = document["cutoffs"][0]["ratio"]
    assert ratio["error"] > 0
    assert ratio["crps"] is None
    assert document["mean_ratio"]["interval"] is None


# -------------------------------------------------------------------------------------------------------------- peaks


def test_peaks_that_are_there() -> None:
    steps = np.arange(0, 1001, 10)
    hill = 10 * np.exp(-(((steps - 400) / 200) ** 2))
    wave = np.random.default_rng(0).standard_normal((4, steps.size)) * 0.02
    values = np.stack([5 + hill, 5 + steps / 100, np.full(steps.size, 5.0), 15 - hill]) * np.exp(wave)
    values[0, 40:43] = np.nan, np.inf, 0.0
    found = true_peaks(steps, np.concatenate([values, np.full((1, steps.size), np.nan)]))
    assert found[0] == pytest.approx(400, abs=30)  # three points to either side: what the smoothing blurs
    assert np.isnan(found[[1, 2, 4]]).all(), "a rise, noise and nothing have no peak"
    assert np.isnan(found[3]), "a trough between equal heights is no peak"


def test_a_fall_within_the_noise_is_no_peak() -> None:
    steps = np.arange(0, 1001, 10)
    bend = np.exp(np.minimum(steps, 1000 - steps / 3) / 500)
    noise = np.random.default_rng(1).standard_normal((1, steps.size))
    assert np.isfinite(true_peaks(steps, bend[None] * np.exp(0.005 * noise))).all()
    assert np.isnan(true_peaks(steps, bend[None] * np.exp(0.3 * noise))).all()
