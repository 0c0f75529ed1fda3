"""Made-up runs with a rule that only other runs can teach: every ratio halves in the last part of the plan."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ma_monitor.learned.combiner import Combiner
from ma_monitor.learned.training import PastRun, train

Floats = NDArray[np.float64]
TOTAL = 600
STEPS = np.unique(np.concatenate([2 ** np.arange(5), np.arange(0, TOTAL + 1, 12)])).astype(float)
LR = np.linspace(1.0, 0.1, TOTAL + 1)


def past_run(seed: int, *, layers: int = 3, noise: float = 0.02) -> PastRun:
    """A run that rises as a logarithm, and halves from 60 to 80 % of the plan."""
    rng = np.random.default_rng(seed)
    rise = rng.uniform(0.1, 0.6, (layers, 1)) * np.log1p(STEPS)
    fall = np.log(2) * np.clip((STEPS / TOTAL - 0.6) / 0.2, 0, 1)
    ratios = np.exp(rng.uniform(1.5, 2.5, (layers, 1)) + rise - fall + noise * rng.standard_normal(rise.shape))
    return PastRun(f"shape {seed}", STEPS, ratios, LR)


@cache
def taught() -> Combiner:
    """What sixteen such runs teach."""
    return train([past_run(seed) for seed in range(16)], card={"about": "made up"})
