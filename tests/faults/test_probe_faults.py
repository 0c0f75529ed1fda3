"""What the model does in the probe: no memory, new types, interrupts, numbers that are none, another model."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ma_monitor import MassiveActivationCallback, Probe, Run
from ma_monitor.errors import ModelError
from tests.faults.trainings import (
    BEFORE,
    CONFIG,
    DUE,
    LENGTH,
    STRICT,
    At,
    bits,
    faults,
    refuses,
    trained,
    undisturbed,
    values,
    warned,
)
from tests.training import VOCABULARY, make_trainer, result_of, the_run, tiny_llama

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


@pytest.mark.parametrize(
    "again", [pytest.param(False, id="for-good", marks=pytest.mark.slow), pytest.param(True, id="for-one-probe")]
)
def test_out_of_memory_on_an_accelerator(again: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, block = with_block_that(raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")))
    callback = MassiveActivationCallback(CONFIG, run_dir=tmp_path / "run")
    events = [At(armed(block))] + ([At(armed(block, False), step=5)] if again else [])
    outcome = trained(tmp_path, [callback, *events], model=model)
    assert values(outcome) == values(undisturbed())
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


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------------------- new types


@dataclass
class Box:
    """What a block of somebody's own may return."""

    hidden: Tensor


class Packs(nn.Module):
    """A block that returns its hidden states in a ``Box``, from the moment on that it is armed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.armed = block, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.block(*args, **kwargs)
        return Box(hidden) if self.armed else hidden


class Unpacks(nn.Module):
    """The block after that one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return self.block(hidden.hidden if isinstance(hidden, Box) else hidden, *args, **kwargs)


def packing_model(armed: bool) -> tuple[nn.Module, Packs]:
    model = tiny_llama()
    first, second = model.model.layers
    packs = Packs(first)
    packs.armed = armed
    model.model.layers[0], model.model.layers[1] = packs, Unpacks(second)
    return model, packs


REASON = "ModelError: h_1 must be a tensor or the first entry of a tuple, got Box; this kind of block is not supported"


def test_a_layer_that_returns_a_new_type_from_some_step_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, packs = packing_model(armed=False)
    callback = MassiveActivationCallback(CONFIG, run_dir=tmp_path / "run")
    outcome = trained(tmp_path, [callback, At(lambda: setattr(packs, "armed", True))], model=model)
    assert values(outcome) == values(undisturbed())
    run = Run.open(tmp_path / "run")
    assert run.steps.tolist() == BEFORE
    assert faults(run) == [f"the probe failed and is left out. {REASON}"]
    assert warned(caplog) == [f"ma_monitor: {faults(run)[0]}"]
    model, packs = packing_model(armed=False)
    strict = [MassiveActivationCallback(STRICT), At(lambda: setattr(packs, "armed", True))]
    refuses(tmp_path / "strict", ModelError, "got Box", strict, model=model)


def test_a_layer_of_a_new_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = MassiveActivationCallback(CONFIG, run_dir=tmp_path / "run")
    outcome = trained(tmp_path, [callback], model=packing_model(armed=True)[0])
    assert values(outcome) == values(undisturbed())
    assert warned(caplog) == [f"ma_monitor: monitoring is off for this training. {REASON}"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match="got Box"):
        trained(tmp_path / "strict", [MassiveActivationCallback(STRICT)], model=packing_model(armed=True)[0])


# ------------------------------------------------------------------------------------------------------ interrupts


def stop(number: int, frame: FrameType | None) -> None:
    """A launcher's handler of SIGTERM."""
    sys.exit(128 + number)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), pytest.param(signal.SIGTERM, SystemExit, marks=pytest.mark.slow)],
)
def test_a_signal_in_the_probe_ends_the_training_and_nothing_is_lost(
    number: int, error: type[BaseException], tmp_path: Path
) -> None:
    """A probe is no place to hide a Ctrl-C: it goes through, model and run are as before, the training can go on."""
    model, block = with_block_that(lambda: os.kill(os.getpid(), number))
    callback = MassiveActivationCallback(CONFIG, run_dir=tmp_path / "run")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
        with pytest.raises(error):
            trained(tmp_path / "out", [callback, At(armed(block))], model=model, **saving)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    the_run(callback).close()
    assert the_run(callback).steps.tolist() == BEFORE
    model, _ = with_block_that(int)
    again = MassiveActivationCallback(STRICT, run_dir=tmp_path / "run")
    trainer = make_trainer(tmp_path / "out", [again], model=model, max_steps=LENGTH)
    trainer.train(resume_from_checkpoint=True)
    weights, _, states = values(bits(result_of(trainer)))
    assert (weights, states) == values(undisturbed())[::2]
    assert the_run(again).path == tmp_path / "run"
    assert Run.open(tmp_path / "run").steps.tolist() == DUE
