"""Checkpoints that several tests of replay share: a tiny GPT-NeoX as a short training leaves it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

VOCABULARY, CONTEXT = 50, 64
IDS = np.random.default_rng(7).integers(0, VOCABULARY, size=(3, 12))
FILES = ("run.json", "measurements.bin", "fits.json", "forecast.json")
"""What a run holds besides its diary, which knows the time."""


def train(root: Path, steps: tuple[int, ...], name: str = "step{}") -> Path:
    """Trains on one batch and saves the state at each of these steps."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.from_numpy(IDS)
    for step in range(steps[-1] + 1):
        if step in steps:
            model.save_pretrained(root / name.format(step))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return root


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run that must not depend on when and how it was made."""
    return {name: (run / name).read_bytes() for name in FILES}


STEPS = (0, 10, 25, 60)
"""Of the random checkpoints."""


def save_model(folder: Path, seed: int, width: int = 16) -> None:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
