"""Trainings that are resumed: the run goes on, whatever became of its directory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe, Run
from tests.training import STEPS, Rows, make_trainer, the_run, train

STRICT = MonitorConfig(every=4, strict=True)
ROOT = Path(__file__).resolve().parents[1]

CRASHES = """
import os, sys
from pathlib import Path
from transformers import TrainerCallback
from ma_monitor import MassiveActivationCallback, MonitorConfig
from tests.training import train

class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os._exit(17)

train(Path(sys.argv[1]), [MassiveActivationCallback(MonitorConfig(every=1, strict=True)), Crash()],
      save_strategy="steps", save_steps=5)
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def crashed(folder: Path) -> Path:
    """A training that died at step 9 after a checkpoint at 5."""
    assert python(CRASHES, str(folder)).returncode == 17
    assert Run.open(folder / "ma_monitor").steps[-1] >= 8
    return folder


def same_measurements(one: Run, other: Run) -> None:
    assert one.steps.tolist() == other.steps.tolist()
    for a, b in zip(one.measurements(), other.measurements(), strict=True):
        np.testing.assert_array_equal(a.top, b.top)
        np.testing.assert_array_equal(a.median, b.median)
        np.testing.assert_array_equal(a.position, b.position)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, [MassiveActivationCallback(MonitorConfig(every=1, strict=True))], save_strategy="steps", save_steps=5)
    return Run.open(folder / "ma_monitor")


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crashed(tmp_path_factory.mktemp("crashed"))


def resumed(folder: Path, checkpoint: Path | bool = True, **changes: Any) -> MassiveActivationCallback:
    callback = MassiveActivationCallback(MonitorConfig(every=1, strict=True))
    trainer = make_trainer(folder, [callback], save_strategy="steps", save_steps=5, **changes)
    trainer.train(resume_from_checkpoint=str(checkpoint) if isinstance(checkpoint, Path) else checkpoint)
    return callback


def test_a_resumed_training_has_the_trajectory_of_an_uninterrupted_one(
    uninterrupted: Run, broken_off: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(broken_off, tmp_path / "out"))
    callback = resumed(folder)
    run = the_run(callback)
    assert run.path == folder / "ma_monitor"
    same_measurements(run, uninterrupted)
    same_measurements(Run.open(folder / "ma_monitor"), uninterrupted)
    assert run.read_document("fits") == uninterrupted.read_document("fits")
    assert run.read_document("forecast") == uninterrupted.read_document("forecast")


def test_a_node_with_nothing_but_the_checkpoint_has_the_history(
    uninterrupted: Run, broken_off: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(broken_off / "checkpoint-5", tmp_path / "elsewhere" / "checkpoint-5"))
    callback = resumed(tmp_path / "new" / "out", checkpoint)
    same_measurements(the_run(callback), uninterrupted)


def test_a_checkpoint_without_a_run_begins_one_and_says_so(
    broken_off: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Path(shutil.copytree(broken_off / "checkpoint-5", tmp_path / "elsewhere" / "checkpoint-5"))
    shutil.rmtree(checkpoint / "ma_monitor")
    with caplog.at_level(logging.WARNING, "ma_monitor"):
        callback = resumed(tmp_path / "out", checkpoint)
    assert the_run(callback).steps.tolist() == list(range(5, STEPS + 1))
    assert "training resumes from step 5 without its run; one begins in" in caplog.text


def test_a_changed_schedule_is_recorded_and_the_old_plan_kept(broken_off: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(broken_off, tmp_path / "out"))
    run = the_run(resumed(folder, max_steps=20))
    assert [(plan.from_step, plan.total_steps) for plan in run.plans] == [(0, STEPS), (5, 20)]
    assert run.steps[-1] == 20


def test_a_changed_batch_is_recorded_and_voids_the_forecast(broken_off: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(broken_off, tmp_path / "out"))
    seen: list[Any] = []

    class Looks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen.append(the_run(callback).read_document("forecast"))

    callback = MassiveActivationCallback(MonitorConfig(every=1, strict=True))
    trainer = make_trainer(folder, [callback, Looks()], per_device_train_batch_size=2)
    assert Run.open(folder / "ma_monitor").read_document("forecast") is not None
    trainer.train(resume_from_checkpoint=True)
    assert [(plan.from_step, plan.batch) for plan in the_run(callback).plans] == [(0, 4), (5, 2)]
    assert seen == [None]


def test_a_run_still_held_by_this_process_is_continued_from_the_checkpoint(uninterrupted: Run, tmp_path: Path) -> None:
    """After an interrupt in a notebook the old callback is still there and has the run open."""

    class Interrupts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    first = MassiveActivationCallback(MonitorConfig(every=1))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [first, Interrupts()], save_strategy="steps", save_steps=5)
    second = MassiveActivationCallback(MonitorConfig(every=1))
    make_trainer(tmp_path, [second], save_strategy="steps", save_steps=5).train(resume_from_checkpoint=True)
    assert the_run(second).path == tmp_path / "ma_monitor-2"
    same_measurements(the_run(second), uninterrupted)
    the_run(first).close()


def test_replaying_the_checkpoints_gives_what_was_measured_live(tmp_path: Path) -> None:
    from ma_monitor.replay.runner import replay
    from ma_monitor.replay.sources import folder_source

    probe = Probe.from_ids(Rows().ids[:4].numpy())
    callback = MassiveActivationCallback(STRICT, probe=probe)
    train(tmp_path / "out", [callback], save_strategy="steps", save_steps=4)
    live = {m.step: m for m in the_run(callback).measurements()}
    replayed = replay(folder_source(tmp_path / "out"), probe, STRICT, tmp_path / "run")
    assert replayed.measured == (4, 8, 12)
    again = Run.open(tmp_path / "run")
    assert again.meta == the_run(callback).meta
    assert [plan.same_as(the_run(callback).plans[0]) for plan in again.plans] == [True]
    for m in again.measurements():
        np.testing.assert_allclose(m.top, live[m.step].top, rtol=1e-6)
        np.testing.assert_allclose(m.median, live[m.step].median, rtol=1e-6)
        np.testing.assert_array_equal(m.position, live[m.step].position)


def test_a_run_of_another_probe_is_not_continued_and_not_touched(
    broken_off: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(broken_off, tmp_path / "out"))
    before = (folder / "ma_monitor" / "measurements.bin").read_bytes()
    probe = Probe.from_ids([[1, 2, 3], [4, 5, 6]])
    callback = MassiveActivationCallback(MonitorConfig(every=1), probe=probe)
    make_trainer(folder, [callback]).train(resume_from_checkpoint=True)
    assert the_run(callback).path == folder / "ma_monitor-2"
    assert the_run(callback).steps[0] == 5
    assert (folder / "ma_monitor" / "measurements.bin").read_bytes() == before
    assert "probe" in caplog.text
    strict = MassiveActivationCallback(MonitorConfig(every=1, strict=True), probe=probe)
    with pytest.raises(Exception, match="probe"):
        make_trainer(folder, [strict], max_steps=13).train(resume_from_checkpoint=str(folder / "checkpoint-5"))


def test_the_trainer_state_carries_plain_json(broken_off: Path) -> None:
    state = json.loads((broken_off / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ma_monitor.v1"] == {"run": "ma_monitor", "measured": 6, "told": []}
