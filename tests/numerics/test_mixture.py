"""Origins from which a run's members are scored, and the correction that changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.numerics.clock import Clock, learning_rate_clock, step_clock
from ma_monitor.numerics.mixture import ORIGIN_POINTS, ORIGINS, Correction, _origins

STILL = learning_rate_clock(np.r_[np.zeros(200), np.ones(801)])
"""A rate of 0 for 200 steps: the clock stands still."""


@pytest.mark.parametrize("clock", [step_clock(), STILL], ids=["steps", "still at first"])
@pytest.mark.parametrize("points", [8, 13, 25, 60])
def test_an_origin_has_points_at_enough_times_before_it_and_some_after(clock: Clock, points: int) -> None:
    steps = np.linspace(0, 400, points)
    cuts, nearness = _origins(clock, steps, 0.5)
    times = clock.time(steps)
    expected: list[int] = []
    for back in ORIGINS:
        before = [t for t in times if t <= times[-1] / back]
        if len(set(before)) >= ORIGIN_POINTS and len(before) < points and len(before) not in expected:
            expected.append(len(before))
    assert cuts == expected
    assert len(nearness) == len(cuts)
    assert not cuts or nearness.sum() == pytest.approx(1, abs=1e-12)


def test_the_nearer_an_origins_horizon_is_the_more_it_counts() -> None:
    steps: NDArray[np.float64] = np.linspace(0, 1000, 200)
    for back in ORIGINS:
        cuts, nearness = _origins(step_clock(), steps, float(np.log(back)))
        assert cuts[int(np.argmax(nearness))] == np.searchsorted(steps, 1000 / back, side="right")


def test_no_correction_says_what_led_to_that() -> None:
    none = Correction.none("the in-run mixture alone")
    assert none.words == "the in-run mixture alone"
    assert none.weight == 0
    assert none.ahead.size == none.shift.size == none.below.size == none.above.size == 0
