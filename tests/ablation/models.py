"""Small causal models with known massive entries, and documents for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from ma_monitor.measure.forward import reading_layers, undisturbed_forward
from ma_monitor.measure.layers import find_layers
from tests.training import VOCABULARY, tiny_llama

LAYERS, WIDTH, TOKENS = 3, 16, 12
SPIKE, CHANNEL = 400.0, 5


def documents(count: int = 4, tokens: int = TOKENS) -> list[NDArray[np.int64]]:
    """Random documents, each a token shorter than the one before."""
    rng = np.random.default_rng(1)
    return [rng.integers(1, VOCABULARY, tokens - number) for number in range(count)]


def tiny_neox() -> GPTNeoXForCausalLM:
    """Two blocks with a parallel residual."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
    )
    model = GPTNeoXForCausalLM(config)
    model.train(False)
    return model


def spiky_llama() -> LlamaForCausalLM:
    """Three blocks, of which the second writes a spike into one channel where the document's first token is read.

    The first token of every document must be 0: its embedding alone points where the second feed-forward answers.
    """
    model = tiny_llama(num_hidden_layers=LAYERS)
    model.train(False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[0] = 0
        model.model.embed_tokens.weight[0, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[3] = 0
        mlp.up_proj.weight[3] = 0
        mlp.gate_proj.weight[3, 0] = mlp.up_proj.weight[3, 0] = 4.0  # the norm makes that entry 4: 16·16 in the product
        mlp.down_proj.weight[:, 3] = 0
        mlp.down_proj.weight[CHANNEL, 3] = SPIKE / 256
    return model


def spiky_documents(count: int = 4) -> list[NDArray[np.int64]]:
    """Documents that begin with token 0."""
    return [np.r_[0, ids[1:]] for ids in documents(count)]


def streams(model: nn.Module, ids: NDArray[np.int64]) -> list[Tensor]:
    """h_0 … h_L of one document, ``[S, d]`` each."""
    found: list[Tensor] = []

    def read(_row: int, value: Any) -> None:
        found.append((value[0] if isinstance(value, tuple) else value)[0].clone())

    with reading_layers(find_layers(model), read):
        undisturbed_forward(model, torch.from_numpy(ids)[None])
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a model is."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks(model: nn.Module) -> int:
    """How many forward hooks there are."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
