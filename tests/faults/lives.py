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
from transformers import TrainerCallback

from ma_monitor import MassiveActivationCallback
from tests.faults.trainings import CONFIG, LENGTH, bits, final
from tests.training import make_trainer, result_of, the_run

T = TypeVar("T")
LOADED = ["pytest", "transformers.trainer", "transformers.models.llama.modeling_llama", "ma_monitor.callback", "scipy"]
PATIENCE = 300.0
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


def children(pid: int | None) -> list[int]:
    """Processes that a process has begun."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def last_checkpoint(folder: Path, length: int) -> Path | None:
    """The last whole checkpoint before the end: a training resumed from its end would take a step too many.

    The Trainer writes the state last, but neither that nor the checkpoint at once.
    """

    def step(checkpoint: Path) -> int:
        try:
            return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
        except (OSError, ValueError):
            return length

    found = [checkpoint for checkpoint in folder.glob("checkpoint-*") if step(checkpoint) < length]
    return max(found, key=step, default=None)


def training_life(folder: Path, *others: TrainerCallback, **changes: Any) -> Path:
    """Trains from the last checkpoint on, or from the beginning; keeps the final weights; gives the run's directory.

    Args:
        folder: Where the training keeps everything.
        others: Callbacks besides the monitor's.
        changes: Of the Trainer's arguments.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    callback = MassiveActivationCallback(CONFIG)
    settings = {"max_steps": LENGTH, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(folder, [callback, *others], **(settings | changes))
    checkpoint = last_checkpoint(folder, trainer.args.max_steps)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    (folder / "final").write_bytes(final(bits(result_of(trainer))))
    return the_run(callback).path
