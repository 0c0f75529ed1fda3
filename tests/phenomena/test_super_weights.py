"""Super weights: found where they were planted, in every family's down projection, and against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from ma_monitor import Probe
from ma_monitor.errors import ModelError
from ma_monitor.measure.layers import find_layers
from ma_monitor.measure.phenomena.emergence import find_feed_forward
from ma_monitor.measure.phenomena.reading import _common, measure_with
from ma_monitor.measure.phenomena.super_weights import SuperWeightsReader, find_down_projection, largest
from tests.training import Rows, tiny_llama

ROW, COLUMN, WEIGHT = 11, 23, 70.0
SINGLE = 1e-5
"""Relative difference of two float32 forwards of other batches."""
SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], str | None]] = {
    "llama": (tiny_llama, "mlp.down_proj"),
    "square": (lambda: tiny_llama(intermediate_size=16), "mlp.down_proj"),
    "gpt_neox": (
        lambda: AutoModel.from_config(GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=32)),
        "mlp.dense_4h_to_h",
    ),
    "opt": (
        lambda: AutoModel.from_config(
            OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=32)
        ),
        "fc2",
    ),
    "gpt2": (lambda: AutoModel.from_config(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)), "mlp.c_proj"),
    "bert": (lambda: AutoModel.from_config(BertConfig(**SMALL, intermediate_size=64)), "output.dense"),
    "t5": (
        lambda: T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=64, num_layers=2, num_heads=2)),
        "layer.1.DenseReluDense.wo",
    ),
    "mixtral": (
        lambda: AutoModel.from_config(MixtralConfig(**SMALL, num_local_experts=2, num_key_value_heads=2)),
        None,
    ),
}


def probe() -> Probe:
    return Probe.from_ids(Rows().ids[:6].numpy(), "rows")


def read(model: nn.Module, **options: Any) -> dict[str, np.ndarray]:
    def failed(name: str, error: Exception) -> None:
        raise error

    measured = measure_with(model, probe(), 0, k=1, phenomena=("super_weights",), failed=failed, **options)
    return {key.removeprefix("super_weights/"): values for key, values in measured.phenomena.items()}


def planted() -> Any:
    """A Llama whose second block multiplies a spike of channel 23 by a huge weight into channel 11."""
    model = tiny_llama().eval()
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        first = model.model.layers[1].post_attention_layernorm.weight
        for projection in (mlp.gate_proj, mlp.up_proj):  # a column that is large for every token
            projection.weight[COLUMN] = 30 * torch.sign(projection.weight[COLUMN]) * first.sign()
        mlp.down_proj.weight[ROW, COLUMN] = WEIGHT
    return model


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_planted_super_weight_is_found(batch_size: int | None) -> None:
    found = read(planted(), batch_size=batch_size)
    assert (found["output_channel"][2], found["input_channel"][2], found["value"][2]) == (ROW, COLUMN, WEIGHT)
    assert found["past_50"][2] == found["past_100"][2] == 1
    assert found["past_50"][1] == 0
    assert all(np.isnan(values[0]) for values in found.values()), "h_0 has no projection"


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gpt2", "t5"])
def test_equals_loops_over_what_the_projection_got(family: str) -> None:
    make, name = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    layers, seen = find_layers(model), {}
    for row, layer in enumerate(layers, start=1):
        projection = layer.get_submodule(str(name))
        projection.register_forward_hook(lambda m, args, out, row=row: seen.update({row: (m, args[0], out)}))
    found = read(model)
    for row, (module, given, made) in seen.items():
        expected: dict[str, list[float]] = {key: [] for key in found}
        weight = module.weight.T if family == "gpt2" else module.weight
        for one, other in zip(given.reshape(6, -1, given.shape[-1]), made.reshape(6, -1, 16), strict=True):
            (size, column), (grown, out) = (
                max((abs(float(x)), -token, c) for token, line in enumerate(each) for c, x in enumerate(line))[::2]
                for each in (one, other)
            )
            numbers = (
                size,
                grown,
                grown > 50 < size,
                grown > 100 < size,
                column,
                out,
                float(weight.detach()[int(out), int(column)]),
            )
            for key, number in zip(found, numbers, strict=True):
                expected[key].append(number)
        for key, numbers_of in expected.items():
            if key in ("input", "output", "past_50", "past_100"):
                assert found[key][row] == pytest.approx(np.mean(numbers_of), rel=SINGLE), key
            else:
                most = max(set(numbers_of), key=numbers_of.count)
                np.testing.assert_equal(found[key][row], most if numbers_of.count(most) > 3 else np.nan, key)
    assert len(seen) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_down_projection_of_every_family(family: str) -> None:
    make, name = FAMILIES[family]
    for block in find_layers(make()):
        assert find_down_projection(block, 16) is (None if name is None else block.get_submodule(name))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the older name
def test_lora_leaves_the_weight_where_it_was() -> None:
    from peft import LoraConfig, get_peft_model

    model = planted()
    down = model.model.layers[1].mlp.down_proj
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM"))
    assert find_down_projection(find_layers(adapted)[1], 16) is down
    assert read(adapted)["value"][2] == WEIGHT


def test_no_projection_no_reading() -> None:
    model = FAMILIES["mixtral"][0]()
    with pytest.raises(ModelError, match='leave "super_weights" out'):
        read(model)


def test_a_block_without_one_is_not_known() -> None:
    model = planted()
    model.model.layers[0].mlp.experts = nn.Linear(4, 4)
    found = read(model)
    assert np.isnan(found["input"][1])
    assert found["value"][2] == WEIGHT


def test_what_mixes_tokens_is_no_feed_forward() -> None:
    """A hybrid calls every kind of block's one part ``mixer``; attention's output also narrows to the stream."""
    config = AutoConfig.for_model(
        "nemotron_h",
        **{**SMALL, "num_hidden_layers": 3},
        layers_block_type=["mamba", "attention", "mlp"],
        intermediate_size=32,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=1,
    )
    mamba, attention, feed_forward = find_layers(AutoModelForCausalLM.from_config(config))
    assert find_down_projection(mamba, 16) is None
    assert find_down_projection(attention, 16) is None
    assert find_down_projection(feed_forward, 16) is feed_forward.get_submodule("mixer.down_proj")
    assert [find_feed_forward(block, 16)[1] is None for block in (mamba, attention, feed_forward)] == [
        True,
        True,
        False,
    ]


def test_the_norm_of_a_recurrence_is_none_of_the_feed_forward() -> None:
    config = AutoConfig.for_model("recurrent_gemma", **SMALL, intermediate_size=32, head_dim=8, lru_width=16)
    for block in find_layers(AutoModelForCausalLM.from_config(config)):
        _, entry, end = find_feed_forward(block, 16)
        assert entry is block.get_submodule("mlp_block")
        assert end is block.get_submodule("mlp_block.down_proj")


class Coded(nn.Linear):
    """Multiplies by a weight in whole numbers, which mean something with their scale alone."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False)
        self.weight = nn.Parameter((whole.weight.detach() * 100).to(torch.int8), requires_grad=False)

    def forward(self, given: Tensor) -> Tensor:
        return nn.functional.linear(given, self.weight / 100)


def test_whole_numbers_are_no_weight() -> None:
    model = tiny_llama()
    for block in model.model.layers:
        block.mlp.down_proj = Coded(block.mlp.down_proj)
    with pytest.raises(ModelError, match=r"of torch\.int8 in a Parameter: quantised"):
        read(model)


def test_a_weight_that_is_not_there_whole_is_refused() -> None:
    model = tiny_llama()
    reader = SuperWeightsReader(model, model.model.layers)
    reader.hidden(0, torch.zeros(1, 2, 16))
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(torch.zeros(256, 1))
    with reader.hooks():
        down.register_forward_hook(lambda *_: None)
        reader.caught(reader._spikes)(1, down, torch.zeros(1, 2, 32), torch.zeros(1, 2, 16))
    assert isinstance(reader.failure, ModelError)
    with pytest.raises(ModelError, match=r"one whole weight of 16 x 32 numbers .* got \(256, 1\)"):
        raise reader.failure
    assert not down._forward_hooks or len(down._forward_hooks) == 1, "own hooks are gone"


def test_what_is_not_a_number_has_no_candidate() -> None:
    values = torch.zeros(2, 3, 4)
    values[0, 1, 2], values[1, 2, 3] = torch.nan, -torch.inf
    size, channel = largest(values, 2)
    assert torch.isnan(size[0])
    assert (float(size[1]), int(channel[1])) == (math.inf, 3)
    flat = largest(values.flatten(0, 1), 2)
    assert torch.equal(flat[0].nan_to_num(), size.nan_to_num())
    assert torch.equal(flat[1], channel)


@pytest.mark.parametrize(
    ("given", "common"),
    [([3, 3, 9], 3), ([3, 9, 3, 3], 3), ([3, 3, 9, 9], np.nan), ([np.nan, 3, np.nan], np.nan), ([3, 3, np.nan], 3)],
)
def test_a_channel_is_what_most_sequences_have_and_never_a_mean(given: list[float], common: float) -> None:
    np.testing.assert_array_equal(_common(np.array(given)[None, :, None]), [[common]])


def test_scale_and_order_of_the_channels() -> None:
    def spikes(values: Tensor) -> tuple[list[float], list[int]]:
        size, channel = largest(values, 3)
        return size.tolist(), channel.tolist()

    values = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    sizes, channels = spikes(values)
    assert spikes(-4 * values) == ([4 * size for size in sizes], channels)
    assert spikes(values[..., order]) == (sizes, [int((order == channel).nonzero()) for channel in channels])
