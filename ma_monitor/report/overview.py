"""The overview in words: which layers carry massive activations, where each is heading, how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ma_monitor.numerics.forecast import FORECAST
from ma_monitor.report.track import Record, scores, track_key, track_words
from ma_monitor.report.words import count, layers_words, number, percent

MASSIVE, EXTREME = 100.0, 1000.0
"""From this ratio on a layer is said to carry massive activations; and the mark of Sun et al. (2024)."""
SURE, FAIRLY = 1.25, 2.0
"""An 80 % band whose ends differ by less than these factors is called sure, or fairly sure."""
LIKELY = 0.5
"""Crossings of this probability or more are told."""
OUTCOMES = {
    "early_peak": "peaked, then fell",
    "log_increase": "rose until the last step",
    "decay": "fell from the start",
    "flat": "did not change",
    "settled": "large and steady",
    "undetermined": "no clear shape",
}
"""Class of a trajectory → what has come of it, in words."""


def towards(now: float, low: float | None, high: float | None) -> tuple[str, str]:
    """Where a layer is heading and how sure that is, from its ratio now and the 80 % band of where it ends."""
    if low is None or high is None or not math.isfinite(now):
        return "not forecast", "unknown"
    width = high / low if low > 0 else math.inf
    sure = "sure" if width <= SURE else "fairly sure" if width <= FAIRLY else "unsure"
    if low > now:
        return "rising", sure
    if high < now:
        return "falling", sure
    return ("about level" if width <= SURE else "open (up or down)"), sure


def headlines(
    rows: Sequence[dict[str, Any]], now: int, end: int | None, record: Sequence[Record]
) -> list[dict[str, str]]:
    """The overview: which layers carry massive activations, where they are heading, how sure that is.

    Returns:
        For each of the three its ``title``, the few words to be read first as ``key``, and the sentences as ``text``.
    """
    over = end is not None and now >= end
    told = {
        "Which layers": _which(rows, now),
        "Where they are heading": _whither(rows, now, end),
        "How sure that is": _how_sure(rows, record, over=over),
    }
    return [{"title": title, "key": key, "text": text} for title, (key, text) in told.items()]


def _which(rows: Sequence[dict[str, Any]], now: int) -> tuple[str, str]:
    ratios = {row["layer"]: math.inf if row["infinite"] else row["now"] for row in rows}
    known = {layer: ratio for layer, ratio in ratios.items() if ratio is not None}
    if not known:
        return "Not known", f"No ratio is a number at step {now:,}."
    top = max(known, key=known.__getitem__)
    past = [layer for layer, ratio in known.items() if ratio >= MASSIVE]
    extreme = sum(ratio >= EXTREME for ratio in known.values())
    text = f"Largest at step {now:,}: layer {top}, {number(known[top])} times the median."
    if not past:
        return (
            f"0 of {count(len(rows), 'layer')} massive",
            f"{text} From {MASSIVE:g} times on, activations count as massive.",
        )
    beyond = f"{extreme} beyond {EXTREME:,.0f}." if extreme else f"None beyond {EXTREME:,.0f}."
    are = "is" if len(past) == 1 else "are"
    words = layers_words(past)
    return (
        f"{len(past)} of {count(len(rows), 'layer')} massive",
        f"{words[0].upper()}{words[1:]} {are} at {MASSIVE:g} times the median or more. {text} {beyond}",
    )


def _whither(rows: Sequence[dict[str, Any]], now: int, end: int | None) -> tuple[str, str]:
    kinds: dict[str, list[int]] = {}
    for row in rows:
        kinds.setdefault(row["heading"], []).append(row["layer"])
    told = "; ".join(f"{layers_words(layers)}: {kind}" for kind, layers in kinds.items())
    told = f"{told[0].upper()}{told[1:]}."
    if end is not None and now >= end:
        usual = max(kinds, key=lambda kind: len(kinds[kind]))
        return usual[0].upper() + usual[1:], f"The training has reached its planned end. {told}"
    ends = [row for row in rows if row["middle"] is not None]
    if not ends:
        return "Not forecast yet", "A forecast needs six finite measurements that differ."
    top = max(ends, key=lambda row: row["middle"])
    until = f"the planned end, step {end:,}" if end is not None else f"step {top['at']:,} (no end is planned)"
    ahead = [row for row in rows if row["peak"] is not None and row["peak"] > now]
    peaks = [f"Layer {row['layer']} peaks at step {row['peak']:,.0f}." for row in ahead[:3]]
    passing = [
        f"Layer {row['layer']} passes {MASSIVE:g} near step {step:,.0f} ({percent(probability)} likely)."
        for row in rows
        for probability, step in filter(None, [row["passes"]])
        if probability >= LIKELY and step > now
    ]
    key = f"Layer {top['layer']}: {number(top['now'])} → {top['end_words']}"
    return key, " ".join([f"The largest at {until}, with its 80 % band.", *passing[:3], *peaks, told])


def _how_sure(rows: Sequence[dict[str, Any]], record: Sequence[Record], *, over: bool) -> tuple[str, str]:
    counts = [(kind, sum(row["sure"] == kind for row in rows)) for kind in ("sure", "fairly sure", "unsure")]
    told = ", ".join(f"{kind} for {count(many, 'layer')}" for kind, many in counts if many)
    first = f"The forecast is {told}. " if told and not over else ""
    if not record:
        return track_key(record), first + track_words(record)
    off = f"{math.exp(scores(record)['error']):.2f}"
    return track_key(
        record
    ), f"{first}Earlier forecasts of this run were off by a factor of {off} on average; more below."


def reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why layers are not forecast, where they are not."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row["status"], []).append(row["layer"])
    return [f"{layers_words(layers)}: {status}" for status, layers in found.items() if status != FORECAST]
