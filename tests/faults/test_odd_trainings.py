"""Trainings that are odd in themselves: numbers that are none, wild series, models and schedules of their own kind."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ma_monitor import MassiveActivationCallback, Probe, Run
from ma_monitor.runs.documents import Document
from tests.faults.trainings import BEFORE, DUE, LENGTH, STRICT, At, bits, faults, trained, values, warned
from tests.training import VOCABULARY, Rows, make_trainer, result_of, the_run, tiny_llama

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
FAST = 2
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


def drawn(step: int) -> float:
    """A rate with noise."""
    return (1 + random.random() + float(torch.rand(())) + np.random.rand()) / (1 + step)


def with_schedule(folder: Path, rate: Callable[[int], float], callbacks: list[TrainerCallback]) -> object:
    torch.manual_seed(0)
    trainer = make_trainer(folder, callbacks, max_steps=LENGTH)
    assert trainer.model is not None
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2)
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    trainer.train()
    return bits(result_of(trainer))


def test_a_schedule_that_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is the training's, and works there; only looking ahead fails, for which there is a word in the run."""
    callback = MassiveActivationCallback(STRICT)
    assert with_schedule(tmp_path, Forgetful(), [callback]) == with_schedule(tmp_path / "once", Forgetful(), [])
    run = the_run(callback)
    assert run.steps.tolist() == DUE
    assert all(plan.held and "could not be replayed (TypeError" in plan.schedule for plan in run.plans)
    assert warned(caplog) == []


def read_on() -> Callable[[int], float]:
    """Rates from a file of them, one after another."""
    rates = iter([1.0 / (1 + step) for step in range(LENGTH + 1)])
    return lambda _: next(rates)


def test_a_schedule_that_reads_on(tmp_path: Path) -> None:
    """A copy shares what a function reads from, so that looking ahead would take the training's rates away."""
    callback = MassiveActivationCallback(STRICT)
    assert with_schedule(tmp_path, read_on(), [callback]) == with_schedule(tmp_path / "once", read_on(), [])
    assert all(plan.held and "reads on from an iterator" in plan.schedule for plan in the_run(callback).plans)


def test_a_schedule_that_draws_random_numbers(tmp_path: Path) -> None:
    """Looking ahead asks it for every rate, and must leave the generators as they were."""
    once = with_schedule(tmp_path / "once", drawn, [])
    assert with_schedule(tmp_path, drawn, [MassiveActivationCallback(STRICT)]) == once
