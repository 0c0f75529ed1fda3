"""Numbers on their way to JSON: null stands for unbounded, unknown or not finite."""

from __future__ import annotations

import math
from typing import SupportsFloat


def none_if_not_finite(value: SupportsFloat | None) -> float | None:
    """The value as a Python float, or None where there is none or it is NaN or infinite (JSON has neither)."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None
