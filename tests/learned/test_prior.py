"""The prior's quantiles once something is known, and with a forecast: against Gaussians worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from ma_monitor.learned.prior import FIRST, LEVELS, MEMORY, MIDDLE, Prior, combined, conditioned

TIME = np.array([0.0, 0.25, 0.5, 1.0])
NORMAL = norm.ppf(LEVELS)


def gaussian(mean: list[float], deviation: list[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Quantiles of one layer, ``[1, 7, M]``."""
    return np.asarray(mean)[None, None] + np.multiply.outer(NORMAL, deviation)[None]


PRIOR = Prior(TIME, gaussian([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.4, 0.8]))


def test_conditioned_is_the_gaussian_given_one_value() -> None:
    now, at, seen = 0.25, np.array([0.5, 1.0]), np.array([2.3])
    out = conditioned(PRIOR, now, seen, at)
    for column, (mean, deviation, ahead) in enumerate(((3.0, 0.4, 0.5), (4.0, 0.8, 1.0))):
        correlation = (now / ahead) ** (1 / math.log(MEMORY))
        expected = mean + correlation * deviation * (2.3 - 2.0) / 0.2
        left = deviation * math.sqrt(1 - correlation**2)
        np.testing.assert_allclose(out[0, :, column], expected + left * NORMAL, rtol=1e-9)


def test_what_was_measured_now_is_known_and_what_is_far_is_not() -> None:
    now = np.array([0.25])
    out = conditioned(PRIOR, 0.25, np.array([2.3]), now)
    np.testing.assert_allclose(out[0, :, 0], 2.3, rtol=1e-12)
    early = conditioned(PRIOR, 0.0, np.array([9.0]), np.array([1.0]))
    kept = FIRST ** (1 / math.log(MEMORY))  # time 0 counts as FIRST
    assert early[0, MIDDLE, 0] == pytest.approx(4.0 + kept * 0.8 * 80, rel=1e-9)


def test_between_its_times_the_prior_goes_straight() -> None:
    out = conditioned(PRIOR, 0.25, np.array([2.0]), np.array([0.75]))
    assert out[0, MIDDLE, 0] == pytest.approx(3.5)


def test_combined_weighs_by_variance_and_time() -> None:
    expected, forecast = gaussian([0.0], [1.0]), gaussian([3.0], [2.0])
    for now in (0.0, 0.1, 0.5):
        share = (1 - now) * 4 / 5
        np.testing.assert_allclose(
            combined(expected, forecast, now)[0, :, 0], (1 - share) * 3 + (share + 2 * (1 - share)) * NORMAL, rtol=1e-9
        )
        np.testing.assert_allclose(
            combined(expected, forecast, now, 0.25),
            0.25 * combined(expected, forecast, now) + 0.75 * forecast,
            rtol=1e-12,
        )
    np.testing.assert_array_equal(combined(expected, forecast, 1.0), forecast)
    np.testing.assert_array_equal(combined(expected, forecast, 0.1, 0.0), forecast)


def test_two_certain_forecasts() -> None:
    sure = gaussian([1.0], [0.0])
    np.testing.assert_array_equal(combined(sure, sure, 0.0), sure)
