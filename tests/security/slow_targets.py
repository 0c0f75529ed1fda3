"""Readers that go through large libraries: tokenizers, transformers, safetensors and torch."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from ma_monitor.measure.layers import context_length
from ma_monitor.replay.models import ModelLoader, blank_model
from ma_monitor.replay.probes import text_probe
from ma_monitor.replay.sources import Checkpoint, FolderSource
from ma_monitor.report.places import token_texts
from ma_monitor.runs.store import Run
from tests.replay.makers import save_model
from tests.security.mutants import byte_mutants, json_bytes
from tests.security.targets import Target, run_files

CONFIG = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "rotary_pct": 0.25,
}
VOCABULARY = {"word" + str(i): i for i in range(20)} | {"[UNK]": 20}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 20,
            "content": "[UNK]",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "[UNK]"},
}
BPE: dict[str, Any] = {
    **TOKENIZER,
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+|\s"}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": None},
}
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "unk_token": "[UNK]"}


@cache
def checkpoint() -> dict[str, bytes]:
    """The files of a tiny checkpoint, its weights once as safetensors and once pickled."""
    with tempfile.TemporaryDirectory() as place:
        save_model(Path(place), seed=0)
        torch.save(load_file(Path(place) / "model.safetensors"), Path(place) / "pytorch_model.bin")
        return {file.name: file.read_bytes() for file in Path(place).iterdir()}


def read_tokens(folder: Path, content: bytes) -> None:
    for name, whole in run_files().items():
        (folder / name).write_bytes(whole)
    (folder / "tokenizer.json").write_bytes(content)
    token_texts(Run.open(folder), [0, 3, 20, 2**31 - 1])


def read_vocabulary(name: str) -> Any:
    def read(folder: Path, content: bytes) -> None:
        step = folder / "step1"
        step.mkdir()
        files = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "tokenizer_config.json": SETTINGS}
        for own, document in files.items():
            (step / own).write_text(json.dumps(document))
        (step / name).write_bytes(content)
        text_probe(FolderSource("made", {Checkpoint(1, "step1"): step}, ()))

    return read


def read_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    context_length(blank_model(folder))


def read_weights(name: str) -> Any:
    def read(folder: Path, content: bytes) -> None:
        (folder / "config.json").write_bytes(checkpoint()["config.json"])
        (folder / name).write_bytes(content)
        with contextlib.redirect_stderr(io.StringIO()):
            ModelLoader(torch.float32, torch.device("cpu")).load(folder)

    return read


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """The header is JSON behind its length."""
    whole = checkpoint()["model.safetensors"]
    size = struct.unpack("<Q", whole[:8])[0]
    header = draw(json_bytes(json.loads(whole[8 : 8 + size])))
    told = draw(st.sampled_from([len(header), len(header), len(header), 2**63, 10**8]))
    return draw(st.just(struct.pack("<Q", told) + header + whole[8 + size :]) | byte_mutants(whole))


def slow_targets() -> tuple[Target, ...]:
    """A hundred times slower than the others."""
    return (
        Target("tokens of a page", json_bytes(TOKENIZER) | json_bytes(BPE), read_tokens),
        Target("tokenizer.json", json_bytes(TOKENIZER) | json_bytes(BPE), read_vocabulary("tokenizer.json")),
        Target("tokenizer_config.json", json_bytes(SETTINGS), read_vocabulary("tokenizer_config.json")),
        Target("config.json", json_bytes(CONFIG), read_config),
        Target("model.safetensors", safetensors(), read_weights("model.safetensors")),
        Target("pytorch_model.bin", byte_mutants(checkpoint()["pytorch_model.bin"]), read_weights("pytorch_model.bin")),
    )
