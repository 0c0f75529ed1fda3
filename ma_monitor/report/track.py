"""A run's own track record: earlier forecasts against what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.analysis import forecast_run
from ma_monitor.numerics.forecast import FORECAST
from ma_monitor.numerics.values import LARGEST
from ma_monitor.report.comparison import figures
from ma_monitor.report.words import percent
from ma_monitor.runs.store import Run

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the measured steps after which a forecast is made again."""
LATER = 60
"""At most so many later measurements are compared."""
LEAST = 3
"""Fewer compared measurements say nothing."""


@dataclass(frozen=True, eq=False)
class Record:
    """One earlier forecast, made from nothing measured after ``at``, and what came. Errors are in ln ratio.

    Attributes:
        at: Step at which it was made.
        steps: Later measurements compared, ``[G]``.
        quantiles: The forecast's 10, 50 and 90 % quantiles, ``[3, L, G]``, NaN for layers not forecast.
        compared: Number of ratios compared.
        error: Mean abs error of the median.
        last_value: The same for the last ratio seen, held constant.
        held: Share of what came inside the 80 % band.
        held95: The same of the 95 % band.
    """

    at: int
    steps: NDArray[np.int64]
    quantiles: NDArray[np.float64]
    compared: int
    error: float
    last_value: float
    held: float
    held95: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        scores = {name: getattr(self, name) for name in ("at", "compared", "error", "last_value", "held", "held95")}
        return {**scores, "steps": self.steps.tolist(), "bands": figures(self.quantiles)}


def track_record(run: Run) -> list[Record]:
    """Forecasts made again at a few earlier steps, exactly as they were or would have been made then.

    A forecast depends on nothing but what had been measured and planned by then, so it need not have been kept.
    Origins at which no layer can be forecast are left out.
    """
    cuts = {int(np.searchsorted(run.steps, share * run.steps[-1], side="right")) for share in SHARES}
    found = (_record(run, cut) for cut in sorted(cuts) if 0 < cut <= len(run.steps) - LEAST)
    return [record for record in found if record is not None]


def _record(run: Run, cut: int) -> Record | None:
    """The forecast from the first ``cut`` measurements."""
    later = np.unique(np.linspace(cut, len(run.steps) - 1, LATER).round().astype(int))
    at, steps, ratios = int(run.steps[cut - 1]), run.steps[later], run.ratios()
    made = forecast_run(run, at=at, grid=[int(step) for step in steps])
    bands = np.stack([layer.quantiles for layer in made.layers], axis=1)  # [7, L, G]
    came = ratios[:, later]
    usable = (came > 0) & (came < LARGEST) & np.array([layer.status == FORECAST for layer in made.layers])[:, None]
    if not usable.any():
        return None
    truth = np.log(came[usable])
    p2_5, p10, _, median, _, p90, p97_5 = (np.log(band[usable]) for band in bands)
    last = np.log(np.broadcast_to(ratios[:, cut - 1 : cut], came.shape)[usable])
    return Record(
        at=at,
        steps=steps,
        quantiles=bands[[1, 3, 5]],
        compared=truth.size,
        error=float(np.abs(median - truth).mean()),
        last_value=float(np.abs(last - truth).mean()),
        held=float(((p10 <= truth) & (truth <= p90)).mean()),
        held95=float(((p2_5 <= truth) & (truth <= p97_5)).mean()),
    )


def track_key(record: Sequence[Record]) -> str:
    """How earlier forecasts of this run fared, in a few words."""
    return f"80 % bands held {percent(_mean(record, 'held'))}" if record else "No track record yet"


def track_words(record: Sequence[Record]) -> str:
    """The same in a sentence."""
    if not record:
        return "This run is too young for its forecasts to have a track record."
    error, last = (np.exp(_mean(record, name)) for name in ("error", "last_value"))
    return (
        f"Of what came after {len(record)} earlier forecasts of this run, their 80 % bands held "
        f"{percent(_mean(record, 'held'))}; the middle was off by a factor of {error:.2f} on average "
        f"(the last value: {last:.2f})."
    )


def _mean(record: Sequence[Record], name: str) -> float:
    """A score over all that was compared."""
    return float(np.average([getattr(one, name) for one in record], weights=[one.compared for one in record]))
