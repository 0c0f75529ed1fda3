"""The forecast benchmark's own arithmetic, on made runs and a recorded one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import forecast as benchmark
from ma_monitor.numerics.backtest import CUTOFFS, METHODS, Score, true_peaks
from ma_monitor.numerics.events import Peak

RUNS = Path(__file__).resolve().parents[2] / "benchmarks" / "runs"
STEPS = np.arange(0, 1001, 10)


def make(name: str, change: float = 1.0) -> benchmark.Recorded:
    """A run of two layers, one of which peaks."""
    t = STEPS / 100
    ratios = np.stack([5 + change * t, 5 + 40 * change * t * np.exp(-t / 2)])
    ratios *= np.exp(0.01 * np.random.default_rng(0).standard_normal(ratios.shape))
    peaks = true_peaks(STEPS, ratios)
    return benchmark.Recorded(name, "GPU sweep", "same", STEPS, ratios, np.full(1001, 1e-3), peaks)


def test_seeds_predict_one_another() -> None:
    runs = [make("a"), make("b", 1.5), make("c", 0.7)]
    trials = [trial for run in runs for trial in run.trials(None)]
    rows = benchmark.seeds(trials, runs)
    assert [row["percent"] for row in rows] == list(CUTOFFS)
    row, now = rows[2], 40
    errors = []
    for run in runs:
        others = [np.log(one.ratios[:, now + 1 :] / one.ratios[:, [now]]) for one in runs if one is not run]
        guess = np.log(run.ratios[:, [now]]) + np.mean(others, axis=0)
        errors.append(np.abs(guess - np.log(run.ratios[:, now + 1 :])).mean())
    assert row["other_seeds"] == pytest.approx(np.mean(errors))
    assert row["limit"] == pytest.approx(np.mean(errors) / np.sqrt(1.5))
    last = [np.abs(np.log(run.ratios[:, [now]] / run.ratios[:, now + 1 :])).mean() for run in runs]
    assert row["last_value"] == pytest.approx(np.mean(last))
    assert benchmark.seeds(trials, [runs[0], replace(runs[1], configuration="other")]) == []


def test_peaks_by_hand() -> None:
    run = make("a")
    assert np.isnan(run.peaks[0])
    assert run.peaks[1] == pytest.approx(200, abs=40)  # noise of 1 % moves a flat top by a few points
    rows = benchmark.peaks(run.trials(None), [run])
    assert [(row["layers"], row["with_peak"], row["runs_with_peak"]) for row in rows] == [(2, 1, 1)] * 5
    (trial,) = [trial for trial in run.trials(None) if trial.percent == 60]
    said = [layer.peak.probability for layer in trial.layers if layer.peak]
    assert rows[3]["brier"] == pytest.approx((said[0] ** 2 + (1 - said[1]) ** 2) / 2)
    assert rows[3]["brier_of_constant"] == 0.25
    assert rows[3]["inside_80"] is None, "one peak is no statistic"


def test_an_interval_without_an_upper_end_reaches_to_the_end() -> None:
    peak = Peak(500.0, 9.0, 300.0, 700.0, True, 1.0, "ahead")
    assert [benchmark.holds(peak, step) for step in (299, 300, 700, 701)] == [False, True, True, False]
    assert benchmark.holds(replace(peak, high=None), 999)
    assert not benchmark.holds(replace(peak, low=None, high=None), 999)
    assert not benchmark.holds(None, 5)


def test_bootstrap_draws_configurations() -> None:
    """Two seeds of one configuration are drawn together: with one configuration alone every draw is the mean."""

    def score(run: str, configuration: str, percent: int, method: str, error: float) -> Score:
        return Score(run, configuration, percent, method, error, error, error, 0.5, 0.8, 0.9)

    def scores(configurations: tuple[str, str, str]) -> list[Score]:
        errors = zip(configurations, (1.0, 2.0, 6.0), strict=True)
        return [
            score(f"{number}", name, percent, method, error * (1 if method == "forecast" else 2))
            for number, (name, error) in enumerate(errors)
            for percent in CUTOFFS
            for method in METHODS
        ]

    one = benchmark.with_intervals(scores(("x", "x", "x")))
    assert one["cutoffs"][0]["forecast_95"]["error"] == pytest.approx([3, 3])
    assert one["mean_ratio_95"]["error"] == pytest.approx([0.5, 0.5])
    assert one["coverage"]["in80"]["mean"] == pytest.approx(0.8)
    two = benchmark.with_intervals(scores(("x", "x", "y")))
    assert two["cutoffs"][0]["forecast_95"]["error"] == pytest.approx([1.5, 6])


def test_a_recorded_run() -> None:
    run = benchmark.load(RUNS / "cpu-neox-04.npz")
    assert (run.of, run.gpu, run.ratios.shape) == ("CPU tiny", False, (2, len(run.steps)))
    assert "seed" not in run.configuration
    document = benchmark.assess(run.trials(None), [run])
    assert set(document["scores"]) == {"CPU tiny"}
    assert document["leads"]["10"] == {"past_runs": 0.0, "mixture_led": 1.0, "mixture_alone": 1.0}
    assert "mean ratio" in benchmark.error_table(document["scores"]["CPU tiny"])
