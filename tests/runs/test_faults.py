"""What happens around a run: killed writers, second writers, disks that refuse."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ma_monitor.errors import StoreError
from ma_monitor.runs.log import HEADER, LogWriter
from ma_monitor.runs.store import Run
from tests.runs.makers import bits, make_measurements, make_meta, make_plan

fcntl = pytest.importorskip("fcntl", reason="locks, limits and signals as POSIX has them")
META = make_meta()
PLAN = make_plan()
REPOSITORY = Path(__file__).resolve().parents[2]

WRITER = """
import itertools, sys
from ma_monitor.runs.store import Run
from tests.runs.makers import make_measurements, make_meta, make_plan

run = Run.create(sys.argv[1], make_meta(), make_plan())
print("ready", flush=True)
for step in itertools.count():
    run.append(make_measurements(step, run.meta))
    print(step, flush=True)
"""

APPENDER = """
import sys
from ma_monitor.errors import StoreError
from ma_monitor.runs.store import Run

try:
    Run.open(sys.argv[1], writable=True)
except StoreError as error:
    print(error)
print(len(Run.open(sys.argv[1]).steps))
"""

READ_ONLY = """
import os, sys
from ma_monitor.errors import StoreError
from ma_monitor.runs.store import Run
from tests.runs.makers import make_meta

if os.geteuid() == 0:  # root may write everywhere: become nobody
    os.setuid(65534)
for attempt in (
    lambda: Run.open(sys.argv[1] + "/run", writable=True),
    lambda: Run.create(sys.argv[1] + "/new", make_meta(), None),
    lambda: Run.open(sys.argv[1] + "/run").copy_to(sys.argv[1] + "/copy"),
):
    try:
        attempt()
    except StoreError as error:
        print(error)
print(len(Run.open(sys.argv[1] + "/run").steps))
"""


@contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, dead when the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(code: str, *arguments: str) -> list[str]:
    with python(code, *arguments) as process:
        return process.communicate(timeout=60)[0].splitlines()


def expected(count: int) -> list[tuple[object, ...]]:
    return [bits(make_measurements(step, META)) for step in range(count)]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk on which no file grows beyond this many bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("appended", [1, 7, 40])
def test_a_killed_writer_loses_at_most_one_record_and_leaves_no_lock(tmp_path: Path, appended: int) -> None:
    path = tmp_path / "run"
    with python(WRITER, str(path)) as process:
        assert process.stdout is not None
        last = [process.stdout.readline() for _ in range(appended + 1)][-1]
        process.send_signal(signal.SIGKILL)
        reported = int(([last, *process.stdout.readlines()])[-1])
        process.wait()
    with Run.open(path, writable=True) as run:
        count = len(run.steps)
        assert count >= reported + 1 >= appended
        assert [bits(m) for m in run.measurements()] == expected(count)
        run.append(make_measurements(count, META))
    assert [bits(m) for m in Run.open(path).measurements()] == expected(count + 1)


def test_a_second_process_may_read_but_not_write(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Run.create(path, META, None) as run:
        run.append(make_measurements(0, META))
        refusal, steps = lines(APPENDER, str(path))
        assert refusal.startswith(f"{path}: a run has one writer at a time")
        assert steps == "1"
        with pytest.raises(StoreError, match=rf"{path}: a run has one writer at a time"):
            Run.continue_(path, META, None, from_step=0)
        run.append(make_measurements(1, META))
    assert lines(APPENDER, str(path)) == ["2"]


def test_a_run_that_another_process_makes_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"

    def late(log: Path, *, create: bool) -> LogWriter:
        monkeypatch.undo()
        with Run.create(path, META, PLAN):
            pass
        return LogWriter(log, create=create)

    monkeypatch.setattr("ma_monitor.runs.store.LogWriter", late)
    with pytest.raises(StoreError, match="run: already holds a run"):
        Run.create(path, META, None)
    assert len(Run.open(path).plans) == 1


KILLED = """
import os, signal, sys, time
from ma_monitor.runs.store import Run
from tests.runs.makers import make_meta

run = Run.create(sys.argv[1], make_meta(), None)
if worker := os.fork():
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
os.close(1)
time.sleep(60)
"""


def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    killed = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    worker = int(killed.stdout)
    try:
        assert killed.returncode == -signal.SIGKILL
        os.kill(worker, 0)  # still there
        Run.open(tmp_path / "run", writable=True).close()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with Run.create(tmp_path / "run", META, None) as run:
        run.append(make_measurements(0, META))
    assert [event.kind for event in run.events] == ["opened", "unlocked"]
    assert len(Run.open(tmp_path / "run").steps) == 1


def test_a_system_without_fcntl_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with Run.create(tmp_path / "run", META, None) as run:
        run.append(make_measurements(0, META))
    assert [event.kind for event in run.events] == ["opened", "unlocked"]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.parent.name.startswith(("pytest-", "popen-")) or folder.name.startswith("pytest-"):
            folder.chmod(0o755)  # pytest's own are closed to others
    with Run.create(tmp_path / "run", META, None) as run:
        run.append(make_measurements(0, META))
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    closed = [*(tmp_path / "run").iterdir(), tmp_path / "run", tmp_path]
    for file in closed:
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        *refusals, steps = lines(READ_ONLY, str(tmp_path))
    finally:
        for file in reversed(closed):
            file.chmod(0o755 if file.is_dir() else 0o644)
    reason = "cannot be written (Permission denied)"
    assert refusals == [f"{tmp_path / name}: {reason}" for name in ("run", "new", "copy")]
    assert steps == "1"
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_loses_nothing_once_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Run.create(path, META, None) as run:
        run.append(make_measurements(0, META))
        whole = (path / "measurements.bin").stat().st_size
        with file_size_limit(whole + 100):
            for step in (1, 2):
                with pytest.raises(
                    StoreError, match=r"measurements.bin: cannot be written \(File too large\); \d+ bytes"
                ):
                    run.append(make_measurements(step, META))
                assert (path / "measurements.bin").stat().st_size == whole
            assert [bits(m) for m in run.measurements()] == expected(3)
            assert len(Run.open(path).steps) == 1
            assert Run.open(path).damage is None
        run.append(make_measurements(3, META))
    assert [bits(m) for m in Run.open(path).measurements()] == expected(4)


def test_what_a_full_disk_refused_is_in_a_copy_and_goes_out_at_the_end(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", META, None)
    with (
        file_size_limit(len(HEADER) + 10),
        pytest.raises(StoreError, match=r"\d+ bytes of the run are not on the disk: make room"),
    ):
        run.append(make_measurements(0, META))
    run.copy_to(tmp_path / "copy")
    run.close()
    for path in (tmp_path / "run", tmp_path / "copy"):
        assert [bits(m) for m in Run.open(path).measurements()] == expected(1)


def test_a_disk_that_stays_full_is_named_at_the_end_and_the_lock_goes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = Run.create(path, META, None)
    with file_size_limit(len(HEADER) + 10):
        with pytest.raises(StoreError, match="cannot be written"):
            run.append(make_measurements(0, META))
        with pytest.raises(StoreError, match="cannot be written"):
            run.close()
    with Run.open(path, writable=True) as again:
        assert again.damage is None
        assert len(again.steps) == 0


def test_a_full_disk_leaves_documents_copies_and_exports_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Run.create(path, META, PLAN) as run:
        run.append(make_measurements(0, META))
        run.write_document("fits", {"layers": []})
        run.copy_to(tmp_path / "copy")
        run.export(tmp_path / "table.csv")
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        run.append(make_measurements(1, META))
        with file_size_limit(200):
            with pytest.raises(StoreError, match=r"fits.json: cannot be written"):
                run.write_document("fits", {"layers": ["x" * 500]})
            with pytest.raises(StoreError, match=r"copy: cannot be written"):
                run.copy_to(tmp_path / "copy")
            with pytest.raises(StoreError, match=r"table.csv: cannot be written"):
                run.export(tmp_path / "table.csv")
            with pytest.raises(StoreError, match=r"measurements.bin: cannot be written"):
                Run.create(tmp_path / "new", META, PLAN)
        names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
        assert names - {str(file.relative_to(tmp_path)) for file in before} == {"new/measurements.bin"}
        Run.create(tmp_path / "new", META, PLAN).close()
    for file, content in before.items():
        if file.name not in ("measurements.bin", "events.jsonl") or file.parent.name == "copy":
            assert file.read_bytes() == content


def test_a_copy_that_cannot_take_its_place_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with Run.create(tmp_path / "run", META, PLAN) as run:
        run.copy_to(tmp_path / "copy")
        before = {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()}
        run.append(make_measurements(0, META))
        monkeypatch.setattr(Path, "rename", refuse)
        for target in ("copy", "first"):
            with pytest.raises(StoreError, match=rf"{target}: cannot be written \(Input/output error\)"):
                run.copy_to(tmp_path / target)
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "copy"}


def test_a_sync_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", META, None)

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match=r"measurements.bin: cannot be synced to the disk \(Input/output error\)"):
        run.close()
    monkeypatch.undo()
    Run.open(tmp_path / "run", writable=True).close()
