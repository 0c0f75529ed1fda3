"""A run's own track record: earlier forecasts against what came.

Nothing is kept for it. A forecast depends on nothing but what had been measured and planned by then, so that made again
it is what was said then, bit for bit; and imported, merged and replayed runs have a record too. Those that count were
made at refits, the first at or after each power of two of steps: what they said was logged then, and as a run goes on
the same ones are looked at again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.analysis import forecast_run, refits
from ma_monitor.numerics.forecast import FORECAST
from ma_monitor.numerics.values import LARGEST, none_if_not_finite
from ma_monitor.report.comparison import figures
from ma_monitor.report.words import count, percent
from ma_monitor.runs.store import Run

MOST = 4
"""At most so many earlier forecasts are looked at, the latest."""
LATER = 60
"""At most so many later measurements are compared."""
LEAST = 3
"""Fewer compared measurements say nothing."""
AHEAD = (1.0, 1.5, 3.0, np.inf)
"""How far ahead is told apart: later step over the forecast's own, in these parts."""


@dataclass(frozen=True, eq=False)
class Record:
    """One earlier forecast, made from nothing measured after ``at``, and what came.

    Attributes:
        at: Step at which it was made.
        steps: Later measurements compared, ``[G]``.
        quantiles: The forecast's 2.5, 10, 50, 90 and 97.5 % quantiles, ``[5, L, G]``, NaN for layers not forecast.
        last: Ratio when it was made, ``[L]``.
        came: Ratio that came, ``[L, G]``; NaN where there is nothing to compare.
    """

    at: int
    steps: NDArray[np.int64]
    quantiles: NDArray[np.float64]
    last: NDArray[np.float64]
    came: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: its scores, and the bands as the page draws them."""
        return {
            "at": self.at,
            **scores([self]),
            "steps": self.steps.tolist(),
            "bands": figures(self.quantiles[1:4]),
        }


def origins(steps: NDArray[np.int64]) -> list[int]:
    """How many points there were at the first refit at or after each power of two of steps."""
    first: dict[int, int] = {}
    for points in refits(len(steps)):
        first.setdefault(int(steps[points - 1]).bit_length(), points)
    return list(first.values())


def track_record(run: Run, *, at: int | None = None, rank: int = 1) -> list[Record]:
    """The latest of the forecasts made at `origins`, made again, against what was measured up to step ``at``.

    Those of which no layer could be forecast are left out.
    """
    steps = run.steps if at is None else run.steps[run.steps <= at]
    cuts = [points for points in origins(steps) if points <= len(steps) - LEAST][-MOST:]
    found = (_record(run, cut, len(steps), rank) for cut in cuts)
    return [record for record in found if np.isfinite(record.came).any()]


def _record(run: Run, cut: int, seen: int, rank: int) -> Record:
    """The forecast from the first ``cut`` of ``seen`` measurements."""
    later = np.unique(np.linspace(cut, seen - 1, LATER).round().astype(int))
    at, steps, ratios = int(run.steps[cut - 1]), run.steps[later], run.ratios(rank)
    made = forecast_run(run, at=at, grid=[int(step) for step in steps], rank=rank)
    known = np.array([layer.status == FORECAST for layer in made.layers])[:, None]
    came = ratios[:, later]
    return Record(
        at=at,
        steps=steps,
        quantiles=np.stack([layer.quantiles[[0, 1, 3, 5, 6]] for layer in made.layers], axis=1),
        last=ratios[:, cut - 1],
        came=np.where(known & (came > 0) & (came < LARGEST), came, np.nan),
    )


def scores(records: Sequence[Record], over: float = AHEAD[0], up_to: float = AHEAD[-1]) -> dict[str, Any]:
    """How forecasts fared, every ratio counting alike.

    Args:
        records: The forecasts.
        over: Only steps beyond so many times the forecast's own.
        up_to: Only those up to so many times it.

    Returns:
        ``compared``, the number of ratios; ``error``, the mean abs error of the median in ln ratio; ``last_value``, the
        same of the last ratio seen; ``held`` and ``held95``, the shares of what came inside the 80 and 95 % bands. None
        where nothing was compared.
    """
    parts = []
    for one in records:
        ahead = one.steps / max(one.at, 1)
        usable = np.isfinite(one.came) & (ahead > over) & (ahead <= up_to)
        last = np.broadcast_to(one.last[:, None], one.came.shape)
        parts.append(np.log([each[usable] for each in (one.came, last, *one.quantiles)]))
    came, last, p2_5, p10, median, p90, p97_5 = np.concatenate(parts, axis=1) if parts else np.zeros((7, 0))
    found = {
        "error": np.abs(median - came),
        "last_value": np.abs(last - came),
        "held": (p10 <= came) & (came <= p90),
        "held95": (p2_5 <= came) & (came <= p97_5),
    }
    return {"compared": came.size, **{name: float(v.mean()) if v.size else None for name, v in found.items()}}


def track_document(records: Sequence[Record]) -> dict[str, Any]:
    """The record as ``ma-monitor forecast --json`` prints it: scores of all, by how far ahead, and each forecast's.

    Each forecast says of the latest step compared what it said of every layer, and what came.
    """
    ahead = [
        {"over": over, "up_to": none_if_not_finite(up_to), **scores(records, over, up_to)}
        for over, up_to in zip(AHEAD[:-1], AHEAD[1:], strict=True)
    ]
    forecasts = [
        {"at": one.at, **scores([one]), "step": int(one.steps[-1]), "layers": _said_last(one)} for one in records
    ]
    return {**scores(records), "ahead": ahead, "forecasts": forecasts}


def _said_last(one: Record) -> list[dict[str, Any]]:
    """What was said of the latest step compared, a layer each, and what came."""
    columns = (*one.quantiles[1:4, :, -1], one.came[:, -1])
    names = ("p10", "median", "p90", "came")
    return [
        {"layer": layer, **dict(zip(names, map(none_if_not_finite, values), strict=True))}
        for layer, values in enumerate(zip(*columns, strict=True), start=1)
    ]


def track_key(record: Sequence[Record]) -> str:
    """How earlier forecasts of this run fared, in a few words."""
    return f"80 % bands held {percent(scores(record)['held'])}" if record else "No track record yet"


def track_words(record: Sequence[Record]) -> str:
    """The same in two sentences: of all that came, and by how far ahead a forecast looked."""
    if not record:
        return "This run is too young for its forecasts to have a track record."
    fared = scores(record)
    error, last = (np.exp(fared[name]) for name in ("error", "last_value"))
    parts = []
    for over, up_to in zip(AHEAD[:-1], AHEAD[1:], strict=True):
        part = scores(record, over, up_to)
        if part["compared"]:
            where = f"up to {up_to:g}" if np.isfinite(up_to) else f"beyond {over:g}"
            parts.append(f"{where} times its step {percent(part['held'])}, a factor of {np.exp(part['error']):.2f}")
    return (
        f"Of what came after {count(len(record), 'earlier forecast')} of this run, their 80 % bands held "
        f"{percent(fared['held'])}; the middle was off by a factor of {error:.2f} on average "
        f"(the last value: {last:.2f}). By how far ahead a forecast looked: {'; '.join(parts)}."
    )
