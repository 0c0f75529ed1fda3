"""Processes that share the work on one folder; the slow test starts them as users do."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import SourceError, StoreError
from ma_monitor.measure.probe import Probe
from ma_monitor.replay.runner import ReplayResult, replay
from ma_monitor.replay.sources import folder_source
from ma_monitor.replay.together import replay_together
from ma_monitor.runs.store import Run
from tests.replay.makers import FILES, IDS, contents, save_model, train

STEPS = (0, 1, 2, 4, 6, 8)
PROBE = Probe.from_ids(IDS, source="ids.npy")
PATIENCE = 120.0
"""Seconds after which a launched replay is taken for hung."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six states of a training; not to be changed."""
    return train(tmp_path_factory.mktemp("saved"), STEPS)


@pytest.fixture(scope="module")
def alone(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    return replay(folder_source(saved), PROBE, None, tmp_path_factory.mktemp("alone") / "run").run


@pytest.fixture
def alone_in_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's only process: shares of others are made beforehand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("alone_in_the_group")
def test_what_dead_processes_measured_is_kept_and_the_rest_resumes(saved: Path, alone: Path, tmp_path: Path) -> None:
    run, source = tmp_path / "run", folder_source(saved)
    for rank, share in enumerate((source.checkpoints[:2], source.checkpoints[4:5])):
        replay(source, PROBE, None, run / "shards" / str(rank), checkpoints=share)

    result = replay_together(source, PROBE, MonitorConfig(), run)

    assert result == ReplayResult(run, (2, 4, 8), (0, 1, 6), ())
    assert contents(run) == contents(alone)
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, "events.jsonl"])


@pytest.mark.usefixtures("alone_in_the_group")
def test_a_join_that_was_killed_is_done_by_the_same_command(
    saved: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source = tmp_path / "run", folder_source(saved)
    replay(source, PROBE, None, run / "shards" / "0", checkpoints=source.checkpoints[:3])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ma_monitor.runs.merge.Run.append", killed)
        with pytest.raises(KeyboardInterrupt):
            replay_together(source, PROBE, MonitorConfig(), run)
    (run / ".merge-killed").mkdir()  # which a SIGKILL would have left

    assert replay_together(source, PROBE, MonitorConfig(), run) == ReplayResult(run, (4, 6, 8), (0, 1, 2), ())

    assert contents(run) == contents(alone)
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, "events.jsonl"])


@pytest.mark.usefixtures("alone_in_the_group")
def test_another_probe_is_refused_and_force_begins_anew(saved: Path, alone: Path, tmp_path: Path) -> None:
    run, source, other = tmp_path / "run", folder_source(saved), Probe.from_ids(IDS[:2])
    replay(source, other, None, run, checkpoints=source.checkpoints[:1])
    replay(source, other, None, run / "shards" / "0", checkpoints=source.checkpoints[1:2])
    with pytest.raises(StoreError, match="holds another run: probe"):
        replay_together(source, PROBE, MonitorConfig(), run)
    result = replay_together(source, PROBE, MonitorConfig(), run, force=True)
    assert result == ReplayResult(run, STEPS, (), ())
    assert contents(run) == contents(alone)


@pytest.mark.usefixtures("alone_in_the_group")
def test_another_model_is_refused_before_anything_is_measured(saved: Path, tmp_path: Path) -> None:
    run, source = tmp_path / "run", folder_source(saved)
    replay(source, PROBE, None, run, checkpoints=source.checkpoints[:1])
    save_model(tmp_path / "wide" / "step9", seed=1, width=32)
    with pytest.raises(StoreError, match="holds another run: model width was 16, is 32"):
        replay_together(folder_source(tmp_path / "wide"), PROBE, MonitorConfig(), run)
    assert not (run / "shards").exists()


@pytest.mark.usefixtures("alone_in_the_group")
def test_nothing_measured_or_a_process_that_died_is_an_error(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path(shutil.copytree(saved, tmp_path / "broken"))
    for file in broken.glob("*/model.safetensors"):
        file.write_bytes(b"cut")
    with pytest.raises(SourceError, match="no checkpoint could be measured: no checkpoint of broken"):
        replay_together(folder_source(broken), PROBE, MonitorConfig(), tmp_path / "run")
    replay(folder_source(saved), PROBE, None, tmp_path / "kept")
    kept = contents(tmp_path / "kept")
    with pytest.raises(SourceError, match="no checkpoint could be measured: no checkpoint of broken"):
        replay_together(folder_source(broken), PROBE, MonitorConfig(), tmp_path / "kept", force=True)
    assert contents(tmp_path / "kept") == kept

    def closed(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.gather_object", closed)
    with pytest.raises(SourceError, match="another process ended early; run the same command again"):
        replay_together(folder_source(saved), PROBE, MonitorConfig(), tmp_path / "run")
    assert Run.open(tmp_path / "run" / "shards" / "0").steps.tolist() == list(STEPS)


def launch(saved: Path, run: Path) -> subprocess.Popen[str]:
    """Starts the command in two processes by accelerate."""
    np.save(run.parent / "ids.npy", IDS)
    program = Path(sys.executable).with_name("accelerate")
    how = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    what = ["-m", "ma_monitor.cli", "replay", str(saved), "--out", str(run), "--probe-ids", str(run.parent / "ids.npy")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(program), "launch", *how, *plain, *what],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_accelerate_starts_workers_that_make_the_run_of_one_and_may_die(
    saved: Path, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with launch(saved, run) as launcher:
        shares = [run / "shards" / str(rank) for rank in range(2)]
        wait_for(lambda: (shares[1] / "run.json").is_file(), launcher)
        (victim,) = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _is_second(pid, run)]
        os.kill(victim, signal.SIGSTOP)  # it cannot end before it is killed
        wait_for(lambda: (shares[0] / "run.json").is_file() and len(Run.open(shares[0]).steps) > 0, launcher)
        os.kill(victim, signal.SIGKILL)
        assert launcher.wait(timeout=PATIENCE) != 0
    before = {
        step for path in (run, *run.glob("shards/*")) if (path / "run.json").is_file() for step in Run.open(path).steps
    }

    with launch(saved, run) as launcher:
        out, _ = launcher.communicate(timeout=PATIENCE)

    assert launcher.returncode == 0
    assert 0 < len(before) <= len(STEPS)
    measured = len(STEPS) - len(before)
    assert out.splitlines()[0].startswith(f"{run}: {measured} checkpoint")
    assert contents(run) == contents(alone)
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, "events.jsonl"])


def wait_for(what: Callable[[], bool], launcher: subprocess.Popen[str]) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not what() and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def _is_second(pid: int, run: Path) -> bool:
    """Whether a process is the second worker of this run."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return b"RANK=1" in environment and str(run).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
