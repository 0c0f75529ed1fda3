"""What the model does in the probe: new types, no memory, signals, numbers that are none, another model."""

from __future__ import annotations

import functools
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe, Run
from ma_monitor.errors import ModelError
from ma_monitor.runs.documents import LOG
from tests.faults.trainings import (
    AT, BEFORE, CONFIG, DUE, LENGTH, STRICT, At, bits, faults, refuses, trained, undisturbed, undisturbed_log, warned,
)  # fmt: skip
from tests.training import VOCABULARY, Rows, make_trainer, result_of, the_run, tiny_llama

MIB = 2**20


class InProbe(nn.Module):
    """A block that does something first wherever it is run for evaluation, from the moment on that it is armed."""

    def __init__(self, block: nn.Module, do: Callable[[], object]) -> None:
        super().__init__()
        self.block, self.do, self.armed = block, do, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.armed and not self.training:
            self.do()
        return self.block(*args, **kwargs)


def with_block_that(do: Callable[[], object]) -> tuple[nn.Module, InProbe]:
    """The tiny model, and its first block, which does ``do`` in the probe once it is armed."""
    model = tiny_llama()
    block = InProbe(model.model.layers[0], do)
    model.model.layers[0] = block
    return model, block


def armed(block: InProbe, on: bool = True) -> Callable[[], None]:
    def switch() -> None:
        block.armed = on

    return switch


def raises(error: BaseException) -> Callable[[], object]:
    def do() -> None:
        raise error

    return do


def weights_of(outcome: tuple[Any, ...]) -> list[bytes]:
    """Weights in their order: a wrapped block's have other names."""
    return list(outcome[0].values())


@pytest.mark.parametrize("again", [False, True], ids=["for-good", "for-one-probe"])
def test_out_of_memory_on_an_accelerator(again: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, block = with_block_that(raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")))
    callback = MassiveActivationCallback(CONFIG, run_dir=tmp_path / "run")
    events = [At(armed(block))] + ([At(armed(block, False), step=5)] if again else [])
    outcome = trained(tmp_path, [callback, *events], model=model)
    assert weights_of(outcome) == weights_of(undisturbed())
    assert outcome[1:] == undisturbed()[1:]
    run = Run.open(tmp_path / "run")
    assert run.steps.tolist() == BEFORE + (DUE[4:] if again else [])
    assert faults(run) == [
        "the probe failed and is left out. OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    ]
    assert [line for line in warned(caplog) if "out of memory" in line] == [f"ma_monitor: {faults(run)[0]}"]
    (told,) = (event.message for event in run.events if event.kind == "alert")
    assert "a smaller batch_size in MonitorConfig helps" in told
    model, block = with_block_that(raises(torch.OutOfMemoryError("CUDA out of memory")))
    strict = [MassiveActivationCallback(STRICT), At(armed(block))]
    refuses(tmp_path / "strict", torch.OutOfMemoryError, "CUDA out of memory", strict, model=model)


class AddressSpace:
    """A limit on this process's memory, some way above what it has."""

    def __init__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_AS)

    def limit(self, room: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, self.before[1]))

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


@pytest.fixture
def memory() -> Iterator[AddressSpace]:
    space = AddressSpace()
    yield space
    space.lift()


def test_out_of_memory_by_the_systems_limit(
    memory: AddressSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The attention scores of this probe take 32 MiB at a time; the training's 48 tokens take next to nothing."""
    changes: dict[str, Any] = {"max_position_embeddings": 512, "attn_implementation": "eager"}
    once = trained(tmp_path / "once", [], model=tiny_llama(**changes))
    probe = Probe.from_ids(np.random.default_rng(0).integers(0, VOCABULARY, (16, 512)))
    callback = MassiveActivationCallback(CONFIG, probe=probe, run_dir=tmp_path / "run")
    limited = [At(lambda: memory.limit(24 * MIB)), At(memory.lift, step=5)]
    assert trained(tmp_path, [callback, *limited], model=tiny_llama(**changes)) == once
    run = Run.open(tmp_path / "run")
    assert run.steps.tolist() == [step for step in DUE if step != 4]
    (fault,) = faults(run)
    assert fault.startswith("the probe failed and is left out. RuntimeError: ")
    assert "allocate memory" in fault
    assert [line for line in warned(caplog) if "allocate memory" in line] == [f"ma_monitor: {fault}"]
