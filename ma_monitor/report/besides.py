"""What was read besides the ratio, ready to be shown: the layers at a step, and layer by step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.values import none_if_not_finite
from ma_monitor.phenomena import METRICS
from ma_monitor.runs.store import Run


def phenomena_then(run: Run, step: int) -> dict[str, NDArray[np.float64]]:
    """What was read besides the measurement of a step, where that is one number a layer row: metric → ``[R]``."""
    found = run.phenomena_at(step)
    return {key: values for key in METRICS if (values := found.get(key)) is not None and values.ndim == 1}


def phenomena_rows(run: Run, step: int) -> list[dict[str, Any]]:
    """One measurement, a row a layer: ``layer`` and every metric (None = not known); empty where none was read."""
    besides = phenomena_then(run, step)
    columns = {key: [none_if_not_finite(float(one)) for one in values] for key, values in besides.items()}
    rows = range(run.meta.rows if columns else 0)
    return [{"layer": run.meta.first_layer + row, **{key: own[row] for key, own in columns.items()}} for row in rows]


def phenomena_over_steps(run: Run) -> dict[str, NDArray[np.float64]]:
    """Every metric of one size a layer at every measured step: metric → ``[L, T]``, NaN where it was not read."""
    found, maps = run.phenomena(), {}
    for key, metric in METRICS.items():
        if (readings := found.get(key)) is not None and readings.values.ndim == 2 and not metric.index:
            whole = np.full((len(run.layers), len(run.steps)), np.nan)
            whole[:, np.searchsorted(run.steps, readings.steps)] = readings.values.T[1 - run.meta.first_layer :]
            if np.isfinite(whole).any():
                maps[key] = whole
    return maps
