"""Massive entries are found on the very text, random ones stand against them, and what is set is set, for a while."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_monitor.ablation.interventions import Entries, Rule, entries_set, others, read_document
from ma_monitor.errors import ConfigError
from ma_monitor.measure.layers import find_layers
from tests.ablation.models import CHANNEL, LAYERS, SPIKE, hooks, spiky_documents, spiky_llama, state, streams


def test_rules() -> None:
    hidden = torch.tensor([[1.0, -9.0, 2.0], [torch.nan, 3.0, -2.0]])
    assert Rule(2).indices(hidden).tolist() == [1, 4]
    assert Rule(9).indices(hidden).tolist() == [1, 4, 2, 5, 0], "of equals the first one, and no NaN"
    assert Rule(threshold=1.5).indices(hidden).tolist() == [1, 4], "the median of 1 2 2 3 9 is 2"
    assert Rule(threshold=100).indices(hidden).tolist() == []
    assert (str(Rule(2)), str(Rule(threshold=1.5))) == (
        "the 2 largest entries of each layer and document",
        "entries of at least 1.5 times the median of their layer and document",
    )


def test_rules_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 entry of a layer, got 0"):
        Rule(0)
    for ratio in (1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="a finite ratio to the median above 1"):
            Rule(threshold=ratio)


def test_a_document_is_read() -> None:
    model, ids = spiky_llama(), spiky_documents()[0]
    reading = read_document(model, torch.from_numpy(ids), Rule(2), draws=2, seed=0)
    expected = streams(model, ids)
    assert reading.entries.layer.tolist() == [1, 1, 2, 2, 3, 3]
    for layer, position, channel, value in zip(*vars(reading.entries).values(), strict=True):
        own = expected[layer].abs()
        assert float(own[position, channel]) in own.flatten().sort(descending=True).values[:2].tolist()
        assert value == float(expected[layer][position, channel])
    assert reading.token == 0
    spike = reading.entries.of_layer(2)
    assert (spike.position[0], spike.channel[0]) == (0, CHANNEL)
    assert spike.value[0] == pytest.approx(SPIKE, rel=0.01)
    np.testing.assert_allclose(reading.means, [h.mean(dim=0).numpy() for h in expected[1:]], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(reading.norms, [h.norm(dim=1).numpy() for h in expected], rtol=1e-5)
    for drawn in reading.random:
        assert drawn.layer.tolist() == reading.entries.layer.tolist()
        for layer in range(1, LAYERS + 1):
            own, massive = drawn.of_layer(layer), reading.entries.of_layer(layer)
            places = set(zip(own.position, own.channel, strict=True))
            assert len(places) == 2
            assert not places & set(zip(massive.position, massive.channel, strict=True))
            assert sorted(own.value) == sorted(float(expected[layer][place]) for place in places)


@settings(max_examples=30)
@given(size=st.integers(1, 30), data=st.data())
def test_others(size: int, data: st.DataObject) -> None:
    taken = np.array(data.draw(st.lists(st.integers(0, size - 1), unique=True)), np.int64)
    drawn = others(taken, size, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert len(set(drawn.tolist())) == len(drawn) == min(len(taken), size - len(taken))
    assert set(drawn.tolist()) <= set(range(size)) - set(taken.tolist())


def test_others_are_drawn_evenly(rng: np.random.Generator) -> None:
    counts = np.zeros(6)
    for _ in range(3000):
        counts[others(np.array([4, 1]), 6, rng)] += 1
    assert counts[[1, 4]].tolist() == [0, 0]
    np.testing.assert_allclose(counts[[0, 2, 3, 5]], 1500, atol=4 * np.sqrt(750))  # four standard deviations


def test_entries_are_set_while_open_and_only_then() -> None:
    model, ids = spiky_llama(), spiky_documents()[0]
    before, plain = state(model), streams(model, ids)
    layer, channel = np.array([2, 2, 3]), np.array([CHANNEL, 1, 0])
    places = Entries(layer, np.array([0, 3, 11]), channel, np.array([7.0, -2.0, 0.5]))
    with entries_set(find_layers(model), places):
        changed = streams(model, ids)
        short = streams(model, ids[:5])
    np.testing.assert_array_equal(changed[1], plain[1])
    expected = plain[2].clone()
    expected[0, CHANNEL], expected[3, 1] = 7.0, -2.0
    np.testing.assert_array_equal(changed[2], expected)
    assert float(changed[3][11, 0]) == 0.5
    assert float(short[2][0, CHANNEL]) == 7.0, "a shorter forward has the places that it has"
    assert hooks(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for was, now in zip(plain, streams(model, ids), strict=True):
        np.testing.assert_array_equal(was, now)


def test_hooks_go_when_a_forward_fails() -> None:
    model, ids = spiky_llama(), spiky_documents()[0]
    places = Entries(np.array([1]), np.array([0]), np.array([99]), np.array([0.0]))
    with pytest.raises(IndexError), entries_set(find_layers(model), places):
        streams(model, ids)
    assert hooks(model) == 0
