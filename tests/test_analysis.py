"""From a run to its forecast: which plan counts, and when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ma_monitor.analysis import analyse, forecast_run
from ma_monitor.errors import ConfigError
from ma_monitor.learned.correction import Corrections
from ma_monitor.numerics.forecast import forecast
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import Run
from tests.test_monitor import META, made_up

FIRST = Plan(0, 60, np.linspace(1.0, 0.0, 61), 8, "linear")
SECOND = Plan(30, 100, np.full(101, 0.5), 8, "constant")


def run_with(folder: Path, last: int, resumed_at: int | None = None) -> Run:
    run = Run.create(folder, META, FIRST)
    for step in range(0, last + 1, 2):
        if step - 2 == resumed_at:
            run.close()
            run = Run.continue_(folder, META, SECOND, from_step=resumed_at)
        run.append(made_up(step))
    run.close()
    return Run.open(folder)


def test_the_past_keeps_its_rates_when_a_resume_changes_the_plan(tmp_path: Path) -> None:
    run = run_with(tmp_path, 50, resumed_at=30)
    stitched = np.concatenate([np.linspace(1.0, 0.0, 61)[:30], np.full(71, 0.5)])
    correct = Corrections(run.path)
    expected = forecast(run.steps, run.ratios(), lr=stitched, total_steps=100, correct=correct)
    assert forecast_run(run).to_dict() == expected.to_dict()


def test_a_forecast_at_an_earlier_step_knows_the_earlier_plan_only(tmp_path: Path) -> None:
    resumed, unbroken = run_with(tmp_path / "a", 50, resumed_at=30), run_with(tmp_path / "b", 50)
    assert forecast_run(resumed, at=20).to_dict() == forecast_run(unbroken, at=20).to_dict()
    assert forecast_run(resumed, at=50).to_dict() != forecast_run(unbroken, at=50).to_dict()


def test_what_if_changes_the_future_only(tmp_path: Path) -> None:
    run = run_with(tmp_path, 40)
    same_future = Plan(0, 60, np.concatenate([np.full(40, 9.0), FIRST.lr[40:]]), 8, "what if")  # type: ignore[index]
    assert forecast_run(run, plan=same_future).to_dict() == forecast_run(run).to_dict()
    assert forecast_run(run, plan=SECOND).to_dict() != forecast_run(run).to_dict()


def test_nothing_after_at_is_used(tmp_path: Path) -> None:
    short, long = run_with(tmp_path / "short", 30), run_with(tmp_path / "long", 50)
    assert analyse(long, at=30).forecast.to_dict() == analyse(short).forecast.to_dict()
    assert analyse(long, at=31).fits_document == analyse(short).fits_document


def test_rates_that_are_all_zero_are_no_clock(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META, Plan(0, 60, np.zeros(61), None, "zero"))
    for step in range(0, 40, 2):
        run.append(made_up(step))
    run.close()
    assert forecast_run(Run.open(tmp_path)).clock == "step"


def test_before_the_first_measurement_there_is_nothing_to_say(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", META, None)
    with pytest.raises(ConfigError, match="at or before step None; of run, it holds none"):
        analyse(run)
    run.append(made_up(10))
    with pytest.raises(ConfigError, match="at or before step 9; of run, its first is step 10"):
        forecast_run(run, at=9)
    run.close()
