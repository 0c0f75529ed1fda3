"""A tiny real training that the tests of the callback share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ma_monitor import MassiveActivationCallback, Run

ROWS, TOKENS, VOCABULARY = 64, 12, 40
STEPS = 12


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Token rows drawn from a fixed seed."""

    def __init__(self, count: int = ROWS) -> None:
        self.ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (count, TOKENS)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Result(NamedTuple):
    """What a training leaves behind: everything that must not depend on being watched."""

    weights: dict[str, torch.Tensor]
    losses: list[tuple[float, dict[str, float]]]
    states: tuple[Any, ...]
    trainer: Trainer


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Two blocks of width 16 with the same weights every time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "attention_dropout": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def make_trainer(output: Path, callbacks: list[TrainerCallback], **changes: Any) -> Trainer:
    """A Trainer over ``Rows`` with a warmed-up cosine schedule; keywords change its arguments."""
    trainer_changes: dict[str, Any] = {
        key: changes.pop(key) for key in ("model", "eval_dataset", "processing_class") if key in changes
    }
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",  # transformers 4 would take every reporter that is installed
    }
    return Trainer(
        model=trainer_changes.pop("model", None) or tiny_llama(),
        args=TrainingArguments(**(settings | changes)),
        train_dataset=Rows(),
        callbacks=callbacks,
        **trainer_changes,
    )


def train(output: Path, callbacks: list[TrainerCallback], **changes: Any) -> Result:
    """Trains from fixed seeds and collects what must not depend on the callbacks."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    trainer = make_trainer(output, callbacks, **changes)
    trainer.train()
    return result_of(trainer)


def result_of(trainer: Trainer) -> Result:
    """The weights, the logged rows without timings, and the random states."""
    timings = ("runtime", "per_second")
    losses = [
        (row["step"], {k: v for k, v in row.items() if not k.endswith(timings)}) for row in trainer.state.log_history
    ]
    legacy: Any = np.random.get_state()
    states = random.getstate(), legacy[1].tolist(), legacy[2:], torch.get_rng_state().tolist()
    assert trainer.model is not None
    weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    return Result(weights, losses, states, trainer)


def the_run(callback: MassiveActivationCallback) -> Run:
    """The run that a callback keeps."""
    assert callback.monitor is not None
    assert callback.monitor.run is not None
    return callback.monitor.run
