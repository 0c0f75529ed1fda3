"""Short real trainings into which a fault is put, and what undisturbed ones leave behind."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from ma_monitor import MassiveActivationCallback, MonitorConfig, Run
from ma_monitor.errors import StoreError
from ma_monitor.runs.documents import LOG
from tests.training import Result, the_run, train

LENGTH = 8
CONFIG = MonitorConfig(every=2)
STRICT = MonitorConfig(every=2, strict=True)
DUE = [0, 1, 2, 4, 6, 8]
AT = 3
"""The fault comes before the update after this step, between two measurements."""
BEFORE = [step for step in DUE if step <= AT]


class At(TrainerCallback):
    """Does something before the update after a step."""

    def __init__(self, do: Callable[[], object], step: int = AT) -> None:
        self._do, self._step = do, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._do()


def bits(result: Result) -> tuple[object, ...]:
    """Weights to the bit, NaN included, logged rows and random states: what no fault of the monitor may change."""
    weights = {name: value.numpy().tobytes() for name, value in result.weights.items()}
    return weights, result.losses, result.states


def trained(folder: Path, callbacks: list[TrainerCallback], **changes: Any) -> tuple[object, ...]:
    """The bits of a training of ``LENGTH`` updates."""
    return bits(train(folder, callbacks, **({"max_steps": LENGTH} | changes)))


def values(outcome: tuple[Any, ...]) -> tuple[Any, ...]:
    """Weights in their order, as the parameters of a wrapped block have other names, and all the rest."""
    weights, *rest = outcome
    return list(weights.values()), *rest


def final(outcome: tuple[Any, ...]) -> bytes:
    """The weights that a training ends with, all that can be compared where the log of an earlier life is torn."""
    return b"".join(outcome[0].values())


@functools.cache
def undisturbed() -> tuple[object, ...]:
    """The bits of a training that nothing watches."""
    with tempfile.TemporaryDirectory() as folder:
        return trained(Path(folder), [])


@functools.cache
def undisturbed_log() -> bytes:
    """The measurements' file of a watched training without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        callback = MassiveActivationCallback(STRICT)
        trained(Path(folder), [callback])
        return (the_run(callback).path / LOG).read_bytes()


def refuses(
    folder: Path, error: type[BaseException], match: str, callbacks: list[TrainerCallback], **changes: Any
) -> None:
    """Checks that a training whose first callback is strict ends with an exception, and lets go of its run."""
    with pytest.raises(error, match=match):
        trained(folder, callbacks, **changes)
    watching = callbacks[0]
    assert isinstance(watching, MassiveActivationCallback)
    with suppress(StoreError):
        the_run(watching).close()


def faults(run: Run) -> list[str]:
    """The faults in a run's diary."""
    return [event.message for event in run.events if event.kind == "fault"]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What ma_monitor warned of."""
    return [r.getMessage() for r in caplog.records if r.name == "ma_monitor" and r.levelno >= logging.WARNING]
