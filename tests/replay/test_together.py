"""Two processes replay one folder; the slow tests start them as users do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.errors import ConfigError
from ma_monitor.measure.probe import Probe
from ma_monitor.replay.runner import replay
from ma_monitor.replay.sources import folder_source
from ma_monitor.replay.together import Worker, launched
from ma_monitor.runs.store import Run
from tests.replay.makers import FILES, IDS, contents, train

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


def test_a_launcher_is_known_by_its_environment() -> None:
    meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert launched({}) is None
    assert launched({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert launched({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"} | meet) == Worker(3, 4, 1)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, so a launcher must set RANK, MASTER_ADDR, MASTER_PORT too"):
        launched({"WORLD_SIZE": "2"})


ONE_OF_TWO = (
    "import os, pathlib, sys\n"
    "import numpy as np\n"
    "from ma_monitor.measure.probe import Probe\n"
    "from ma_monitor.replay import runner, sources, together\n"
    "saved, out, ids, force, die = sys.argv[1:]\n"
    "source, probe = sources.folder_source(pathlib.Path(saved)), Probe.from_ids(np.load(ids), 'ids.npy')\n"
    "worker = together.launched(os.environ)\n"
    "def stop(done, total, name):\n"
    "    if worker.rank == int(die) and done == 1: os.kill(os.getpid(), 9)\n"
    "def share(out, shard, beside):\n"
    "    return runner.replay(source, probe, None, out, shard=shard, beside=beside, progress=stop)\n"
    "result = together.replay_together(worker, pathlib.Path(out), share, force=force == 'yes')\n"
    "print(None if result is None else (result.measured, result.skipped, result.problems))\n"
)


def two(saved: Path, out: Path, *, force: bool = False, die: int = -1, count: int = 2) -> list[str]:
    """What each of two processes prints that meet without a launcher that would kill one when the other dies."""
    np.save(out.parent / "ids.npy", IDS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    words = [str(saved), str(out), str(out.parent / "ids.npy"), "yes" if force else "no", str(die)]
    command = [sys.executable, "-W", "ignore", "-c", ONE_OF_TWO, *words]
    started = [
        subprocess.Popen(command, env=os.environ | meet | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    return [process.communicate(timeout=PATIENCE)[0].strip() for process in started]


@pytest.mark.slow
def test_the_survivor_joins_what_there_is_and_force_begins_anew(saved: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    survivor, dead = two(saved, run, die=1)
    assert dead == ""
    words = "('worker 1 ended early; run the same command again for what it left',)"
    assert survivor == f"((0, 2, 6), (1,), {words})"
    assert Run.open(run).steps.tolist() == [0, 1, 2, 6]

    assert two(saved, run, force=True) == [f"({STEPS}, (), ())", "None"]

    assert contents(run) == contents(alone)
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, "events.jsonl"])


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
        shares = [run / "shards" / f"{rank}-of-2" for rank in range(2)]
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
