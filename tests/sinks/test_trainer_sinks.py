"""The reporters of a real Trainer, read back from the files that they write."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import CodeCarbonCallback, TensorBoardCallback, WandbCallback

from ma_monitor.sinks.base import Emission, Sink
from ma_monitor.sinks.relay import RelaySink
from ma_monitor.sinks.trainer import TrainerSinks, find_handler, is_reporter

STEPS = 6
EVERY = 2
"""Both measuring and logging happen every two steps: the case in which a careless sink eats the Trainer's own rows."""
MEASURED = [0, 2, 4, 6]
LOGGED = [2, 4, 6]


class Emitter(TrainerCallback):
    """Emits at step 0 and every two steps, as a monitor would."""

    def __init__(self, make_emission: Callable[[int], Emission]) -> None:
        self.reporters = TrainerSinks()
        self.make_emission = make_emission
        self.sinks: list[Sink] = []
        self.undisturbed = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.emit(args, state, control, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            self.emit(args, state, control, kwargs["model"])

    def emit(self, args: Any, state: Any, control: Any, model: Any) -> None:
        before = copy.deepcopy((control, state.log_history))
        self.sinks = self.reporters(find_handler(), args, state, control, model)
        for sink in self.sinks:
            sink.emit(self.make_emission(state.global_step))
        self.undisturbed &= before == (control, state.log_history)


class Ledger(TrainerCallback):
    """A third reporter, which treats what a sink gives it without respect."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        self.rows.append((state.global_step, dict(logs)))
        if "ma/max_ratio" in logs:
            control.should_log = control.should_evaluate = control.should_save = False
            state.log_history.append({"spoiled": 1.0})
            state.global_step = -1
            logs.clear()
        return control


class LoudLedger(Ledger):
    """A reporter's subclass that fails at our scalars."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        if "ma/max_ratio" in logs:
            raise RuntimeError("the ledger is closed")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Two layers of width 8."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )


@pytest.fixture
def train(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Trains six steps; ``late`` callbacks come by ``add_callback``."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ledger", Ledger)

    def run(report_to: list[str], callbacks: list[Any], late: list[Any]) -> Trainer:
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=STEPS,
            logging_steps=EVERY,
            per_device_train_batch_size=2,
            report_to=report_to,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        ids = list(range(8))
        data = [{"input_ids": ids, "labels": ids}] * 16
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks)
        for callback in late:
            trainer.add_callback(callback)
        trainer.train()
        return trainer

    return run


def loss_steps(trainer: Trainer) -> list[float]:
    """Steps of the loss rows in the Trainer's own history."""
    return [row["step"] for row in trainer.state.log_history if "loss" in row]


def arrangements(emitter: Emitter, way: str) -> tuple[list[str], list[Any], list[Any]]:
    """``report_to``, constructor's and later callbacks for one way of naming W&B, TensorBoard and the ledger."""
    if way == "report_to":
        return ["tensorboard", "wandb", "ledger"], [emitter], []
    reporters = [kind() for kind in (WandbCallback, TensorBoardCallback, Ledger)]
    if way == "instances, ours last":
        return [], [*reporters, emitter], []
    if way == "added before":
        return [], [], [*reporters, emitter]
    return [], [emitter], reporters


@pytest.mark.parametrize("way", ["report_to", "instances, ours last", "added before", "added after"])
def test_every_reporter_is_served(
    way: str,
    wandb_folder: Path,
    tmp_path: Path,
    read_wandb: Callable[[Path], Any],
    read_events: Callable[[Path], dict[str, Any]],
    make_emission: Callable[[int], Emission],
    train: Callable[..., Trainer],
) -> None:
    import wandb

    emitter = Emitter(make_emission)
    trainer = train(*arrangements(emitter, way))
    wandb.finish()

    assert emitter.undisturbed
    assert loss_steps(trainer) == LOGGED
    assert not any("spoiled" in row or "ma/max_ratio" in row for row in trainer.state.log_history)

    tags = read_events(tmp_path / "tensorboard")
    assert tags["train/loss"].steps == LOGGED
    assert tags["ma/ratio/layer_01"].steps == MEASURED
    assert [float(v) for v in tags["ma/ratio/layer_01"].values] == [5.0 + step / 8 for step in MEASURED]
    assert tags["ma/heatmap"].steps == MEASURED
    assert len(tags["custom_scalars__config__"].steps) == 1

    content = read_wandb(wandb_folder)
    ours = [row for row in content.rows if "ma/max_ratio" in row]
    assert [row["train/global_step"] for row in ours] == MEASURED
    assert [row["ma/ratio/layer_02"] for row in ours] == [50.0 + step / 8 for step in MEASURED]
    assert all(any(key.startswith("ma/heatmap") for key in row) for row in ours)
    assert [row["train/global_step"] for row in content.rows if "train/loss" in row] == LOGGED
    assert content.config["ma_monitor/model"] == "tiny"

    (ledger,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Ledger))
    rows = [(step, logs) for step, logs in ledger.rows if "ma/max_ratio" in logs]
    assert rows == [(step, make_emission(step).scalars) for step in MEASURED]
    assert all(type(value) is float for _, logs in rows for value in logs.values())
    assert [step for step, logs in ledger.rows if "loss" in logs] == LOGGED


def test_no_reporter_no_sink(train: Callable[..., Trainer], make_emission: Callable[[int], Emission]) -> None:
    emitter = Emitter(make_emission)
    trainer = train([], [emitter], [])
    assert emitter.sinks == []
    assert loss_steps(trainer) == LOGGED


def test_run_without_wandb_callback_is_left_alone(
    wandb_folder: Path,
    read_wandb: Callable[[Path], Any],
    train: Callable[..., Trainer],
    make_emission: Callable[[int], Emission],
) -> None:
    import wandb

    wandb.init(project="tests")
    emitter = Emitter(make_emission)
    trainer = train([], [emitter], [])
    assert emitter.sinks == []
    (fallback,) = emitter.reporters(None, trainer.args, trainer.state, trainer.control)
    fallback.emit(make_emission(3))
    fallback.close()
    wandb.finish()
    assert emitter.reporters(None, trainer.args, trainer.state, trainer.control) == []
    assert [row["train/global_step"] for row in read_wandb(wandb_folder).rows] == [3]


def test_closed_writer_is_not_opened_again(
    tmp_path: Path,
    read_events: Callable[[Path], dict[str, Any]],
    train: Callable[..., Trainer],
    make_emission: Callable[[int], Emission],
) -> None:
    emitter = Emitter(make_emission)
    train(["tensorboard"], [emitter], [])
    (sink,) = emitter.sinks
    sink.emit(make_emission(STEPS + 1))
    sink.close()
    assert read_events(tmp_path / "tensorboard")["ma/max_ratio"].steps == MEASURED


def test_second_training_gets_its_own_writer(
    tmp_path: Path,
    read_events: Callable[[Path], dict[str, Any]],
    train: Callable[..., Trainer],
    make_emission: Callable[[int], Emission],
) -> None:
    emitter = Emitter(make_emission)
    trainer = train(["tensorboard"], [emitter], [])
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(tmp_path / "first")
    trainer.train()
    tags = read_events(tmp_path / "tensorboard")
    assert tags["ma/max_ratio"].steps == MEASURED
    assert len(tags["custom_scalars__config__"].steps) == 1


def test_failure_of_a_reporter_reaches_the_caller(
    train: Callable[..., Trainer], make_emission: Callable[[int], Emission]
) -> None:
    with pytest.raises(RuntimeError, match="the ledger is closed"):
        train([], [LoudLedger(), Emitter(make_emission)], [])


def test_other_ranks_write_nothing(train: Callable[..., Trainer], make_emission: Callable[[int], Emission]) -> None:
    trainer = train([], [Ledger()], [])
    trainer.state.is_world_process_zero = False
    sinks = TrainerSinks()
    assert sinks(trainer.callback_handler, trainer.args, trainer.state, trainer.control) == []
    trainer.state.is_world_process_zero = True
    (relay,) = sinks(trainer.callback_handler, trainer.args, trainer.state, trainer.control)
    assert relay.name == "Ledger"


def test_who_is_a_reporter() -> None:
    class Other(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None: ...

    assert not is_reporter(Other())
    assert not is_reporter(CodeCarbonCallback.__new__(CodeCarbonCallback)), "it takes no scalars"
    assert is_reporter(integration_utils.SwanLabCallback.__new__(integration_utils.SwanLabCallback))


def test_search_for_the_handler_keeps_nothing_alive() -> None:
    class Batch: ...

    def training_loop() -> bool:
        batch = Batch()
        earlier = weakref.ref(batch)
        find_handler()
        batch = Batch()
        return earlier() is None

    assert training_loop()


def test_relayed_values_are_python_floats() -> None:
    ledger = Ledger()
    relay = RelaySink(ledger, cast(Any, None), TrainerState(global_step=9), TrainerControl())
    relay.emit(Emission(4, {"ma/ratio/layer_01": cast(float, np.float32(0.5)), "ma/max_ratio_layer": 3}))
    relay.close()
    ((step, logs),) = ledger.rows
    assert step == 4
    assert logs == {"ma/ratio/layer_01": 0.5, "ma/max_ratio_layer": 3.0}
    assert {type(value) for value in logs.values()} == {float}


def test_no_handler_outside_of_an_event() -> None:
    class Impostor:
        def call_event(self) -> object:
            return find_handler()

    assert find_handler() is None
    assert Impostor().call_event() is None
