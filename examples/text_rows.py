"""Text for `train_pythia_like.py`: found on this machine or streamed from the Hub, and cut into rows of tokens."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
DOCUMENTATION = (".rst", ".md", ".txt")
DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)
TELLING = 100
"""Characters of the shortest docstring that is taken."""
SMALLEST, LARGEST = 1_000, 300_000
"""Bytes of a file that is read: what is smaller says little, what is larger is mostly tables."""
HELD_OUT = 30
"""Documents kept from the training, at most."""
HELD_OUT_ROWS = 64
SHUFFLED = 1_000
"""Documents of a stream among which the order is drawn."""


class Text(NamedTuple):
    """A tokenizer, rows to train on (``input_ids`` and ``labels``), and rows of documents that are not trained on."""

    tokenizer: PreTrainedTokenizerBase
    train: Any
    held_out: list[dict[str, Any]]


def local_text(megabytes: float, length: int, vocabulary: int) -> Text:
    """Documentation found on this machine, with a tokenizer trained on it.

    Args:
        megabytes: How much text at most, in millions of characters.
        length: Tokens of a row.
        vocabulary: Tokens of the tokenizer.
    """
    documents = list(local_documents(megabytes))
    tokenizer = train_tokenizer(documents, vocabulary)
    held_out = min(HELD_OUT, len(documents) // 4)
    train = [_row(row) for row in rows_of_tokens(documents[held_out:], tokenizer, length)]
    return Text(tokenizer, train, _spread(documents[:held_out], tokenizer, length))


def hub_text(
    dataset: str, column: str | None, tokenizer: str | None, megabytes: float, length: int, vocabulary: int, seed: int
) -> Text:
    """A data set of the Hub (or a folder of text files), streamed: nothing is stored on the disk.

    Args:
        dataset: Its name, with ``:`` and a configuration where it has several, such as ``allenai/c4:en``.
        column: The column that holds the text; None to take ``text``, else the first one that holds a string.
        tokenizer: Name of a published tokenizer; None to train one.
        megabytes: Text that a tokenizer is trained on, in millions of characters.
        length: Tokens of a row.
        vocabulary: Tokens of a tokenizer that is trained.
        seed: Of the order of the documents.
    """
    from datasets import load_dataset  # takes seconds, and only a stream needs it

    name, _, configuration = dataset.partition(":")
    splits = load_dataset(name, configuration or None, streaming=True)
    stream = splits["train"] if "train" in splits else next(iter(splits.values()))
    example = next(iter(stream))
    column = column or text_column(example)
    if column not in example:
        raise SystemExit(f"--text-column must be a column of {dataset}, got {column}; it has {', '.join(example)}")
    stream = stream.select_columns([column])
    learned: PreTrainedTokenizerBase
    if tokenizer is None:
        learned = train_tokenizer(_capped((row[column] for row in stream), megabytes), vocabulary)
    else:
        learned = AutoTokenizer.from_pretrained(tokenizer)

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        rows = rows_of_tokens(batch[column], learned, length)
        return {"input_ids": rows, "labels": rows}

    train = stream.skip(HELD_OUT).shuffle(seed=seed, buffer_size=SHUFFLED)
    train = train.map(pack, batched=True, batch_size=SHUFFLED, remove_columns=[column])
    held_out = [row[column] for row in stream.take(HELD_OUT)]
    return Text(learned, train, _spread(held_out, learned, length))


def local_documents(megabytes: float) -> Iterator[str]:
    """Docstrings and documentation files of the standard library and of installed packages, each text once.

    The order mixes all packages and is the same every time: that of a hash of each file's path.
    """
    return _capped(_each_once(map(_documentation, _files())), megabytes)


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, the kind that Pythia has; no text is unknown to it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def rows_of_tokens(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Documents joined and cut into rows, each led by the end-of-text token.

    That token is what massive activations gather on: it is the same in every row, so attention has somewhere to go
    when there is nothing to attend to.
    """
    end = tokenizer.eos_token_id
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    stream = [token for document in encoded for token in (end, *document)]
    step = length - 1
    return [[end, *stream[start : start + step]] for start in range(0, len(stream) - step + 1, step)]


def text_column(example: dict[str, Any]) -> str:
    """The column that holds the text."""
    columns = [name for name, value in example.items() if isinstance(value, str)]
    if not columns:
        raise SystemExit(f"no column of the data set holds text; it has {', '.join(example)}")
    return "text" if "text" in columns else columns[0]


def _files() -> Iterator[Path]:
    found: dict[bytes, Path] = {}
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for folder, subfolders, names in os.walk(root):
            # Outside a virtual environment the packages lie inside the standard library's folder.
            subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
            for name in names:
                if name.endswith((".py", *DOCUMENTATION)):
                    path = Path(folder, name)
                    found[hashlib.sha256(str(path.relative_to(root)).encode()).digest()] = path
    for _, path in sorted(found.items()):
        if SMALLEST < path.stat().st_size < LARGEST:
            yield path


def _documentation(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        docstrings = (docstring.strip() for docstring in DOCSTRING.findall(text))
        text = "\n\n".join(docstring for docstring in docstrings if len(docstring) >= TELLING)
    return text if len(text) > SMALLEST else ""


def _each_once(texts: Iterable[str]) -> Iterator[str]:
    seen = {""}
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _capped(texts: Iterable[str], megabytes: float) -> Iterator[str]:
    left = megabytes * 1e6
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return


def _spread(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """Rows from all over the documents, not only from the first."""
    rows = rows_of_tokens(documents, tokenizer, length)
    return [_row(row) for row in islice(rows, 0, None, max(1, len(rows) // HELD_OUT_ROWS))]


def _row(tokens: list[int]) -> dict[str, Any]:
    ids = torch.tensor(tokens)
    return {"input_ids": ids, "labels": ids}
