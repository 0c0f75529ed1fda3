from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.numerics import members
from ma_monitor.numerics.clock import learning_rate_clock, step_clock
from ma_monitor.numerics.curve import evaluate
from ma_monitor.numerics.members import CurveGrid, log_trend, member_names, member_paths, weigh_curves
from ma_monitor.numerics.mixture import make_mixture

Floats = NDArray[np.float64]
TOTAL = 1000
LR = np.minimum(np.arange(TOTAL + 1) / 10, 0.55 + 0.45 * np.cos(np.pi * np.arange(TOTAL + 1) / TOTAL))
STEPS = np.unique(np.concatenate([2 ** np.arange(5), np.arange(0, TOTAL + 1, 20)]))
CURVES = ((0.0001, 200.0, 20.0, -100.0, 0.0), (0.008, 50.0, 60.0, -200.0, 12.0), (0.01, 5.0, 0.0, 20.0, 5.0))
"""A rise, a peak and a decay in the learning-rate clock: β, τ₀, A₁, A₂, K."""
LAYERS = np.stack([evaluate(learning_rate_clock(LR).time(STEPS), *curve) for curve in CURVES])
LAYERS *= np.exp(0.01 * np.random.default_rng(0).standard_normal(LAYERS.shape))


def _slow_average(times: Floats, values: Floats, at: Floats, b: Floats, c: Floats) -> tuple[Floats, Floats]:
    """Least squares node by node, its weighted mean at ``at``, and the weights."""
    curves, residuals = [], []
    for node_b, node_c in zip(b, c, strict=True):

        def columns(t: Floats, node_b: float = node_b, node_c: float = node_c) -> Floats:
            s = (t - times[0]) / times[-1]
            decay = np.exp(-node_b * s)
            x1 = np.expm1(-node_b * s) / math.expm1(-node_b)
            return np.stack([np.ones_like(s), x1, decay * np.log1p(s / node_c)], axis=1)

        q, r = np.linalg.qr(columns(times))
        coefficients = np.linalg.lstsq(r, q.T @ values, rcond=1e-10)[0]
        curves.append(columns(at) @ coefficients)
        residuals.append(((columns(times) @ coefficients - values) ** 2).sum())
    sse = np.array(residuals)
    weights = np.exp(-0.5 * max(1.0, 0.35 * times.size - 5) * (sse / sse.min() - 1))
    weights /= weights.sum()
    return np.tensordot(weights, np.stack(curves), 1), weights


@pytest.mark.parametrize("seen", [12, 30, STEPS.size])
def test_the_curve_is_averaged_over_all_nodes(seen: int) -> None:
    times = learning_rate_clock(LR).time(STEPS[:seen])
    at = np.linspace(0, 2 * times[-1], 9)
    grid = weigh_curves(times, LAYERS[:, :seen])
    average = grid.average(at)
    for i, values in enumerate(LAYERS[:, :seen]):
        slow, weights = _slow_average(times, values, at, members._NODE_B, members._NODE_C)
        # nodes that are nearly of lower rank are cut at slightly different places
        np.testing.assert_allclose(grid.weights[i], weights, atol=1e-4)
        np.testing.assert_allclose(average[i], slow, rtol=1e-3)


def test_a_long_history_enters_as_means_of_blocks() -> None:
    times = np.arange(640.0)
    values = np.log1p(times)[None] + 3
    long = weigh_curves(times, values)
    short = weigh_curves(times.reshape(64, 10).mean(axis=1), values.reshape(1, 64, 10).mean(axis=2))
    for field in dataclasses.fields(CurveGrid):
        np.testing.assert_allclose(getattr(long, field.name), getattr(short, field.name), rtol=1e-9, atol=1e-12)


def test_the_limit_of_a_settled_curve_is_found() -> None:
    grid = weigh_curves(np.arange(100.0), (10 - 8 * np.exp(-0.2 * np.arange(100.0)))[None])
    value, spread = grid.asymptotes()
    assert float((grid.weights * value).sum()) == pytest.approx(10, rel=1e-2)  # the nodes are .7 apart in ln b
    assert (spread > 0).all()


def test_the_trend_is_a_regression_over_the_last_half() -> None:
    log_values = np.log(LAYERS[:, :31])
    got = log_trend(STEPS[:31].astype(float), log_values, np.array([500.0, 900.0]))
    for row, values in zip(got, log_values, strict=True):
        line = np.polynomial.Polynomial.fit(np.log1p(STEPS[15:31]), values[15:], 1)
        np.testing.assert_allclose(row, line(np.log1p([500.0, 900.0])), rtol=1e-9)


def test_a_trend_of_one_time_is_level() -> None:
    np.testing.assert_array_equal(log_trend(np.zeros(6), np.ones((2, 6)), np.array([5.0])), np.ones((2, 1)))


def test_members_agree_with_the_last_points_seen() -> None:
    clock = learning_rate_clock(LR)
    steps = STEPS[:30].astype(float)
    paths, _ = member_paths(clock, steps, LAYERS[:, :30], steps[-5:])
    gap = (paths - np.log(LAYERS[:, 25:30])).mean(axis=2)
    np.testing.assert_allclose(gap[:-1], 0, atol=1e-9)  # the last value's is its own
    assert len(paths) == len(member_names(clock)) == 6
    assert member_names(step_clock()) == ("curve_step", "log_trend_step", "damped_trend", "last_value")


def test_a_member_that_was_wrong_counts_less() -> None:
    """A steady rise in ln(t + 1): trends were right at every origin, the last value never."""
    steps = STEPS.astype(float)
    rise = np.exp(0.5 * np.log1p(steps) + 0.01 * np.random.default_rng(3).standard_normal(steps.size))
    mixture = make_mixture(step_clock(), steps, rise[None], 2.0 * TOTAL)
    weights = dict(zip(member_names(step_clock()), mixture.weights[:, 0], strict=True))
    assert weights["log_trend_step"] > 3 * weights["last_value"]
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)


def test_what_a_path_says_of_a_step_does_not_depend_on_the_others() -> None:
    mixture = make_mixture(learning_rate_clock(LR), STEPS[:30].astype(float), LAYERS[:, :30], TOTAL)
    steps = np.array([550.0, 700.0, 1000.0])
    together = mixture.sample(steps)
    for i in range(3):
        np.testing.assert_allclose(mixture.sample(steps[i : i + 1])[:, :, :], together[:, i : i + 1], rtol=1e-9)


def test_the_damped_trend_goes_where_the_log_trend_goes_and_dies_away() -> None:
    clock, steps = learning_rate_clock(LR), STEPS[:30].astype(float)
    future = np.array([steps[-1] + 1, 600.0, 800.0, 1000.0])
    paths, _ = member_paths(clock, steps, LAYERS[:, :30], future)
    by_name = dict(zip(member_names(clock), paths, strict=True))
    now = np.log(LAYERS[:, 30 - members.ANCHOR : 30]).mean(axis=1)[:, None]
    ahead = np.log1p(clock.time(future)) - np.log1p(clock.time(steps[-1]))
    # the mean over the way of a slope that falls as e^(-ahead / DAMPING)
    kept = np.array([np.exp(-np.linspace(0, a, 20_001) / members.DAMPING).mean() for a in ahead])
    expected = now + (by_name["log_trend_learning_rate"] - now) * kept
    np.testing.assert_allclose(by_name["damped_trend"], expected, rtol=1e-4)  # of the mean over 20,001 places


def test_every_nodes_limit_is_that_of_its_least_squares() -> None:
    times = np.arange(60.0)
    values = 5 + 8 * np.exp(-0.02 * times) + np.log1p(times)
    grid = weigh_curves(times, values[None])
    found, _ = grid.asymptotes()
    s = times / times[-1]
    for node, (b, c) in enumerate(zip(members._NODE_B, members._NODE_C, strict=True)):
        columns = np.stack([np.ones_like(s), np.exp(-b * s), np.exp(-b * s) * np.log1p(s / c)], axis=1)
        solution, _, rank, singular = np.linalg.lstsq(columns, values, rcond=None)
        if rank == 3 and singular[-1] > 1e-4 * singular[0]:  # else the limit is no number to compare
            assert found[0, node] == pytest.approx(solution[0], rel=1e-5), (b, c)
