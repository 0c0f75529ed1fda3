"""What counts as a value: the bounds that fit and forecast share, null in JSON, and values between points."""

from __future__ import annotations

import math
from typing import SupportsFloat

import numpy as np
from numpy.typing import NDArray

MIN_POINTS = 6
"""Points that a fit or forecast needs: one more than the curve has parameters."""
LARGEST = 1e100
"""A ratio beyond this is left out as an infinite one is: its square would not fit a float."""


def none_if_not_finite(value: SupportsFloat | None) -> float | None:
    """The value as a Python float, or None where there is none or it is NaN or infinite (JSON has neither)."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def interpolate(at: NDArray[np.float64], x: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """``np.interp`` for many rows over the same ``x``: values ``[…, G]`` of ``rows […, n]`` at ``at [G]``."""
    place = np.clip(np.searchsorted(x, at, side="right"), 1, max(1, x.size - 1))
    upper = np.minimum(place, x.size - 1)
    width = x[upper] - x[place - 1]
    share = np.clip((at - x[place - 1]) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    return np.asarray(rows[..., place - 1] + (rows[..., upper] - rows[..., place - 1]) * share)
