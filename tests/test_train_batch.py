"""The training's own forward as what is read."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, TrainerCallback

from ma_monitor import MassiveActivationCallback, Monitor, MonitorConfig, Probe, Run
from ma_monitor.errors import ConfigError, ModelError
from ma_monitor.measure.forward import measure
from tests.test_neutrality import SETTINGS, deterministic, hooks, same
from tests.training import VOCABULARY, tiny_llama, train

__all__ = ["deterministic"]

CONFIG = MonitorConfig(every=3, source="train_batch", strict=True)
DUE = [0, 1, 2, 3, 4, 6, 8, 9]
"""Multiples of 3 and powers of two below the last step, 12, which no forward follows."""


def batch(rows: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(0))


def watching(model: torch.nn.Module, folder: Path) -> closing[Monitor]:
    return closing(Monitor(model, None, CONFIG, run_dir=folder / "run"))


@pytest.mark.parametrize(
    "setting", ["plain", "gradient_accumulation", "gradient_checkpointing", "reentrant_checkpointing", "bf16_autocast"]
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name that older versions know
def test_training_is_bit_identical_and_measured_where_a_forward_follows(setting: str, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", [], **SETTINGS[setting])
    watched = train(tmp_path / "watched", [MassiveActivationCallback(CONFIG)], **SETTINGS[setting])
    assert same(plain, watched)
    assert hooks(watched) == hooks(plain)
    with Run.open(tmp_path / "watched" / "ma_monitor") as run:
        assert run.steps.tolist() == DUE
        assert np.isfinite(run.ratios()).all()
        assert (run.meta.probe.source, run.meta.probe.hash) == ("training batches", None)


def test_a_batch_gives_what_a_probe_of_its_rows_gives(tmp_path: Path) -> None:
    model, ids = tiny_llama(attention_dropout=0.0), batch(10)
    expected = measure(model, Probe.from_ids(ids.numpy()), 0, k=3)
    with watching(model, tmp_path) as monitor:
        with monitor.train_batch(0):
            model(input_ids=ids, labels=ids).loss.backward()
        assert monitor.run is not None
        got = monitor.run.measurements()[0]
    for name in ("top", "median", "position", "token", "channel", "nan", "inf"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


def test_of_a_larger_batch_the_first_are_read_and_of_a_smaller_one_the_rest_is_unknown(tmp_path: Path) -> None:
    model = tiny_llama()
    with watching(model, tmp_path) as monitor:
        for step, rows in enumerate((12, 4)):
            with monitor.train_batch(step):
                model(batch(rows))
        assert monitor.run is not None
        large, small = monitor.run.measurements()
    assert large.top.shape == small.top.shape == (3, 10, 3)
    assert np.isfinite(large.top).all()
    assert np.isfinite(small.top[:, :4]).all()
    assert np.isnan(small.top[:, 4:]).all()
    assert (small.token[:, 4:] == -1).all()


def test_without_token_ids_the_tokens_are_unknown(tmp_path: Path) -> None:
    model = tiny_llama()
    with watching(model, tmp_path) as monitor:
        with monitor.train_batch(0):
            model(inputs_embeds=model.get_input_embeddings()(batch(10)))
        assert monitor.run is not None
        got = monitor.run.measurements()[0]
    assert (got.token == -1).all()
    assert (got.position >= 0).all()


def test_an_encoders_token_ids_are_not_taken_for_the_decoders(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "ffn_dim")}
    heads: dict[str, Any] = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    model = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=16, **sizes, **heads))
    with watching(model, tmp_path) as monitor:
        with monitor.train_batch(0):
            model(input_ids=batch(10), labels=batch(10))
        with monitor.train_batch(1):
            model(input_ids=batch(10).flip(1), decoder_input_ids=batch(10))
        assert monitor.run is not None
        unknown, known = monitor.run.measurements()
    assert (unknown.token == -1).all()
    np.testing.assert_array_equal(known.token[0], np.take_along_axis(batch(10).numpy(), known.position[0], axis=1))


def test_a_forward_without_gradients_is_passed_over(tmp_path: Path) -> None:
    model = tiny_llama(attention_dropout=0.0)
    expected = measure(model, Probe.from_ids(batch(10).numpy()), 0, k=3)
    with watching(model, tmp_path) as monitor:
        with monitor.train_batch(0):
            for rows, gradients in ((4, False), (10, True), (3, False), (6, True)):  # only the second is read
                with torch.set_grad_enabled(gradients):
                    model(batch(rows))
        assert monitor.run is not None
        got = monitor.run.measurements()[0]
        with pytest.raises(ModelError, match="every block must run once"), monitor.train_batch(1), torch.no_grad():
            model(batch(10))
    np.testing.assert_array_equal(got.top, expected.top)
    np.testing.assert_array_equal(got.token, expected.token)


class StopBetween(TrainerCallback):
    """Ends the training between two micro-batches of one update."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step == 4
        return control


def test_a_training_stopped_between_micro_batches_keeps_no_hooks(tmp_path: Path) -> None:
    ended = train(tmp_path, [MassiveActivationCallback(CONFIG), StopBetween()], gradient_accumulation_steps=2)
    assert hooks(ended) == hooks(train(tmp_path / "plain", [], max_steps=1))
    with Run.open(tmp_path / "ma_monitor") as run:
        assert run.steps.tolist() == [0, 1, 2, 3, 4]


class Skips(torch.nn.Module):
    """Leaves its first block out in every other training forward, as LayerDrop may."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)
        self.layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        self.skips = False

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers[int(self.skips) :]:
            hidden = layer(hidden)
        self.skips = self.training and not self.skips
        return torch.as_tensor(hidden)


def test_two_forwards_are_never_one_measurement(tmp_path: Path) -> None:
    model = Skips()
    with watching(model, tmp_path) as monitor:
        model.skips = True
        with pytest.raises(ModelError, match="every block must run once"), monitor.train_batch(0):
            model(batch(10)), model(batch(10))


def test_hooks_are_gone_once_the_last_block_was_read(tmp_path: Path) -> None:
    model = tiny_llama()
    with watching(model, tmp_path) as monitor, monitor.train_batch(0):
        loss = model(input_ids=batch(10), labels=batch(10)).loss
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        loss.backward()


def test_a_training_that_fails_keeps_its_own_error_and_no_hooks(tmp_path: Path) -> None:
    model = tiny_llama()
    with watching(model, tmp_path) as monitor:
        with pytest.raises(ZeroDivisionError), monitor.train_batch(0):
            raise ZeroDivisionError
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_never_came_is_a_fault(tmp_path: Path) -> None:
    with (
        watching(tiny_llama(), tmp_path) as monitor,
        pytest.raises(ModelError, match="every block must run once"),
        monitor.train_batch(0),
    ):
        pass


def test_a_compiled_model_is_refused_before_its_forward(tmp_path: Path) -> None:
    model = tiny_llama()
    with watching(model, tmp_path) as monitor:
        model.compile(backend="eager")
        with pytest.raises(ModelError, match="cannot look into a compiled forward"), monitor.train_batch(0):
            pass


def test_a_compiled_training_is_told_at_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = MassiveActivationCallback(MonitorConfig(source="train_batch"))
    with caplog.at_level(logging.WARNING, "ma_monitor"):
        train(tmp_path, [callback], torch_compile=True, torch_compile_backend="eager", max_steps=2)
    assert "cannot look into a compiled forward, got torch_compile=True" in caplog.text
    assert callback.monitor is None


@pytest.mark.parametrize(
    ("source", "probe", "got"),
    [("probe", None, "no probe"), ("train_batch", Probe.from_ids([[1, 2, 3]]), "a probe")],
)
def test_a_probe_goes_with_its_source(source: Any, probe: Probe | None, got: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"got source='{source}' and {got}"):
        Monitor(tiny_llama(), probe, MonitorConfig(source=source), run_dir=tmp_path)


def test_a_callback_takes_no_probe_with_training_batches() -> None:
    with pytest.raises(ConfigError, match='a callback takes no probe with source="train_batch"'):
        MassiveActivationCallback(CONFIG, probe=Probe.from_ids([[1, 2, 3]]))


def test_a_source_must_be_known() -> None:
    with pytest.raises(ConfigError, match="`source` must be one of probe, train_batch, got 'batch'"):
        MonitorConfig(source="batch")  # type: ignore[arg-type]
