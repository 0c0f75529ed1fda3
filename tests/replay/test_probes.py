"""Probes in a source's own tokens, and the paper's corpus from a Hub on the loopback interface."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from ma_monitor.errors import MissingExtraError, SourceError
from ma_monitor.replay.probes import CORPUS, DRAWN, SEED, corpus_documents, paper_probe, text_probe
from ma_monitor.replay.sources import Checkpoint, FolderSource
from tests.replay.loopback import LoopbackHub

CONVERTED = "refs/convert/parquet"
ROWS = (700, 500)
"""Documents in each of the corpus's two files."""
DOCUMENTS = [" ".join(f"w{(7 * i + j) % 97}" for j in range(5 + i % 40)) for i in range(sum(ROWS))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["?", *(f"w{i}" for i in range(97))])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="?")


@pytest.fixture
def source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> FolderSource:
    """A source of which only tokenizer and context are asked."""
    folder = tmp_path / "step0"
    tokenizer.save_pretrained(folder)
    GPTNeoXConfig(
        vocab_size=98,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=128,
    ).save_pretrained(folder)

    return FolderSource("source", {Checkpoint(0, "step0"): folder}, ())


@pytest.fixture
def corpus(hub: LoopbackHub) -> LoopbackHub:
    """The corpus as the Hub converts it: two parquet files of several row groups each."""
    files, start = {}, 0
    for number, rows in enumerate(ROWS):
        file = io.BytesIO()
        table = pa.table({"meta": ["{}"] * rows, "text": DOCUMENTS[start : start + rows]})
        pq.write_table(table, file, row_group_size=90)
        files[f"default/train/{number:04d}.parquet"] = file.getvalue()
        start += rows
    hub.repos[CORPUS] = {"main": {"README.md": b"x"}, CONVERTED: files}
    return hub


@pytest.mark.usefixtures("corpus")
def test_documents_come_in_the_order_of_the_papers_draw() -> None:
    np.random.seed(SEED)
    drawn = np.random.choice(sum(ROWS), DRAWN, replace=False)
    assert list(corpus_documents()) == [DOCUMENTS[i] for i in drawn]


@pytest.mark.usefixtures("corpus")
def test_the_papers_probe_is_the_beginning_of_all_drawn_documents(
    source: FolderSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    probe = paper_probe(source)

    everything: Any = tokenizer("\n\n".join(corpus_documents()), add_special_tokens=False)["input_ids"]
    assert np.array_equal(probe.ids, np.reshape(everything[: 10 * 128], (10, 128)))
    assert probe.source == "togethercomputer/RedPajama-Data-1T-Sample, numpy seed 1, no BOS"


def test_only_what_was_drawn_is_downloaded(corpus: LoopbackHub, source: FolderSource) -> None:
    paper_probe(source)
    wanted = [request for request in corpus.requests if "/resolve/" in request and request.startswith("GET")]
    assert 2 <= len(wanted) < 2 + 4 * 90


def test_a_corpus_that_cannot_be_had_names_the_alternatives(
    hub: LoopbackHub, source: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match="cannot be had .*--probe-text or ids by --probe-ids, or .*--probe builtin"):
        paper_probe(source)
    hub.repos[CORPUS] = {"main": {"README.md": b"x"}, CONVERTED: {"README.md": b"x"}}
    with pytest.raises(SourceError, match=r"cannot be had \(FileNotFoundError: no parquet files\)"):
        paper_probe(source)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match="pyarrow is not installed"):
        paper_probe(source)


def test_text_and_passages_are_cut_to_the_context(source: FolderSource) -> None:
    assert text_probe(source).ids.shape == (10, 128)
    own = text_probe(source, DOCUMENTS[:200], "mine.txt")
    assert (own.ids.shape, own.source) == ((10, 128), "mine.txt")


def test_a_tokenizer_that_cannot_be_read_is_said_so(source: FolderSource) -> None:
    (source.fetch(source.checkpoints[0], Path()) / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SourceError, match=r"the tokenizer of source cannot be read .* give --probe-ids"):
        text_probe(source)
