"""The callback in real trainings: due steps, the last step, defaults, faults, reporters, resumes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback

from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe, Run
from tests.training import STEPS, TOKENS, VOCABULARY, Rows, make_trainer, the_run, tiny_llama, train

STRICT = MonitorConfig(every=4, strict=True)
DUE = [0, 1, 2, 4, 8, 12]


def faults(run: Run) -> list[str]:
    return [event.message for event in run.events if event.kind == "fault"]


def test_defaults_need_nothing_else(tmp_path: Path) -> None:
    callback = MassiveActivationCallback()
    trainer = make_trainer(tmp_path, [callback])
    trainer.train()
    run = the_run(callback)
    assert run.path == tmp_path / "ma_monitor"
    assert run.steps.tolist() == [0, 1, 2, 4, 8, STEPS]
    assert run.meta.probe.source == "training data"
    assert run.meta.probe.length == TOKENS
    assert run.meta.precision == "float32"
    plan = run.plan_at(0)
    assert plan is not None
    assert plan.total_steps == STEPS
    assert plan.batch == 4
    assert plan.lr is not None
    # lr[s] is the rate of the update from s to s + 1, which the Trainer logs at s + 1.
    logged = {int(row["step"]): row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row}
    for step, rate in logged.items():
        assert plan.lr[step - 1] == pytest.approx(rate, rel=1e-12)
    assert faults(run) == []


def test_the_probe_is_rows_of_the_evaluation_data_where_there_are_some(tmp_path: Path) -> None:
    callback = MassiveActivationCallback(STRICT)
    evaluation = Rows(20)
    make_trainer(tmp_path, [callback], eval_dataset=evaluation).train()
    assert the_run(callback).meta.probe == Probe.from_ids(evaluation.ids[:10].numpy(), "evaluation data").info


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Any:
        yield from (Rows()[i % len(Rows())] for i in range(1000))


class Letters:
    """Enough of a tokenizer for the built-in passages."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        return None


def test_a_stream_is_not_read_for_the_probe(tmp_path: Path) -> None:
    callback = MassiveActivationCallback(STRICT)
    trainer = make_trainer(tmp_path, [callback], processing_class=Letters())
    trainer.train_dataset = Stream()
    trainer.train()
    assert the_run(callback).meta.probe.source == "built-in passages"
    assert the_run(callback).meta.probe.length == 32, "cut to the model's context"


class SizedStream(Stream):
    def __len__(self) -> int:
        return 1000


class Broken(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        raise OSError("the disk of the evaluation data is gone")


def test_datasets_that_give_no_rows_are_passed_over(tmp_path: Path) -> None:
    callback = MassiveActivationCallback(STRICT)
    trainer = make_trainer(tmp_path / "a", [callback], processing_class=Letters())
    trainer.train_dataset = SizedStream()
    trainer.train()
    assert the_run(callback).meta.probe.source == "built-in passages"
    callback = MassiveActivationCallback(STRICT)
    make_trainer(tmp_path / "b", [callback], eval_dataset=Broken(20)).train()
    assert the_run(callback).meta.probe.source == "training data"


def test_the_model_is_not_kept_alive_after_training(tmp_path: Path) -> None:
    callback = MassiveActivationCallback(STRICT)
    trainer = make_trainer(tmp_path, [callback])
    trainer.train()
    model = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None
    assert callback.forecast() is not None


def test_a_batch_is_all_that_an_update_sees(tmp_path: Path) -> None:
    callback = MassiveActivationCallback(STRICT)
    make_trainer(tmp_path, [callback], gradient_accumulation_steps=3).train()
    plan = the_run(callback).plan_at(0)
    assert plan is not None
    assert plan.batch == 12


def test_epochs_that_an_evaluation_ends_are_measured(tmp_path: Path) -> None:
    callback = MassiveActivationCallback(MonitorConfig(every=1000, strict=True))
    changes: dict[str, Any] = {"eval_strategy": "epoch", "eval_dataset": Rows(8), "max_steps": 40}
    make_trainer(tmp_path, [callback], **changes).train()
    assert the_run(callback).steps.tolist() == [0, 1, 2, 4, 8, 16, 32, 40]


def test_without_rows_or_tokenizer_monitoring_is_off_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = MassiveActivationCallback()
    trainer = make_trainer(tmp_path, [callback])
    trainer.train_dataset = Stream()
    trainer.train()
    assert callback.monitor is None
    assert trainer.state.global_step == STEPS
    assert "monitoring is off for this training. ConfigError: a probe needs evaluation or training rows" in caplog.text


@pytest.mark.parametrize("evaluation", ["steps", "epoch"])
@pytest.mark.parametrize("before", [True, False], ids=["early-stopping-first", "early-stopping-last"])
def test_the_last_step_of_an_early_stop_is_measured_before_the_best_model_is_loaded(
    evaluation: str, before: bool, tmp_path: Path
) -> None:
    class Worse(TrainerCallback):
        """Makes every evaluation worse than the last."""

        worst = 0.0

        def on_evaluate(self, *_: Any, **kwargs: Any) -> None:
            Worse.worst += 1
            kwargs["metrics"]["eval_loss"] = Worse.worst

    weights: dict[int, torch.Tensor] = {}

    class Copies(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights[state.global_step] = kwargs["model"].get_input_embeddings().weight.detach().clone()

    callback = MassiveActivationCallback(STRICT, probe=Probe.from_ids(Rows().ids[:2].numpy()))
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    callbacks = [Worse(), stop, callback, Copies()] if before else [callback, Worse(), stop, Copies()]
    changes: dict[str, Any] = {"max_steps": 40}
    changes |= {"eval_strategy": "steps", "eval_steps": 3} if evaluation == "steps" else {"eval_strategy": "epoch"}
    changes |= {"save_strategy": evaluation, "save_steps": 3, "load_best_model_at_end": True}
    changes |= {"metric_for_best_model": "eval_loss", "eval_dataset": Rows(8), "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, callbacks, **changes)
    trainer.train()
    last = trainer.state.global_step
    assert last < 40
    run = the_run(callback)
    assert run.steps[-1] == last
    # Layer 0's first token is its embedding: the measured one is that of the last step, not of the best model.
    embedding = weights[last][Rows().ids[:2]].abs().amax(dim=(1, 2)).numpy()
    np.testing.assert_allclose(np.abs(run.measurements()[-1].top[0, :, 0]), embedding, rtol=1e-6)
    document = run.read_document("forecast")
    assert document is not None
    assert document["at"] == last


def test_a_second_training_leaves_the_first_run_alone(tmp_path: Path) -> None:
    first = MassiveActivationCallback(STRICT)
    train(tmp_path, [first])
    before = {p.name: p.read_bytes() for p in (tmp_path / "ma_monitor").iterdir() if p.is_file()}
    second = MassiveActivationCallback(STRICT)
    train(tmp_path, [second])
    assert the_run(second).path == tmp_path / "ma_monitor-2"
    assert {p.name: p.read_bytes() for p in (tmp_path / "ma_monitor").iterdir() if p.is_file()} == before


@pytest.mark.parametrize("strict", [False, True])
def test_a_probe_that_fails_is_named_once_and_training_goes_on(
    strict: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(TrainerCallback):
        """From step 3 on, the first block refuses to be evaluated."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                layer = kwargs["model"].model.layers[0]
                forward = layer.forward

                def refuses(*inputs: Any, **named: Any) -> Any:
                    if not layer.training:
                        raise RuntimeError("no evaluation today")
                    return forward(*inputs, **named)

                layer.forward = refuses

    callback = MassiveActivationCallback(MonitorConfig(every=2, strict=strict))
    if strict:
        with pytest.raises(RuntimeError, match="no evaluation today"):
            train(tmp_path, [callback, Breaks()])
        the_run(callback).close()
        return
    unwatched = train(tmp_path / "unwatched", [Breaks()])
    watched = train(tmp_path, [callback, Breaks()])
    assert all(torch.equal(value, watched.weights[name]) for name, value in unwatched.weights.items())
    assert the_run(callback).steps.tolist() == [0, 1, 2]
    assert faults(the_run(callback)) == ["the probe failed and is left out. RuntimeError: no evaluation today"]
    assert caplog.text.count("no evaluation today") == 1


def test_reporters_that_cannot_be_found_cost_the_logs_and_not_the_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = MassiveActivationCallback(MonitorConfig(every=4))
    monkeypatch.setattr(callback, "_reporters", lambda *_: 1 / 0)
    train(tmp_path, [callback])
    assert the_run(callback).steps.tolist() == DUE
    assert faults(the_run(callback)) == [
        "finding the reporters failed and is left out. ZeroDivisionError: division by zero"
    ]


def test_a_run_directory_that_cannot_be_made_leaves_training_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    callback = MassiveActivationCallback(run_dir=tmp_path / "file" / "run")
    result = train(tmp_path / "out", [callback])
    assert result.trainer.state.global_step == STEPS
    assert "monitoring is off for this training. StoreError" in caplog.text


# ------------------------------------------------------------------------------------------------ fine-tuning


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # PEFT and TRL use the old names
def test_fine_tuning_with_trl_and_lora(tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    lengths = np.random.default_rng(0).integers(4, TOKENS, 40)
    rows = Dataset.from_dict({"input_ids": [list(range(1, n)) for n in lengths]})
    callback = MassiveActivationCallback(MonitorConfig(every=2, strict=True))
    settings = SFTConfig(
        output_dir=str(tmp_path), max_steps=5, use_cpu=True, bf16=False, disable_tqdm=True, report_to="none"
    )
    model = tiny_llama(attention_dropout=0.0)
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
        callbacks=[callback],
    )
    trainer.train()
    run = the_run(callback)
    assert run.steps.tolist() == [0, 1, 2, 4, 5]
    assert run.meta.model.layers == 2
    assert run.meta.probe.source == "training data"
    first, last = run.measurements()[0], run.measurements()[-1]
    assert not np.array_equal(first.top[1:], last.top[1:]), "the adapters are part of what is measured"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0", pad_token="w0", unk_token="w0")


class Halving:
    """A scheduler of somebody's own, of no known base, that keeps its optimizer to itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._steps = optimizer, 0

    def step(self) -> None:
        self._steps += 1
        self._optimizer.param_groups[0]["lr"] *= 0.5 if self._steps % 4 == 0 else 1.0

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        return {"steps": self._steps}


def test_a_scheduler_that_nobody_knows_holds_the_present_rate(tmp_path: Path) -> None:
    callback = MassiveActivationCallback(MonitorConfig(every=2, strict=True))
    trainer = make_trainer(tmp_path, [callback])
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)  # type: ignore[union-attr]
    trainer.optimizer, trainer.lr_scheduler = optimizer, Halving(optimizer)  # type: ignore[assignment]
    trainer.train()
    plans = the_run(callback).plans
    assert "Halving, which cannot be known in advance: the present rate 0.1 is held" in plans[0].schedule
    assert [plan.lr[0] for plan in plans if plan.lr is not None] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert [plan.from_step for plan in plans] == [0, 4, 8, 12]


def test_a_rate_that_falls_on_plateaus_is_followed(tmp_path: Path) -> None:
    """The loss falls and is taken for something to be maximised: every evaluation halves the rate."""
    callback = MassiveActivationCallback(MonitorConfig(every=2, strict=True))
    train(
        tmp_path, [callback], lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=3,
        lr_scheduler_kwargs={"mode": "max", "patience": 0, "factor": 0.5}, eval_dataset=Rows(4), warmup_steps=0,
    )  # fmt: skip
    plans = the_run(callback).plans
    rates = [plan.lr[0] for plan in plans if plan.lr is not None]
    assert all(plan.held for plan in plans)
    assert rates == [1e-2 * 0.5**i for i in range(len(plans))]
    assert len(plans) >= 3
