"""Origins from which a run's members are scored, and the correction that changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.numerics.clock import Clock, learning_rate_clock, step_clock
from ma_monitor.numerics.mixture import ORIGIN_POINTS, ORIGINS, Correction, _origins, _shrunk

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


def test_a_correction_moves_the_middle_and_stretches_each_side() -> None:
    rng = np.random.default_rng(0)
    paths = rng.standard_normal((2, 4, 101))
    knots = np.array([0.5, 1.0])
    shift, below, above = (np.array([[a, b], [2 * a, 3 * b]]) for a, b in ((0.1, 0.4), (1.5, 2.0), (1.0, 0.5)))
    ahead = np.array([0.0, 0.25, 0.5, 2.0])
    found = Correction(knots, shift, below, above, 1.0, "made up").apply(paths, ahead)
    for layer in range(2):
        for place, at in enumerate(ahead):
            own, middle = paths[layer, place], np.median(paths[layer, place])
            moved = np.interp(at, [0.0, *knots], [0.0, *shift[layer]])
            down, up = np.interp(at, knots, below[layer]), np.interp(at, knots, above[layer])
            expected = [middle + moved + (v - middle) * (down if v < middle else up) for v in own]
            np.testing.assert_allclose(found[layer, place], expected, rtol=1e-12)


def test_layers_are_drawn_half_way_to_their_mean() -> None:
    errors = np.array([[1.0, 3.0], [10.0, 20.0]])
    np.testing.assert_allclose(_shrunk(errors), [[1.5, 2.5], [12.5, 17.5]])
