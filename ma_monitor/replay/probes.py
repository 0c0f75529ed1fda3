"""What a replay measures: text in the tokens of the source's own model, and the paper's corpus."""

from __future__ import annotations

import bisect
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import MaMonitorError, MissingExtraError, SourceError, is_fault
from ma_monitor.measure.layers import context_length
from ma_monitor.measure.probe import COUNT, LENGTH, Probe
from ma_monitor.replay.models import blank_model
from ma_monitor.replay.sources import Source

CORPUS = "togethercomputer/RedPajama-Data-1T-Sample"
CORPUS_LENGTH = 2048
"""Tokens of a sequence in the paper's protocol for Pythia."""
SEED, DRAWN = 1, 500
"""Documents are drawn as in the code that the paper builds on (Sun et al. 2024): numpy's seed, and how many."""


def text_probe(source: Source, texts: Iterable[str] | None = None, name: str = "texts") -> Probe:
    """A probe in the source's own tokens, no longer than its model's context.

    Args:
        source: Whose tokenizer and context count.
        texts: Documents; None for the built-in passages.
        name: Where the documents came from.

    Raises:
        ConfigError: If the texts are too short.
        SourceError: If the source has no tokenizer that can be read.
    """
    tokenizer, context = _reading(source)
    length = min(LENGTH, context)
    with _explained(source):
        if texts is None:
            return Probe.builtin(tokenizer, length=length)
        return Probe.from_texts(texts, tokenizer, length=length, source=name)


def text_documents(source: Source, texts: Iterable[str] | None = None) -> list[NDArray[np.int64]]:
    """Documents in the source's own tokens ``[S]`` each, without special tokens, cut to at most ``LENGTH`` tokens.

    Args:
        source: Whose tokenizer and context count.
        texts: Documents, of which those of fewer than two tokens are left out; None for the built-in passages.

    Raises:
        SourceError: If the source has no tokenizer that can be read.
    """
    tokenizer, context = _reading(source)
    if texts is None:
        passages = resources.files("ma_monitor.measure").joinpath("passages.txt")
        texts = passages.read_text(encoding="utf-8").split("\n---\n")
    each = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
    documents = [np.array(ids[: min(LENGTH, context)], np.int64) for ids in each]
    return [document for document in documents if len(document) >= 2]


def paper_probe(source: Source) -> Probe:
    """The paper's probe: 10 sequences of 2048 tokens of RedPajama-Data-1T-Sample, without a BOS token.

    Documents are drawn from the whole corpus, and only those are downloaded.

    Raises:
        MissingExtraError: If pyarrow is not installed.
        SourceError: If the source has no tokenizer, or the corpus cannot be had; says what to measure instead.
    """
    tokenizer, context = _reading(source)
    length = min(CORPUS_LENGTH, context)
    texts, tokens = [], 0
    for text in corpus_documents():
        texts.append(text)
        with _explained(source):
            tokens += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokens > COUNT * length:
            break
    return Probe.from_texts(texts, tokenizer, length=length, source=f"{CORPUS}, numpy seed {SEED}, no BOS")


def corpus_documents() -> Iterator[str]:
    """The corpus's documents in the order in which the paper's protocol draws them.

    Of the parquet files on the Hub only their ends, which say what is where, and the row groups of the documents that
    are asked for are read.

    Raises:
        MissingExtraError: If pyarrow is not installed.
        SourceError: If the corpus cannot be had.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("pyarrow", "report") from error
    from huggingface_hub import HfFileSystem

    try:
        hub = HfFileSystem(skip_instance_cache=True)
        # The Hub keeps a parquet copy of corpora that are in another format under a reference of its own.
        paths = sorted(hub.glob(f"datasets/{CORPUS}@refs/convert/parquet/**/*.parquet"))
        files = [ParquetFile(hub.open(path)) for path in paths]
        groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        ends = list(itertools.accumulate(file.metadata.row_group(group).num_rows for file, group in groups))
        if not ends:
            raise FileNotFoundError("no parquet files")
        for row in np.random.RandomState(SEED).choice(ends[-1], min(DRAWN, ends[-1]), replace=False):
            number = bisect.bisect_right(ends, row)
            file, group = groups[number]
            texts = file.read_row_group(group, columns=["text"])["text"]
            yield str(texts[len(texts) - (ends[number] - int(row))].as_py())
    except Exception as error:  # the client's, its HTTP library's and pyarrow's
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"the paper's corpus {CORPUS} cannot be had ({type(error).__name__}: {reason}); give your own text by "
            "--probe-text or ids by --probe-ids, or measure the built-in passages (--probe builtin)"
        ) from error


def _reading(source: Source) -> tuple[Any, int]:
    """A source's tokenizer, and how many tokens its model reads at most."""
    from transformers import AutoTokenizer

    last = source.checkpoints[-1]
    with tempfile.TemporaryDirectory(prefix="ma_monitor-") as scratch:
        context = context_length(blank_model(source.fetch(last, Path(scratch), "record"))) or CORPUS_LENGTH
        folder = source.fetch(last, Path(scratch), "tokenizer")
        with _explained(source):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), context


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Says whose tokenizer failed."""
    try:
        yield
    except BaseException as error:  # every kind of tokenizer fails in its own way
        if isinstance(error, MaMonitorError) or not is_fault(error):
            raise
        raise SourceError(
            f"the tokenizer of {source.name} cannot be read ({type(error).__name__}: {error}); give --probe-ids"
        ) from error
