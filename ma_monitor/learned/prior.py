"""What is expected of a training before it starts, and how that fades as measurements come.

Plain arrays in, plain arrays out: whoever has a prior of another making can use it here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.forecast import QUANTILES
from ma_monitor.numerics.values import interpolate

Floats = NDArray[np.float64]
LEVELS = QUANTILES
"""The levels of all quantiles: those of a forecast."""


@dataclass(frozen=True, eq=False)
class Prior:
    """What is expected of every layer before anything is measured.

    Attributes:
        time: Relative times from 0 to 1: shares of all updates, each weighed by its learning rate, ``[G]``.
        quantiles: ln ratio at ``LEVELS``, ``[L, len(LEVELS), G]``.
        trust: What it is worth beside a forecast: 1 where its own quantiles say it all, towards 0 where it was learned
            from trainings unlike this one.
    """

    time: Floats
    quantiles: Floats
    trust: float = 1.0


MEMORY = 3.0
"""Factor of relative time after which what was learned of a deviation is worth 1/e."""
FIRST = 1e-3
"""Relative times below this count as this: nothing is known about the very first updates."""
MIDDLE = LEVELS.index(0.5)
_TO_DEVIATION = 2 * 1.2815515655446004
"""Width of a Gaussian's 80 % interval, in standard deviations."""


def conditioned(prior: Prior, now: float, seen: Floats, at: Floats) -> Floats:
    """The prior of later times once the ratio at one time is known.

    A layer above what was expected of it stays above, the less the farther ahead: deviations, in units of their spread,
    are taken to be correlated as (earlier / later time)^(1 / ln ``MEMORY``).

    Args:
        prior: What was expected.
        now: Relative time of what was measured.
        seen: ln ratio then, a mean over a few neighbouring measurements, ``[L]``.
        at: Relative times asked for, from ``now`` on, ``[M]``.

    Returns:
        Quantiles of ln ratio at ``LEVELS``, ``[L, len(LEVELS), M]``.
    """
    expected, later = _at(prior, np.array([now])), _at(prior, at)
    surprise = (seen - expected[:, MIDDLE, 0]) / _spread(expected)[:, 0]
    kept = (np.maximum(now, FIRST) / np.maximum(at, FIRST)) ** (1 / np.log(MEMORY))
    middle = later[:, MIDDLE] + kept * surprise[:, None] * _spread(later)
    narrowed = np.sqrt(1 - np.minimum(kept, 1.0) ** 2)
    return np.asarray(middle[:, None] + narrowed * (later - later[:, MIDDLE, None]))


def combined(expected: Floats, forecast: Floats, now: float, trust: float = 1.0) -> Floats:
    """Quantiles of a forecast with those expected of it beforehand, weighed by how sure each is.

    Quantiles are averaged, each pair of one level: the shares are those of the inverse variances, the prior's times
    ``trust`` and 1 - ``now``, so that it is gone at the end. Errors of the two are alike in part, which is why the
    result is not made narrower than both.

    Args:
        expected: Quantiles of ln ratio, ``[L, len(LEVELS), M]``.
        forecast: The same of the forecast.
        now: Relative time at which the forecast was made.
        trust: `Prior.trust`.
    """
    own, other = _spread(expected) ** 2, _spread(forecast) ** 2
    share = trust * (1 - now) * other / np.maximum(own + other, np.finfo(float).tiny)
    return np.asarray(share[:, None] * expected + (1 - share[:, None]) * forecast)


def _at(prior: Prior, times: Floats) -> Floats:
    """The prior's quantiles at other times ``[M]``: ``[L, len(LEVELS), M]``."""
    return interpolate(times, prior.time, prior.quantiles)


def _spread(quantiles: Floats) -> Floats:
    """Standard deviation of the Gaussian with that 80 % interval: ``[L, M]`` of ``[L, len(LEVELS), M]``."""
    return np.asarray((quantiles[:, LEVELS.index(0.9)] - quantiles[:, LEVELS.index(0.1)]) / _TO_DEVIATION)
