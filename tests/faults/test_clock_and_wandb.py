"""A clock that jumps back, and a W&B service that is killed: what needs a process of its own to happen in."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import WandbCallback

from ma_monitor import MassiveActivationCallback, MonitorConfig, Run
from tests.faults.lives import alone, children
from tests.faults.trainings import BEFORE, CONFIG, DUE, STRICT, At, faults, final, trained, undisturbed

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME && access(getenv("JUMPED"), F_OK) == 0) now->tv_sec -= 86400;
    return failed;
}
"""
"""Put before the C library: the time of day is that of yesterday as soon as a file is there."""

TRAINING = """
import sys
from pathlib import Path
from tests.faults.lives import training_life
from tests.faults.trainings import At

folder = Path(sys.argv[1])
training_life(folder, At((folder / "jumped").touch))
training_life(folder)
"""
"""A training in which the clock jumps, and one that is resumed from its checkpoint on the day before that was made."""


def test_a_clock_that_jumps_back_by_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the diary knows the time of day, and its order is that of writing."""
    if shutil.which("cc") is None:
        pytest.skip("a clock of one's own is made with a C compiler, and there is none")
    (tmp_path / "clock.c").write_text(CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("JUMPED", str(tmp_path / "jumped"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", TRAINING, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "final").read_bytes() == final(undisturbed())
    run = Run.open(tmp_path / "ma_monitor")
    assert run.steps.tolist() == DUE
    assert run.read_document("forecast") is not None
    assert [event.kind for event in run.events] == ["opened", "opened", "resumed", "rewound"]
    today, *yesterday = (datetime.fromisoformat(event.time) for event in run.events)
    assert all(timedelta(hours=23) < today - time < timedelta(hours=24) for time in yesterday)


class KeepsItsFaults(WandbCallback):
    """W&B's reporter with its own faults kept from the Trainer, which dies of them otherwise."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        with suppress(Exception):
            super().on_log(*args, **kwargs)  # type: ignore[no-untyped-call]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        with suppress(Exception):
            super().on_train_end(*args, **kwargs)


def kill_service() -> None:
    """Kills W&B's own process, which is this one's child."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in children(os.getpid())}
    (service,) = (pid for pid, name in names.items() if name.startswith("wandb-core"))
    os.kill(service, signal.SIGKILL)
    os.waitpid(service, 0)


def with_killed_service(folder: Path, config: MonitorConfig) -> tuple[object, ...]:
    """A training whose W&B service is killed under way, with a reporter that lives on."""
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=str(folder), WANDB_SILENT="true")
    reporter = KeepsItsFaults()  # type: ignore[no-untyped-call]
    with (folder / "log").open("w") as log:
        logging.getLogger("ma_monitor").addHandler(logging.StreamHandler(log))
        return trained(folder, [reporter, MassiveActivationCallback(config), At(kill_service)])


def with_killed_service_of_its_own(folder: Path, watched: bool) -> None:
    """The same with the Trainer's own reporter."""
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=str(folder), WANDB_SILENT="true")
    callbacks: list[TrainerCallback] = [MassiveActivationCallback(CONFIG)] if watched else []
    trained(folder, [*callbacks, At(kill_service)], report_to=["wandb"])


def test_a_wandb_service_that_is_killed(tmp_path: Path) -> None:
    assert alone(with_killed_service, tmp_path, CONFIG) == undisturbed()
    run = Run.open(tmp_path / "ma_monitor")
    assert run.steps.tolist() == DUE
    (fault,) = faults(run)
    assert fault.startswith("the wandb sink failed and is left out. Connection")
    assert (tmp_path / "log").read_text() == f"ma_monitor: {fault}\n"
    (tmp_path / "strict").mkdir()
    with pytest.raises(ConnectionError):
        alone(with_killed_service, tmp_path / "strict", STRICT)


@pytest.mark.parametrize("watched", [False, True])
def test_the_trainers_own_wandb_dies_with_its_service_watched_or_not(watched: bool, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        alone(with_killed_service_of_its_own, tmp_path, watched)
    if watched:
        assert Run.open(tmp_path / "ma_monitor").steps.tolist()[: len(BEFORE)] == BEFORE
