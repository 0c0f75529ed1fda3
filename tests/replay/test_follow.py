"""A folder that is still being written, followed by the function and by the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.cli.__main__ import main
from ma_monitor.errors import SourceError
from ma_monitor.measure.probe import Probe
from ma_monitor.replay.follow import follow
from ma_monitor.replay.runner import ReplayResult, replay
from ma_monitor.replay.sources import FolderSource, folder_source
from ma_monitor.runs.store import Run
from ma_monitor.sinks.base import Emission, MemorySink
from tests.replay.makers import IDS, train

STEPS = (0, 2, 5, 9)
PROBE = Probe.from_ids(IDS)
PATIENCE = 60.0
"""Seconds after which a command is taken for hung."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four states of a training, the last of which says that it is done; not to be changed."""
    root = train(tmp_path_factory.mktemp("saved"), STEPS, "checkpoint-{}")
    for step in STEPS:
        rows = [{"step": s, "learning_rate": 1.0 - s / 10} for s in range(1, step + 1)]
        state = {
            "global_step": step,
            "max_steps": STEPS[-1],
            "log_history": rows or [{"step": 1, "learning_rate": 1.0}],
        }
        (root / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the training writes."""
    path = tmp_path / "training"
    path.mkdir()
    return path


class Script:
    """Does one thing at each look at the folder, instead of waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], object]) -> None:
        self.acts = list(acts)
        monkeypatch.setattr("ma_monitor.replay.follow.time.sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        if not self.acts:
            raise KeyboardInterrupt
        self.acts.pop(0)()


class Calls:
    """Replays, and keeps which steps each call was for."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.steps: list[list[int]] = []

    def __call__(self, source: FolderSource) -> ReplayResult:
        self.steps.append([checkpoint.step for checkpoint in source.checkpoints])
        return replay(source, PROBE, None, self.out)


def copying(saved: Path, root: Path, step: int) -> Callable[[], object]:
    return lambda: shutil.copytree(saved / f"checkpoint-{step}", root / f"checkpoint-{step}")


def nothing() -> None:
    """Lets a look pass."""


def test_checkpoints_are_measured_once_they_are_complete_until_training_ends(
    saved: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = saved / "checkpoint-2" / "model.safetensors"
    target = root / "checkpoint-2"

    def begin_second() -> None:
        shutil.copytree(saved / "checkpoint-2", target)
        (target / "model.safetensors").write_bytes(half.read_bytes()[:5000])

    def go_on() -> None:
        (target / "model.safetensors").write_bytes(half.read_bytes()[:9000])

    def complete() -> None:
        (target / "model.safetensors").write_bytes(half.read_bytes())

    script = Script(
        monkeypatch,
        copying(saved, root, 0),
        nothing,
        begin_second,
        go_on,
        complete,
        copying(saved, root, 5),
        nothing,
        copying(saved, root, 9),
        nothing,
    )
    calls = Calls(tmp_path / "run")

    result = follow(root, tmp_path / "run", calls)

    assert calls.steps == [[0], [0, 2], [0, 2, 5], [0, 2, 5, 9]]
    assert result == ReplayResult(tmp_path / "run", STEPS, (), ())
    assert script.acts == []
    replay(folder_source(saved), PROBE, None, tmp_path / "at once")
    assert Run.open(tmp_path / "run").steps.tolist() == list(STEPS)
    (told_at_the_end,) = Run.open(tmp_path / "at once").plans
    assert Run.open(tmp_path / "run").plans[-1].same_as(told_at_the_end), "what the training tells later must count"
    assert np.array_equal(Run.open(tmp_path / "run").ratios(), Run.open(tmp_path / "at once").ratios())


def test_what_was_measured_before_is_kept_and_an_interrupt_ends_it(
    saved: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying(saved, root, 0)()
    replay(folder_source(root), PROBE, None, tmp_path / "run")
    (root / "checkpoint-7").mkdir()
    Script(monkeypatch, copying(saved, root, 2), nothing)

    result = follow(root, tmp_path / "run", Calls(tmp_path / "run"))

    assert (result.measured, result.skipped) == ((2,), (0,))
    assert result.problems == ("checkpoint-7 left out: half written, there is no config.json",)
    assert Run.open(tmp_path / "run").read_document("fits") is not None


def test_a_broken_checkpoint_is_tried_again_only_when_it_changes(
    saved: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = root / "checkpoint-2" / "model.safetensors"
    copying(saved, root, 0)()
    copying(saved, root, 2)()
    weights.write_bytes(b"cut")
    calls = Calls(tmp_path / "run")
    mend = (saved / "checkpoint-2" / "model.safetensors").read_bytes()
    Script(monkeypatch, nothing, nothing, nothing, lambda: weights.write_bytes(mend), nothing, nothing)

    result = follow(root, tmp_path / "run", calls)

    assert len(calls.steps) == 2
    assert (result.measured, result.problems) == ((0, 2), ())


def test_nothing_measured_is_an_error(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch)
    with pytest.raises(SourceError, match="no checkpoint of .*training was measured: none was complete"):
        follow(root, tmp_path / "run", Calls(tmp_path / "run"))


def test_an_interrupt_while_it_measures_loses_nothing(
    saved: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in STEPS[:3]:
        copying(saved, root, step)()
    Script(monkeypatch, nothing)

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    result = follow(root, run, lambda source: replay(source, PROBE, None, run, progress=interrupt))

    assert result == ReplayResult(run, (0, 2), (), ())
    assert Run.open(run).read_document("fits") is not None


def test_an_interrupt_right_after_the_first_record_loses_nothing(
    saved: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(MemorySink):
        def emit(self, emission: Emission) -> None:
            raise KeyboardInterrupt

    copying(saved, root, 0)()
    Script(monkeypatch, nothing)
    run = tmp_path / "run"

    result = follow(root, run, lambda source: replay(source, PROBE, None, run, sinks=[Interrupt()]))

    assert result == ReplayResult(run, (0,), (), ())
    assert Run.open(run).read_document("fits") is not None


def test_a_folder_that_cannot_be_read_is_warned_about_once_and_waited_for(
    saved: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = tmp_path / "away"
    copying(saved, root, 0)()
    Script(
        monkeypatch,
        nothing,
        lambda: root.rename(away),
        nothing,
        lambda: away.rename(root),
        lambda: root.rename(away),
        lambda: away.rename(root),
        copying(saved, root, 9),
        nothing,
    )

    result = follow(root, tmp_path / "run", Calls(tmp_path / "run"))

    assert (result.measured, result.problems) == ((0, 9), ())
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "ma_monitor"]
    assert warning == f"{root}: cannot be read (No such file or directory); waiting until it can"


def test_what_is_not_whole_is_waited_for_and_named(
    saved: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "checkpoint-7").mkdir()
    Script(monkeypatch, nothing)
    with pytest.raises(SourceError, match="was measured: .*checkpoint-7 left out: half written"):
        follow(root, tmp_path / "run", Calls(tmp_path / "run"))
    Script(monkeypatch, nothing, copying(saved, root, 9), nothing)
    result = follow(root, tmp_path / "run", Calls(tmp_path / "run"))
    assert result.measured == (9,)
    assert result.problems == ("checkpoint-7 left out: half written, there is no config.json",)


def test_the_command_wants_a_folder_and_nothing_that_cannot_be_done_with_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "lab/tiny", "--follow", "--out", str(tmp_path / "run")]) == 2
    assert "--follow needs a folder that exists, got 'lab/tiny'" in capsys.readouterr().err
    assert main(["replay", str(root), "--follow", "--force", "--out", str(tmp_path / "run")]) == 2
    assert "--follow goes with none of --force" in capsys.readouterr().err
    assert main(["replay", str(root), "--follow", "--revisions", "log", "--out", str(tmp_path / "run")]) == 2
    assert "and --revisions" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_follows_until_it_is_interrupted(saved: Path, root: Path, tmp_path: Path) -> None:
    copying(saved, root, 0)()
    np.save(tmp_path / "ids.npy", IDS)
    script = (
        "import sys; from ma_monitor.replay import follow; follow.POLL = 0.05\n"
        "from ma_monitor.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["replay", root, "--follow", "--out", tmp_path / "run", "--probe-ids", tmp_path / "ids.npy", "--json"]
    command = [sys.executable, "-c", script, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as one:
        wait_until_idle(tmp_path / "run", replays=1)
        copying(saved, root, 2)()
        wait_until_idle(tmp_path / "run", replays=2)
        one.send_signal(signal.SIGINT)
        out, _ = one.communicate(timeout=60)
    assert one.returncode == 0
    assert json.loads(out)["measured"] == [0, 2]
    replay(folder_source(root), PROBE, None, tmp_path / "at once")
    assert Run.open(tmp_path / "run").read_document("fits") == Run.open(tmp_path / "at once").read_document("fits")


def wait_until_idle(run: Path, *, replays: int) -> None:
    """Waits until a run was replayed into as often as this, and nobody does now."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        events = Run.open(run).events if (run / "run.json").is_file() else ()
        if sum(event.kind == "replayed" for event in events) == replays and not (run / "incoming").exists():
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run}: not replayed {replays} times")
