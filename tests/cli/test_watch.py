"""``ma-monitor watch``: what it says of a run once, live on a terminal, and of names that would steer it."""

from __future__ import annotations

import errno
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_monitor.cli.watch import BLOCKS, PLAIN, SPARK, Snapshot, read, sparkline, view
from ma_monitor.config import MonitorConfig
from ma_monitor.monitor import Observer
from ma_monitor.runs.records import Measurements
from ma_monitor.runs.store import Run
from tests.cli.conftest import LAYERS, PLAN, STEPS, TOTAL, Call, make_measurements, make_meta, make_run

SHORT = STEPS[:12]
WAIT = 60.0
"""Seconds until a program on a busy machine has said what it is expected to say."""


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """A short run with fits and a forecast; its first layer has just passed 1000, as an alert tells."""
    run = Run.create(tmp_path / "run", make_meta(), PLAN)
    observer = Observer(run, MonitorConfig(strict=True))
    for m in make_measurements(SHORT):
        observer.observe(m)
    observer.observe(huge(int(SHORT[-1]) + 50))
    observer.finish()
    observer.close()
    return tmp_path / "run"


def huge(step: int) -> Measurements:
    """The last of the short measurements, with a first layer past 1000."""
    (last,) = make_measurements(SHORT[-1:])
    top = np.abs(last.top) * np.array([2000.0 / np.abs(last.top[0]).max(), 1, 1])[:, None, None]
    return Measurements.from_statistics(step, top, last.median)


def test_a_run_at_a_glance(call: Call, watched: Path) -> None:
    result = call("watch", watched)
    assert result.code == 0
    assert result.err == ""
    lines = result.out.splitlines()
    run = Run.open(watched)
    assert lines[0] == "tiny"
    assert f"step {run.steps[-1]:,} of {TOTAL:,}" in lines[1]
    assert re.search(r"\d+ (s|min) left, measured \d+ s ago", lines[1])
    heading = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    rows = [line.split() for line in lines[heading + 1 : heading + 1 + LAYERS]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    ends = [entry["end"]["median"] for entry in (run.read_document("forecast") or {})["layers"]]
    for row, ratio in zip(rows, run.ratios()[:, -1], strict=True):
        assert float(row[1].replace(",", "")) == pytest.approx(ratio, rel=1e-3)
        assert set(row[2]) <= set(BLOCKS)
    assert all(end is not None for end in ends)
    assert "the largest activation of layer 1 is" in result.out
    assert "\x1b" not in result.out, "colour although nobody sees it"


def test_json(call: Call, watched: Path) -> None:
    document = call("watch", watched, "--json").document
    run = Run.open(watched)
    assert (document["model"], document["step"], document["total_steps"]) == ("tiny", run.steps[-1], TOTAL)
    assert document["seconds_left"] > 0
    assert [layer["layer"] for layer in document["layers"]] == [1, 2, 3]
    assert [layer["ratio"] for layer in document["layers"]] == run.ratios()[:, -1].tolist()
    assert document["layers"][0]["class"] == (run.read_document("fits") or {})["layers"][0]["class"]
    assert set(document["layers"][0]) == {"layer", "ratio", "class", "end", "peak"}
    assert any("past 1,000" in words for words in document["alerts"])


def test_a_run_of_which_little_is_known(call: Call, tmp_path: Path) -> None:
    make_run(tmp_path / "empty", steps=np.arange(0))
    assert "nothing measured yet" in call("watch", tmp_path / "empty").out
    make_run(tmp_path / "unplanned", plan=None, steps=SHORT[:2])
    result = call("watch", tmp_path / "unplanned")
    assert f"step {SHORT[1]:,}, measured" in result.out
    assert call("watch", tmp_path / "unplanned", "--json").document["seconds_left"] is None


def test_pace_counts_from_the_last_resume(watched: Path) -> None:
    with Run.continue_(watched, make_meta(), PLAN, from_step=int(SHORT[-2])) as run:
        run.append(make_measurements(SHORT[-1:])[0])
    snapshot = read(watched)
    assert snapshot.left is not None
    spent = snapshot.left * (SHORT[-1] - SHORT[-2]) / (TOTAL - SHORT[-1])
    assert 0 < spent < WAIT
    Run.open(watched, writable=True).close()
    assert read(watched).left is None, "a life of which no beginning is known has no pace"


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;title\x07", "[bold red]x[/]" + "\u202egnp" + "y" * 10_000])
def test_names_cannot_steer_the_terminal(name: str, call: Call, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", name=name, steps=SHORT)
    with Run.open(path, writable=True) as run:
        run.event("alert", f"past_100@0:1 Layer 1. {name}")
    out = call("watch", path).out
    assert not set("\x1b\x07\u202e") & set(out)
    assert ("\\x1b[2J" if "\x1b" in name else "[bold red]x[/]\\u202egnp") in out
    assert max(map(len, out.splitlines())) < 1000


def shown(layers: int, *, height: int, width: int = 120, encoding: str = "utf-8") -> str:
    """What a terminal of this size shows of so many layers."""
    import io

    from rich.console import Console

    entry: dict[str, Any] = {"history": [1.0, 2.0, 4.0], "class": "flat", "end": None, "peak": None}
    rows = tuple({"layer": i, "ratio": float(i % 7 * 100), **entry} for i in range(1, layers + 1))
    snapshot = Snapshot("run", "model", 50, 100, 0.0, 90.0, rows, ("something happened",))
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system="truecolor")
    console.print(view(snapshot, console, 7200.0))
    file.seek(0)
    return file.read()


def test_large_models_show_the_largest_layers() -> None:
    text = shown(80, height=30)
    assert text.count("\n") <= 30
    assert "of 80 layers" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert re.search(r"^ +6 +600 ", plain, re.MULTILINE)
    assert not re.search(r"^ +7 +0 ", plain, re.MULTILINE)
    assert "50 of 100 (50%), 90 s left, measured 2 h ago" in plain
    assert "\x1b[1;31m" in shown(8, height=60) or "\x1b[33m" in shown(8, height=60), "no colour on a terminal"


def test_narrow_and_plain_terminals() -> None:
    narrow = re.sub(r"\x1b\[[0-9;]*m", "", shown(3, height=40, width=80))
    assert max(map(len, narrow.splitlines())) <= 80
    assert "flat" not in narrow
    assert not set(BLOCKS) & set(shown(3, height=40, encoding="ascii"))


def test_sparkline_against_a_slow_reference(rng: np.random.Generator) -> None:
    values = np.exp(rng.normal(0, 2, 60))
    values[[3, 7, 11]] = np.nan, np.inf, 0.0
    low, high = (f([v for v in values if 0 < v < np.inf]) for f in (min, max))
    expected = ""
    for value in values:
        if not 0 < value < np.inf:
            expected += " "
        else:
            expected += BLOCKS[round(7 * float(np.log(value / low)) / float(np.log(high / low)))]
    assert sparkline(values.tolist()) == expected
    assert sparkline([5.0, 5.0], PLAIN) == PLAIN[0] * 2
    assert sparkline([float("nan")]) == " "
    assert sparkline([]) == ""
    assert len(read_history()) == SPARK


def read_history() -> list[float]:
    """The history of a long run, thinned."""
    from ma_monitor.cli.watch import _evenly

    steps = np.arange(0, 10_000, 10)
    history = _evenly(steps, steps.astype(float))
    assert history[0] == 0
    assert history[-1] == steps[-1]
    np.testing.assert_allclose(np.diff(history), np.diff(history).mean(), rtol=0.1)
    return history


def test_it_follows_a_run_on_a_terminal_until_the_end(tmp_path: Path) -> None:
    """A real terminal (a pseudo one), a real writer beside it; the program ends when the planned end is measured."""
    path = make_run(tmp_path / "run", steps=SHORT[:3])
    leader, follower = pty.openpty()
    argv = [sys.executable, "-m", "ma_monitor.cli", "watch", str(path), "--every", "1"]
    program = subprocess.Popen(argv, stdout=follower, stderr=follower, env=os.environ | {"TERM": "xterm-256color"})
    os.close(follower)
    text: list[str] = []
    reader = threading.Thread(target=_drain, args=(leader, text))
    reader.start()
    try:
        _until(text, f"step {SHORT[2]} of {TOTAL:,}")
        with Run.open(path, writable=True) as run:
            run.append(make_measurements(SHORT[3:4])[0])
            _until(text, f"step {SHORT[3]} of {TOTAL:,}")
            run.append(make_measurements(np.array([TOTAL]))[0])
        assert program.wait(WAIT) == 0
    finally:
        program.kill()
        program.wait()
        reader.join(WAIT)
        os.close(leader)
    assert "done" in "".join(text)
    assert "\x1b[" in "".join(text)


def _drain(leader: int, text: list[str]) -> None:
    """Collects what a terminal is given until its program is gone."""
    try:
        while data := os.read(leader, 4096):
            text.append(data.decode("utf-8", "replace"))
    except OSError as error:
        if error.errno != errno.EIO:  # how Linux says that the other end is closed
            raise


def _until(text: list[str], words: str) -> None:
    """Waits for words on the terminal, colours aside."""
    deadline = time.monotonic() + WAIT
    while words not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", "".join(text)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{words!r} did not come; the terminal shows {''.join(text)[-2000:]!r}")
        time.sleep(0.05)


def test_ctrl_c_ends_it_well(call: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    from ma_monitor.cli import watch

    monkeypatch.setattr(watch, "follow", interrupted)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert call("watch", run_dir).code == 0


def test_help_has_an_example(call: Call) -> None:
    text = call("watch", "--help").out
    assert "example:\n  ma-monitor watch" in text
    assert "default: 2" in text


def test_what_is_no_run(call: Call, tmp_path: Path) -> None:
    result = call("watch", tmp_path)
    assert result.code == 2
    assert "not a run" in result.err
