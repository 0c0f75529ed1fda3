"""``ma-monitor forecast``: the pinned document, strict causality, what-if."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.analysis import forecast_run
from ma_monitor.cli.forecast import read_steps, what_if
from ma_monitor.runs.store import Run
from tests.cli.conftest import LAYERS, PLAN, TOTAL, Call, make_measurements, make_meta, make_run

QUANTILES = ("p2_5", "p10", "p25", "median", "p75", "p90", "p97_5")
AT = 600


def test_document(call: Call, run_dir: Path) -> None:
    result = call("forecast", run_dir, "--at", AT, "--json")
    document = result.document
    assert result.err == ""
    assert set(document) >= {"run", "at", "clock", "layers", "what_if", "ratio", "rank", "track_record", "normal"}
    assert (document["at"], document["clock"], document["what_if"]) == (AT, "learning_rate", None)
    assert [layer["layer"] for layer in document["layers"]] == [1, 2, 3]
    for layer in document["layers"]:
        assert set(layer) >= {"steps", *QUANTILES, "end", "peak", "asymptote", "crossings", "led_by"}
        assert layer["steps"][0] > AT
        assert layer["steps"][-1] == TOTAL
        bands = np.array([layer[key] for key in QUANTILES])
        assert (np.diff(bands, axis=0) >= 0).all(), "quantiles out of order"
        assert layer["end"]["median"] == layer["median"][-1]
        assert set(layer["peak"]) >= {"step", "height", "low", "high", "identified", "status"}
        assert set(layer["asymptote"]) == {"value", "low", "high", "identified"}
        assert set(layer["crossings"]["1000"]) == {"probability", "step", "low", "high"}


def test_grid(call: Call, refused: Callable[..., str], run_dir: Path, tmp_path: Path) -> None:
    asked = [650, 700, 1900]
    np.save(tmp_path / "steps.npy", asked)
    (tmp_path / "steps.txt").write_text("1900, 650;650\n 700\n")
    documents = [
        call("forecast", run_dir, "--at", AT, "--steps", tmp_path / name, "--json").document
        for name in ("steps.npy", "steps.txt")
    ]
    assert documents[0] == documents[1]
    assert [layer["steps"] for layer in documents[0]["layers"]] == [asked] * LAYERS
    until = call("forecast", run_dir, "--at", AT, "--until", 1900, "--json").document
    for layer, other in zip(documents[0]["layers"], until["layers"], strict=True):
        assert other["steps"][-1] == 1900
        assert other["median"][-1] == pytest.approx(layer["median"][-1]), "the answer depends on what else is asked"
    for option in (["--until", 600], ["--steps", tmp_path / "early.txt"]):
        (tmp_path / "early.txt").write_text("5\n600\n")
        assert "must reach beyond" in refused("forecast", run_dir, "--at", AT, *option)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"1 2 three", "steps must be one list of whole numbers"),
        ("a.txt", b"", "steps must be one list of whole numbers"),
        ("a.txt", b"-4", "steps must be one list of whole numbers"),
        ("a.txt", b"\xff\xfe1", "cannot be read so"),
        ("a.txt", b"9" * 30, "cannot be read so"),
        ("a.npy", b"no array", "cannot be read so"),
        ("a.npy", None, "No such file or directory"),
    ],
)
def test_files_that_hold_no_steps(
    refused: Callable[..., str], run_dir: Path, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert words in refused("forecast", run_dir, "--steps", tmp_path / name)


@pytest.mark.parametrize("array", [np.array([1.5]), np.zeros((2, 2), dtype=int), np.array([[]], dtype=int)])
def test_arrays_that_are_no_steps(refused: Callable[..., str], run_dir: Path, tmp_path: Path, array: object) -> None:
    np.save(tmp_path / "a.npy", array)  # type: ignore[arg-type]
    assert "steps must be one list of whole numbers" in refused("forecast", run_dir, "--steps", tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--until", 10**23], f"must be a whole number of at most 1,000,000,000, got '{10**23}'"),
        (["--at", 10**23], f"must be a whole number of at most 1,000,000,000, got '{10**23}'"),
        (["--until", 10**12, "--schedule", "cosine"], "must be a whole number of at most 1,000,000,000"),
        (["--until", 10**9, "--schedule", "cosine"], "of at most 10,000,000 updates, got 1,000,000,000"),
    ],
)
def test_steps_beyond_any_training(
    refused: Callable[..., str], run_dir: Path, options: list[object], words: str
) -> None:
    assert words in refused("forecast", run_dir, *options)


def test_the_farthest_step_that_is_taken(
    call: Call, refused: Callable[..., str], run_dir: Path, tmp_path: Path
) -> None:
    document = call("forecast", run_dir, "--until", 10**9, "--json").document
    assert document["layers"][0]["steps"][-1] == 10**9
    for values in (np.array([10**9 + 1]), np.array([2**64 - 1], dtype=np.uint64)):
        np.save(tmp_path / "far.npy", values)
        assert "from 0 to 1,000,000,000" in refused("forecast", run_dir, "--steps", tmp_path / "far.npy")


def test_steps_come_in_order_and_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("9\n3,3 5")
    assert read_steps(str(tmp_path / "a")) == [3, 5, 9]


@pytest.mark.parametrize("options", [[], ["--json"], ["--schedule", "linear", "--json"], ["--until", "3000", "--json"]])
def test_nothing_after_at_is_used(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Later measurements are changed, or were never made, and a later plan is another: not a byte may differ."""
    make_run(tmp_path / "whole" / "run")
    with Run.create(tmp_path / "cut" / "run", make_meta(), PLAN) as run:
        for m in make_measurements():
            if m.step <= AT:
                run.append(m)
    with Run.create(tmp_path / "changed" / "run", make_meta(), PLAN) as run:
        for m in make_measurements():
            run.append(m if m.step <= AT else replace(m, top=m.top * (1 + m.step), median=m.median * 0.01))
    changed_plan = replace(PLAN, total_steps=9000, lr=np.ones(9001))
    Run.continue_(tmp_path / "changed" / "run", make_meta(), changed_plan, from_step=1000).close()
    answers = set()
    for name in ("whole", "cut", "changed"):
        monkeypatch.chdir(tmp_path / name)
        answers.add(call("forecast", "run", "--at", AT, *options))
    assert len(answers) == 1
    assert answers.pop().code == 0


def test_table(call: Call, run_dir: Path) -> None:
    document = call("forecast", run_dir, "--at", AT, "--json").document
    lines = call("forecast", run_dir, "--at", AT).out.splitlines()
    assert lines[0] == f"{run_dir}: tiny, forecast from step 600, clock: learning_rate"
    assert "at step 2,000 [80 %]" in lines[2]
    assert lines[3 + LAYERS] == ""
    for line, layer in zip(lines[3 : 3 + LAYERS], document["layers"], strict=True):
        assert line.startswith(str(layer["layer"]))
        assert f" {layer['median'][-1]:.3g} [" in line
        assert line.endswith(layer["led_by"])
    assert "WHAT IF" not in "\n".join(lines)


def test_a_finished_run_shows_its_end(call: Call, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=np.arange(0, TOTAL + 1, 50))
    document = call("forecast", path, "--json").document
    lines = call("forecast", path).out.splitlines()
    assert "at step 2,000 [80 %]" in lines[2]
    for line, layer in zip(lines[3 : 3 + LAYERS], document["layers"], strict=True):
        assert layer["steps"] == []
        assert f" {layer['end']['median']:.3g} [{layer['end']['p10']:.3g}, " in line


def test_no_schedule_is_spoken_of_where_none_is_known(call: Call, run_dir: Path, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", plan=None)
    (rising,) = (layer for layer in call("forecast", path, "--json").document["layers"] if layer["layer"] == 2)
    assert rising["peak"]["status"] == "not_within_schedule"
    text = call("forecast", path).out
    assert "still rises at the last step looked at" in text
    assert "not within the schedule" not in text
    assert "not within the schedule" in call("forecast", run_dir).out


def test_what_if_is_labelled(call: Call, run_dir: Path) -> None:
    own = call("forecast", run_dir, "--at", AT, "--json").document
    asked = call("forecast", run_dir, "--at", AT, "--schedule", "constant", "--json").document
    assert asked["what_if"] == "constant"
    assert asked["layers"] != own["layers"]
    assert (
        "WHAT IF: from step 600 on the schedule is constant"
        in call("forecast", run_dir, "--at", AT, "--schedule", "constant").out
    )


def test_what_if_of_the_same_schedule_is_the_forecast(call: Call, run_dir: Path) -> None:
    own = call("forecast", run_dir, "--at", AT, "--json").document
    asked = call("forecast", run_dir, "--at", AT, "--schedule", "cosine:floor=.1", "--json").document
    for layer, other in zip(own["layers"], asked["layers"], strict=True):
        np.testing.assert_allclose(other["median"], layer["median"], rtol=1e-6)


def test_what_if_scales_to_the_runs_own_rates(run_dir: Path, tmp_path: Path) -> None:
    run = Run.open(run_dir)
    assert PLAN.lr is not None
    peak = PLAN.lr.max()
    plan = what_if(run, "linear", AT, None)
    assert plan.total_steps == TOTAL
    assert plan.lr is not None
    np.testing.assert_allclose(plan.lr[AT:], peak * (1 - np.arange(AT, TOTAL + 1) / TOTAL), rtol=1e-12)
    longer = what_if(run, "constant", AT, 3000)
    assert longer.total_steps == 3000
    assert longer.lr is not None
    np.testing.assert_allclose(longer.lr[AT:], np.full(3001 - AT, peak))
    np.save(tmp_path / "rates.npy", np.full(TOTAL + 1, 5.0))
    given = what_if(run, str(tmp_path / "rates.npy"), AT, None)
    assert given.lr is not None
    assert set(given.lr[AT:]) == {5.0}, "rates of a file are no shares of a peak"
    assert not given.held
    state = {"log_history": [{"step": 100, "learning_rate": 5.0}], "max_steps": TOTAL}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert what_if(run, str(tmp_path / "trainer_state.json"), AT, None).held, "what comes after step 100 is not known"


def test_what_if_keeps_the_past(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of updates done are those that were planned, also where a training went on beyond its plan."""
    used: list[NDArray[np.float64]] = []

    def spy(*_: object, lr: NDArray[np.float64], **__: object) -> None:
        used.append(lr)

    monkeypatch.setattr("ma_monitor.analysis.forecast", spy)
    run = Run.open(run_dir)
    assert PLAN.lr is not None
    asked = what_if(run, "linear", AT, None)
    assert asked.lr is not None
    forecast_run(run, at=AT, plan=asked)
    np.testing.assert_array_equal(used[0][:AT], PLAN.lr[:AT])
    np.testing.assert_array_equal(used[0][AT:], asked.lr[AT:])
    monkeypatch.setattr(Run, "plans", (replace(PLAN, total_steps=100, lr=np.linspace(1e-3, 1e-4, 101)),))
    forecast_run(run, at=AT, plan=asked)
    np.testing.assert_array_equal(used[1][101:AT], np.full(AT - 101, 1e-4))
    np.testing.assert_array_equal(used[1][AT:], asked.lr[AT:])


def test_what_if_without_a_plan(call: Call, refused: Callable[..., str], tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", plan=None)
    assert "planned length is not known; give a later --until" in refused("forecast", path, "--schedule", "constant")
    assert call("forecast", path, "--json").document["clock"] == "step"
    document = call("forecast", path, "--schedule", "wsd:decay=.2", "--until", 2500, "--json").document
    assert document["clock"] == "learning_rate"
    assert document["layers"][0]["end"]["step"] == 2500


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("sawtooth", "a schedule is one of constant, linear, cosine, wsd or a file"),
        ("cosine:warmup=2", "must be a fraction from 0 to 1"),
        ("cosine:decay=.1", "takes warmup, floor"),
        ("absent.npy", "absent.npy"),
    ],
)
def test_schedules_that_break_a_rule(refused: Callable[..., str], run_dir: Path, schedule: str, words: str) -> None:
    assert words in refused("forecast", run_dir, "--schedule", schedule)


def test_before_the_first_measurement(refused: Callable[..., str], tmp_path: Path) -> None:
    late = make_run(tmp_path / "late", steps=np.arange(100, 1000, 50))
    for option in ([], ["--schedule", "constant"]):
        assert "at or before step 99" in refused("forecast", late, "--at", 99, *option)


def test_too_few_points_are_a_result(call: Call, tmp_path: Path) -> None:
    path = make_run(tmp_path / "short", steps=np.array([0, 1, 2]))
    document = call("forecast", path, "--json").document
    assert all(value is None for layer in document["layers"] for value in layer["median"])
    text = call("forecast", path).out
    assert text.count("not known") == 2 * LAYERS
    assert text.splitlines()[3 + LAYERS :] == [
        "layer 1, 2, 3: not forecast: fewer than 6 measurements are finite and above 0",
        "",
        "This run is too young for its forecasts to have a track record.",
    ]
