"""Peaks and crossings against plain loops over the paths, and values between points against numpy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ma_monitor.numerics.events import MARGIN, find_peak, first_crossing
from ma_monitor.numerics.values import interpolate

Floats = NDArray[np.float64]
STEPS = np.arange(0.0, 50.0, 5.0)
NODES = np.arange(50.0, 101.0, 10.0)
levels = st.sampled_from([np.log(x) for x in (1.0, 2.0, 10.0, 100.0, 1000.0)])


@given(st.lists(levels, min_size=10, max_size=10), st.lists(levels, min_size=18, max_size=18), st.booleans())
def test_a_crossing_is_the_first_value_at_or_above_the_threshold(
    seen: list[float], ahead: list[float], short: bool
) -> None:
    past = np.exp(np.array(seen)) * (0.01 if short else 1.0)
    paths = np.array(ahead).reshape(6, 3)
    found = first_crossing(STEPS, past, NODES, paths, 100.0)
    over = [step for step, value in zip(STEPS, past, strict=True) if value >= 100]
    if over:
        assert (found.probability, found.step, found.low, found.high) == (1.0, over[0], over[0], over[0])
        return
    first = [next((n for n, v in zip(NODES, p, strict=True) if v >= np.log(100.0)), None) for p in paths.T]
    reached = sorted(n for n in first if n is not None)
    assert found.probability == pytest.approx(len(reached) / 3)
    if reached:
        quantiles = [reached[math.ceil(q * (len(reached) - 1))] for q in (0.1, 0.5, 0.9)]  # steps that paths do reach
        assert [found.low, found.step, found.high] == quantiles
    else:
        assert found.step is found.low is found.high is None


def test_a_peak_is_ahead_only_beyond_the_last_step() -> None:
    """The past is highest in its last point; the futures fall at once, or rise at first."""
    past = np.linspace(0.0, 2.0, STEPS.size)
    falls = np.repeat(np.linspace(1.5, 0.5, NODES.size)[:, None], 8, axis=1)
    at_the_end = find_peak(STEPS, past, 1e-6, NODES, falls)
    assert at_the_end.status == "past"
    assert at_the_end.step == STEPS[-1]
    rises = falls.copy()
    rises[1] = 2.5
    ahead = find_peak(STEPS, past, 1e-6, NODES, rises)
    assert ahead.status == "ahead"
    assert ahead.step == NODES[1]


@pytest.mark.parametrize(("factor", "probability"), [(0.9, 0.0), (1.1, 1.0)])
def test_a_peak_counts_where_the_end_lies_below_it_by_more_than_noise(factor: float, probability: float) -> None:
    noise, past = 0.1, np.full(STEPS.size, -3.0)
    ahead = np.full((NODES.size, 4), -1.0)
    ahead[2] = 2.0
    ahead[-1] = 2.0 - factor * MARGIN * np.sqrt(2) * noise
    assert find_peak(STEPS, past, noise, NODES, ahead).probability == probability


@given(
    st.lists(st.floats(-5, 15), min_size=1, max_size=6),
    st.lists(st.floats(0, 10), min_size=1, max_size=8, unique=True),
)
def test_interpolates_as_numpy_does_row_by_row(at: list[float], x: list[float]) -> None:
    known = np.sort(np.array(x))
    if known.size > 1 and np.diff(known).min() < 1e-6:
        return
    rows = np.sin(np.outer([1.0, 2.0, 3.0], known)).reshape(3, known.size)
    expected = [np.interp(at, known, row) for row in rows]
    np.testing.assert_allclose(interpolate(np.array(at), known, rows), expected, atol=1e-9)
