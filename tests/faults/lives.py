"""Trainings in processes of their own, which a test may kill: forks of one that has everything loaded."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ma_monitor import MassiveActivationCallback
from tests.faults.trainings import CONFIG, LENGTH, At, bits
from tests.training import make_trainer, result_of, the_run

T = TypeVar("T")
LOADED = ["pytest", "transformers.trainer", "transformers.models.llama.modeling_llama", "ma_monitor.callback", "scipy"]
PATIENCE = 60.0
"""Seconds for what takes one or two on an idle machine."""


def forks() -> ForkServerContext:
    """Makes processes by a fork of one that has loaded what takes seconds to load, and has never trained."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    return context


def alone(work: Callable[..., T], *arguments: Any) -> T:
    """What ``work`` returns or raises in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=forks()) as pool:
        return pool.submit(work, *arguments).result(PATIENCE)


@contextmanager
def beside(work: Callable[..., object], *arguments: Any) -> Iterator[ForkServerProcess]:
    """``work`` in a process of its own, dead when the block ends."""
    process = forks().Process(target=work, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(happened: Callable[[], bool]) -> None:
    """Returns once something has happened.

    Raises:
        TimeoutError: If it has not for ``PATIENCE``.
    """
    until = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > until:
            raise TimeoutError("what a test waits for has not happened")
        time.sleep(0.005)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole: the Trainer writes its state last, and does not write it at once."""

    def whole(checkpoint: Path) -> bool:
        try:
            return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
        except (OSError, ValueError):
            return False

    found = [checkpoint for checkpoint in folder.glob("checkpoint-*") if whole(checkpoint)]
    return max(found, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)


def training_life(folder: Path, length: int = LENGTH, pause: int | None = None, **changes: Any) -> Path:
    """Trains from the last checkpoint on, or from the beginning; keeps the final weights; gives the run's directory.

    Args:
        folder: Where the training keeps everything.
        length: Updates.
        pause: Wait before the update after this step until there is a file ``go``; None does not.
        changes: Of the Trainer's arguments.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    callback = MassiveActivationCallback(CONFIG)
    waits = [] if pause is None else [At(lambda: wait_for((folder / "go").exists), step=pause)]
    settings = {"max_steps": length, "save_strategy": "steps", "save_steps": 3, "report_to": "none"}
    trainer = make_trainer(folder, [callback, *waits], **(settings | changes))
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    (folder / "final").write_bytes(final(bits(result_of(trainer))))
    return the_run(callback).path


def final(outcome: tuple[Any, ...]) -> bytes:
    """The weights that a training ends with, all that can be compared where the log of an earlier life is torn."""
    return b"".join(outcome[0].values())
