"""What the page says of a run, in words and numbers ready for JSON: nothing that the data do not support."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.analysis import fit_run, forecast_run, sequence_ratios
from ma_monitor.numerics.fit import Fit
from ma_monitor.numerics.forecast import FORECAST, Forecast, LayerForecast
from ma_monitor.numerics.values import none_if_not_finite
from ma_monitor.numerics.variability import variability
from ma_monitor.report.comparison import listed
from ma_monitor.report.places import places
from ma_monitor.report.track import Record, track_record, track_words
from ma_monitor.report.words import (
    UNKNOWN,
    asymptote_words,
    band,
    compare,
    count,
    layers_words,
    number,
    peak_words,
    percent,
)
from ma_monitor.runs.store import Run

Floats = NDArray[np.float64]
MASSIVE, EXTREME = 100.0, 1000.0
"""From this ratio on a layer is said to carry massive activations; and the mark of Sun et al. (2024)."""
POINTS, THINNED, COLUMNS = 5000, 600, 240
"""Most measurements that are drawn of rank 1, of ranks 2 and 3, and as columns of a heat map."""
CURVE_POINTS = 160
DIGITS = 5
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


def summary(run: Run, tokenizer: Path | None = None) -> dict[str, Any]:
    """Everything that the page shows of a run.

    Args:
        run: The run; may hold no measurement yet.
        tokenizer: A ``tokenizer.json`` that turns token ids into text; looked for beside the run where None.
    """
    meta, measured = run.meta, len(run.steps)
    head = {"name": meta.model.name, "path": str(run.path), "measured": measured, "layers": meta.model.layers}
    warnings = [run.damage] if run.damage else []
    if not measured:
        return {**head, "now": None, "end": None, "live": True, "warnings": warnings, "about": about(run)}
    now, ratios = int(run.steps[-1]), run.ratios()
    fits, forecast, record = fit_run(run), forecast_run(run), track_record(run)
    documents = [{"layer": layer, **fit.to_dict()} for layer, fit in zip(run.layers, fits, strict=True)]
    each = sequence_ratios(run)
    plan = run.plan_at(now)
    end = None if plan is None else plan.total_steps
    rows = [
        layer_row(document, prediction, float(values[-1]), over=end is not None and now >= end)
        | {"cv": variability(own).cv_percent}
        for document, prediction, values, own in zip(documents, forecast.layers, ratios, each, strict=True)
    ]
    found = places(run, tokenizer)
    return {
        **head,
        "now": now,
        "end": end,
        "live": end is None or now < end,
        "warnings": warnings + not_finite(run) + faults(run),
        "headlines": headlines(rows, now, end, forecast, record),
        "rows": rows,
        "reasons": reasons(rows),
        "track": [one.to_dict() for one in record],
        "track_words": track_words(record),
        "hypotheses": compare(documents),
        "fits": documents,
        "variability": variability(each).to_dict(),
        "places": found,
        "about": about(run),
        "drawn": drawn(run, fits, forecast, each, found),
    }


def layer_row(document: dict[str, Any], prediction: LayerForecast, now: float, *, over: bool) -> dict[str, Any]:
    """One layer as the table shows it: where it is, where it is heading, and how sure that is.

    Args:
        document: Its fit.
        prediction: Its forecast.
        now: Its ratio at the last measurement.
        over: Whether the planned end has been reached.
    """
    known = prediction.to_dict()
    farthest = known["end"] or {}
    if not farthest and known["steps"]:
        farthest = {key: known[key][-1] for key in ("median", "p10", "p90")} | {"step": known["steps"][-1]}
    low, middle, high = (farthest.get(key) for key in ("p10", "median", "p90"))
    heading, sure = OUTCOMES[document["class"]], UNKNOWN
    if not over:
        heading, sure = towards(now, low, high)
    crossing = prediction.crossings.get(MASSIVE)
    best = {"curve": {"aicc": document["aicc"]}, **document["hypotheses"]}
    scored = {name: one["aicc"] for name, one in best.items() if one["aicc"] is not None}
    return {
        "layer": document["layer"],
        "now": none_if_not_finite(now),
        "infinite": bool(np.isinf(now)),
        "class": document["class"].replace("_", " "),
        "heading": heading,
        "sure": sure,
        "at": farthest.get("step"),
        "middle": middle,
        "low": low,
        "high": high,
        "end_words": band(middle, low, high),
        "r2": document["r2"],
        "peak": prediction.peak.step if prediction.peak and prediction.peak.identified else None,
        "peak_words": peak_words(known["peak"], planned=known["end"] is not None),
        "asymptote": known["asymptote"]["value"] if (known["asymptote"] or {}).get("identified") else None,
        "asymptote_words": asymptote_words(known["asymptote"]),
        "best": min(scored, key=scored.__getitem__).replace("_", " ") if scored else None,
        "passes": None if over or not crossing else (crossing.probability, crossing.step),
        "status": prediction.status,
    }


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
    rows: Sequence[dict[str, Any]], now: int, end: int | None, forecast: Forecast, record: Sequence[Record]
) -> list[dict[str, str]]:
    """The overview: which layers carry massive activations, where they are heading, how sure that is."""
    return [
        {"title": "Which layers", "text": _which(rows, now)},
        {"title": "Where they are heading", "text": _whither(rows, now, end)},
        {"title": "How sure that is", "text": _how_sure(rows, record, over=end is not None and now >= end)},
    ]


def _which(rows: Sequence[dict[str, Any]], now: int) -> str:
    ratios = {row["layer"]: math.inf if row["infinite"] else row["now"] for row in rows}
    known = {layer: ratio for layer, ratio in ratios.items() if ratio is not None}
    if not known:
        return f"No ratio is a number at step {now:,}."
    top = max(known, key=known.__getitem__)
    largest = f"layer {top}, at {number(known[top])} times the median"
    past = [layer for layer, ratio in known.items() if ratio >= MASSIVE]
    if not past:
        return (
            f"No layer carries massive activations at step {now:,} ({MASSIVE:g} times the median); largest: {largest}."
        )
    extreme = sum(ratio >= EXTREME for ratio in known.values())
    return (
        f"{len(past)} of {count(len(rows), 'layer')} {'carries' if len(past) == 1 else 'carry'} massive activations at "
        f"step {now:,} (at least {MASSIVE:g} times the median): {layers_words(past)}. Largest: {largest}. "
        + (f"{extreme} beyond {EXTREME:,.0f}." if extreme else f"None beyond {EXTREME:,.0f}.")
    )


def _whither(rows: Sequence[dict[str, Any]], now: int, end: int | None) -> str:
    kinds: dict[str, list[int]] = {}
    for row in rows:
        kinds.setdefault(row["heading"], []).append(row["layer"])
    told = "; ".join(f"{layers_words(layers)}: {kind}" for kind, layers in kinds.items())
    if end is not None and now >= end:
        return f"The training has reached its planned end. {told[0].upper()}{told[1:]}."
    ends = [row for row in rows if row["middle"] is not None]
    if not ends:
        return "Not forecast yet: a forecast needs six finite measurements that differ."
    top = max(ends, key=lambda row: row["middle"])
    until = f"the planned end, step {end:,}" if end is not None else f"step {top['at']:,} (no end is planned)"
    ahead = [row for row in rows if row["peak"] is not None and row["peak"] > now]
    peaks = [f"Layer {row['layer']} peaks at step {row['peak']:,.0f}." for row in ahead[:3]]
    passing = [
        f"Layer {row['layer']} passes {MASSIVE:g} near step {step:,.0f} ({percent(probability)} likely)."
        for row in rows
        for probability, step in filter(None, [row["passes"]])
        if probability >= LIKELY and row["now"] and row["now"] < MASSIVE
    ]
    largest = f"Largest then: layer {top['layer']}, {top['end_words']} (80 % band)."
    return " ".join([f"Until {until}: {told}.", largest, *passing[:3], *peaks])


def _how_sure(rows: Sequence[dict[str, Any]], record: Sequence[Record], *, over: bool) -> str:
    counts = [(kind, sum(row["sure"] == kind for row in rows)) for kind in ("sure", "fairly sure", "unsure")]
    told = ", ".join(f"{kind} for {count(many, 'layer')}" for kind, many in counts if many)
    first = f"The forecast is {told}. " if told and not over else ""
    return first + track_words(record)


def reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why layers are not forecast, where they are not."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row["status"], []).append(row["layer"])
    return [f"{layers_words(layers)}: {status}" for status, layers in found.items() if status != FORECAST]


def not_finite(run: Run) -> list[str]:
    """A warning where the last measurement met NaN or infinities."""
    stack = run.stack()
    bad = (stack.nan[-1] + stack.inf[-1]).sum(axis=1)
    layers = [run.meta.first_layer + int(row) for row in np.flatnonzero(bad)]
    entries = count(int(bad.sum()), "entry" if bad.sum() == 1 else "entrie")
    return (
        [f"Activations are not finite at step {stack.steps[-1]:,}: {entries}, {layers_words(layers)}."]
        if layers
        else []
    )


def faults(run: Run) -> list[str]:
    """A warning where the diary tells of faults."""
    told = [event for event in run.events if event.kind == "fault"]
    return [f"{count(len(told), 'fault')} on record; the latest: {told[-1].message}"] if told else []


def about(run: Run) -> dict[str, Any]:
    """Model, probe and provenance: name → value, in words; plans and diary."""
    meta, shape, probe = run.meta, run.meta.model, run.meta.probe
    numbers = {"layers": shape.layers, "width": shape.width, "heads": shape.heads, "vocabulary": shape.vocabulary}
    told = [f"{value:,} {name}" for name, value in {**numbers, "parameters": shape.parameters}.items() if value]
    reduced = {"ratio_of_means": "mean of the largest over mean of the medians (Eq. 8)"}
    facts = {
        "Run": str(run.path),
        "Model": ", ".join([shape.name, *([shape.family] if shape.family not in (None, shape.name) else [])]),
        "Shape": ", ".join(told),
        "Probe": f"{probe.sequences} sequences of {probe.length or 'unknown'} tokens, from {probe.source}",
        "Probe's SHA-256": probe.hash or "not known",
        "Ratio over sequences": reduced.get(meta.ratio, "mean of each sequence's ratio (Eq. 6 and 7)"),
        "Precision": meta.precision,
        "Entries kept": f"the {meta.k} largest of each sequence",
        "Versions": ", ".join(f"{name} {version}" for name, version in meta.versions.items()) or "not known",
    }
    plans = [
        f"from step {plan.from_step:,}: {plan.schedule}, {number(plan.total_steps)} steps"
        + (f", {plan.batch} sequences an update" if plan.batch else "")
        for plan in run.plans
    ]
    return {"facts": facts, "plans": plans, "events": [vars(event) for event in run.events[-20:]]}


def drawn(run: Run, fits: Sequence[Fit], forecast: Forecast, each: Floats, found: dict[str, Any]) -> dict[str, Any]:
    """The numbers behind the charts."""
    ratios, kept, few = run.ratios(), _spread(len(run.steps), POINTS), _spread(len(run.steps), THINNED)
    times = np.unique(np.r_[run.steps[0], np.geomspace(1, max(run.steps[-1], 1), CURVE_POINTS // 2)])
    times = np.unique(np.r_[times, np.linspace(run.steps[0], run.steps[-1], CURVE_POINTS // 2)])
    times = times[times >= run.steps[0]]
    stack, bands = run.stack(), [layer.quantiles for layer in forecast.layers]
    sizes = [
        {
            "step": int(stack.steps[when]),
            "lines": [figures(np.abs(stack.top[when, ..., rank]).mean(axis=1)) for rank in range(min(run.meta.k, 3))],
            "median": figures(stack.median[when].mean(axis=1)),
        }
        for when in (0, -1)
    ]
    return {
        "steps": run.steps[kept].tolist(),
        "ratios": figures(ratios[:, kept]),
        "few": few.tolist() if len(few) < len(kept) else None,
        "ranks": [figures(run.ratios(rank)[:, few]) for rank in range(2, min(run.meta.k, 3) + 1)],
        "curve_steps": figures(times),
        "curves": [None if fit.curve is None else figures(fit.curve.evaluate(times)) for fit in fits],
        "future": forecast.layers[0].steps.tolist(),
        "bands": [[figures(one[q]) for q in (0, 1, 3, 5, 6)] for one in bands],
        "peaks": [one.peak.step if one.peak and one.peak.identified else None for one in forecast.layers],
        "r2": [fit.r2 for fit in fits],
        "first_layer": run.meta.first_layer,
        "sizes": sizes,
        "maps": maps(run, each, found),
    }


def maps(run: Run, each: Floats, found: dict[str, Any]) -> dict[str, Any]:
    """Layer by step: the ratio, its spread over sequences, and how alike the place of the largest entry is.

    Args:
        run: The run.
        each: Ratios of the sequences, ``[L, T, n]``.
        found: What `places` found.
    """
    starts = _spread(len(run.steps), COLUMNS)
    size = np.diff(np.r_[starts, len(run.steps)])
    with np.errstate(all="ignore"):
        spread = (
            100 * each.std(axis=2, ddof=1) / each.mean(axis=2) if each.shape[2] > 1 else np.full(each.shape[:2], np.nan)
        )
    shares = [("channel", "in the layer's channel of today"), ("position", "at the layer's position of today")]

    def averaged(values: Floats) -> list[Any]:
        return figures(np.add.reduceat(values, starts, axis=1) / size)

    shown = [
        {"title": "largest / median", "log": True, "values": figures(np.fmax.reduceat(run.ratios(), starts, axis=1))}
    ]
    if found["rows"]:
        shown += [
            {
                "title": f"% of sequences with the largest entry {where}",
                "log": False,
                "values": averaged(100 * found[key]),
            }
            for key, where in shares
        ]
    if np.isfinite(spread).any():
        shown.append({"title": "spread over sequences (CV %)", "log": False, "values": averaged(spread)})
    for key in ("channel", "position"):
        found.pop(key)
    return {"steps": run.steps[starts].tolist(), "shown": shown}


def figures(values: Any) -> list[Any]:
    """Numbers in five significant digits as JSON has them, None where not finite."""
    array = np.asarray(values, dtype=np.float64)
    with np.errstate(all="ignore"):
        unit = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.abs(array))))
        short = np.round(array * unit) / unit
    return listed(np.where(np.isfinite(short), short, np.where(array == 0, 0.0, np.nan)))


def _spread(points: int, most: int) -> NDArray[np.intp]:
    """All of these, or ``most`` evenly spaced ones, the first and the last among them."""
    return np.unique(np.linspace(0, points - 1, min(points, most)).round().astype(np.intp))
