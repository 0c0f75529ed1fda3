"""Other people's text, and numbers, in words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.report.comparison import figures
from ma_monitor.report.overview import towards
from ma_monitor.report.words import layers_words, percent, shown


@given(st.text(alphabet=st.characters(), max_size=600), st.integers(1, 400))
def test_shown_text_neither_steers_nor_floods(text: str, most: int) -> None:
    told = shown(text, most)
    assert all(character.isprintable() for character in told)
    assert len(told) <= 10 * most + 30, "an escape has at most ten characters"
    if text.isprintable() and len(text) <= most:
        assert told == text


def test_shown_says_how_long_a_text_is() -> None:
    assert shown("x" * 10_240, 5) == "xxxxx… (10,240 characters)"
    assert shown(None) == "None"


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ([3], "layer 3"),
        ([1, 2, 3, 7], "layers 1–3, 7"),
        ([1, 3, 5, 7, 9, 11, 13, 14, 16], "layers 1, 3, 5, 7, 9, 11, 3 more"),
    ],
)
def test_layers(layers: list[int], told: str) -> None:
    assert layers_words(layers) == told


def test_percent() -> None:
    assert (percent(0.754), percent(1)) == ("75 %", "100 %")


@pytest.mark.parametrize(
    ("now", "low", "high", "heading", "sure"),
    [
        (10.0, 11.0, 12.0, "rising", "sure"),
        (10.0, 11.0, 20.0, "rising", "fairly sure"),
        (10.0, 11.0, 23.0, "rising", "unsure"),
        (10.0, 8.0, 9.5, "falling", "sure"),
        (10.0, 9.0, 11.0, "about level", "sure"),
        (10.0, 5.0, 20.0, "open (up or down)", "unsure"),
        (10.0, 0.0, 20.0, "open (up or down)", "unsure"),
        (10.0, None, None, "not forecast", "unknown"),
        (math.inf, 5.0, 20.0, "not forecast", "unknown"),
    ],
)
def test_towards(now: float, low: float | None, high: float | None, heading: str, sure: str) -> None:
    assert towards(now, low, high) == (heading, sure)


@given(st.lists(st.floats(width=64), max_size=30))
def test_figures_have_five_digits(values: list[float]) -> None:
    for value, told in zip(values, figures(values), strict=True):
        if not math.isfinite(value):
            assert told is None
        elif 1e-290 < abs(value) < 1e290:
            assert told == pytest.approx(value, rel=5.1e-5)
            assert told == pytest.approx(float(f"{told:.5g}"), rel=1e-12)
