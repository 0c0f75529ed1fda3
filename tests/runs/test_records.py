from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ma_monitor.errors import ConfigError
from ma_monitor.runs.records import UNKNOWN, Measurements
from tests.runs.makers import make_measurements, make_meta, make_plan

META = make_meta()


def test_a_step_is_not_negative() -> None:
    with pytest.raises(ConfigError, match="cannot be negative, got -1"):
        replace(make_measurements(0, META), step=-1)


def test_the_arrays_agree_in_shape() -> None:
    m = make_measurements(0, META)
    with pytest.raises(ConfigError, match=r"`top` must have the axes \[layer, sequence, rank\], got shape \(3, 3\)"):
        replace(m, top=m.top[0])
    for name in ("position", "token", "channel"):
        with pytest.raises(ConfigError, match=rf"`{name}` must have the shape of `top`, \(3, 3, 3\), got \(3, 3, 2\)"):
            replace(m, **{name: getattr(m, name)[..., :2]})
    for name in ("median", "nan", "inf"):
        with pytest.raises(ConfigError, match=rf"`{name}` must have the shape \(3, 3\), got \(2, 3\)"):
            replace(m, **{name: getattr(m, name)[:2]})


def test_statistics_without_places() -> None:
    top, median = np.full((2, 3, 4), 5, np.float32), np.full((2, 3), 0.5, np.float16)
    m = Measurements.from_statistics(7, top, median)
    assert m.step == 7
    assert [array.dtype.name for array in (m.top, m.median)] == ["float64", "float64"]
    for places in (m.position, m.token, m.channel):
        np.testing.assert_array_equal(places, np.full((2, 3, 4), UNKNOWN))
    for counts in (m.nan, m.inf):
        np.testing.assert_array_equal(counts, np.zeros((2, 3)))


def test_rows_are_the_layers_and_what_enters_the_first() -> None:
    assert make_meta(layers=6, first_layer=0).rows == 7
    assert make_meta(layers=6, first_layer=1).rows == 6


def test_plans_are_the_same_whenever_they_came_into_force() -> None:
    plan = make_plan()
    assert plan.same_as(make_plan(from_step=50))
    assert plan.same_as(replace(plan, schedule="in other words"))
    without = replace(plan, lr=None)
    assert without.same_as(replace(without, from_step=3))
    for other in (
        without,
        make_plan(peak=2e-3),
        replace(plan, total_steps=None),
        replace(plan, batch=9),
        replace(plan, held=True),
    ):
        assert not plan.same_as(other)
        assert not other.same_as(plan)
