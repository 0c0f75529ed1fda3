"""The probe: the fixed token sequences that are measured every time."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ma_monitor.errors import ConfigError
from ma_monitor.runs.records import ProbeInfo

COUNT = 10
"""Sequences of a probe (paper, Eq. 7)."""
LENGTH = 512
"""Longest sequence of a probe that nobody specified, in tokens."""
_MIN_LENGTH = 2
_ROWS_LOOKED_AT = 10_000


@dataclass(frozen=True, eq=False)
class Probe:
    """A fixed set of token sequences.

    Attributes:
        ids: Token ids, ``[n, S]`` int64.
        source: Where they came from, in words.
    """

    ids: NDArray[np.int64]
    source: str

    @classmethod
    def from_ids(cls, ids: ArrayLike, source: str = "token ids") -> Probe:
        """A probe of these token ids, ``[n, S]``.

        Raises:
            ConfigError: If the ids are not a rectangular array of whole, non-negative numbers of at least two tokens.
        """
        try:
            array = np.asarray(ids)
        except ValueError as ragged:
            raise ConfigError(
                "probe ids must be rectangular [sequences, tokens], got rows of unequal length"
            ) from ragged
        if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < _MIN_LENGTH:
            raise ConfigError(
                f"probe ids must have shape [sequences >= 1, tokens >= {_MIN_LENGTH}], got shape {array.shape}; "
                "cut your sequences to one length"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise ConfigError(f"probe ids must be whole numbers, got {array.dtype}")
        if array.min() < 0:
            raise ConfigError(f"probe ids must not be negative, got {array.min()}")
        return cls(np.ascontiguousarray(array, dtype=np.int64), source)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: Any, *, count: int = COUNT, length: int = LENGTH, source: str = "texts"
    ) -> Probe:
        """A probe of ``count`` sequences cut from these texts.

        As in Sun et al. (2024) the texts are joined by blank lines, tokenised once without special tokens, and cut.

        Args:
            texts: Documents.
            tokenizer: A transformers tokenizer, or anything callable that returns ``input_ids``.
            count: Sequences.
            length: Tokens of each, fewer where the texts are short.
            source: Where the texts came from, in words.

        Raises:
            ConfigError: If the texts hold fewer than two tokens a sequence, or are one string.
        """
        if isinstance(texts, str):
            raise ConfigError("`texts` must be a list of documents, got one string; put it into a list")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        text = "\n\n".join(texts)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return cls._cut([list(ids)], count, length, source)

    @classmethod
    def builtin(cls, tokenizer: Any, *, length: int = LENGTH) -> Probe:
        """A probe of the ten passages that come with the package."""
        text = resources.files("ma_monitor.measure").joinpath("passages.txt").read_text(encoding="utf-8")
        return cls.from_texts(text.split("\n---\n"), tokenizer, length=length, source="built-in passages")

    @classmethod
    def from_rows(cls, rows: Iterable[Any], *, count: int = COUNT, length: int = LENGTH, source: str = "rows") -> Probe:
        """A probe of the first rows of a tokenised dataset.

        Rows of one length (packed pretraining data) are taken as they are, so that the probe starts where training
        rows start; others are joined and cut.

        Args:
            rows: Mappings with ``input_ids`` and, where padded, ``attention_mask``.
            count: Sequences.
            length: Tokens of each, fewer where the rows are short.
            source: Where the rows came from, in words.

        Raises:
            ConfigError: If the rows have no ``input_ids`` or hold fewer than two tokens a sequence.
        """
        sequences: list[list[int]] = []
        for row in itertools.islice(rows, _ROWS_LOOKED_AT):
            sequences.append(_row_ids(row))
            one_length = len({len(s) for s in sequences}) == 1
            if len(sequences) >= count and (one_length or sum(map(len, sequences)) >= count * length):
                break
        return cls._cut(sequences, count, length, source)

    @classmethod
    def _cut(cls, sequences: Sequence[list[int]], count: int, length: int, source: str) -> Probe:
        if len(sequences) == count and len({len(s) for s in sequences}) == 1:
            return cls.from_ids([s[:length] for s in sequences], source)
        joined = list(itertools.chain.from_iterable(sequences))
        length = min(length, len(joined) // count)
        if length < _MIN_LENGTH:
            raise ConfigError(
                f"a probe needs at least {_MIN_LENGTH} tokens for each of its {count} sequences, "
                f"got {len(joined)} tokens from {source}; pass longer texts or a smaller `count`"
            )
        return cls.from_ids(np.reshape(joined[: count * length], (count, length)), source)

    @property
    def hash(self) -> str:
        """SHA-256 of the shape and the ids: what a run stores and compares."""
        digest = hashlib.sha256(repr(self.ids.shape).encode())
        digest.update(self.ids.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def info(self) -> ProbeInfo:
        """What a run stores of the probe."""
        return ProbeInfo(self.hash, self.ids.shape[0], self.ids.shape[1], self.source)

    def check(self, vocabulary: int | None, context: int | None) -> None:
        """Refuses a model that cannot read the probe.

        Raises:
            ConfigError: If an id is not in the vocabulary, or the sequences are longer than the context.
        """
        if vocabulary is not None and self.ids.max() >= vocabulary:
            raise ConfigError(
                f"every probe id must be below the model's vocabulary of {vocabulary}, got {self.ids.max()}; "
                "make the probe with the model's own tokenizer"
            )
        if context is not None and self.ids.shape[1] > context:
            raise ConfigError(
                f"probe sequences must fit the model's context of {context} tokens, got {self.ids.shape[1]}; cut them"
            )


def _row_ids(row: Any) -> list[int]:
    """Token ids of a dataset row without its padding."""
    try:
        ids = np.asarray(row["input_ids"]).ravel()
    except (KeyError, TypeError, IndexError) as missing:
        raise ConfigError("the rows of a probe must hold `input_ids`; tokenise the dataset first") from missing
    mask = row.get("attention_mask") if hasattr(row, "get") else None
    if mask is not None:
        ids = ids[np.asarray(mask).ravel().astype(bool)]
    return [int(i) for i in ids]
