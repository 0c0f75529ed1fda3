"""The class of a trajectory: what every admissible curve of the profile likelihood agrees on."""

from __future__ import annotations

from enum import Enum

import numpy as np

from ma_monitor.numerics.profile import Evidence
from ma_monitor.numerics.projection import Floats

STEADY = 0.1
"""A trajectory is steady if its change is surely below this share of its level."""
LARGE = 20.0
"""A steady ratio above this is a trained model's: the largest of a probe's normally distributed activations is about 7
times their median, and untrained models measure 6 to 8."""


class TrajectoryClass(str, Enum):
    """How a layer's ratio develops over the steps that were measured.

    Decided by all curves that the data admit at the 80 % level (see ``profile``), not by the best one. What the data
    must show for each:

    * ``early_peak``: every admissible curve has its maximum inside the window, above both ends of it by at least 5 % of
      the curve's range: the rise and some of the fall have been seen.
    * ``log_increase``: every admissible curve is largest at the last step, or falls from its maximum by less than that
      (a plateau is no peak; an early dip does not matter).
    * ``decay``: every admissible curve is largest at the first step, likewise.
    * ``flat``: the change over the window is surely below 10 % of the level.
    * ``settled``: flat, and large: at least 20, where untrained models measure 6 to 8.
    * ``undetermined``: the admissible curves disagree, or there are too few points for any to be ruled out. More
      points, later points or less noise turn it into one of the others.
    """

    EARLY_PEAK = "early_peak"
    LOG_INCREASE = "log_increase"
    DECAY = "decay"
    FLAT = "flat"
    SETTLED = "settled"
    UNDETERMINED = "undetermined"

    @classmethod
    def of_steady(cls, level: float) -> TrajectoryClass:
        """The class of a trajectory that does not change, by its level."""
        return cls.SETTLED if abs(level) >= LARGE else cls.FLAT


def classify(evidence: Evidence, change: Floats, level: Floats) -> list[TrajectoryClass]:
    """The class of each series, from its evidence, the upper bound of its change and its level, ``[L]`` each."""
    shapes = np.stack([evidence.highest_first, evidence.highest_inside, evidence.highest_last])
    names = (TrajectoryClass.DECAY, TrajectoryClass.EARLY_PEAK, TrajectoryClass.LOG_INCREASE)
    classes = []
    for column, most, height in zip(shapes.T, change, np.abs(level), strict=True):
        if most <= STEADY * height:
            classes.append(TrajectoryClass.of_steady(float(height)))
        elif column.sum() == 1:
            classes.append(names[int(np.argmax(column))])
        else:
            classes.append(TrajectoryClass.UNDETERMINED)
    return classes
