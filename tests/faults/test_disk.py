"""What the disk does to a training that is watched: full, read-only, emptied under way."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from ma_monitor import MassiveActivationCallback, Run
from ma_monitor.errors import StoreError
from ma_monitor.runs.documents import LOG
from tests.faults.disks import FILLER, fill, mounted
from tests.faults.trainings import (
    BEFORE,
    CONFIG,
    DUE,
    STRICT,
    At,
    refuses,
    trained,
    undisturbed,
    undisturbed_log,
    warned,
)
from tests.training import the_run


def make_read_only(stack: ExitStack, run: Path) -> None:
    """Puts a read-only view of a directory over it: even root cannot write to that."""
    stack.enter_context(mounted(run, "--bind", "-o", "ro", str(run)))


def test_a_disk_that_is_full_from_some_step_on(disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = MassiveActivationCallback(CONFIG, run_dir=disk / "run")
    assert trained(tmp_path, [callback, At(lambda: fill(disk))]) == undisturbed()
    run = the_run(callback)
    assert run.steps.tolist() == DUE, "what the disk refuses is kept in memory"
    on_disk = Run.open(disk / "run")
    assert on_disk.damage is None
    assert on_disk.steps.tolist() in (BEFORE, DUE[:4]), "the last page may have had room for one more"
    assert undisturbed_log().startswith((disk / "run" / LOG).read_bytes())
    for what in ("recording a measurement", "the fit and forecast", "closing the run"):
        (named,) = (line for line in warned(caplog) if line.startswith(f"ma_monitor: {what} failed"))
        assert "No space left on device" in named


def test_a_disk_that_has_room_again(disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = MassiveActivationCallback(CONFIG, run_dir=disk / "run")
    room = At((disk / FILLER).unlink, step=7)
    assert trained(tmp_path, [callback, At(lambda: fill(disk)), room]) == undisturbed()
    assert (disk / "run" / LOG).read_bytes() == undisturbed_log()
    assert Run.open(disk / "run").read_document("forecast") is not None
    (named,) = (line for line in warned(caplog) if "failed" in line)
    assert "No space left on device" in named


def test_a_directory_that_becomes_read_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is open for writing stays so, as on any Unix; what is made anew, fits and diary, is refused."""
    path = tmp_path / "run"
    callback = MassiveActivationCallback(CONFIG, run_dir=path)
    with ExitStack() as stack:
        assert trained(tmp_path / "out", [callback, At(lambda: make_read_only(stack, path))]) == undisturbed()
        assert Run.open(path).steps.tolist() == DUE
    assert (path / LOG).read_bytes() == undisturbed_log()
    failed, unrecorded = warned(caplog)
    assert failed.startswith("ma_monitor: the fit and forecast failed and is left out. StoreError: ")
    assert "Read-only file system" in failed
    assert "events.jsonl: cannot be written (Read-only file system); not recorded: fault" in unrecorded


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_disk_on_which_no_run_can_begin(
    state: str, disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(disk) if state == "full" else subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    callback = MassiveActivationCallback(CONFIG, run_dir=disk / "run")
    assert trained(tmp_path, [callback]) == undisturbed()
    (named,) = warned(caplog)
    assert named.startswith("ma_monitor: monitoring is off for this training. StoreError: ")
    assert ("No space left on device" if state == "full" else "Read-only file system") in named
    with pytest.raises(StoreError, match="cannot be written"):
        trained(tmp_path / "strict", [MassiveActivationCallback(STRICT, run_dir=disk / "run")])


@pytest.mark.parametrize("fault", [pytest.param("full", marks=pytest.mark.slow), "read-only", "deleted-and-replaced"])
def test_strict_raises_what_the_disk_refuses(fault: str, disk: Path, tmp_path: Path) -> None:
    path = disk / "run"
    callback = MassiveActivationCallback(STRICT, run_dir=path)
    with ExitStack() as stack:
        faults = {
            "full": lambda: fill(disk),
            "read-only": lambda: make_read_only(stack, path),
            "deleted-and-replaced": lambda: replace(path),
        }
        refusal = (
            r"cannot be written \((No space left|Read-only)|deleted under way, and what is there now is not this run's"
        )
        refuses(tmp_path, StoreError, refusal, [callback, At(faults[fault])])


def replace(path: Path) -> None:
    """Deletes a run's directory and puts something else there."""
    shutil.rmtree(path)
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def test_a_directory_that_is_deleted_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run"
    callback = MassiveActivationCallback(CONFIG, run_dir=path)
    assert trained(tmp_path / "out", [callback, At(lambda: shutil.rmtree(path))]) == undisturbed()
    assert (path / LOG).read_bytes() == undisturbed_log()
    run = Run.open(path)
    assert run.damage is None
    assert run.read_document("forecast") is not None
    (line,) = warned(caplog)
    assert line.startswith(f"{path}: the directory was deleted under way and is made again with all measurements")
    assert [f"{path}: {event.message}" for event in run.events if event.kind == "repaired"] == [line]
    with Run.open(path, writable=True):
        pass  # nobody holds it


def test_a_directory_that_is_deleted_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run"
    callback = MassiveActivationCallback(CONFIG, run_dir=path)
    assert trained(tmp_path / "out", [callback, At(lambda: replace(path))]) == undisturbed()
    assert the_run(callback).steps.tolist() == DUE, "kept in memory"
    assert (path / "notes.txt").read_text() == "mine"
    assert not (path / LOG).exists()
    (line,) = warned(caplog)
    assert line.startswith("ma_monitor: recording a measurement failed")
    assert "what is there now is not this run's; move it away" in line


def test_a_directory_that_is_moved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is open moves with it; what is made anew has nowhere to go."""
    path, moved = tmp_path / "run", tmp_path / "moved"
    callback = MassiveActivationCallback(CONFIG, run_dir=path)
    assert trained(tmp_path / "out", [callback, At(lambda: path.rename(moved))]) == undisturbed()
    assert (moved / LOG).read_bytes() == undisturbed_log()
    assert not path.exists()
    failed, unrecorded = warned(caplog)
    assert failed.startswith("ma_monitor: the fit and forecast failed and is left out. StoreError: ")
    assert "events.jsonl: cannot be written (No such file or directory); not recorded: fault" in unrecorded
