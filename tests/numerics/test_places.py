"""Where entries sit, since when, what counts as massive, and where a massive token emerges: against plain loops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ma_monitor.numerics.places import (
    DELIMITER,
    FIRST,
    OTHER,
    candidate_since,
    emergence_layer,
    is_delimiter,
    kinds_of_token,
    massive_in_sequences,
    massive_on_average,
    most_common,
    share_at,
    since,
    spread_of,
)

STEPS = np.array([0, 1, 2, 4, 8, 16])
PLACES = hnp.arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(-1, 3))


@given(PLACES)
def test_the_most_common_place_and_its_share(values: np.ndarray) -> None:
    usual = most_common(values)
    for row, place, share in zip(values.tolist(), usual, share_at(values, usual), strict=True):
        times = Counter(row)
        assert place == min(value for value, count in times.items() if count == max(times.values()))
        assert share == times[place] / len(row)


def test_places_as_large_as_they_come_cost_no_memory() -> None:
    huge = np.array([[2**31 - 1, 5, 2**31 - 1]], dtype=np.int32)
    assert most_common(huge).tolist() == [2**31 - 1]


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_since(holds: list[bool]) -> None:
    expected = next((int(step) for k, step in enumerate(STEPS) if all(holds[k:])), None)
    assert since(STEPS, np.array(holds)) == expected


@given(PLACES)
def test_spread_over_layers_and_sequences(channel: np.ndarray) -> None:
    position = np.random.default_rng(channel.size).integers(-1, 2, channel.shape)
    pairs = [(c, p) for c, p in zip(channel.ravel(), position.ravel(), strict=True) if c >= 0 and p >= 0]
    spread = spread_of(channel, position)
    if not pairs:
        assert spread is None
    else:
        most = Counter(c for c, _ in pairs).most_common(1)[0][1]
        assert spread == (most / len(pairs), sum(p == 0 for _, p in pairs) / len(pairs))


def test_spread_is_whole_where_all_agree_and_the_numbers_of_channels_do_not_matter() -> None:
    channel, position = np.full((3, 4), 7), np.zeros((3, 4), dtype=int)
    assert spread_of(channel, position) == (1, 1)
    channel[0, :2], position[2] = 3, 5
    assert spread_of(channel, position) == (10 / 12, 8 / 12) == spread_of(100 - channel, position)
    assert spread_of(channel * 0 - 1, position) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [(".", True), (" .", True), ("▁.", True), ("\n", True), ("\n\n", True), (" \n", True), ("\r\n", True)]
    + [(text, False) for text in ("", " ", ",", "...", "a.", ".\n", "of", "\t")],
)
def test_delimiters(text: str, expected: bool) -> None:
    assert is_delimiter(text) is expected


def test_kinds_of_tokens() -> None:
    position, token = np.array([[0, 0, 3, 9, -1, 4, 7]]), np.array([[13, 5, 13, 5, 13, -1, 0]])
    kinds = kinds_of_token(position, token, np.array([13]))
    assert kinds.tolist() == [[FIRST, FIRST, DELIMITER, OTHER, -1, -1, OTHER]]


@pytest.mark.parametrize(
    ("top", "median", "massive"),
    [
        (101.0, 0.1, True),
        (-125.0, 0.125, True),  # at least 1000 times
        (100.0, 0.01, False),  # larger than 100, not at least
        (500.0, 0.501, False),
        (math.inf, 1.0, True),
        (math.inf, math.inf, True),
        (math.nan, 0.1, False),
        (500.0, math.nan, False),
        (500.0, 0.0, True),
    ],
)
def test_what_counts_as_massive(top: float, median: float, massive: bool) -> None:
    tops, medians = np.full((2, 3), top), np.full((2, 3), median)
    assert (massive_in_sequences(tops, medians) == massive).all()
    assert massive_on_average(tops, medians).tolist() == [massive] * 2


def test_the_two_criteria_can_differ() -> None:
    """One sequence of four carries it: by means the layer is massive. And two at ratios that means do not reach."""
    top, median = np.array([[900.0, 1, 1, 1], [150, -150, 90, 90]]), np.array([[0.1] * 4, [0.1, 0.1, 0.2, 0.2]])
    assert massive_in_sequences(top, median).tolist() == [[True, False, False, False], [True, True, False, False]]
    assert massive_on_average(top, median).tolist() == [True, False]
    for b in range(2):
        means = np.abs(top[b]).sum() / 4, median[b].sum() / 4
        assert massive_on_average(top, median)[b] == (means[0] > 100 and means[0] >= 1000 * means[1])


def slow_layer(jump: list[float], typical: list[float]) -> int | None:
    """The rule as products from scratch."""
    layers = range(1, len(jump))

    def relative(layer: int) -> float:
        return math.prod(jump[k] / typical[k] for k in range(1, layer + 1))

    if not all(math.isfinite(relative(layer)) for layer in layers):
        return None
    largest = max(relative(layer) for layer in range(len(jump)))
    peak = min(layer for layer in range(len(jump)) if relative(layer) == largest)
    for layer in range(1, peak + 1):
        if all(relative(k) >= 3 * relative(layer - 1) for k in range(layer, peak + 1)):
            return layer
    return None


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.5, 1.0, 2.0, 5.0, 40.0]), st.sampled_from([0.5, 1.0, 8.0])), max_size=6)
)
def test_the_emergence_layer_is_that_of_the_rule(pairs: list[tuple[float, float]]) -> None:
    jump, typical = ([math.nan, *each] for each in ([one for one, _ in pairs], [other for _, other in pairs]))
    assert emergence_layer(np.array(jump), np.array(typical)) == slow_layer(jump, typical)


N = math.nan


@pytest.mark.parametrize(
    ("jump", "typical", "layer"),
    [
        ([N, 8, 1.1, 1, 1], [N, 8, 1.1, 1, 1], None),  # every token grows in layer 1
        ([N, 8, 50, 1, 1], [N, 8, 1, 1, 1], 2),
        ([N, 1, 50, 1, 0.02], [N, 1, 1, 1, 1], 2),  # the last layer takes it away
        ([N, 5, 0.2, 50, 1], [N, 1, 1, 1, 1], 3),  # a token's noise falls back
        ([N, 5, 10, 1, 1], [N, 1, 1, 1, 1], 1),  # in two steps: the first
        ([N, 2.9, 1, 1, 1], [N, 1, 1, 1, 1], None),
        ([N, 3, 1, 1, 1], [N, 1, 1, 1, 1], 1),
        ([N, N, 9, 1, 1], [N, 1, 1, 1, 1], None),  # not known
        ([N, 2, 1, 1, 1], [N, 0, 1, 1, 1], None),
        ([N], [N], None),
    ],
)
def test_where_a_massive_token_emerges(jump: list[float], typical: list[float], layer: int | None) -> None:
    assert emergence_layer(np.array(jump), np.array(typical)) == layer


def test_since_when_a_candidate_is_the_one() -> None:
    output = np.array([3, N, 3, 5, 5, 5])
    assert candidate_since(STEPS, output, np.full(6, 9.0)) == 4
    assert candidate_since(STEPS, output, np.array([9, 9, 9, 9, 8, 9.0])) == 16
    assert candidate_since(STEPS, np.array([5, 5, 5, 5, 5, N]), np.full(6, 9.0)) is None
