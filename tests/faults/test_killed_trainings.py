"""Trainings that are killed, doubled, fed by other processes, or resumed on a torn run."""

from __future__ import annotations

import functools
import logging
import random
import shutil
import signal
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe, Run
from ma_monitor.errors import StoreError
from ma_monitor.runs.documents import LOG, META
from ma_monitor.runs.log import scan
from tests.faults.lives import alone, beside, children, last_checkpoint, training_life, wait_for
from tests.faults.trainings import CONFIG, DUE, LENGTH, STRICT, At, bits, final, trained, undisturbed, warned
from tests.runs.makers import bits as bits_of
from tests.training import Rows, make_trainer, result_of, the_run

pytestmark = pytest.mark.slow
KILLS = 50
LONG = 30
"""Updates of a training that is killed again and again."""


@functools.cache
def undisturbed_long() -> tuple[bytes, list[object]]:
    """Final weights of a training of ``LONG`` updates, and what is measured in it."""
    with tempfile.TemporaryDirectory() as folder:
        callback = MassiveActivationCallback(STRICT)
        outcome = trained(Path(folder), [callback], max_steps=LONG)
        return final(outcome), [bits_of(m) for m in the_run(callback).measurements()]


def long_life(folder: Path) -> Path:
    return training_life(folder, max_steps=LONG)


def waiting_life(folder: Path, **changes: Any) -> Path:
    """A training that waits after step 5 until there is a file ``go``."""
    return training_life(folder, At(lambda: wait_for((folder / "go").exists), step=5), **changes)


def size(folder: Path) -> int:
    """Bytes of all that a training has written so far: it changes at every record and every checkpoint."""
    try:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except FileNotFoundError:  # renamed while we looked
        return -1


def wait_for_write(folder: Path, life: ForkServerProcess) -> None:
    before = size(folder)
    wait_for(lambda: size(folder) != before or not life.is_alive())


def test_a_training_killed_at_fifty_moments_is_the_one_that_was_not(tmp_path: Path) -> None:
    chance = random.Random(11)
    kills, reached = 0, set()
    finished: list[Path] = []
    while kills < KILLS:
        folder = tmp_path / f"training-{len(finished)}"
        folder.mkdir(exist_ok=True)
        with beside(long_life, folder) as life:
            if chance.random() < 0.3:  # while it starts
                time.sleep(chance.uniform(0, 0.3))
            else:  # some time after a write, of a record or of a checkpoint
                for _ in range(chance.randint(1, 40)):
                    wait_for_write(folder, life)
                time.sleep(chance.uniform(0, 0.01))
            life.kill()
            life.join()
            assert life.exitcode in (0, -signal.SIGKILL)
            if life.exitcode == 0:
                finished.append(folder)
            else:
                kills += 1
                reached.add(last_checkpoint(folder, LONG))
    finished.append(folder)
    alone(long_life, folder)
    print(f"{KILLS} kills in {len(finished)} trainings, at {len(reached)} different checkpoints")
    weights, measured = undisturbed_long()
    for folder in finished:
        assert (folder / "final").read_bytes() == weights
        runs = [Run.open(path) for path in sorted(folder.glob("ma_monitor*")) if (path / META).is_file()]
        whole = [run for run in runs if [bits_of(m) for m in run.measurements()] == measured]
        assert len(whole) == 1, [run.steps.tolist() for run in runs]
        assert whole[0].damage is None
        assert [event for event in whole[0].events if event.kind == "fault"] == []


def test_a_killed_trainings_worker_does_not_hold_its_run(tmp_path: Path) -> None:
    """The data loader's forked worker lives on for seconds after its parent was killed."""
    changes = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}
    with beside(functools.partial(waiting_life, tmp_path, **changes)) as life:
        wait_for(lambda: (tmp_path / "checkpoint-3" / "ma_monitor" / META).exists())
        (worker,) = children(life.pid)
        life.kill()
        life.join()
        assert Path(f"/proc/{worker}").exists()
        (tmp_path / "go").touch()
        assert alone(training_life, tmp_path) == tmp_path / "ma_monitor"
    assert (tmp_path / "final").read_bytes() == final(undisturbed())
    assert Run.open(tmp_path / "ma_monitor").steps.tolist() == DUE


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_data_loaders_of_either_kind(way: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": way}
    run = alone(functools.partial(training_life, tmp_path, **changes))
    assert (tmp_path / "final").read_bytes() == final(undisturbed())
    assert Run.open(run).steps.tolist() == DUE
    assert not any(event.kind == "fault" for event in Run.open(run).events)


def test_two_trainings_of_one_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody resumes a training that is still there: the run has one writer, and the second begins from a copy."""
    with beside(waiting_life, tmp_path) as first:
        wait_for(lambda: (tmp_path / "checkpoint-3" / "ma_monitor" / META).exists())
        checkpoint = shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "kept" / "checkpoint-3")
        wait_for(lambda: Run.open(tmp_path / "ma_monitor").steps.tolist() == DUE[:4])
        strict = MassiveActivationCallback(STRICT)
        with pytest.raises(StoreError, match="a run has one writer at a time and another process is writing this one"):
            make_trainer(tmp_path, [strict], max_steps=LENGTH).train(resume_from_checkpoint=str(checkpoint))
        second = MassiveActivationCallback(CONFIG)
        trainer = make_trainer(tmp_path, [second], max_steps=LENGTH)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert final(bits(result_of(trainer))) == final(undisturbed())
        (line,) = warned(caplog)
        assert "ma_monitor is not continued" in line
        assert "a run has one writer at a time" in line
        (tmp_path / "go").touch()
        first.join()
    assert first.exitcode == 0
    assert (tmp_path / "final").read_bytes() == final(undisturbed())
    assert the_run(second).path == tmp_path / "ma_monitor-2"
    one, other = Run.open(tmp_path / "ma_monitor"), Run.open(tmp_path / "ma_monitor-2")
    assert [bits_of(m) for m in one.measurements()] == [bits_of(m) for m in other.measurements()]
    assert one.steps.tolist() == DUE


def test_a_run_torn_at_every_byte_of_its_last_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is resumed by a real Trainer, from the checkpoint before that record; strict, so that nothing may fail."""
    caplog.set_level(logging.ERROR, "ma_monitor")
    config, probe = MonitorConfig(every=100, k=1, strict=True), Probe.from_ids(Rows().ids[:1, :4].numpy())
    first = MassiveActivationCallback(config, probe=probe, run_dir=tmp_path / "run")
    saving = {"save_strategy": "steps", "save_steps": LENGTH - 1}
    assert trained(tmp_path, [first], **saving) == undisturbed()
    run = tmp_path / "run"
    kept = Path(shutil.copytree(run, tmp_path / "kept"))
    whole = (kept / LOG).read_bytes()
    last = scan(whole, "log").frames[-1]
    for end in range(last.offset, len(whole)):
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        (run / LOG).write_bytes(whole[:end])
        callback = MassiveActivationCallback(config, probe=probe, run_dir=run)
        trainer = make_trainer(tmp_path, [callback], max_steps=LENGTH)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{LENGTH - 1}"))
        assert final(bits(result_of(trainer))) == final(undisturbed())
        assert the_run(callback).path == run
        assert (run / LOG).read_bytes() == whole
        repairs = [event for event in Run.open(run).events if event.kind == "repaired"]
        assert len(repairs) == (end > last.offset)
    print(f"{len(whole) - last.offset} trainings")
