from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from ma_monitor.numerics.clock import learning_rate_clock, step_clock

RTOL, ATOL = 1e-12, 1e-9  # sums of at most a few hundred rates of size 1

rates = (
    st.lists(st.sampled_from([0.0, 0.0, 1e-6, 0.25, 1.0]) | st.floats(1e-3, 3.0), min_size=1, max_size=60)
    .filter(any)
    .map(lambda lr: np.array(lr))
)


def _close(got: ArrayLike, wanted: ArrayLike) -> None:
    np.testing.assert_allclose(np.asarray(got, float), np.asarray(wanted, float), rtol=RTOL, atol=ATOL)


def _slow_time(lr: NDArray[np.float64], step: int) -> float:
    """C(S), summed update by update; the last rate is held after the plan."""
    return math.fsum(lr[min(s, lr.size - 1)] / lr.max() for s in range(step))


def _slow_step(lr: NDArray[np.float64], time: float, limit: int) -> float:
    """First step at which the clock shows a time, searched update by update; NaN if not before ``limit``."""
    for step in range(limit + 1):
        now = _slow_time(lr, step)
        if now >= time:
            before = _slow_time(lr, step - 1) if step else 0.0
            return step - 1 + (time - before) / (now - before) if step and now > before else float(step)
    return math.nan


@given(rates)
def test_time_is_the_sum_of_relative_rates(lr: NDArray[np.float64]) -> None:
    clock = learning_rate_clock(lr)
    steps = np.arange(lr.size + 20)
    _close(clock.time(steps), [_slow_time(lr, s) for s in range(steps.size)])


@given(rates, st.floats(0, 1))
def test_the_inverse_finds_the_first_step(lr: NDArray[np.float64], share: float) -> None:
    clock = learning_rate_clock(lr)
    limit = lr.size + 20
    time = share * float(clock.time(limit))
    step = float(clock.step(time))
    _close(clock.time(step), time)
    wanted = _slow_step(lr, time, limit)
    if abs(step - wanted) > 1e-6:  # a rounded time may lie on either side of a flat stretch
        _close(clock.time(wanted), time)


@given(rates)
def test_time_never_runs_backwards_and_steps_come_back(lr: NDArray[np.float64]) -> None:
    clock = learning_rate_clock(lr)
    steps = np.linspace(0, lr.size + 5, 97)
    times = clock.time(steps)
    assert (np.diff(times) >= 0).all()
    back = clock.step(times)
    assert (back <= steps + 1e-6).all()  # the first step that shows this time


@given(rates, st.floats(1e-6, 1e6))
def test_the_unit_of_the_rate_does_not_matter(lr: NDArray[np.float64], scale: float) -> None:
    steps = np.arange(lr.size + 3)
    ours = learning_rate_clock(lr * scale).time(steps)
    _close(ours, learning_rate_clock(lr).time(steps))


def test_the_step_clock_counts() -> None:
    clock = step_clock()
    steps = np.array([0.0, 1.0, 2.5, 1e9])
    np.testing.assert_array_equal(clock.time(steps), steps)
    np.testing.assert_array_equal(clock.step(steps), steps)
    assert np.isnan(clock.step([-1.0, math.nan, math.inf])).all()


def test_a_constant_rate_counts_too() -> None:
    clock = learning_rate_clock(np.full(5, 0.3))
    _close(clock.time([0, 3, 9]), [0, 3, 9])
    _close(clock.step([0, 3, 9]), [0, 3, 9])


def test_a_schedule_that_ends_at_zero_saturates() -> None:
    clock = learning_rate_clock([1.0, 0.5, 0.0])
    _close(clock.time([0, 1, 2, 3, 1e6]), [0, 1, 1.5, 1.5, 1.5])
    _close(clock.step([0.5, 1.25, 1.5, 1.5001]), [0.5, 1.5, 2.0, math.nan])


def test_a_start_at_rate_zero_and_a_flat_stretch() -> None:
    clock = learning_rate_clock([0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    _close(clock.time([0, 1, 2, 3, 4, 5]), [0, 0, 1, 1, 1, 2])
    _close(clock.step([0.0, 1.0, 1.5, 2.0, 3.0]), [0, 2, 4.5, 5, 6])


@pytest.mark.parametrize("lr", [[], [0.0, 0.0], [1.0, -1.0], [math.nan], [math.inf], [[1.0]]])
def test_bad_rates(lr: list[float]) -> None:
    with pytest.raises(ValueError, match="rates must be one finite list, not negative and not all 0"):
        learning_rate_clock(lr)


def test_a_real_schedule(shared_data: Path) -> None:
    lr = np.load(shared_data / "runs" / "neox-70m.npz")["lr"].astype(np.float64)
    clock = learning_rate_clock(lr)
    total = lr.size - 1
    assert float(clock.time(total)) == pytest.approx(lr[:-1].sum() / lr.max(), rel=1e-12)
    steps = np.arange(0, total, 37)
    np.testing.assert_allclose(clock.step(clock.time(steps)), steps, atol=1e-6)  # rates are at least 1 % of the peak
