"""Softenings by their formulas, even damping, a weight left out; nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from ma_monitor.ablation.softening import (
    CAP,
    GAIN,
    SOFTENINGS,
    Parts,
    damped,
    find_parts,
    largest_other,
    softened,
    updates_of,
    weight_removed,
)
from ma_monitor.errors import ModelError
from ma_monitor.measure.forward import undisturbed_forward
from tests.ablation.models import hooks, spiky_documents, spiky_llama, state, tiny_neox
from tests.training import tiny_llama

IDS = torch.from_numpy(spiky_documents()[0])[None]
ROUNDING = 1e-5
"""float32, relative."""


def updates(model: nn.Module, parts: Parts, ids: Tensor = IDS) -> Tensor:
    with updates_of([parts]) as found:
        undisturbed_forward(model, ids)
    return found[0]


def under(model: nn.Module, parts: Parts, change: AbstractContextManager[None], ids: Tensor = IDS) -> Tensor:
    """The updates under a change, of which nothing is left afterwards."""
    before, plain = state(model), updates(model, parts, ids)
    with change:
        changed = updates(model, parts, ids)
    assert hooks(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(updates(model, parts, ids), plain)
    return changed


def test_parts_by_name() -> None:
    llama, neox = tiny_llama(), tiny_neox()
    for parts, block in zip(find_parts(llama), llama.model.layers, strict=True):
        assert parts == Parts(block.mlp.down_proj, block.mlp.down_proj, block.post_attention_layernorm)
    blocks: Any = neox.gpt_neox.layers
    for parts, block in zip(find_parts(neox), blocks, strict=True):
        assert parts == Parts(block.mlp.dense_4h_to_h, block.mlp.dense_4h_to_h, block.post_attention_layernorm)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    found: Any = gpt2.transformer.h
    block = found[0]
    assert find_parts(gpt2) == [Parts(block.mlp.c_proj, block.mlp.c_proj, block.ln_2)]
    assert hooks(llama) + hooks(neox) + hooks(gpt2) == 0


def test_experts_have_no_one_projection() -> None:
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    model = MixtralForCausalLM(config)
    (parts,) = find_parts(model)
    assert [parts.allow(softening) for softening in SOFTENINGS] == [True, True, False]
    with pytest.raises(ModelError, match="has not what the softening 'product' changes"), softened(parts, "product", 0):
        pass


def tiny_opt() -> OPTForCausalLM:
    """Its feed-forward has no module of its own, and takes all tokens in one axis."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
    )
    return OPTForCausalLM(config)


def test_a_block_without_a_feed_forward() -> None:
    model: Any = tiny_llama()
    del model.model.layers[1].mlp
    with pytest.raises(ModelError, match="must have a feed-forward to be changed there, and block 2 has none"):
        find_parts(model)


def test_tokens_in_one_axis() -> None:
    model = tiny_opt()
    parts = find_parts(model)[1]
    block: Any = model.get_decoder().layers[1]
    assert parts == Parts(block.fc2, block.fc2, block.final_layer_norm)
    with torch.no_grad():
        block.final_layer_norm.weight.copy_(torch.linspace(-1, 2, 16))
    plain = updates(model, parts)
    token = int(plain.norm(dim=1).argmax())
    for softening in SOFTENINGS:
        changed = under(model, parts, softened(parts, softening, token))
        assert torch.equal(changed[:token], plain[:token])
        assert torch.equal(changed[token + 1 :], plain[token + 1 :])
        if softening == "gain":
            assert not torch.equal(changed[token], plain[token])


def test_cap() -> None:
    model = spiky_llama()
    parts = find_parts(model)[1]
    plain, changed = updates(model, parts), under(model, parts, softened(parts, "cap", 0))
    sizes = sorted(float(token.norm()) for token in plain)
    middle = sizes[(len(sizes) - 1) // 2]
    assert sizes[-1] > 1000 * middle
    assert float(changed[0].norm()) == pytest.approx(CAP * middle, rel=ROUNDING)
    torch.testing.assert_close(changed[0] / changed[0].norm(), plain[0] / plain[0].norm())
    assert torch.equal(changed[1:], plain[1:])
    assert torch.equal(under(model, parts, softened(parts, "cap", 3)), plain), "nothing to cap there"


def test_product() -> None:
    model = spiky_llama()
    parts = find_parts(model)[1]
    assert isinstance(parts.down, nn.Linear)
    given: list[Tensor] = []
    handle = parts.down.register_forward_pre_hook(lambda _, args: given.append(args[0][0].detach()))
    plain = updates(model, parts)
    handle.remove()
    sizes = given[0].square().mean(dim=1).sqrt()
    middle = sorted(sizes[1:].tolist())[(len(sizes) - 2) // 2]
    changed = under(model, parts, softened(parts, "product", 0))
    torch.testing.assert_close(changed[0], plain[0] * middle / sizes[0])
    assert torch.equal(changed[1:], plain[1:])
    least = int(sizes.argmin())
    assert torch.equal(under(model, parts, softened(parts, "product", least)), plain), "never made larger"
    alone = IDS[:, :1]
    assert torch.equal(under(model, parts, softened(parts, "product", 0), alone), updates(model, parts, alone))


def test_gain() -> None:
    for model in (spiky_llama(), tiny_neox()):
        parts = find_parts(model)[1]
        assert parts.norm is not None
        gain = parts.norm.get_parameter("weight")
        with torch.no_grad():
            gain.copy_(torch.linspace(-1, 2, len(gain)))
        plain, changed = updates(model, parts), under(model, parts, softened(parts, "gain", 2))
        held = gain.detach().clone()
        with torch.no_grad():
            gain.copy_(held.mean() + GAIN * (held - held.mean()))
        expected = updates(model, parts)
        torch.testing.assert_close(changed[2], expected[2])
        assert not torch.equal(changed[2], plain[2])
        assert torch.equal(torch.cat([changed[:2], changed[3:]]), torch.cat([plain[:2], plain[3:]]))


def test_a_sequence_without_the_token() -> None:
    model = spiky_llama()
    parts = find_parts(model)[1]
    short = IDS[:, :4]
    for softening in SOFTENINGS:
        changed = under(model, parts, softened(parts, softening, 9), short)
        assert torch.equal(changed, updates(model, parts, short))


def test_damping() -> None:
    model = spiky_llama()
    parts = find_parts(model)[0]
    assert torch.equal(under(model, parts, damped(parts, 0.25)), updates(model, parts) * 0.25)


@pytest.mark.parametrize("make", [tiny_llama, tiny_neox])
def test_a_weight_is_removed_and_comes_back(make: Callable[[], nn.Module]) -> None:
    model = make()
    down = find_parts(model)[1].down
    assert isinstance(down, nn.Linear)
    before = state(model)
    with weight_removed(down, 3, 7):
        assert float(down.weight.detach()[3, 7]) == 0
        assert int((down.weight != 0).sum()) == down.weight.numel() - 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError), weight_removed(down, 0, 0):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_transposed_matrix() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    down = find_parts(model)[0].down
    assert down is not None
    weight = down.get_parameter("weight").detach()
    with weight_removed(down, 3, 40):
        assert float(weight[40, 3]) == 0
    weight[50, 2], weight[9, 4] = -5.0, 4.0
    assert largest_other(down, 0, 0) == (2, 50)
    assert largest_other(down, 2, 50) == (4, 9)
