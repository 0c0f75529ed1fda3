"""``ma-monitor forecast``: the same as live, strict causality, thresholds, ranks, track record, and past runs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_monitor.analysis import analyse, refit_due
from ma_monitor.cli.__main__ import main
from ma_monitor.config import MonitorConfig
from ma_monitor.learned.reference import PAPER
from ma_monitor.monitor import Observer
from ma_monitor.report.normal import among_past_runs, normal_words
from ma_monitor.report.track import track_document, track_record, track_words
from ma_monitor.runs.records import Measurements, Plan
from ma_monitor.runs.store import Run
from ma_monitor.sinks.metrics import emission
from tests.cli.conftest import LAYERS, PLAN, STEPS, TOTAL, Call, make_measurements, make_meta, make_ratios, make_run

RESUMED = 650
AT = 600


def logged_live(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Step and forecast at every refit of a training that is resumed on a longer plan, and repeats two steps."""
    longer = Plan(0, 3000, np.linspace(1e-3, 0.0, 3001), 8, "linear")
    first = Run.create(path, make_meta(), PLAN)
    for run, measured in (
        (first, [m for m in make_measurements() if m.step <= RESUMED + 100]),
        (None, [m for m in make_measurements() if m.step > RESUMED]),
    ):
        run = run or Run.continue_(path, make_meta(), longer, from_step=RESUMED)
        with closing(Observer(run, MonitorConfig(strict=True))) as observer:
            for m in measured:
                observer.observe(m)
                if refit_due(len(run.steps)) and (run is not first or m.step < RESUMED):  # the rest is superseded
                    said = run.read_document("forecast")
                    assert said is not None
                    yield m.step, said


def test_a_forecast_logged_live_is_made_again_bit_for_bit(call: Call, tmp_path: Path) -> None:
    logged = list(logged_live(tmp_path / "run"))
    assert len(logged) > 20
    assert {step > RESUMED for step, _ in logged} == {False, True}
    for step, said in logged:
        later = call("forecast", tmp_path / "run", "--at", step, "--json").document
        assert {key: later[key] for key in said} == said


@st.composite
def futures(draw: st.DrawFn) -> list[Measurements]:
    """The small run, all but measured up to ``AT`` changed at will: left out, scaled, broken."""
    factors = st.sampled_from([0.0, 1e-300, 1e-3, 0.5, 2.0, 1e3, 1e200, np.inf, np.nan])
    out = []
    for m in make_measurements():
        if m.step > AT:
            if draw(st.booleans()):
                continue
            top, median = draw(factors), draw(st.sampled_from([0.0, 0.1, 1.0, np.nan]))
            m = replace(m, top=m.top * top, median=m.median * median)
        out.append(m)
    return out


@settings(max_examples=12)
@given(futures(), st.sampled_from([[], ["--rank", "2"], ["--threshold", "50", "--schedule", "linear"]]))
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")  # of the futures made here
def test_nothing_after_at_changes_what_the_command_prints(future: list[Measurements], options: list[str]) -> None:
    printed = []
    for measurements in (future, [m for m in make_measurements() if m.step <= AT]):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            with Run.create("run", make_meta(), PLAN) as run:
                for m in measurements:
                    run.append(m)
            for form in ([], ["--json"]):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    assert main(["forecast", "run", "--at", str(AT), *options, *form]) == 0
                printed.append(out.getvalue())
    assert printed[:2] == printed[2:]


def test_thresholds(call: Call, run_dir: Path) -> None:
    asked = ("forecast", run_dir, "--at", AT, "--threshold", 200, "--threshold", 20.5, "--threshold", 200)
    layers = call(*asked, "--json").document["layers"]
    assert [list(layer["crossings"]) for layer in layers] == [["20.5", "200"]] * LAYERS
    seen = make_ratios(STEPS)
    for layer, ratios in zip(layers, seen, strict=True):
        reached = layer["crossings"]["20.5"]
        assert (reached["probability"], reached["step"]) == (1, STEPS[ratios >= 20.5][0])
    text = call(*asked).out
    assert "reaches 20.5 [80 %]" in text
    assert f"reached at step {layers[0]['crossings']['20.5']['step']:,.0f}" in text
    rising = layers[1]["crossings"]["200"]
    assert f"{100 * rising['probability']:.0f} % likely: step" in text
    assert "all layers: less than 5 % likely to reach 1,000,000" in call("forecast", run_dir, "--threshold", 1e6).out
    assert list(call("forecast", run_dir, "--json").document["layers"][0]["crossings"]) == ["100", "1000"]


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "many"])
def test_what_is_no_threshold(refused: Callable[..., str], run_dir: Path, value: str) -> None:
    assert f"must be a number above 0, got '{value}'" in refused("forecast", run_dir, f"--threshold={value}")


def test_other_ranks(call: Call, refused: Callable[..., str], run_dir: Path) -> None:
    """The second entries are half of the first: so is every ratio that is told of them."""
    first, second = (call("forecast", run_dir, "--at", AT, "--rank", k, "--json").document for k in (1, 2))
    assert (first["rank"], second["rank"], second["normal"]) == (1, 2, None)
    for one, half in zip(first["layers"], second["layers"], strict=True):
        np.testing.assert_allclose(half["median"], np.array(one["median"]) / 2, rtol=1e-9)
    assert second["track_record"]["error"] == pytest.approx(first["track_record"]["error"])
    text = call("forecast", run_dir, "--at", AT, "--rank", 2).out
    assert "forecast of rank 2 from step 600" in text
    assert "Is this normal?" not in text
    assert "`rank` must be one of this run's, 1 to 3, got 4" in refused("forecast", run_dir, "--rank", 4)


def test_the_track_record_is_the_runs_own(call: Call, run_dir: Path) -> None:
    record = track_record(Run.open(run_dir), at=1000)
    assert [one.at for one in record] == [64, 128, 256, 550]
    document = call("forecast", run_dir, "--at", 1000, "--json").document["track_record"]
    assert document == json.loads(json.dumps(track_document(record)))
    assert f"\n\n{track_words(record)}\n" in call("forecast", run_dir, "--at", 1000).out


def test_dashboards_are_told_at_doublings_and_at_the_end(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "run", steps=np.append(STEPS, [1700, TOTAL])))
    told: dict[int, list[float]] = {}
    for seen, step in enumerate(run.steps.tolist(), start=1):
        if refit_due(seen) or step == TOTAL:
            shown = emission(run, seen, analyse(run, at=step), with_config=False, with_pictures=False).scalars
            keys = [key for key in shown if key.startswith("ma/forecast/earlier_")]
            told |= {step: [shown[key] for key in keys]} if keys else {}
    assert list(told) == [64, 128, 256, 550, 1050, TOTAL], "before, no forecast has three measurements to show for it"
    for step, (held, error) in told.items():
        fared = track_document(track_record(run, at=step))
        assert held == fared["held"]
        assert error == pytest.approx(math.exp(fared["error"]))


def test_past_runs_stand_beside(call: Call, run_dir: Path) -> None:
    run = Run.open(run_dir)
    found = among_past_runs(run, 1000)
    assert found is not None
    assert found.share == 1000 / TOTAL
    assert found.past.kind == "CPU", "nearest to a thousand parameters"
    document = call("forecast", run_dir, "--at", 1000, "--json").document["normal"]
    assert document == json.loads(json.dumps(found.to_dict()))
    assert document["paper"] == PAPER
    words = normal_words(found)
    assert words in call("forecast", run_dir, "--at", 1000).out
    for layer, ratio in enumerate(run.ratios()[:, run.steps.searchsorted(1000)], start=1):
        assert f"layer {layer}: {ratio:.4g}" in words


def test_past_runs_need_a_planned_length_that_is_not_over(call: Call, tmp_path: Path) -> None:
    unplanned = make_run(tmp_path / "unplanned", plan=None)
    over = make_run(tmp_path / "over", plan=Plan(0, 1000, None, 8, "unknown"))
    for path, at in ((unplanned, 1000), (over, 1001), (over, 1)):
        assert among_past_runs(Run.open(path), at) is None
    assert call("forecast", unplanned, "--json").document["normal"] is None
    assert "Is this normal?" not in call("forecast", over).out
