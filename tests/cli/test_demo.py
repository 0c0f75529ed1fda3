"""``ma-monitor demo``: the packaged run, played back; and what the other commands say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_monitor.cli.__main__ import main
from ma_monitor.cli.demo import recorded
from ma_monitor.runs.store import Run
from tests.cli.conftest import Call

LAYERS, POINTS, END = 6, 163, 10_000


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo, played once for all tests: its run and what it printed."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("demo") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--out", str(out)]) == 0
    return out, printed.getvalue()


def test_what_is_printed(played: tuple[Path, str]) -> None:
    out, text = played
    assert str(out) in text
    progress = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(progress) >= 10
    assert "forecast of the largest at the end" in progress[-1]
    assert "came" in text
    rows = [line for line in text.splitlines() if line[:1].isdigit() and "step" not in line]
    assert sum(line.split()[0] in map(str, range(1, LAYERS + 1)) for line in rows) >= LAYERS
    for command in ("fit", "forecast", "log", "export"):
        assert f"  ma-monitor {command} {out}" in text


def test_the_run_holds_what_was_recorded(played: tuple[Path, str]) -> None:
    run = Run.open(played[0])
    published = recorded()
    assert len(run.steps) == POINTS
    assert run.damage is None
    for m, n in zip(run.measurements(), published.measurements, strict=True):
        np.testing.assert_array_equal(m.top, n.top)
        np.testing.assert_array_equal(m.median, n.median)
    plan = run.plan_at(0)
    assert plan is not None
    assert plan.total_steps == END
    assert not [event for event in run.events if event.kind == "fault"]
    assert run.read_document("fits") is not None
    assert run.read_document("forecast") is not None


def test_json_and_a_directory_of_its_own(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beginning = replace(recorded(), measurements=recorded().measurements[:30])
    monkeypatch.setattr("ma_monitor.cli.demo.recorded", lambda: beginning)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = call("demo", "--json")
    document = result.document
    assert result.err == ""
    assert Path(document["run"]).is_relative_to(tmp_path)
    assert document["steps"] == [m.step for m in beginning.measurements]
    ratios = Run.open(document["run"]).ratios()[:, -1]
    assert len(document["layers"]) == LAYERS
    for number, (layer, ratio) in enumerate(zip(document["layers"], ratios, strict=True), start=1):
        assert set(layer) == {"layer", "ratio", "class", "peak", "asymptote", "end_forecast"}
        assert (layer["layer"], layer["ratio"]) == (number, ratio)
        said = layer["end_forecast"]
        assert said["at"] <= document["steps"][-1] // 2
        assert said["inside"] == (said["p10"] <= ratio <= said["p90"])


def test_the_forecast_shown_is_the_one_that_forecast_gives(call: Call, played: tuple[Path, str]) -> None:
    then = call("forecast", played[0], "--at", END // 2, "--json").document
    shown = [line.split() for line in played[1].splitlines()]
    for layer in then["layers"]:
        median = f"{layer['end']['median']:.3g}"
        assert any(words and words[0] == str(layer["layer"]) and median in words for words in shown)


def test_live_documents_are_what_fit_and_forecast_say_later(call: Call, played: tuple[Path, str]) -> None:
    run = Run.open(played[0])
    fits = call("fit", played[0], "--json").document
    forecast = call("forecast", played[0], "--json").document
    stored_fits, stored_forecast = run.read_document("fits"), run.read_document("forecast")
    assert stored_fits is not None
    assert stored_forecast is not None
    assert fits["layers"] == json.loads(json.dumps(stored_fits["layers"]))
    assert forecast["layers"] == json.loads(json.dumps(stored_forecast["layers"]))


def test_other_commands_on_it(call: Call, played: tuple[Path, str], tmp_path: Path) -> None:
    text = call("fit", played[0]).out
    assert "hypothesis" in text
    exported: dict[str, Any] = call("export", played[0], "--out", tmp_path / "demo.csv", "--json").document
    assert exported["rows"] == POINTS * LAYERS * 10


def test_bad_input(refused: Callable[..., str], played: tuple[Path, str], tmp_path: Path) -> None:
    assert "already holds a run" in refused("demo", "--out", played[0], "--json")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("demo", "--out", tmp_path / "file", "--json")
