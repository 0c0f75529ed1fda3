from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ma_monitor.runs.history import History, sequence_ratio
from ma_monitor.runs.records import Measurements, Ratio
from tests.runs.makers import any_floats, bits, make_measurements, make_meta

META = make_meta()
SHAPE = (META.rows, META.probe.sequences, META.k)
RELATIVE = 1e-12  # summation order: a few units of the last place of float64 over at most six terms


def slow_ratio(top: list[float], median: list[float], ratio: Ratio) -> float:
    """One layer's ratio by the letter of the definition, in plain Python."""
    pairs = [(abs(t), m) for t, m in zip(top, median, strict=True) if not math.isnan(t) and math.isfinite(m)]
    if ratio == "mean_of_ratios":
        each = [t / m for t, m in pairs if m > 0]
        return sum(each) / len(each) if each else math.nan
    below = sum(m for _, m in pairs)
    return sum(t for t, _ in pairs) / below if below > 0 else math.nan


values = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf]) | st.floats(-1e6, 1e6, width=32)
medians = st.sampled_from([0.0, math.nan, math.inf]) | st.floats(2**-20, 1e6, width=32)


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float64, (4, n), elements=values), hnp.arrays(np.float64, (4, n), elements=medians)
        )
    ),
    st.sampled_from(["ratio_of_means", "mean_of_ratios"]),
)
def test_ratio_equals_the_definition(arrays: tuple[NDArray[np.float64], NDArray[np.float64]], ratio: Ratio) -> None:
    top, median = arrays
    expected = [slow_ratio(t, m, ratio) for t, m in zip(top.tolist(), median.tolist(), strict=True)]
    np.testing.assert_allclose(sequence_ratio(top, median, ratio), expected, rtol=RELATIVE)


def test_the_two_ratios_on_an_example_worked_by_hand() -> None:
    top, median = np.array([-8.0, 2.0]), np.array([2.0, 4.0])
    assert sequence_ratio(top, median, "ratio_of_means") == 10 / 6
    assert sequence_ratio(top, median, "mean_of_ratios") == (4 + 0.5) / 2


def test_a_sequence_of_median_zero_counts_in_the_means_only() -> None:
    top, median = np.array([6.0, 2.0]), np.array([0.0, 4.0])
    assert sequence_ratio(top, median, "ratio_of_means") == 2.0
    assert sequence_ratio(top, median, "mean_of_ratios") == 0.5
    assert np.isnan(sequence_ratio(top, np.zeros(2), "ratio_of_means"))
    assert np.isnan(sequence_ratio(top, np.zeros(2), "mean_of_ratios"))


@given(any_floats((5, 3)), any_floats((5, 3)), st.sampled_from(["ratio_of_means", "mean_of_ratios"]))
def test_no_input_warns_or_raises(top: NDArray[np.float64], median: NDArray[np.float64], ratio: Ratio) -> None:
    assert sequence_ratio(top, median, ratio).shape == (5,)


Action = tuple[str, int, int]
actions = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "rewind", "ratios"]), st.integers(0, 40), st.integers(0, 3))
)


@given(actions)
def test_history_equals_a_dict_of_steps(todo: list[Action]) -> None:
    history = History(SHAPE)
    reference: dict[int, Measurements] = {}
    for action, step, seed in todo:
        if action == "add":
            m = make_measurements(step, META, seed)
            history.add(m)
            reference[step] = m
        elif action == "rewind":
            dropped = [held for held in reference if held > step]
            assert history.rewind(step) == len(dropped)
            for held in dropped:
                del reference[held]
        else:
            history.ratios(1, "ratio_of_means")
    stack = history.stack()
    assert stack.steps.tolist() == sorted(reference)
    assert [bits(m) for m in history.measurements()] == [bits(reference[step]) for step in sorted(reference)]
    for rank in (1, 2, 3):
        for ratio in ("ratio_of_means", "mean_of_ratios"):
            expected = [
                [
                    slow_ratio(m.top[row, :, rank - 1].tolist(), m.median[row].tolist(), ratio)
                    for m in ordered(reference)
                ]
                for row in range(META.rows)
            ]
            found = history.ratios(rank, ratio)
            np.testing.assert_allclose(found, np.reshape(expected, (META.rows, len(reference))), rtol=RELATIVE)


def ordered(reference: dict[int, Measurements]) -> list[Measurements]:
    return [reference[step] for step in sorted(reference)]


@pytest.mark.parametrize("change", ["later", "same", "earlier", "rewind"])
def test_what_was_shown_does_not_change_any_more(change: str) -> None:
    history = History(SHAPE)
    history.load(make_measurements(step, META) for step in (10, 20, 30))
    shown, ratios = history.stack(), history.ratios(1, "ratio_of_means")
    before = [bits(shown.at(i)) for i in range(3)], ratios.tobytes()
    if change == "rewind":
        history.rewind(10)
        history.add(make_measurements(25, META, seed=1))
    else:
        history.add(make_measurements({"later": 40, "same": 20, "earlier": 15}[change], META, seed=1))
    assert ([bits(shown.at(i)) for i in range(3)], ratios.tobytes()) == before
    assert len(history.stack().steps) == {"later": 4, "same": 3, "earlier": 4, "rewind": 2}[change]


def test_nobody_can_write_into_what_is_shown() -> None:
    history = History(SHAPE)
    history.add(make_measurements(0, META))
    stack = history.stack()
    for array in [getattr(stack, field.name) for field in fields(stack)] + [history.ratios(1, "ratio_of_means")]:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    history.add(make_measurements(1, META))
    assert history.stack().steps.tolist() == [0, 1]


def test_an_empty_history_has_empty_arrays() -> None:
    history = History(SHAPE)
    assert history.stack().top.shape == (0, *SHAPE)
    assert history.ratios(1, "mean_of_ratios").shape == (META.rows, 0)
    assert history.rewind(0) == 0
