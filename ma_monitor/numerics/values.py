"""What counts as a value: the bounds that fit and forecast share, and null in JSON for what is not a number."""

from __future__ import annotations

import math
from typing import SupportsFloat

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
