"""The one place that names what is logged.

| key | what it is |
|---|---|
| `ma/ratio/layer_07` | top-1/median of layer 7, every measurement |
| `ma/max_ratio`, `ma/max_ratio_layer` | the largest ratio and its layer |
| `ma/layers_past_100`, `ma/layers_past_1000` | number of layers with a ratio of at least that |
| `ma/layers_not_finite` | number of layers whose ratio is infinite or not a number, where there are any |
| `ma/where/channel_share` | share of layers and sequences whose largest entry is in the most common channel |
| `ma/where/first_token_share` | share of those where it is at the first token |
| `ma/criterion/layers_sun`, `…_owen` | number of layers that are massive by two definitions (`numerics.places`) |
| `ma/share_identified` | share of layers whose peak or asymptote the data identify |
| `ma/forecast/max_end`, `…_low`, `…_high` | largest ratio forecast for the planned end, with its 80 % band |
| `ma/forecast/max_asymptote` | largest identified asymptote |
| `ma/forecast/next_peak_step`, `…_layer` | the next peak ahead, where one is identified |
| `ma/forecast/earlier_held` | share of what came inside earlier 80 % bands; when steps double and at the end |
| `ma/forecast/earlier_error` | factor by which their medians were off on average, likewise |
| `ma/sinks/rate` and the like | what is read besides: one number of the layers' (`ma_monitor.phenomena`) |
| `ma/emergence/layer` | the layer in which the massive token emerges, where there is one |
| `ma/heatmap` | layer × step picture of the ratios |
| `ma/fan` | picture: measured ratios and forecast bands of the layers that are forecast to end largest |
| `ma/layers` | table: per layer its class, fit, peak, asymptote and forecast |
| `ma/phenomena` | table: per layer what was read besides, at the last measurement |
| `ma/ablation/entries` and the like | tables of `ma-monitor ablate`, of a run that keeps its result |
| `ma_monitor/…` | facts of the run (configuration), and what it has come to (summary) |

A key is absent where its value is not known: nothing is logged that the data do not support.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.analysis import Analysis, planned_end
from ma_monitor.numerics.places import STEADY, emergence_layer, massive_in_sequences, massive_on_average, spread_of
from ma_monitor.phenomena import METRICS, of_layers
from ma_monitor.report.besides import phenomena_rows, phenomena_then
from ma_monitor.report.track import origins, scores, track_record
from ma_monitor.report.words import printable
from ma_monitor.runs.records import RunMeta
from ma_monitor.runs.store import Run
from ma_monitor.sinks.alerts import BOUNDS, LONGEST, Alert, Facts
from ma_monitor.sinks.base import Cell, Emission, Table
from ma_monitor.sinks.fan import fan
from ma_monitor.sinks.heatmap import heatmap

_COLUMNS = (
    "layer",
    "ratio",
    "class",
    "R2",
    "peak step",
    "peak step low",
    "peak step high",
    "peak height",
    "peak",
    "asymptote",
    "asymptote low",
    "asymptote high",
    "end",
    "end low",
    "end high",
)


def facts(run: Run, seen: int, analysis: Analysis | None) -> Facts:
    """What alerts are judged by at the last of the first ``seen`` measurements."""
    stack, ratios = run.stack(), run.ratios()[:, :seen]
    broken = (stack.nan[seen - 1] + stack.inf[seen - 1]).sum(axis=-1)[-len(ratios) :]
    return Facts(run.steps[:seen], ratios, broken, analysis.forecast_document["layers"] if analysis else ())


def emission(
    run: Run,
    seen: int,
    analysis: Analysis | None,
    *,
    alerts: tuple[Alert, ...] = (),
    with_config: bool,
    with_pictures: bool = True,
) -> Emission:
    """What the last of the first ``seen`` measurements of a run gives to look at.

    Args:
        run: The run.
        seen: How many of its measurements are known, at least 1.
        analysis: Fits and forecast made then, None where no refit was due.
        alerts: What deserves attention.
        with_config: Whether dashboards are to be told the run's facts, once a process.
        with_pictures: Whether pictures and tables are to be made, where a refit was due.
    """
    steps, ratios = run.steps[:seen], run.ratios()[:, :seen]
    step, scalars = int(steps[-1]), _ratio_scalars(ratios[:, -1]) | _place_scalars(run, seen)
    scalars |= _phenomena_scalars(phenomena_then(run, step))
    config = _config(run.meta) if with_config else {}
    if analysis is None:
        return Emission(step, scalars, config=config, alerts=alerts)
    scalars |= _forecast_scalars(analysis) | _track_scalars(run, seen)
    summary = _summary(steps, ratios, analysis)
    if not with_pictures:
        return Emission(step, scalars, config=config, summary=summary, alerts=alerts)
    images = {"ma/heatmap": heatmap(steps, ratios)}
    if (drawn := fan(steps, ratios, analysis.forecast)) is not None:
        images["ma/fan"] = drawn
    tables = {"ma/layers": layer_table(ratios[:, -1], analysis)}
    if rows := phenomena_rows(run, step):
        tables["ma/phenomena"] = Table(tuple(rows[0]), tuple(tuple(row.values()) for row in rows))
    return Emission(step, scalars, images, tables, config, summary, alerts)


def layer_table(ratio: NDArray[np.float64], analysis: Analysis) -> Table:
    """A row a layer: the ratio now, and what fit and forecast say of it (None = not known)."""
    rows = []
    documents = zip(analysis.fits_document["layers"], analysis.forecast_document["layers"], strict=True)
    for now, (fit, prediction) in zip(ratio, documents, strict=True):
        peak, asymptote, end = prediction["peak"] or {}, prediction["asymptote"] or {}, prediction["end"] or {}
        peak_known, asymptote_known = peak.get("identified"), asymptote.get("identified")
        rows.append(
            (
                fit["layer"],
                float(now) if math.isfinite(now) else None,
                fit["class"],
                fit["r2"],
                peak.get("step") if peak_known else None,
                peak.get("low") if peak_known else None,
                peak.get("high") if peak_known else None,
                peak.get("height") if peak_known else None,
                peak.get("status") if peak_known else "not identified",
                asymptote.get("value") if asymptote_known else None,
                asymptote.get("low") if asymptote_known else None,
                asymptote.get("high") if asymptote_known else None,
                end.get("median"),
                end.get("p10"),
                end.get("p90"),
            )
        )
    return Table(_COLUMNS, tuple(rows))


def _phenomena_scalars(besides: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """One number of each metric, those that are known."""
    numbers = {f"ma/{key}": of_layers(METRICS[key], values) for key, values in besides.items()}
    jumps = [besides[key] for key in ("emergence/norm_jump", "emergence/typical_jump") if key in besides]
    if len(jumps) == 2:
        numbers["ma/emergence/layer"] = emergence_layer(*jumps)
    return {key: float(number) for key, number in numbers.items() if number is not None}


def _place_scalars(run: Run, seen: int) -> dict[str, float]:
    """Where the largest entries of the last of ``seen`` measurements sit, and in how many layers they are massive."""
    last, layers = run.stack().at(seen - 1), slice(1 - run.meta.first_layer, None)
    top, median = last.top[layers, :, 0], last.median[layers]
    scalars: dict[str, float] = {}
    if (spread := spread_of(last.channel[layers, :, 0], last.position[layers, :, 0])) is not None:
        scalars |= {"ma/where/channel_share": spread[0], "ma/where/first_token_share": spread[1]}
    if not np.isnan(top).all():
        by_sun = massive_in_sequences(top, median).mean(axis=1) >= STEADY
        by_owen = massive_on_average(top, median)
        scalars |= {"ma/criterion/layers_sun": float(by_sun.sum()), "ma/criterion/layers_owen": float(by_owen.sum())}
    return scalars


def _ratio_scalars(ratio: NDArray[np.float64]) -> dict[str, float]:
    """Per-layer and summary scalars of one measurement; an infinite ratio counts as past every bound."""
    digits = max(2, len(str(len(ratio))))
    known = {layer: float(value) for layer, value in enumerate(ratio, start=1) if math.isfinite(value)}
    scalars = {f"ma/ratio/layer_{layer:0{digits}d}": value for layer, value in known.items()}
    if known:
        largest = max(known, key=known.__getitem__)
        scalars |= {"ma/max_ratio": known[largest], "ma/max_ratio_layer": float(largest)}
    if not np.isnan(ratio).all():
        scalars |= {f"ma/layers_past_{bound}": float((ratio >= bound).sum()) for bound in BOUNDS}
    if len(known) < len(ratio):
        scalars["ma/layers_not_finite"] = float(len(ratio) - len(known))
    return scalars


def _forecast_scalars(analysis: Analysis) -> dict[str, float]:
    """The forecast's summary scalars, those that are known."""
    layers: list[dict[str, Any]] = analysis.forecast_document["layers"]
    ends = [(entry["end"], entry["layer"]) for entry in layers if entry["end"] and entry["end"]["median"] is not None]
    asymptotes = [e["asymptote"]["value"] for e in layers if e["asymptote"] and e["asymptote"]["identified"]]
    peaks = [
        (entry["peak"]["step"], entry["layer"])
        for entry in layers
        if entry["peak"] and entry["peak"]["identified"] and entry["peak"]["status"] == "ahead"
    ]
    scalars = {"ma/share_identified": sum(_identified(entry) for entry in layers) / len(layers)}
    if ends:
        end, _ = max(ends, key=lambda pair: pair[0]["median"])
        scalars |= {
            "ma/forecast/max_end": float(end["median"]),
            "ma/forecast/max_end_low": float(end["p10"]),
            "ma/forecast/max_end_high": float(end["p90"]),
        }
    if asymptotes:
        scalars["ma/forecast/max_asymptote"] = float(max(asymptotes))
    if peaks:
        step, layer = min(peaks)
        scalars |= {"ma/forecast/next_peak_step": float(step), "ma/forecast/next_peak_layer": float(layer)}
    return scalars


def _track_scalars(run: Run, seen: int) -> dict[str, float]:
    """How earlier forecasts fared, where the last measurement begins a new origin or is the planned end.

    Not at every refit: making a few forecasts again takes about as long as a refit.
    """
    step = int(run.steps[seen - 1])
    if step != planned_end(run, step) and seen not in origins(run.steps[:seen]):
        return {}
    fared = scores(track_record(run, at=step))
    if not fared["compared"]:
        return {}
    return {"ma/forecast/earlier_held": fared["held"], "ma/forecast/earlier_error": math.exp(fared["error"])}


def _identified(entry: dict[str, Any]) -> bool:
    """Whether the data say where this layer peaks or settles."""
    return any(bool(entry[key] and entry[key]["identified"]) for key in ("peak", "asymptote"))


def _summary(steps: NDArray[np.int64], ratios: NDArray[np.float64], analysis: Analysis) -> dict[str, Cell]:
    """What the run has come to: where it was largest, and how many layers are of which class."""
    classes = Counter(entry["class"] for entry in analysis.fits_document["layers"])
    summary: dict[str, Cell] = {"ma_monitor/classes": ", ".join(f"{n} {name}" for name, n in classes.most_common())}
    known = np.where(np.isfinite(ratios), ratios, -np.inf)
    layer, at = np.unravel_index(int(known.argmax()), known.shape)
    if np.isfinite(known[layer, at]):
        summary |= {
            "ma_monitor/largest_ratio": float(known[layer, at]),
            "ma_monitor/largest_ratio_layer": int(layer) + 1,
            "ma_monitor/largest_ratio_step": int(steps[at]),
        }
    return summary


def _config(meta: RunMeta) -> dict[str, Cell]:
    """Facts of the run for a dashboard's configuration; other people's words cleaned and cut."""
    facts: dict[str, Cell] = {
        "model": meta.model.name,
        "layers": meta.model.layers,
        "width": meta.model.width,
        "heads": meta.model.heads,
        "parameters": meta.model.parameters,
        "probe": meta.probe.hash,
        "probe_source": meta.probe.source,
        "probe_tokens": f"{meta.probe.sequences} x {meta.probe.length}",
        "ratio": meta.ratio,
        "precision": meta.precision,
    }
    shown = ((name, printable(fact)[:LONGEST] if isinstance(fact, str) else fact) for name, fact in facts.items())
    return {f"ma_monitor/{name}": fact for name, fact in shown}
