"""What the page says of a run, in words and numbers ready for JSON: nothing that the data do not support."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.analysis import fit_run, forecast_run, planned_end, sequence_ratios
from ma_monitor.errors import StoreError
from ma_monitor.numerics.fit import Fit
from ma_monitor.numerics.forecast import Forecast, LayerForecast
from ma_monitor.numerics.values import none_if_not_finite
from ma_monitor.numerics.variability import variability
from ma_monitor.phenomena import METRICS
from ma_monitor.report.ablation import Ablation, read_ablation
from ma_monitor.report.besides import phenomena_over_steps, phenomena_rows
from ma_monitor.report.comparison import figures
from ma_monitor.report.normal import among_past_runs, normal_words
from ma_monitor.report.overview import MASSIVE, OUTCOMES, headlines, reasons, towards
from ma_monitor.report.places import findings, places
from ma_monitor.report.track import track_record, track_words
from ma_monitor.report.words import (
    UNKNOWN,
    asymptote_words,
    band,
    best_hypothesis,
    compare,
    count,
    layers_words,
    number,
    peak_words,
    shown,
)
from ma_monitor.runs.store import Run

Floats = NDArray[np.float64]
POINTS, THINNED, COLUMNS = 5000, 600, 240
"""Most measurements that are drawn of rank 1, of ranks 2 and 3, and as columns of a heat map."""
LABEL = 24
"""Characters of a name inside a chart."""
ALERTS = 5
"""Alerts shown: the latest."""
CURVE_POINTS = 160


def summary(run: Run, tokenizer: Path | None = None) -> dict[str, Any]:
    """Everything that the page shows of a run.

    Args:
        run: The run; may hold no measurement yet.
        tokenizer: A ``tokenizer.json`` that turns token ids into text; looked for beside the run where None.
    """
    meta, measured = run.meta, len(run.steps)
    name = meta.model.name
    head = {"name": name, "label": shown(name, LABEL), "measured": measured, "layers": meta.model.layers}
    warnings = [run.damage] if run.damage else []
    if not measured:
        return {**head, "now": None, "end": None, "live": True, "warnings": warnings, "about": about(run)}
    now, ratios = int(run.steps[-1]), run.ratios()
    fits, forecast, record = fit_run(run), forecast_run(run), track_record(run)
    documents = [{"layer": layer, **fit.to_dict()} for layer, fit in zip(run.layers, fits, strict=True)]
    each = sequence_ratios(run)
    end = planned_end(run, now)
    rows = [
        layer_row(document, prediction, float(values[-1]), over=end is not None and now >= end)
        | {"cv": variability(own).cv_percent}
        for document, prediction, values, own in zip(documents, forecast.layers, ratios, each, strict=True)
    ]
    found, beside = places(run, tokenizer), among_past_runs(run, now)
    ablation, problems = ablation_of(run)
    return {
        **head,
        "now": now,
        "end": end,
        "live": end is None or now < end,
        "warnings": warnings + not_finite(run) + faults(run) + problems,
        "alerts": [event.message.partition(" ")[2] for event in run.events if event.kind == "alert"][-ALERTS:],
        "headlines": headlines(rows, now, end, record),
        "rows": rows,
        "reasons": reasons(rows),
        "rests_on": forecast.rests_on,
        "track": [one.to_dict() for one in record],
        "track_words": track_words(record),
        "normal": normal_words(beside) if beside else None,
        "hypotheses": compare(documents),
        "fits": documents,
        "variability": variability(each).to_dict(),
        "places": found,
        "besides": phenomena_rows(run, now),
        "findings": findings(run),
        "ablation": ablation,
        "metrics": {key: metric.title for key, metric in METRICS.items()},
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
    best = best_hypothesis({"curve": {"aicc": document["aicc"]}, **document["hypotheses"]})
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
        "best": best and best.replace("_", " "),
        "passes": None if over or not crossing else (crossing.probability, crossing.step),
        "status": prediction.status,
    }


def not_finite(run: Run) -> list[str]:
    """A warning where the last measurement met NaN or infinities."""
    stack = run.stack()
    bad = (stack.nan[-1] + stack.inf[-1]).sum(axis=1)
    layers = [run.meta.first_layer + int(row) for row in np.flatnonzero(bad)]
    if not layers:
        return []
    return [f"Not finite at step {stack.steps[-1]:,}, {layers_words(layers)}: {bad.sum():,} activations."]


def faults(run: Run) -> list[str]:
    """A warning where the diary tells of faults."""
    told = [event for event in run.events if event.kind == "fault"]
    return [f"{count(len(told), 'fault')} on record; the latest: {told[-1].message}"] if told else []


def ablation_of(run: Run) -> tuple[Ablation | None, list[str]]:
    """What `ma-monitor ablate` left in the run's directory; a file that cannot be read is left out, with a warning."""
    try:
        return read_ablation(run.path), []
    except StoreError as error:
        return None, [f"Ablation left out: {error}"]


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
        "strips": strips(ratios, fits, forecast),
        "first_layer": run.meta.first_layer,
        "sizes": sizes,
        "maps": maps(run, each, found),
    }


def strips(ratios: Floats, fits: Sequence[Fit], forecast: Forecast) -> list[dict[str, Any]]:
    """The paper's Figures 5 and 7: a number a layer."""
    highest = np.fmax.reduce(np.where(np.isfinite(ratios), ratios, np.nan), axis=1)
    peaks = [one.peak.step if one.peak and one.peak.identified else None for one in forecast.layers]
    return [
        {"title": "largest ratio of all steps", "log": True, "values": figures(highest)},
        {"title": "peak step, past or forecast", "log": True, "values": peaks},
        {"title": "R² of the fitted curve", "log": False, "values": [fit.r2 for fit in fits]},
    ]


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
    for key, besides in phenomena_over_steps(run).items():
        known = np.add.reduceat(np.isfinite(besides), starts, axis=1, dtype=np.int64)
        with np.errstate(invalid="ignore"):
            means = np.add.reduceat(np.where(np.isfinite(besides), besides, 0), starts, axis=1) / known
        shown.append({"title": METRICS[key].title, "log": METRICS[key].log, "values": figures(means)})
    for key in ("channel", "position"):
        found.pop(key)
    return {"steps": run.steps[starts].tolist(), "shown": shown}


def _spread(points: int, most: int) -> NDArray[np.intp]:
    """All of these, or ``most`` evenly spaced ones, the first and the last among them."""
    return np.unique(np.linspace(0, points - 1, min(points, most)).round().astype(np.intp))
