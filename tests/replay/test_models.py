from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DistilBertConfig, DistilBertForMaskedLM, DistilBertModel, GPTNeoXConfig, GPTNeoXForCausalLM

from ma_monitor.errors import ConfigError, SourceError
from ma_monitor.measure.layers import describe_model
from ma_monitor.replay.models import ModelLoader, blank_model, checked_device, checked_dtype

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny GPT-NeoX, saved in bfloat16."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    GPTNeoXForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    return tmp_path


def rewrite_weights(folder: Path, **changes: Any) -> None:
    """Replaces the weights by those for which ``keep`` holds, as safetensors or, on demand, pickled."""
    file = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if changes.get("keep", bool)(name)}
    file.unlink()
    if changes.get("pickled"):
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for_whatever_they_were_saved_in(checkpoint: Path, dtype: torch.dtype) -> None:
    model = ModelLoader(dtype, CPU).load(checkpoint)

    saved = load_file(checkpoint / "model.safetensors")["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    loaded = model.get_parameter("gpt_neox.layers.1.mlp.dense_h_to_4h.weight")
    assert loaded.dtype == dtype
    assert torch.equal(loaded, saved.to(dtype))
    assert not model.training


def test_pickled_tensors_alone_are_read(checkpoint: Path) -> None:
    expected = ModelLoader(torch.float32, CPU).load(checkpoint).state_dict()
    rewrite_weights(checkpoint, pickled=True)

    loaded = ModelLoader(torch.float32, CPU).load(checkpoint).state_dict()

    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_pickled_code_is_refused_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": Malicious(tmp_path / "executed")}, checkpoint / "pytorch_model.bin")

    with pytest.raises(SourceError, match=r"weights cannot be read \(UnpicklingError: Weights only load failed"):
        ModelLoader(torch.float32, CPU).load(checkpoint)

    assert not (tmp_path / "executed").exists()
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "executed").exists(), "the file was harmless, so this test showed nothing"


def test_safetensors_go_before_pickled_weights(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"weight": Malicious(tmp_path / "executed")}, checkpoint / "pytorch_model.bin")

    ModelLoader(torch.float32, CPU).load(checkpoint)

    assert not (tmp_path / "executed").exists()


def test_remote_code_is_refused(checkpoint: Path) -> None:
    configuration = {"model_type": "own", "auto_map": {"AutoConfig": "own.Configuration"}}
    (checkpoint / "config.json").write_text(json.dumps(configuration), encoding="utf-8")
    (checkpoint / "own.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    with pytest.raises(SourceError, match=r"config\.json cannot be used .*custom code"):
        ModelLoader(torch.float32, CPU).load(checkpoint)


def test_an_unknown_architecture_is_named(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    with pytest.raises(SourceError, match=r"config\.json cannot be used .*no-such-model"):
        blank_model(checkpoint)


@pytest.mark.parametrize("kept_bytes", [0, 5, 1000])
def test_cut_weights_are_refused(checkpoint: Path, kept_bytes: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(SourceError, match="weights cannot be read"):
        ModelLoader(torch.float32, CPU).load(checkpoint)


def test_weights_that_are_not_there_are_not_left_to_chance(checkpoint: Path) -> None:
    rewrite_weights(checkpoint, keep=lambda name: "layers.1.mlp" not in name)
    with pytest.raises(SourceError, match=r"lack gpt_neox\.layers\.1\.mlp\.dense_4h_to_h\.bias, .* and more"):
        ModelLoader(torch.float32, CPU).load(checkpoint)


def test_a_missing_head_does_no_harm(checkpoint: Path) -> None:
    rewrite_weights(checkpoint, keep=lambda name: not name.startswith("embed_out"))
    assert isinstance(ModelLoader(torch.float32, CPU).load(checkpoint), GPTNeoXForCausalLM)


def test_an_architecture_without_a_causal_head_is_loaded_bare(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64)
    DistilBertForMaskedLM(config).save_pretrained(tmp_path)
    assert isinstance(ModelLoader(torch.float32, CPU).load(tmp_path), DistilBertModel)


def test_a_blank_model_has_the_shape_and_no_weights(checkpoint: Path) -> None:
    expected = describe_model(ModelLoader(torch.float32, CPU).load(checkpoint))
    (checkpoint / "model.safetensors").unlink()

    blank = blank_model(checkpoint)

    assert describe_model(blank) == expected
    assert {parameter.device.type for parameter in blank.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ("auto", None),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_by_name_or_as_they_are(given: torch.dtype | str | None, meant: torch.dtype | None) -> None:
    assert checked_dtype(given) == meant


@pytest.mark.parametrize("given", ["int8", "fp33", "nn", "", torch.int32])
def test_what_is_no_dtype_is_refused(given: torch.dtype | str) -> None:
    with pytest.raises(ConfigError, match="`dtype` must be auto, float32, bfloat16, float16 or float64"):
        checked_dtype(given)


def test_devices_are_checked_before_anything_is_loaded() -> None:
    assert checked_device("cpu") == CPU
    for absent in ("gpu", "cuda:97"):
        with pytest.raises(ConfigError, match=f"`device` must be one that torch finds here, got '{absent}'"):
            checked_device(absent)
