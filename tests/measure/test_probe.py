"""Probes: how they are cut, told apart, and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.errors import ConfigError
from ma_monitor.measure.probe import Probe


class Words:
    """A tokenizer that gives one id a word."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        assert kwargs["add_special_tokens"] is False
        return {"input_ids": [len(word) for word in text.split()]}


def test_texts_are_joined_tokenised_once_and_cut() -> None:
    probe = Probe.from_texts(["a bb ccc dddd", "eeeee ffffff"], Words(), count=2, length=512)
    assert probe.ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    probe = Probe.from_texts(["a bb ccc dddd", "eeeee ffffff"], Words(), count=2, length=2)
    assert probe.ids.tolist() == [[1, 2], [3, 4]]


def test_the_builtin_passages_are_ten_sequences() -> None:
    probe = Probe.builtin(Words())
    assert probe.ids.shape[0] == 10
    assert probe.ids.shape[1] >= 100
    assert probe.source == "built-in passages"


def test_rows_of_one_length_are_taken_as_they_are() -> None:
    rows = [{"input_ids": [i, 1, 2, 3]} for i in range(20)]
    probe = Probe.from_rows(rows, count=3, length=3)
    assert probe.ids.tolist() == [[0, 1, 2], [1, 1, 2], [2, 1, 2]]


def test_ragged_rows_are_joined_without_their_padding() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 0], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [4, 5], "attention_mask": [1, 1]},
        {"input_ids": [6, 7, 8, 9], "attention_mask": [1, 1, 1, 1]},
    ]
    assert Probe.from_rows(rows, count=2, length=4).ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_reading_rows_stops_when_there_are_enough() -> None:
    def rows() -> Any:
        yield {"input_ids": [1, 2]}
        yield {"input_ids": [3, 4]}
        raise AssertionError("a third row was read")

    assert Probe.from_rows(rows(), count=2).ids.tolist() == [[1, 2], [3, 4]]


@given(st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=2), min_size=1, max_size=4))
def test_the_hash_tells_ids_and_shapes_apart(ids: list[list[int]]) -> None:
    probe = Probe.from_ids(ids)
    assert probe.hash == Probe.from_ids(np.array(ids, dtype=np.int32), source="elsewhere").hash
    changed = np.array(ids)
    changed[0, 0] += 1
    assert probe.hash != Probe.from_ids(changed).hash
    if len(ids) == 4:
        assert probe.hash != Probe.from_ids(np.reshape(ids, (2, 4))).hash


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3]], "rectangular"),
        ([], r"got shape \(0,\)"),
        ([[]], r"got shape \(1, 0\)"),
        ([[1]], "tokens >= 2"),
        ([1, 2], r"got shape \(2,\)"),
        ([[0.5, 1.5]], "whole numbers, got float64"),
        ([[-1, 2]], "must not be negative, got -1"),
    ],
)
def test_refuses_bad_ids(ids: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Probe.from_ids(ids)


def test_refuses_texts_that_are_too_short() -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens for each of its 10 sequences, got 1 tokens"):
        Probe.from_texts(["word"], Words())


def test_refuses_one_string_for_a_list_of_texts() -> None:
    with pytest.raises(ConfigError, match="a list of documents, got one string"):
        Probe.from_texts("one string", Words())


def test_refuses_rows_without_ids() -> None:
    with pytest.raises(ConfigError, match="must hold `input_ids`"):
        Probe.from_rows([{"text": "a"}])


def test_refuses_a_model_that_cannot_read_it() -> None:
    probe = Probe.from_ids([[1, 500, 3]])
    probe.check(501, 3)
    probe.check(None, None)
    with pytest.raises(ConfigError, match="below the model's vocabulary of 500, got 500"):
        probe.check(500, 3)
    with pytest.raises(ConfigError, match="context of 2 tokens, got 3"):
        probe.check(501, 2)
