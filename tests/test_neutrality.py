"""Training is bit-identical with and without the callback."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ma_monitor import MassiveActivationCallback, MonitorConfig
from tests.training import STEPS, Result, Rows, train

STRICT = MonitorConfig(every=3, strict=True)
DUE = [0, 1, 2, 3, 4, 6, 8, 9, 12]
"""Multiples of 3, powers of two, and the last step, of 12."""

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_accumulation": {"gradient_accumulation_steps": 2},
    "gradient_checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant_checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16_autocast": {"bf16": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "dataloader_workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 5},
}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Two runs can only be compared where torch promises that they agree."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()


def same(one: Result, other: Result) -> bool:
    """Whether every weight, logged row and random state is equal to the bit."""
    weights = all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    return weights and one.losses == other.losses and one.states == other.states


def hooks(result: Result) -> list[tuple[str, int]]:
    """Hooks by module: checkpointing has one of its own."""
    model = result.trainer.model
    assert model is not None
    return [(name, len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in model.named_modules()]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # dataloader workers under a threaded test runner
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name that older versions know
def test_training_is_bit_identical(setting: str, tmp_path: Path) -> None:
    changes = SETTINGS[setting]
    if "eval_strategy" in changes:
        changes = changes | {"eval_dataset": Rows(8)}
    once = train(tmp_path / "once", [], **changes)
    again = train(tmp_path / "again", [], **changes)
    assert same(once, again), "two unwatched runs differ, so nothing can be said"
    callback = MassiveActivationCallback(STRICT)
    watched = train(tmp_path / "watched", [callback], **changes)
    assert same(once, watched)
    assert callback.monitor is not None
    assert callback.monitor.run is not None
    assert callback.monitor.run.steps.tolist() == DUE
    assert len(once.losses) >= STEPS
    assert hooks(watched) == hooks(once)


class Draws(Rows):
    """Rows that draw from every generator when they are read, as augmentation does."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random.random()
        np.random.rand()
        torch.rand(1)
        return super().__getitem__(index)


def test_reading_a_probe_from_rows_that_draw_random_numbers_draws_none(tmp_path: Path) -> None:
    once = train(tmp_path / "once", [], eval_dataset=Draws(12))
    watched = train(tmp_path / "watched", [MassiveActivationCallback(STRICT)], eval_dataset=Draws(12))
    assert same(once, watched)


def test_a_training_that_is_disturbed_is_noticed(tmp_path: Path) -> None:
    """The comparison can fail: one drawn random number changes the dropout of every later step."""
    from transformers import TrainerCallback

    class Draws(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.rand(1)

    once = train(tmp_path / "once", [])
    disturbed = train(tmp_path / "disturbed", [Draws()])
    assert not same(once, disturbed)
