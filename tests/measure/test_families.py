"""Every family of models is read where it should be, checked against what the library itself shows.

The other way to the same tensors is ``output_hidden_states``, in a copy whose final norm is the identity: its last
entry is then what the last block gave. The other way to the statistics is a full sort in numpy.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from ma_monitor import Monitor, Probe
from ma_monitor.errors import ModelError
from ma_monitor.measure.forward import measure, precision_of
from ma_monitor.measure.layers import context_length, describe_model

LAYERS, WIDTH, VOCABULARY, K = 3, 16, 50, 3
PROBE = Probe.from_ids(np.random.default_rng(0).integers(5, VOCABULARY - 5, (4, 9)))

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 1}
HEADS = GROUPED | {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
BLOOM = {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2, "vocab_size": VOCABULARY}
OPT = SIZES | {"ffn_dim": 32, "word_embed_proj_dim": WIDTH}
T5 = {"d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_heads": 2, "vocab_size": VOCABULARY}
BART = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}
DEEPSEEK = SIZES | {
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
SSM = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "state_size": 4}
PIXELS = {"image_size": 8, "patch_size": 4, "projection_dim": WIDTH}
VISION = {name: SIZES[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")} | PIXELS
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


class Family(NamedTuple):
    """A tiny model, and the module between its last block and the last of the library's hidden states."""

    model: str
    config: str
    changes: dict[str, Any]
    final: str | None


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family("GPTNeoXForCausalLM", "gpt_neox", SIZES, "gpt_neox.final_layer_norm"),
    "gpt_neox, sequential": Family(
        "GPTNeoXForCausalLM", "gpt_neox", SIZES | {"use_parallel_residual": False}, "gpt_neox.final_layer_norm"
    ),
    "gpt2": Family("GPT2LMHeadModel", "gpt2", GPT2, "transformer.ln_f"),
    "llama": Family("LlamaForCausalLM", "llama", GROUPED, "model.norm"),
    "llama, no head": Family("LlamaModel", "llama", GROUPED, "norm"),
    "mistral": Family("MistralForCausalLM", "mistral", GROUPED, "model.norm"),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", GROUPED, "model.norm"),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", HEADS, "model.norm"),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", HEADS, "model.norm"),
    "gemma3": Family("Gemma3ForCausalLM", "gemma3_text", HEADS, "model.norm"),
    "phi": Family("PhiForCausalLM", "phi", GROUPED, "model.final_layernorm"),
    "phi3": Family("Phi3ForCausalLM", "phi3", GROUPED, "model.norm"),
    "olmo": Family("OlmoForCausalLM", "olmo", GROUPED, "model.norm"),
    "olmo2": Family("Olmo2ForCausalLM", "olmo2", GROUPED, "model.norm"),
    "opt": Family("OPTForCausalLM", "opt", OPT, "model.decoder.final_layer_norm"),
    "opt, norm after and embeddings projected": Family(
        "OPTForCausalLM",
        "opt",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
        None,
    ),
    "bloom": Family("BloomForCausalLM", "bloom", BLOOM, "transformer.ln_f"),
    "bloom, residual after norm": Family(
        "BloomForCausalLM", "bloom", BLOOM | {"apply_residual_connection_post_layernorm": True}, "transformer.ln_f"
    ),
    "falcon": Family("FalconForCausalLM", "falcon", SIZES, "transformer.ln_f"),
    "falcon, new": Family(
        "FalconForCausalLM", "falcon", SIZES | {"new_decoder_architecture": True}, "transformer.ln_f"
    ),
    "falcon, sequential": Family("FalconForCausalLM", "falcon", SIZES | {"parallel_attn": False}, "transformer.ln_f"),
    "mixtral": Family("MixtralForCausalLM", "mixtral", GROUPED | EXPERTS | {"num_local_experts": 4}, "model.norm"),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        HEADS | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 8},
        "model.norm",
    ),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "deepseek_v3", DEEPSEEK | EXPERTS, "model.norm"),
    "gpt_oss": Family("GptOssForCausalLM", "gpt_oss", HEADS | EXPERTS | {"num_local_experts": 4}, "model.norm"),
    "t5": Family(
        "T5ForConditionalGeneration",
        "t5",
        T5 | {"num_layers": 2, "num_decoder_layers": LAYERS},
        "decoder.final_layer_norm",
    ),
    "t5, encoder": Family(
        "T5EncoderModel", "t5", T5 | {"num_layers": LAYERS, "num_decoder_layers": 2}, "encoder.final_layer_norm"
    ),
    "bart": Family("BartForConditionalGeneration", "bart", BART, None),
    "bart, decoder": Family("BartForCausalLM", "bart", BART, None),
    "bert": Family("BertForMaskedLM", "bert", SIZES, None),
    "modernbert": Family(
        "ModernBertForMaskedLM", "modernbert", SIZES | {"cls_token_id": 1, "sep_token_id": 2}, "model.final_norm"
    ),
    "mamba": Family("MambaForCausalLM", "mamba", SSM, None),
    "mamba2": Family("Mamba2ForCausalLM", "mamba2", SSM | {"num_heads": 4, "head_dim": 8, "n_groups": 1}, None),
    "llava": Family(
        "LlavaForConditionalGeneration",
        "llava",
        # A vision tower of the same depth is not mistaken for the decoder.
        {
            "text_config": HEADS | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "num_hidden_layers": LAYERS},
        },
        "model.language_model.norm",
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        "paligemma",
        {
            "text_config": HEADS | {"model_type": "gemma"},
            "vision_config": VISION | {"model_type": "siglip_vision_model", "num_hidden_layers": 2},
            "projection_dim": WIDTH,
        },
        "model.language_model.norm",
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {
            "text_config": GROUPED | MROPE,
            "vision_config": {"depth": LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2},
        },
        "model.language_model.norm",
    ),
}
NO_HEADS = {"mamba", "mamba2"}
DECODERS = {"gemma3": "gemma3_text", "llava": "llama", "paligemma": "gemma", "qwen2_vl": "qwen2_vl_text"}
"""What is measured in a model of several parts."""


@cache
def tiny(name: str) -> Any:
    family = FAMILIES[name]
    torch.manual_seed(0)
    return build(family.model, family.config, family.changes)


def build(model: str, config: str, changes: dict[str, Any]) -> Any:
    return getattr(transformers, model)(AutoConfig.for_model(config, **changes)).eval()


def hidden_states(model: Any, final: str | None) -> list[Tensor]:
    """h_0 … h_L by the library, the last one bare of the final norm."""
    model = copy.deepcopy(model)
    if final is not None:
        model.set_submodule(final, nn.Identity())
    if getattr(model.config, "word_embed_proj_dim", WIDTH) != WIDTH:  # OPT-350M's narrower head
        model.model.decoder.project_out = None
        model.lm_head = nn.Identity()
    ids = torch.from_numpy(PROBE.ids)
    arguments: dict[str, Any] = {"use_cache": False, "decoder_input_ids": ids}
    if not model.config.is_encoder_decoder:
        del arguments["decoder_input_ids"]
    if "use_cache" not in inspect.signature(model.forward).parameters:
        del arguments["use_cache"]
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, **arguments)
        if model.config.model_type.startswith("mamba"):  # which shows h_1 … h_L, then the final norm
            return [model.get_input_embeddings()(ids), *out.hidden_states[:-1]]
    return list(out["decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"])


def check(model: Any, states: list[Tensor]) -> None:
    """Measured equals sorted, to the bit: the same kernels ran on the same numbers."""
    got = measure(model, PROBE, 7, k=K)
    assert len(states) == LAYERS + 1
    assert got.top.shape == (LAYERS + 1, len(PROBE.ids), K)
    for layer, hidden in enumerate(states):
        signed = hidden.float().flatten(1).numpy()
        order = np.argsort(-np.abs(signed), axis=1, kind="stable")
        top = order[:, :K]
        np.testing.assert_array_equal(got.top[layer], np.take_along_axis(signed, top, 1), err_msg=f"h_{layer}")
        np.testing.assert_array_equal(got.position[layer], top // WIDTH)
        np.testing.assert_array_equal(got.channel[layer], top % WIDTH)
        np.testing.assert_array_equal(got.token[layer], np.take_along_axis(PROBE.ids, top // WIDTH, 1))
        middle = order[:, order.shape[1] // 2]  # of an even number in descending order, the lower of the middle two
        np.testing.assert_array_equal(got.median[layer], np.abs(signed)[np.arange(len(signed)), middle])


@pytest.mark.parametrize("name", FAMILIES)
def test_measures_what_the_library_shows(name: str) -> None:
    check(tiny(name), hidden_states(tiny(name), FAMILIES[name].final))


@pytest.mark.parametrize("name", FAMILIES)
def test_describes_the_decoder(name: str) -> None:
    shape = describe_model(tiny(name))
    assert (shape.layers, shape.width, shape.vocabulary) == (LAYERS, WIDTH, VOCABULARY)
    assert shape.heads == (None if name in NO_HEADS else 2)
    assert shape.family == DECODERS.get(name, FAMILIES[name].config)
    assert shape.parameters == sum(p.numel() for p in tiny(name).parameters())


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gemma2", "t5", "mamba", "llava"])
def test_measures_bfloat16(name: str) -> None:
    model = copy.deepcopy(tiny(name)).bfloat16()
    assert precision_of(model) == "bfloat16"
    check(model, hidden_states(model, FAMILIES[name].final))


@pytest.mark.parametrize(
    ("name", "context"), [("gpt2", 32), ("opt", 32), ("bart", 32), ("llava", 32), ("bloom", None), ("mamba", None)]
)
def test_the_context_is_known_by_whatever_name(name: str, context: int | None) -> None:
    assert context_length(tiny(name)) == context


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_measures_adapted_models() -> None:
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(tiny("llama")).bfloat16()
    adapted: Any = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).eval()
    floating = [p.dtype for p in adapted.parameters()]
    assert floating.count(torch.float32) > floating.count(torch.bfloat16)
    assert precision_of(adapted) == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_of(adapted) == "bfloat16"
    assert describe_model(adapted).family == "llama"
    check(adapted, hidden_states(adapted, "base_model.model.model.norm"))
    top = measure(adapted, PROBE, 0, k=1).top
    assert (top[1:] != measure(copy.deepcopy(tiny("llama")).bfloat16(), PROBE, 0, k=1).top[1:]).any()


class WeightOnly(nn.Module):
    """A linear layer whose weights are 8-bit whole numbers with a scale a row, and no parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("whole", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, hidden: Tensor) -> Tensor:
        scale, whole = self.get_buffer("scale"), self.get_buffer("whole")
        return nn.functional.linear(hidden, whole.to(hidden.dtype) * scale)


def test_measures_quantised_models() -> None:
    model = copy.deepcopy(tiny("llama")).bfloat16()
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, WeightOnly(module))
    assert precision_of(model) == "bfloat16"
    check(model, hidden_states(model, "model.norm"))


GEMMA3N = HEADS | {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
    "layer_types": ["full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 2,
    "intermediate_size": [32] * 2,
}
MLLAMA = {
    "text_config": GROUPED
    | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "vision_config": VISION
    | {"num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
    | {"vision_output_dim": 48, "intermediate_layers_indices": [0, 1]},
}
XLNET = {"d_model": WIDTH, "n_layer": LAYERS, "n_head": 2, "d_inner": 32, "vocab_size": VOCABULARY}
REFUSED = {
    "pixels": ("ViTModel", "vit", VISION | {"num_hidden_layers": 2}, "token ids alone .* ViTModel .* pixel_values"),
    "sound": (
        "WhisperForConditionalGeneration",
        "whisper",
        BART | {"pad_token_id": 0},
        "token ids alone .* input_features",
    ),
    "two towers": (
        "CLIPModel",
        "clip",
        {"text_config": SIZES, "vision_config": VISION | {"num_hidden_layers": 2}},
        "token ids alone .* CLIPModel",
    ),
    "several streams": ("Gemma3nForCausalLM", "gemma3n_text", GEMMA3N, r"h_0 .* shape \(4, 1, 2, 16\).*AltUp"),
    "blocks for images only": ("MllamaForConditionalGeneration", "mllama", MLLAMA, r"only \[0, 1, 3\] were seen"),
    "tokens first": ("XLNetLMHeadModel", "xlnet", XLNET, r"shape \(2, 1, 16\) for one sequence of two tokens"),
    "one block many times": ("AlbertModel", "albert", SIZES | {"embedding_size": 8}, "one list of 3 blocks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_one_residual_stream_of_tokens_is_refused_at_once(name: str, tmp_path: Path) -> None:
    model, config, changes, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        Monitor(build(model, config, changes), PROBE, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
