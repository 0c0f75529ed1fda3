"""The one place that names what is logged.

| key | what it is |
|---|---|
| `ma/ratio/layer_07` | top-1/median of layer 7, every measurement |
| `ma/max_ratio`, `ma/max_ratio_layer` | the largest ratio and its layer |
| `ma/layers_past_100`, `ma/layers_past_1000` | number of layers with a ratio of at least that |
| `ma/layers_not_finite` | number of layers whose ratio is infinite or not a number, where there are any |
| `ma/share_identified` | share of layers whose peak or asymptote the data identify |
| `ma/forecast/max_end`, `…_low`, `…_high` | largest ratio forecast for the planned end, with its 80 % band |
| `ma/forecast/max_asymptote` | largest identified asymptote |
| `ma/forecast/next_peak_step`, `…_layer` | the next peak ahead, where one is identified |
| `ma/heatmap` | layer × step picture of the ratios |
| `ma/layers` | table: per layer its class, fit, peak, asymptote and forecast |

A key is absent where its value is not known: nothing is logged that the data do not support.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.analysis import Analysis
from ma_monitor.runs.records import RunMeta
from ma_monitor.sinks.base import Cell, Emission, Table
from ma_monitor.sinks.heatmap import heatmap

THRESHOLDS = (100, 1000)

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
    "asymptote identified",
    "end",
    "end low",
    "end high",
)


def emission(
    meta: RunMeta,
    steps: NDArray[np.int64],
    ratios: NDArray[np.float64],
    analysis: Analysis | None,
    *,
    with_config: bool,
) -> Emission:
    """What the latest of these measurements gives to look at.

    Args:
        meta: The run's facts.
        steps: Measured steps so far, ``[T]``; the last is the one shown.
        ratios: Ratios of layers 1 … L, ``[L, T]``.
        analysis: Fits and forecast made at this step, None where no refit was due.
        with_config: Whether dashboards are to be told the run's facts, once a process.
    """
    step = int(steps[-1])
    scalars = _ratio_scalars(ratios[:, -1])
    config = _config(meta) if with_config else {}
    if analysis is None:
        return Emission(step, scalars, config=config)
    scalars |= _forecast_scalars(analysis)
    return Emission(
        step,
        scalars,
        images={"ma/heatmap": heatmap(steps, ratios)},
        tables={"ma/layers": layer_table(ratios[:, -1], analysis)},
        config=config,
    )


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
                bool(asymptote_known),
                end.get("median"),
                end.get("p10"),
                end.get("p90"),
            )
        )
    return Table(_COLUMNS, tuple(rows))


def _ratio_scalars(ratio: NDArray[np.float64]) -> dict[str, float]:
    """Per-layer and summary scalars of one measurement; an infinite ratio counts as past every bound."""
    digits = max(2, len(str(len(ratio))))
    known = {layer: float(value) for layer, value in enumerate(ratio, start=1) if math.isfinite(value)}
    scalars = {f"ma/ratio/layer_{layer:0{digits}d}": value for layer, value in known.items()}
    if known:
        largest = max(known, key=known.__getitem__)
        scalars |= {"ma/max_ratio": known[largest], "ma/max_ratio_layer": float(largest)}
    if not np.isnan(ratio).all():
        scalars |= {f"ma/layers_past_{bound}": float((ratio >= bound).sum()) for bound in THRESHOLDS}
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


def _identified(entry: dict[str, Any]) -> bool:
    """Whether the data say where this layer peaks or settles."""
    return any(bool(entry[key] and entry[key]["identified"]) for key in ("peak", "asymptote"))


def _config(meta: RunMeta) -> dict[str, Cell]:
    """Facts of the run for a dashboard's configuration."""
    return {
        "ma_monitor/model": meta.model.name,
        "ma_monitor/layers": meta.model.layers,
        "ma_monitor/width": meta.model.width,
        "ma_monitor/heads": meta.model.heads,
        "ma_monitor/parameters": meta.model.parameters,
        "ma_monitor/probe": meta.probe.hash,
        "ma_monitor/probe_source": meta.probe.source,
        "ma_monitor/probe_tokens": f"{meta.probe.sequences} x {meta.probe.length}",
        "ma_monitor/ratio": meta.ratio,
        "ma_monitor/precision": meta.precision,
    }
