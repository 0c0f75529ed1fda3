"""What is expected of a training before it starts, and how that fades as measurements come.

Plain arrays in, plain arrays out: whoever has a prior of another making can use it here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
"""The levels of all quantiles, as forecasts give them."""


@dataclass(frozen=True, eq=False)
class Prior:
    """What is expected of every layer before anything is measured.

    Attributes:
        time: Relative times from 0 to 1: shares of all updates, each weighed by its learning rate, ``[G]``.
        quantiles: ln ratio at ``LEVELS``, ``[L, len(LEVELS), G]``.
    """

    time: Floats
    quantiles: Floats
