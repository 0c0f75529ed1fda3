"""Features of any configuration, against formulas written out and parameters counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, GPTNeoXConfig, LlamaConfig

from ma_monitor.architecture.features import FEATURES, TABLE_4, Shape, changed, layer_features, shape_of
from ma_monitor.errors import ConfigError

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 500,
}


def test_table_4_written_out() -> None:
    shape = Shape(4, 256, 8, 1024, 32, 5000, 7_000_000, 0.25, 10_000.0, False)
    rows = layer_features(shape)
    assert rows.shape == (4, len(FEATURES))
    for layer, row in enumerate(rows, start=1):
        p = layer / 4
        table_4 = [p, p * p, p * p * p, math.sqrt(p), 8 / 256, 1024 / 256, 256 / 4, 8 / 4, math.log(256), layer * 4]
        further = [0.25, math.log(1e4), math.log(5000), math.log(7e6), 32, 0]
        np.testing.assert_allclose(row, table_4 + further, rtol=1e-12)
    assert len(TABLE_4) == 10


def test_pythia_14m() -> None:
    config = GPTNeoXConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, vocab_size=50_304
    )
    block = 4 * 128**2 + 4 * 128 + 2 * 128 * 512 + 512 + 128 + 4 * 128  # attention, MLP, two layer norms
    parameters = 2 * 50_304 * 128 + 6 * block + 2 * 128
    assert shape_of(config) == Shape(6, 128, 4, 512, 32, 50_304, parameters, 0.25, 10_000.0, False)


def test_llama() -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, head_dim=8)
    block = 4 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert shape_of(config) == Shape(3, 64, 4, 96, 8, 500, 2 * 500 * 64 + 3 * block + 64, 1.0, 5e5, True)


@pytest.mark.parametrize(
    ("family", "mlp", "rotary", "rms"),
    [
        ("gpt2", 256, (0.0, 1.0), False),
        ("opt", 96, (0.0, 1.0), False),
        ("bloom", 256, (0.0, 1.0), False),
        ("mpt", 256, (0.0, 1.0), False),
        ("gptj", 256, (0.5, 10_000.0), False),
        ("falcon", 256, (1.0, 10_000.0), False),
        ("phi", 96, (0.5, 10_000.0), False),
        ("qwen3", 96, (1.0, 10_000.0), True),
        ("gemma3_text", 96, (1.0, 1_000_000.0), True),
        ("olmo2", 96, (1.0, 10_000.0), True),
    ],
)
def test_families(family: str, mlp: int, rotary: tuple[float, float], rms: bool) -> None:
    more: dict[str, Any] = {"opt": {"ffn_dim": 96}, "gptj": {"rotary_dim": 8}}.get(family, {})
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size" or mlp == value}
    shape = shape_of(AutoConfig.for_model(family, **sizes, **more))
    assert (shape.layers, shape.width, shape.heads, shape.vocabulary) == (3, 64, 4, 500)
    assert (shape.mlp, shape.rms_norm) == (mlp, rms)
    assert (shape.rotary_share, shape.rotary_base) == rotary
    assert shape.parameters > 500 * 64


def test_a_text_model_inside_another() -> None:
    text = AutoConfig.for_model("gemma3_text", **SIZES)
    assert shape_of(AutoConfig.for_model("gemma3", text_config=text)) == shape_of(text)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mamba", "needs `num_attention_heads` as one whole number of at least 1, and this mamba .* has None"),
        ("vit", "needs `vocab_size` as one whole number"),
        ("bert", "for decoder-only language models, and a 'bert' configuration is for none"),
        ("whisper", "for decoder-only language models"),
        ("t5", "needs the width of the MLP, and this t5 configuration has none of intermediate_size"),
    ],
)
def test_what_cannot_be_predicted(family: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shape_of(AutoConfig.for_model(family))


def test_a_model_that_cannot_be_built() -> None:
    config = AutoConfig.for_model("opt", **SIZES, ffn_dim=96)
    config.num_attention_heads = 5
    with pytest.raises(ConfigError, match="no opt model can be built of this configuration: .*divisible"):
        shape_of(config)


def test_changes() -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=4)
    fewer = shape_of(changed(config, {"heads": 2}))
    assert (fewer.heads, fewer.head_size, fewer.mlp) == (2, 32, 96)
    wider = shape_of(changed(config, {"width": 128}))
    assert (wider.width, wider.mlp, wider.head_size) == (128, 192, 32), "the MLP keeps its ratio"
    both = shape_of(changed(config, {"width": 128, "mlp": 96, "num_hidden_layers": 5, "vocabulary": 600}))
    assert (both.mlp, both.layers, both.vocabulary) == (96, 5, 600)
    assert shape_of(config).heads == 4, "the configuration itself is as before"


@pytest.mark.parametrize(("family", "mlp"), [("gpt2", 300), ("opt", 300), ("falcon", 300)])
def test_changes_under_other_names(family: str, mlp: int) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    config = AutoConfig.for_model(family, **sizes)
    shape = shape_of(changed(config, {"mlp": mlp, "layers": 2}))
    assert (shape.mlp, shape.layers) == (mlp, 2)


def test_a_width_that_brings_its_mlp() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    assert shape_of(changed(AutoConfig.for_model("bloom", **sizes), {"width": 128})).mlp == 512


def test_changes_refused() -> None:
    with pytest.raises(ConfigError, match="the MLP of a bloom model is four times as wide as the model"):
        changed(AutoConfig.for_model("bloom"), {"mlp": 300})
    with pytest.raises(ConfigError, match="has no number 'depth'; give one of layers, width"):
        changed(LlamaConfig(**SIZES), {"depth": 3})
    with pytest.raises(ConfigError, match="a llama configuration cannot have {'width': 66}: .*multiple of"):
        changed(LlamaConfig(**SIZES), {"width": 66})
