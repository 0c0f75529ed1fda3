"""What the model does in the probe: no memory, new types, interrupts, numbers that are none, another model."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ma_monitor import MassiveActivationCallback, Probe, Run
from ma_monitor.errors import ModelError
from ma_monitor.runs.documents import Document
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
    warned,
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


def values(outcome: tuple[Any, ...]) -> tuple[Any, ...]:
    """Weights in their order, as the parameters of a wrapped block have other names, and all the rest."""
    weights, *rest = outcome
    return list(weights.values()), *rest


@pytest.mark.parametrize("again", [False, True], ids=["for-good", "for-one-probe"])
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


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
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


# ------------------------------------------------------------------------------------------- numbers that are none


DOCUMENTS: tuple[Document, ...] = ("fits", "forecast")
RARE = VOCABULARY
"""A token that only the probe has: what its embedding is changes the probe and, to the bit, nothing else."""
WIDTH = 16
ROWS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 8))


def rare_model() -> Any:
    return tiny_llama(vocab_size=VOCABULARY + 1)


def rare(model: Any) -> Tensor:
    """That token's embedding, to be written to."""
    row: Tensor = model.model.embed_tokens.weight.data[RARE]
    return row


def all_but_rare(outcome: tuple[Any, ...]) -> tuple[Any, ...]:
    (embedding, *others), *rest = values(outcome)
    return embedding[: VOCABULARY * WIDTH * 4], others, *rest


@functools.cache
def undisturbed_rare() -> tuple[Any, ...]:
    with tempfile.TemporaryDirectory() as folder:
        return all_but_rare(trained(Path(folder), [], model=rare_model()))


@pytest.mark.parametrize(
    ("value", "spoilt"),
    [
        pytest.param(np.nan, 1, id="nan-in-some"),
        pytest.param(np.inf, 3, id="inf-in-all"),
        pytest.param(np.inf, 1, id="inf-in-some", marks=pytest.mark.slow),
        pytest.param(np.nan, 3, id="nan-in-all", marks=pytest.mark.slow),
    ],
)
def test_activations_that_are_not_finite(
    value: float, spoilt: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = ROWS.copy()
    ids[:spoilt, 3] = RARE
    model = rare_model()
    callback = MassiveActivationCallback(STRICT, probe=Probe.from_ids(ids), run_dir=tmp_path / "run")
    outcome = trained(tmp_path, [callback, At(lambda: rare(model).fill_(value))], model=model)
    assert all_but_rare(outcome) == undisturbed_rare()
    run = Run.open(tmp_path / "run")
    assert run.steps.tolist() == DUE
    bad = run.stack().nan + run.stack().inf
    assert not bad[: len(BEFORE)].any()
    assert (bad[len(BEFORE) :, :, :spoilt] > 0).all()
    assert not bad[:, :, spoilt:].any()
    assert np.isfinite(run.stack().top[:, :, spoilt:]).all()
    (told,) = (event.message for event in run.events if event.kind == "alert" and "not_finite" in event.message)
    assert told.startswith("not_finite@4:1,2 ")
    assert sum("NaN or infinite" in line for line in warned(caplog)) == 1
    assert faults(run) == []
    assert run.read_document("forecast") is not None


SERIES: dict[str, Callable[[int], float]] = {
    "nothing": lambda step: 0.0,
    "from-one-end-of-float32-to-the-other": lambda step: 3e38 if step % 4 else 1e-45,
    "comes-and-goes": lambda step: [1.0, np.nan, 0.0, np.inf][step // 2 % 4],
    "constant": lambda step: 7.0,
    "one-spike": lambda step: 1e30 if step == 4 else 1.0,
    "explodes": lambda step: 10.0 ** (4 * step),
}
FAST = 3
FLOAT32 = 1e-6
"""Relative: rounded once."""


@pytest.mark.parametrize(
    "name", [name if i < FAST else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(SERIES)]
)
def test_series_that_no_curve_fits(name: str, tmp_path: Path) -> None:
    """Strict, so that a fit, forecast or alert that breaks ends this test."""
    model, base = rare_model(), float(name != "nothing")

    def put(step: int) -> Callable[[], object]:
        return lambda: rare(model).fill_(base)[0].fill_(SERIES[name](step))

    probe = Probe.from_ids(np.full((2, 8), RARE))
    callback = MassiveActivationCallback(STRICT, probe=probe, run_dir=tmp_path / "run")
    outcome = trained(tmp_path, [callback, *(At(put(step), step=step - 1) for step in DUE[1:])], model=model)
    assert all_but_rare(outcome) == undisturbed_rare()
    run = Run.open(tmp_path / "run")
    assert run.steps.tolist() == DUE
    seen = run.trajectory(layer=0).values[1:]
    asked = [np.fmax(SERIES[name](step), base) if base else np.nan for step in DUE[1:]]  # NaN are left out
    np.testing.assert_allclose(seen, asked, rtol=FLOAT32)
    assert faults(run) == []
    assert {run.read_document(document) is None for document in DOCUMENTS} == {False}


# --------------------------------------------------------------------------------------------------- another model


def test_a_model_that_model_init_swaps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each ``train()`` of such a Trainer begins with another model, the second one here of another shape."""

    def twice(folder: Path, callbacks: list[TrainerCallback]) -> list[object]:
        depths = iter((2, 2, 3))
        arguments = make_trainer(folder, [], max_steps=LENGTH).args
        trainer = Trainer(
            args=arguments, train_dataset=Rows(), callbacks=callbacks,
            model_init=lambda: tiny_llama(num_hidden_layers=next(depths)),
        )  # fmt: skip
        outcomes: list[object] = []
        for seed in range(2):
            trainer.args.seed = trainer.args.data_seed = seed
            trainer.train()
            outcomes.append(bits(result_of(trainer)))
        return outcomes

    callback = MassiveActivationCallback(STRICT)
    assert twice(tmp_path, [callback]) == twice(tmp_path / "once", [])
    runs = [Run.open(tmp_path / name) for name in ("ma_monitor", "ma_monitor-2")]
    assert [run.meta.model.layers for run in runs] == [2, 3]
    assert [run.steps.tolist() for run in runs] == [DUE] * 2
    assert [run.damage for run in runs] == [None] * 2
    assert warned(caplog) == []


# -------------------------------------------------------------------------------------------- a schedule that raises


class Forgetful:
    """Rates that can be had once, in order, and not again."""

    def __init__(self) -> None:
        self.asked = -1

    def __call__(self, step: int) -> float:
        if step != self.asked + 1:
            raise RuntimeError(f"asked for step {step} after step {self.asked}")
        self.asked = step
        return 1.0 / (1 + step)

    def __deepcopy__(self, memo: object) -> Forgetful:
        raise TypeError("cannot be copied")


def with_schedule(folder: Path, callbacks: list[TrainerCallback]) -> object:
    torch.manual_seed(0)
    trainer = make_trainer(folder, callbacks, max_steps=LENGTH)
    assert trainer.model is not None
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2)
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, Forgetful())
    trainer.train()
    return bits(result_of(trainer))


def test_a_schedule_that_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is the training's, and works there; only looking ahead fails, for which there is a word in the run."""
    callback = MassiveActivationCallback(STRICT)
    assert with_schedule(tmp_path, [callback]) == with_schedule(tmp_path / "once", [])
    run = the_run(callback)
    assert run.steps.tolist() == DUE
    assert all(plan.held and "could not be replayed (TypeError" in plan.schedule for plan in run.plans)
    assert warned(caplog) == []
