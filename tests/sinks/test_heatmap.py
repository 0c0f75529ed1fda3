"""The heat map, against a slow reference that looks at every pixel column and measurement."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError
from ma_monitor.sinks import heatmap as module
from ma_monitor.sinks.heatmap import heatmap

RECORDED = np.array([0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)])
"""The 154 steps of Pythia's checkpoints."""
UNIFORM_LIGHTNESS = 1.5
"""Largest over smallest rise in lightness allowed between equal steps of the scale; 1 is perfect."""
TOO_LARGE = 600
"""No picture is higher, whatever the run."""


def cells(picture: NDArray[np.uint8], layers: int) -> NDArray[np.uint8]:
    """The coloured part by layer, lowest layer first: ``[layers, width, 3]``, the middle pixel of each row."""
    height = picture.shape[0] - module._TOP - module._BOTTOM
    row = height // layers
    plot = picture[module._TOP : module._TOP + height, module._LEFT : module._LEFT + module._PLOT_WIDTH]
    return plot[row // 2 :: row][::-1]


def slow_columns(steps: list[int], values: list[float]) -> list[float]:
    """What each pixel column must show of one layer.

    A measurement reaches half-way to its neighbours. It is shown by the columns whose left edge it covers, or, if it
    is too narrow for any, by the column that it lies in; the largest of those that share a column wins.
    """
    width, span = module._PLOT_WIDTH, max(steps[-1] - steps[0], 1)
    places = [math.log1p(30 * (step - steps[0]) / span) / math.log1p(30) for step in steps]
    borders = [-math.inf, *((a + b) / 2 for a, b in zip(places, places[1:], strict=False)), math.inf]
    members: list[list[float]] = [[] for _ in range(width)]
    for value, left, right in zip(values, borders, borders[1:], strict=False):
        covered = [column for column in range(width) if left <= column / width < right]
        for column in covered or [int(left * width)]:
            members[column].append(value)
    return [max((value for value in column if not math.isnan(value)), default=math.nan) for column in members]


def slow_colour(value: float, low: float, high: float) -> tuple[int, ...]:
    """The colour of one value."""
    if math.isnan(value) or value < 0:
        return module._NAN
    share = (
        0.0
        if value == 0
        else 1.0
        if value == math.inf
        else (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    )
    place = min(max(share, 0.0), 1.0) * (len(module._ANCHORS) - 1)
    below = min(int(place), len(module._ANCHORS) - 2)
    mix = place - below
    return tuple(
        round(a + (b - a) * mix) for a, b in zip(module._ANCHORS[below], module._ANCHORS[below + 1], strict=True)
    )


VALUES = st.one_of(
    st.floats(1e-3, 1e6), st.just(math.nan), st.just(math.inf), st.just(0.0), st.just(-1.0), st.floats(1e-300, 1e300)
)


@settings(max_examples=40)
@given(data=st.data(), layers=st.integers(1, 3), count=st.integers(1, 12))
def test_every_pixel_against_the_slow_reference(data: st.DataObject, layers: int, count: int) -> None:
    steps = sorted(data.draw(st.sets(st.integers(0, 200_000), min_size=count, max_size=count)))
    rows = [data.draw(st.lists(VALUES, min_size=count, max_size=count)) for _ in range(layers)]
    picture = heatmap(np.array(steps), np.array(rows))
    low, high = module.limits(np.array(rows))
    got = cells(picture, layers).astype(int)
    for row, values in zip(got, rows, strict=True):
        want = np.array([slow_colour(value, low, high) for value in slow_columns(steps, values)])
        # One unit of 255 for a value that falls between two shades.
        assert np.abs(row - want).max() <= 1


def test_crowded_columns_against_the_slow_reference(rng: np.random.Generator) -> None:
    steps = np.arange(1500) * 10
    values = 10 ** rng.uniform(0, 3, (1, 1500))
    values[rng.random(values.shape) < 0.3] = np.nan
    low, high = module.limits(values)
    want = [slow_colour(value, low, high) for value in slow_columns(steps.tolist(), values[0].tolist())]
    # One unit of 255 for a value that falls between two shades.
    assert np.abs(cells(heatmap(steps, values), 1)[0].astype(int) - np.array(want)).max() <= 1


@given(values=st.lists(st.floats(5e-324, 1.7e308), min_size=1, max_size=4))
def test_scale_holds_every_value(values: list[float]) -> None:
    low, high = module.limits(np.array([values]))
    assert 0 < low <= min(values)
    assert max(values) <= high < math.inf


@pytest.mark.parametrize("layers", [1, 2, 6, 12, 36, 80])
@pytest.mark.parametrize("count", [1, 2, 154, 5000])
def test_size_is_bounded(layers: int, count: int, rng: np.random.Generator) -> None:
    picture = heatmap(np.arange(count) * 10, 10 ** rng.uniform(0, 4, (layers, count)))
    assert picture.dtype == np.uint8
    assert picture.shape[0] <= TOO_LARGE
    assert picture.shape[1:] == (module._LEFT + module._PLOT_WIDTH + module._RIGHT, 3)


def test_one_spike_among_5000_is_seen_in_its_layer() -> None:
    values = np.ones((4, 5000))
    values[1, 4321] = 1000.0
    shown = cells(heatmap(np.arange(5000) * 100, values), 4)
    brightest = tuple(int(part) for part in module._ANCHORS[-1])
    assert [bool((row == brightest).all(axis=-1).any()) for row in shown] == [False, True, False, False]


def test_layers_go_up() -> None:
    values = np.geomspace(1.0, 1000.0, 12)[:, None] * np.ones((1, len(RECORDED)))
    lightness = _lightness(cells(heatmap(RECORDED, values), 12)[:, 0])
    assert np.all(np.diff(lightness) > 0)


def test_scale_is_uniform_in_lightness() -> None:
    """What makes a scale readable in grey, and so for every kind of colour blindness."""
    shades = module._colours(np.geomspace(1.0, 10.0, len(module._ANCHORS)), 1.0, 10.0)
    rises = np.diff(_lightness(shades))
    assert rises.min() > 0
    assert rises.max() / rises.min() < UNIFORM_LIGHTNESS


def test_nothing_known_is_all_grey_and_explained() -> None:
    unknown = heatmap(np.arange(3), np.full((2, 3), np.nan))
    assert np.all(cells(unknown, 2) == module._NAN)
    known = heatmap(np.arange(3), np.ones((2, 3)))
    footer = slice(known.shape[0] - module._BOTTOM // 2, None)
    right = slice(known.shape[1] // 2 + 60, None)
    assert np.any(unknown[footer, right] != 255)
    assert np.all(known[footer, right] == 255)


def test_labels_keep_apart_and_prefer_the_first() -> None:
    marks = {10: 0.0, 20: 1.0, 30: 0.05, 40: 0.5, 50: 0.45}
    assert module.with_room(marks, 0.1) == [(10, 0.0), (20, 1.0), (40, 0.5)]


@pytest.mark.parametrize(
    ("steps", "values"),
    [
        (np.arange(3), np.ones((2, 4))),
        (np.arange(3), np.ones(3)),
        (np.arange(0), np.ones((2, 0))),
        (np.arange(3), np.ones((0, 3))),
    ],
)
def test_shapes_that_disagree(steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    with pytest.raises(ConfigError, match=r"`values` must be \[layers, steps\].*got values"):
        heatmap(steps, values)


@pytest.mark.parametrize("steps", [[0, 5, 5], [0, 7, 3]])
def test_steps_that_do_not_rise(steps: list[int]) -> None:
    with pytest.raises(ConfigError, match="must rise strictly"):
        heatmap(np.array(steps), np.ones((2, 3)))


def _lightness(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """CIE L* of sRGB colours ``[n, 3]``."""
    share = rgb / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.asarray(116 * np.cbrt(luminance) - 16)
