"""How uneven noise spreads into limit, peak and height: derivatives against differences."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.numerics.noise import _gradients, _jacobian
from ma_monitor.numerics.projection import flat_time

Floats = NDArray[np.float64]
POINTS = np.array(
    [[2.0, -8.0, 10.0, 6.0, np.log(0.1)], [1.0, -5.0, 20.0, 9.0, np.log(0.02)], [3.0, 0.5, 2.0, 0.8, 0.0]]
)
"""a0, a1, a2, b and ln c: two that peak within the window, one that still rises at its end."""
STEP = 1e-5
CENTRAL = 1e-6
"""Relative error of central differences with that step: its square, and rounding over it."""


def curve(s: Floats, parameters: Floats) -> Floats:
    a0, a1, a2, b, log_c = parameters
    return np.asarray(a0 + a1 * (1 - np.exp(-b * s)) + a2 * np.exp(-b * s) * np.log1p(s / np.exp(log_c)))


def slope(s: Floats, parameters: Floats) -> Floats:
    return (curve(s + 1e-4, parameters) - curve(s - 1e-4, parameters)) / 2e-4


def differences(function: object, s: Floats, parameters: Floats) -> Floats:
    """Central differences by each parameter: ``[n, 5]``."""
    columns = []
    for i in range(5):
        moved = np.zeros(5)
        moved[i] = STEP
        assert callable(function)
        columns.append((function(s, parameters + moved) - function(s, parameters - moved)) / (2 * STEP))
    return np.stack(columns, axis=1)


def test_the_jacobian_is_the_derivative() -> None:
    s = np.linspace(0.05, 1, 20)
    found = _jacobian(s, POINTS[:, 3], np.exp(POINTS[:, 4]), POINTS[:, :3])
    for row, parameters in zip(found, POINTS, strict=True):
        np.testing.assert_allclose(row, differences(curve, s, parameters), rtol=1e-4, atol=CENTRAL)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_directions_are_those_of_the_limit_the_peaks_slope_and_its_height(which: int) -> None:
    b, c = POINTS[:, 3], np.exp(POINTS[:, 4])
    limit, time, height = _gradients(1.0, b, c, POINTS[:, :3])
    parameters = POINTS[which]
    at = flat_time(b, c, POINTS[:, 1], POINTS[:, 2])[which]
    assert (0 < at < 1) == (which < 2)
    s = np.array([at if 0 < at < 1 else 1.0])
    np.testing.assert_array_equal(limit[which], [1, 1, 0, 0, 0])  # as s grows without end
    np.testing.assert_allclose(height[which], differences(curve, s, parameters)[0], rtol=1e-4, atol=CENTRAL)
    np.testing.assert_allclose(time[which], differences(slope, s, parameters)[0], rtol=1e-3, atol=1e-4)
