"""The picture of where the largest layers are heading."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.numerics.events import Peak
from ma_monitor.numerics.forecast import Forecast, forecast
from ma_monitor.sinks import fan as module
from ma_monitor.sinks.fan import fan
from ma_monitor.sinks.heatmap import INK, limits

END = 2000
STEPS = np.arange(0, 1001, 50)


def ratios(layers: int) -> NDArray[np.float64]:
    """Rising ratios ``[L, T]``, of later layers larger, with a little noise."""
    noise = 1 + 0.02 * np.random.default_rng(0).standard_normal((layers, len(STEPS)))
    return np.asarray(np.arange(1, layers + 1)[:, None] * (5 + 2 * np.log1p(STEPS / 50)) * noise)


def panel(picture: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """The inside of a panel."""
    left = module._LEFT + number * (module._PANEL + module._GAP)
    return picture[module._TOP : module._TOP + module._HEIGHT, left : left + module._PANEL]


def rows_of(inside: NDArray[np.uint8], column: int, colour: Any, *, near: int = 12) -> NDArray[np.intp]:
    """Rows of a column that have about this colour."""
    return np.flatnonzero(np.abs(inside[:, column].astype(int) - colour).max(axis=1) <= near)


def drawn(values: NDArray[np.float64], made: Forecast) -> NDArray[np.uint8]:
    picture = fan(STEPS, values, made)
    assert picture is not None
    return picture


def test_the_three_that_end_largest_against_the_slow_reference() -> None:
    values = ratios(5)
    made = forecast(STEPS, values, total_steps=END)
    picture = drawn(values, made)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == module._LEFT + 3 * module._PANEL + 2 * module._GAP + module._RIGHT
    largest = sorted(made.layers, key=lambda layer: -layer.quantiles[3, -1])[:3]
    everything = np.concatenate([np.r_[values[layer.layer - 1], layer.quantiles.ravel()] for layer in largest])
    low, high = limits(everything)
    for number, layer in enumerate(largest):
        inside = panel(picture, number)
        for column in (170, 220, 270):
            step = END * column / module._PANEL
            quantiles = [np.interp(step, layer.steps, row) for row in layer.quantiles]
            at = [(module._HEIGHT - 1) * (1 - np.log(q / low) / np.log(high / low)) for q in quantiles]
            band = np.concatenate([rows_of(inside, column, colour) for *_, colour in module._BANDS])
            assert band.min() == pytest.approx(at[6], abs=2)
            assert band.max() == pytest.approx(at[0], abs=2)
            median = rows_of(inside, column, module._BLUE, near=90)
            assert median.mean() == pytest.approx(at[3], abs=2)
        measured = rows_of(inside, round(module._PANEL * STEPS[10] / END), INK, near=60)
        value = values[layer.layer - 1, 10]
        assert measured.mean() == pytest.approx(
            (module._HEIGHT - 1) * (1 - np.log(value / low) / np.log(high / low)), abs=2
        )


def test_values_that_are_no_numbers_are_left_out() -> None:
    values = ratios(2)
    made = forecast(STEPS, values, total_steps=END)
    values[1, 3:6] = np.nan, np.inf, 0.0
    assert np.isfinite(drawn(values, made)).all()


def test_a_peak_that_is_identified_is_marked() -> None:
    made = forecast(STEPS, ratios(1), total_steps=END)
    (layer,) = made.layers
    orange = []
    for identified in (False, True):
        peak = Peak(1500.0, float(layer.quantiles[3].max()), 1400.0, 1600.0, identified, 0.9, "ahead")
        picture = drawn(ratios(1), replace(made, layers=(replace(layer, peak=peak),)))
        inside = panel(picture, 0)
        orange.append(np.flatnonzero([len(rows_of(inside, x, module._ORANGE)) for x in range(module._PANEL)]))
    nothing, marks = orange
    assert nothing.size == 0
    ends = np.array([1400, 1600]) * module._PANEL / END
    np.testing.assert_allclose([marks.min(), marks.max()], ends, atol=2)


@pytest.mark.parametrize("end", [1001, 1003, 143_000])
def test_any_length(end: int) -> None:
    made = forecast(STEPS, ratios(2), total_steps=end)
    assert drawn(ratios(2), made).shape == drawn(ratios(2), forecast(STEPS, ratios(2), total_steps=END)).shape


def test_nothing_to_show() -> None:
    assert fan(STEPS[:3], ratios(2)[:, :3], forecast(STEPS[:3], ratios(2)[:, :3], total_steps=END)) is None
    done = forecast(STEPS, ratios(2), total_steps=1000)
    assert fan(STEPS, ratios(2), done) is None
