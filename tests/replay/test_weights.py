"""Checkpoint after checkpoint poured into one model, against a model that transformers loads anew each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from ma_monitor.errors import SourceError
from ma_monitor.replay.models import ModelLoader, default_dtype
from ma_monitor.replay.weights import READERS, fingerprint, pour, stored_tensors

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
Save = Callable[[int, Path], None]


def neox(seed: int, **changes: Any) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(SIZES | changes)))


def llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


def mixtral(seed: int) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_key_value_heads=2))


def pickled(model: PreTrainedModel, folder: Path) -> None:
    """Saves as ``.bin``."""
    model.save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def base_alone(model: GPTNeoXForCausalLM, folder: Path) -> None:
    """Saves without the head, as ``layers.0.…``."""
    GPTNeoXModel.save_pretrained(model.gpt_neox, folder)


def with_old_buffers(model: GPTNeoXForCausalLM, folder: Path) -> None:
    """Saves with the buffers that Pythia's first revisions hold and nobody needs any more."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | {
        f"gpt_neox.layers.{i}.attention.{name}": torch.ones(4)
        for i in range(2)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


WAYS: dict[str, tuple[bool, Save]] = {
    "NeoX, whose head is renamed": (True, lambda seed, folder: neox(seed).save_pretrained(folder)),
    "saved in bfloat16": (True, lambda seed, folder: neox(seed).bfloat16().save_pretrained(folder)),
    "shards": (True, lambda seed, folder: neox(seed).save_pretrained(folder, max_shard_size="6KB")),
    "pickled": (True, lambda seed, folder: pickled(neox(seed), folder)),
    "without the head": (True, lambda seed, folder: base_alone(neox(seed), folder)),
    "buffers of old": (True, lambda seed, folder: with_old_buffers(neox(seed), folder)),
    "tied embeddings": (True, lambda seed, folder: llama(seed, tie_word_embeddings=True).save_pretrained(folder)),
    "experts that transformers fuses": (False, lambda seed, folder: mixtral(seed).save_pretrained(folder)),
}


@pytest.mark.parametrize(("poured", "save"), WAYS.values(), ids=WAYS)
def test_every_checkpoint_gives_what_transformers_gives(poured: bool, save: Save, tmp_path: Path) -> None:
    ids = torch.arange(20)[None]
    loader = ModelLoader(torch.float32, CPU)
    seen: list[Any] = []
    for seed in range(3):
        save(seed, tmp_path / str(seed))
        model: Any = loader.load(tmp_path / str(seed))
        anew: Any = type(model).from_pretrained(tmp_path / str(seed), dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(model.base_model(ids)[0], anew.base_model(ids)[0])
        whole = model.base_model.state_dict()
        assert all(torch.equal(value, anew.base_model.state_dict()[name]) for name, value in whole.items())
        assert not model.training
        seen.append(model)
    assert (seen[0] is seen[1] is seen[2]) == poured


def test_weights_are_in_memory_of_our_own(tmp_path: Path) -> None:
    neox(0).save_pretrained(tmp_path)
    model: Any = ModelLoader(torch.float32, CPU).load(tmp_path)
    before = model.get_input_embeddings().weight.clone()
    (tmp_path / "model.safetensors").write_bytes(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_another_configuration_of_the_same_shape_is_loaded_anew(tmp_path: Path) -> None:
    neox(0).save_pretrained(tmp_path / "0")
    neox(0, rotary_pct=0.5).save_pretrained(tmp_path / "1")
    loader = ModelLoader(torch.float32, CPU)
    first = loader.load(tmp_path / "0")
    second = loader.load(tmp_path / "1")
    assert second is not first
    assert {parameter.device.type for parameter in first.parameters()} == {"meta"}
    anew = GPTNeoXForCausalLM.from_pretrained(tmp_path / "1", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(second(torch.arange(9)[None]).logits, anew(torch.arange(9)[None]).logits)


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A checkpoint whose tensors were changed."""
    neox(1).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LAST = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "lacks": (lambda w: w.pop(LAST), rf"its weights lack {LAST}"),
    "has too many": (
        lambda w: w.update({"gpt_neox.layers.2.mlp.dense_4h_to_h.weight": torch.ones(16, 32)}),
        r"has no place for gpt_neox\.layers\.2\.mlp\.dense_4h_to_h\.weight among its weights",
    ),
    "has one of another shape": (
        lambda w: w.update({LAST: torch.ones(16, 31)}),
        rf"its {LAST} has the shape \[16, 31\] instead of \[16, 32\]",
    ),
}


@pytest.mark.parametrize(("change", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_next_is_whole(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    for seed in (0, 2):
        neox(seed).save_pretrained(tmp_path / str(seed))
    loader = ModelLoader(torch.float32, CPU)
    loader.load(tmp_path / "0")
    with pytest.raises(SourceError, match=words):
        loader.load(damaged(tmp_path / "1", change))
    model = loader.load(tmp_path / "2")
    anew = GPTNeoXForCausalLM.from_pretrained(tmp_path / "2", dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(model.base_model.parameters(), anew.base_model.parameters(), strict=True)
    )


def test_another_shape_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    neox(0).save_pretrained(tmp_path / "0")
    neox(1, hidden_size=32).save_pretrained(tmp_path / "1")
    (tmp_path / "1" / "model.safetensors").write_bytes(b"cut")
    loader = ModelLoader(torch.float32, CPU)
    model = loader.load(tmp_path / "0")
    with pytest.raises(SourceError, match="of another shape than the one before"):
        loader.load(tmp_path / "1")
    assert loader.load(tmp_path / "0") is model


def test_a_few_tensors_at_a_time_are_on_their_way(tmp_path: Path) -> None:
    neox(0).save_pretrained(tmp_path)
    alive: list[int] = [0]
    most: list[int] = [0]

    class Counted(torch.Tensor):
        """A tensor that tells when it is gone."""

        def __del__(self) -> None:
            alive[0] -= 1

    def counted(read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def open_() -> torch.Tensor:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return read().as_subclass(Counted)

        return open_

    with stored_tensors(tmp_path) as stored:
        into = {name: torch.empty_like(read()) for name, read in stored.items()}
        pour({name: counted(read) for name, read in stored.items()}, into)
        assert all(torch.equal(into[name], read()) for name, read in stored.items())
    assert 1 <= most[0] <= READERS < len(into)


@pytest.mark.parametrize("save", [GPTNeoXForCausalLM.save_pretrained, pickled], ids=["safetensors", "bin"])
def test_a_fingerprint_is_that_of_the_weights(save: Callable[[PreTrainedModel, Path], object], tmp_path: Path) -> None:
    model = neox(1)
    save(model, tmp_path / "one")
    model.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))
    model.register_buffer("frequencies", torch.ones(2))
    save(model, tmp_path / "copy")
    with torch.no_grad():
        model.get_parameter("gpt_neox.layers.1.mlp.dense_4h_to_h.weight")[0, 1] += 1e-3
    save(model, tmp_path / "later")

    one, copy, later = (fingerprint(tmp_path / name) for name in ("one", "copy", "later"))

    assert one == copy
    assert one is not None
    assert later not in (None, one)
    for file in (tmp_path / "copy").glob("*model*"):
        file.write_bytes(b"cut")
    assert fingerprint(tmp_path / "copy") is None
    assert fingerprint(tmp_path / "absent") is None


def test_large_models_are_measured_in_bfloat16() -> None:
    with torch.device("meta"):
        small, large = torch.nn.Linear(2**15, 1_414_647_808 // 2**15), torch.nn.Linear(2**15, 2_775_208_960 // 2**15)
    assert (default_dtype(small), default_dtype(large)) == (torch.float32, torch.bfloat16)
