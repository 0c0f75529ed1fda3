"""Finding the blocks, and measuring without leaving a trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ma_monitor.errors import ModelError
from ma_monitor.measure.forward import measure, precision_of, reading_layers
from ma_monitor.measure.layers import describe_model, find_layers
from ma_monitor.measure.probe import Probe

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
PROBE = Probe.from_ids(np.random.default_rng(0).integers(0, 50, (4, 9)))
# Micro-batches and whole batches multiply matrices of other shapes, whose sums round differently in float32.
ROUNDING = 1e-5


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(SIZES | changes)))


def test_the_last_layer_is_before_the_final_norm() -> None:
    model = tiny()
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.fill_(1000.0)
    assert abs(measure(model, PROBE, 0, k=1).top[-1]).max() < 100


def test_signs_are_kept() -> None:
    model = tiny()
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[:, 3] = -50.0
    got = measure(model, PROBE, 0, k=1)
    assert (got.top[0] == -50).all()
    assert (got.channel[0] == 3).all()


def test_micro_batches_give_the_same() -> None:
    model = tiny()
    whole, parts = measure(model, PROBE, 0, k=2), measure(model, PROBE, 0, k=2, batch_size=3)
    np.testing.assert_allclose(parts.top, whole.top, rtol=ROUNDING)
    np.testing.assert_array_equal(parts.position, whole.position)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_wrapped_and_compiled_models_are_measured_as_they_are() -> None:
    from peft import LoraConfig, get_peft_model

    plain = measure(tiny(), PROBE, 0, k=1)
    lora = get_peft_model(tiny(), LoraConfig(target_modules=["query_key_value"]))
    np.testing.assert_array_equal(measure(lora, PROBE, 0, k=1).top, plain.top)
    assert describe_model(lora).layers == 3
    compiled: Any = torch.compile(tiny(), backend="aot_eager")
    np.testing.assert_array_equal(measure(compiled, PROBE, 0, k=1).top, plain.top)


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return [*state[1].tolist(), state[2]]


def test_leaves_no_trace() -> None:
    model = tiny(attention_dropout=0.5, hidden_dropout=0.5).train()
    model.gpt_neox.layers[1].eval()
    flags = [m.training for m in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    measure(model, PROBE, 0, k=1)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class DrawsInEvaluation(nn.Module):
    """A block that draws from every generator even in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, ids: torch.Tensor) -> Any:
        noise = random.random() + np.random.rand() + torch.rand(*ids.shape, 2)
        return self.layers[0](noise * self.scale)


def test_random_states_are_put_back_even_where_a_block_draws_in_evaluation() -> None:
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    measure(DrawsInEvaluation(), PROBE, 0, k=1)
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_dropout_is_off_in_the_probe() -> None:
    model = tiny(attention_dropout=0.5, hidden_dropout=0.5)
    evaluated = measure(model.eval(), PROBE, 0, k=1)
    np.testing.assert_array_equal(measure(model.train(), PROBE, 0, k=1).top, evaluated.top)


def test_nothing_is_compiled_and_the_forward_is_a_cheap_one() -> None:
    from torch._dynamo.utils import counters

    seen: list[dict[str, Any]] = []
    model = tiny()
    forward = model.forward

    def remembers(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return forward(*args, **kwargs)

    model.forward = remembers
    compiled: Any = torch.compile(model, backend="eager")
    counters.clear()
    measure(compiled, PROBE, 0, k=1)
    assert sum(counters["stats"].values()) == 0
    assert seen == [{"use_cache": False, "logits_to_keep": 1}]


def test_modules_that_act_in_eval_are_left_as_they_are() -> None:
    """loralib's layers merge their weights in ``train(False)``; only the flag may change."""

    class Merges(nn.Identity):
        merged = 0

        def train(self, mode: bool = True) -> Any:
            Merges.merged += 1
            return super().train(mode)

    model = tiny().train()
    model.gpt_neox.layers[0].extra = Merges()
    before = Merges.merged
    measure(model, PROBE, 0, k=1)
    assert Merges.merged == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_in_evaluation_and_keep_their_own_flag() -> None:
    class Drops(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(hidden, 0.5, self.training)

    model = tiny().train()
    expected = measure(model, PROBE, 0, k=1)
    drops = model.gpt_neox.layers[0].mlp.drops = torch.jit.script(Drops().train())
    model.gpt_neox.layers[0].mlp.register_forward_hook(lambda module, args, output: drops(output))
    np.testing.assert_array_equal(measure(model, PROBE, 0, k=1).top, expected.top)
    assert drops.training
    model.eval()
    assert not drops.training


def test_a_default_device_does_not_matter() -> None:
    expected = measure(tiny(), PROBE, 0, k=3)
    model = tiny()
    with torch.device("meta"):
        got = measure(model, PROBE, 0, k=3)
    np.testing.assert_array_equal(got.top, expected.top)


def test_added_positions_are_refused() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity()])

        def forward(self, ids: torch.Tensor) -> Any:
            return self.layers[0](torch.zeros(len(ids), ids.shape[1] + 2, 4))

    with pytest.raises(ModelError, match="a position for every token of the probe, 9, got 11"):
        measure(Prompted(), PROBE, 0, k=1)


def test_leaves_no_trace_when_a_block_fails() -> None:
    model = tiny().train()
    broken = model.gpt_neox.layers[2]
    broken.forward = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        measure(model, PROBE, 0, k=1)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


def test_hooks_are_gone_when_attaching_fails_half_way() -> None:
    layers = tiny().gpt_neox.layers
    layers[2].register_forward_hook = None
    with pytest.raises(TypeError, match="not callable"), reading_layers(layers, lambda *_: None):
        pass
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in layers)


def test_nan_and_infinities_are_counted() -> None:
    model = tiny()
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[PROBE.ids[0, 0], 0] = torch.nan
    got = measure(model, PROBE, 0, k=1)
    assert got.nan[0, 0] == (PROBE.ids[0] == PROBE.ids[0, 0]).sum()
    assert np.isfinite(got.top[0]).all()


def test_precision_names_type_and_autocast() -> None:
    assert precision_of(tiny()) == "float32"
    assert precision_of(tiny().bfloat16()) == "bfloat16"
    model = tiny()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    assert precision_of(model) == "float32 under bfloat16 autocast"


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="exactly one list of its blocks .* Linear has none"):
        find_layers(nn.Linear(2, 2))


def test_a_model_with_two_candidate_lists_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)]), "b": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(ModelError, match=r"\[\('a', 1\), \('b', 1\)\]"):
        find_layers(model)


def test_a_block_that_does_not_run_is_named() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.layers[0](torch.zeros(*ids.shape, 2))
            return hidden

    with pytest.raises(ModelError, match=r"of h_0 … h_2 only \[0, 1\] were seen"):
        measure(Skips(), PROBE, 0, k=1)


def test_a_block_without_a_tensor_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity()])

        def forward(self, ids: torch.Tensor) -> Any:
            return self.layers[0]({"hidden": ids})

    with pytest.raises(ModelError, match="h_0 must be a tensor or the first entry of a tuple, got dict"):
        measure(Odd(), PROBE, 0, k=1)
