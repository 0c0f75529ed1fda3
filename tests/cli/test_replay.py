"""``ma-monitor replay`` of tiny random checkpoints in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.runs.store import Run
from tests.cli.conftest import Call

STEPS = (0, 10, 25)
LAYERS, VOCABULARY, CONTEXT = 2, 50, 24
WORDS = "the cat sat on a mat and the dog ran far away from it while rain fell on grey hills".split()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a model with a short context, and a tokenizer of whole words; not to be changed."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("saved")
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    for step in STEPS:
        torch.manual_seed(step)
        GPTNeoXForCausalLM(config).save_pretrained(root / f"checkpoint-{step}")
    vocabulary = {word: number for number, word in enumerate(["?", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(root)
    return root


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Token ids of three sequences in a file."""
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(7).integers(0, VOCABULARY, (3, 12)))
    return path


def test_ids_then_again(call: Call, saved: Path, ids: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = call("replay", saved, "--out", run, "--probe-ids", ids, "--batch-size", 2, "--json")
    assert result.document == {
        "run": str(run),
        "model": saved.name,
        "measured": list(STEPS),
        "skipped": [],
        "problems": [],
    }
    opened = Run.open(run)
    assert list(opened.steps) == list(STEPS)
    assert (opened.meta.model.layers, opened.meta.probe.sequences, opened.meta.probe.length) == (LAYERS, 3, 12)
    assert (opened.meta.precision, opened.meta.ratio, opened.meta.probe.source) == (
        "float32",
        "ratio_of_means",
        "ids.npy",
    )
    again = call("replay", saved, "--out", run, "--probe-ids", ids)
    assert again.code == 0
    assert again.out.splitlines()[0] == f"{run}: 0 checkpoints of {saved.name} measured, 3 measured before"
    assert again.out.splitlines()[1] == f"next: ma-monitor fit {run}"


def test_options_reach_the_run(call: Call, saved: Path, ids: Path, tmp_path: Path) -> None:
    options = ["--dtype", "bfloat16", "--device", "cpu", "--ratio", "mean_of_ratios"]
    assert call("replay", saved, "--out", tmp_path / "run", "--probe-ids", ids, *options).code == 0
    meta = Run.open(tmp_path / "run").meta
    assert (meta.precision, meta.ratio) == ("bfloat16", "mean_of_ratios")


def test_text_is_cut_to_the_context(call: Call, saved: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(WORDS) for _ in range(20)))
    assert call("replay", saved, "--out", tmp_path / "run", "--probe-text", text).code == 0
    probe = Run.open(tmp_path / "run").meta.probe
    assert (probe.sequences, probe.length, probe.source) == (10, CONTEXT, "text.txt")


def test_builtin_passages_are_the_default(call: Call, saved: Path, tmp_path: Path) -> None:
    assert call("replay", saved, "--out", tmp_path / "run").code == 0
    probe = Run.open(tmp_path / "run").meta.probe
    assert (probe.sequences, probe.length, probe.source) == (10, CONTEXT, "built-in passages")


def test_what_cannot_be_measured_is_named(call: Call, saved: Path, ids: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(saved, tmp_path / "broken"))
    (broken / "checkpoint-10" / "model.safetensors").write_bytes(b"no weights")
    (broken / "checkpoint-25" / "config.json").unlink()
    result = call("replay", broken, "--out", tmp_path / "run", "--probe-ids", ids, "--json")
    assert result.code == 3
    document = json.loads(result.out)
    assert document["measured"] == [0]
    assert [problem.split(" left out: ")[0] for problem in document["problems"]] == ["checkpoint-25", "checkpoint-10"]
    named = [line for line in result.err.splitlines() if line.startswith("ma-monitor: ")]
    assert named == [f"ma-monitor: {' '.join(problem.split())}" for problem in document["problems"]]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 4)), "probe ids must be whole numbers, got float64"),
        (np.array([[1, 2], [3]], dtype=object), "token ids must be one array"),
        (np.zeros(5, dtype=int), "got shape (5,)"),
        (np.array([[-1, 2]]), "probe ids must not be negative, got -1"),
        (np.array([[0, VOCABULARY]]), f"below the model's vocabulary of {VOCABULARY}, got {VOCABULARY}"),
        (np.zeros((1, CONTEXT + 1), dtype=int), f"context of {CONTEXT} tokens"),
    ],
)
def test_ids_that_break_a_rule(
    refused: Callable[..., str],
    saved: Path,
    tmp_path: Path,
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    words: str,
) -> None:
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    assert words in refused("replay", saved, "--out", tmp_path / "run", "--probe-ids", tmp_path / "bad.npy")
    assert not (tmp_path / "run" / "run.json").exists()


def test_files_that_cannot_be_read(refused: Callable[..., str], saved: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run"]
    assert "No such file" in refused("replay", saved, *out, "--probe-ids", tmp_path / "absent.npy")
    assert "No such file" in refused("replay", saved, *out, "--probe-text", tmp_path / "absent.txt")
    np.savez(tmp_path / "several.npz", a=np.zeros(1), b=np.zeros(1))
    assert "probe ids must have shape" in refused("replay", saved, *out, "--probe-ids", tmp_path / "several.npz")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "needs at least" in refused("replay", saved, *out, "--probe-text", tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("the cat\n")
    assert "needs at least 2 tokens" in refused("replay", saved, *out, "--probe-text", tmp_path / "short.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "must be UTF-8" in refused("replay", saved, *out, "--probe-text", tmp_path / "latin.txt")


def test_sources_that_are_none(refused: Callable[..., str], saved: Path, ids: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run", "--probe-ids", ids]
    assert "existing folder or a Hub id" in refused("replay", tmp_path / "absent" / "folder", *out)
    (tmp_path / "nothing").mkdir()
    assert "holds none" in refused("replay", tmp_path / "nothing", *out)
    assert "`dtype` must be auto, float32" in refused("replay", saved, *out, "--dtype", "int8")
    assert "`device` must be one that torch finds" in refused("replay", saved, *out, "--device", "abacus")


def test_a_source_without_a_tokenizer(
    call: Call, refused: Callable[..., str], saved: Path, ids: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(saved, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert "needs the model's tokenizer" in refused("replay", bare, "--out", tmp_path / "run")
    (bare / "tokenizer.json").write_text(json.dumps({"version": "none"}))
    assert "give --probe-ids" in refused("replay", bare, "--out", tmp_path / "run")
    assert call("replay", bare, "--out", tmp_path / "run", "--probe-ids", ids).code == 0


def test_another_probe_is_another_run(
    call: Call, refused: Callable[..., str], saved: Path, ids: Path, tmp_path: Path
) -> None:
    assert call("replay", saved, "--out", tmp_path / "run", "--probe-ids", ids).code == 0
    np.save(ids, np.zeros((3, 12), dtype=int))
    assert "probe hash was" in refused("replay", saved, "--out", tmp_path / "run", "--probe-ids", ids)


def test_shards_then_merge_is_one_replay(call: Call, saved: Path, ids: Path, tmp_path: Path) -> None:
    ask = ["--probe-ids", ids, "--json"]
    assert call("replay", saved, "--out", tmp_path / "alone", *ask).code == 0
    shards = [tmp_path / f"shard-{i}" for i in range(2)]
    measured = [call("replay", saved, "--out", s, "--shard", f"{i}/2", *ask) for i, s in enumerate(shards)]
    assert [result.document["measured"] for result in measured] == [[0, 25], [10]]
    assert call("merge", *shards, "--out", tmp_path / "joined", "--json").document["steps"] == 3
    for name in ("run.json", "measurements.bin", "fits.json", "forecast.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "1/0", "0/9999999999"])
def test_what_is_no_shard(refused: Callable[..., str], saved: Path, tmp_path: Path, shard: str) -> None:
    words = refused("replay", saved, "--out", tmp_path / "run", f"--shard={shard}")
    assert f"must be one of 0/N to (N-1)/N, got '{shard}'" in words


def test_force_measures_anew_with_another_probe(call: Call, saved: Path, ids: Path, tmp_path: Path) -> None:
    assert call("replay", saved, "--out", tmp_path / "run").code == 0
    again = call("replay", saved, "--out", tmp_path / "run", "--probe-ids", ids, "--force", "--json")
    assert (again.document["measured"], again.document["skipped"]) == (list(STEPS), [])


def test_the_papers_probe_without_a_network_names_what_else_there_is(
    refused: Callable[..., str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = refused("replay", saved, "--out", tmp_path / "run", "--probe", "paper")
    assert "cannot be had" in words
    assert "--probe-text" in words


def test_a_dry_run_of_a_folder(call: Call, saved: Path, tmp_path: Path) -> None:
    result = call("replay", saved, "--out", tmp_path / "run", "--dry-run", "--shard", "0/2")
    size = (saved / "checkpoint-0" / "model.safetensors").stat().st_size
    lines = result.out.splitlines()
    assert (result.code, lines[0].split()) == (0, ["step", "name", "MB"])
    assert [line.split()[:2] for line in lines[1:-1]] == [["0", "checkpoint-0"], ["25", "checkpoint-25"]]
    unknown = "time unknown until this run has measured something; 0 held"
    assert lines[-1] == f"2 checkpoints to measure, {2 * size / 1e9:.3g} GB, {unknown}"
    assert not (tmp_path / "run").exists()
