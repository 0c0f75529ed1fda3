"""How much a layer's ratio differs from one sequence of the probe to another (paper, Table 2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from ma_monitor.numerics.values import LARGEST

CONFIDENCE = 0.95
"""Probability of the interval."""


@dataclass(frozen=True)
class Variability:
    """Spread over sequences in percent of their mean, averaged over measurements; None where none has two sequences.

    Attributes:
        cv_percent: Coefficient of variation: standard deviation (of n - 1) over the mean.
        sem_percent: Standard error of the mean, CV/√n.
        ci95_percent: Half width of the mean's 95 % interval by Student's t with n - 1 degrees of freedom.
        measurements: Number of measurements (a step of a layer) averaged.
    """

    cv_percent: float | None
    sem_percent: float | None
    ci95_percent: float | None
    measurements: int

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON has them."""
        return asdict(self)


def variability(ratios: ArrayLike) -> Variability:
    """The three numbers of the paper's Table 2, which fit one another as computed here (its CI is 2.262 SEM at n = 10).

    Args:
        ratios: Ratio of each sequence at each measurement, ``[..., n]``. What is not finite is left out, and
            so is a measurement with fewer than two sequences or a mean of 0.
    """
    values = np.asarray(ratios, dtype=np.float64)
    values = values.reshape(-1, values.shape[-1])
    usable = np.abs(values) <= LARGEST  # False for NaN
    n = usable.sum(axis=1)
    values, usable, n = values[n >= 2], usable[n >= 2], n[n >= 2]
    mean = np.where(usable, values, 0.0).sum(axis=1) / n
    deviation = np.sqrt((np.where(usable, values - mean[:, None], 0.0) ** 2).sum(axis=1) / (n - 1))
    known = mean > 0
    if not known.any():
        return Variability(None, None, None, 0)
    cv = 100 * deviation[known] / mean[known]
    sem = cv / np.sqrt(n[known])
    sizes, place = np.unique(n[known], return_inverse=True)  # one quantile a size: they are slow
    half = np.asarray(student.ppf((1 + CONFIDENCE) / 2, sizes - 1))[place] * sem
    return Variability(float(cv.mean()), float(sem.mean()), float(half.mean()), int(known.sum()))
