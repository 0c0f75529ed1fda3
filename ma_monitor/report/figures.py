"""Figures of the paper's kinds, from runs and fits: one function each, giving a matplotlib figure.

| paper | function | shows |
|---|---|---|
| 1a, 3 | `magnitudes` | largest entries and median by layer, at the first and the last step |
| 2 | `scale` | largest ratio at the end against the number of parameters |
| 1b, 4 | `trajectories` | ratios of ranks 1 to 3 by step, a panel a layer |
| 5, 7b | `depth_map` | one number of every layer of every model |
| 1c, 6 | `fitted` | measured ratios and the fitted curve |
| 7a | `fit_quality` | R² by relative depth |
| 8 | `peak_steps` | where the curve of Eq. 9 peaks, for any λ and γ |

And `heat_map` (layer × step), `comparison` (several runs at equal relative depth) and `forecasts` (what was forecast
against what came). Nothing here touches pyplot or a display: ``figure.savefig(name)`` writes PNG, SVG or PDF.

Step axes are logarithmic and linear below the first step after 0, and say so, for most of a trajectory's shape lies
early; ratio axes are logarithmic where ratios span more than a factor of 30. Colours are Okabe and Ito's and viridis,
which the colour-blind tell apart; lines differ by marker or dash besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import wrightomega

from ma_monitor.analysis import Analysis
from ma_monitor.errors import ConfigError, MissingExtraError
from ma_monitor.numerics.fit import Fit
from ma_monitor.runs.store import Run

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "report") from error

from ma_monitor.report.axes import (
    BLUE,
    GREEN,
    GREY,
    MARKED,
    ORANGE,
    PALE,
    clean,
    edges,
    finish,
    layer_axis,
    marker,
    panels,
    plain,
    shade,
    short,
    step_axis,
    styles,
    value_axis,
    words,
)

RANKS = (("largest", BLUE, "o"), ("second", ORANGE, "s"), ("third", GREEN, "^"))
"""Name, colour and marker of each rank that is shown."""
RATIO = "largest / median of |h|"
PANELS = 16
"""Most layers that one figure of panels shows."""


def magnitudes(runs: Sequence[Run]) -> Figure:
    """The paper's Figures 1a and 3: a row a run, the first step left and the last right, on one scale a row.

    Means over the probe's sequences of the k largest abs(h) and of its median, by layer.
    """
    figure = Figure(figsize=(7.5, 0.7 + 2.4 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False, sharey="row")
    for row, run in zip(grid, map(_measured, runs), strict=True):
        stack, layers = run.stack(), np.arange(run.meta.first_layer, run.meta.model.layers + 1)
        for axes, when in zip(row, (0, -1), strict=True):
            lines = [(*RANKS[rank - 1], np.abs(stack.top[when, ..., rank - 1])) for rank in _ranks(run)]
            for under, (name, colour, kind, values) in enumerate((*lines, ("median", GREY, "x", stack.median[when]))):
                style: dict[str, Any] = {"color": colour, "marker": marker(layers, kind), "zorder": 5 - under}
                dash = "--" if name == "median" else "-"
                axes.plot(layers, clean(values.mean(axis=1)), dash, ms=3, lw=1.2, label=name, **style)
            plain(axes)
            layer_axis(axes, "x")
            axes.set_ylabel("|h|, mean over sequences")
            axes.set_title(f"{_name(run)}, step {int(run.steps[when]):,}", fontsize=9)
    return finish(figure, list(grid.flat))


def scale(parameters: ArrayLike, ratios: ArrayLike, names: Sequence[str]) -> Figure:
    """The paper's Figure 2: the largest ratio of each model at its end against its number of parameters, ``[M]``."""
    sizes, values = np.asarray(parameters, dtype=np.float64), clean(ratios)
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(sizes)
    axes.plot(sizes[order], values[order], "-o", color=BLUE, ms=5, lw=1.2)
    for size, value, name in zip(sizes, values, names, strict=True):
        if np.isfinite(value):
            axes.annotate(words(name), (size, value), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    plain(axes)
    axes.set_xscale("log")
    axes.margins(0.1, 0.15)
    value_axis([axes])
    axes.set_xlabel("parameters (log)")
    axes.set_ylabel(f"{RATIO}, last step")
    return figure


def trajectories(run: Run, layers: Sequence[int] | None = None) -> Figure:
    """The paper's Figures 1b and 4: ratios of the first three ranks by step, a panel a layer, on one scale.

    Args:
        run: The run.
        layers: Which; by default all, or 16 evenly spaced ones.
    """
    chosen = _spread(_measured(run).layers) if layers is None else tuple(layers)
    figure, grid = panels(len(chosen), sharey=True)
    for axes, layer in zip(grid, chosen, strict=True):
        for rank in _ranks(run):
            name, colour, kind = RANKS[rank - 1]
            values = clean(run.ratios(rank)[layer - 1])
            style: dict[str, Any] = {"color": colour, "marker": marker(values, kind), "zorder": 4 - rank}
            axes.plot(run.steps, values, ms=2, lw=1, label=name, **style)
        plain(axes)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_ylabel("ratio to the median of |h|")
        step_axis(axes, run.steps)
    return finish(figure, grid, _title(run, chosen))


def fitted(runs: Sequence[tuple[Run, Sequence[Fit]]], layers: Sequence[int] | None = None) -> Figure:
    """The paper's Figures 1c and 6: measured ratios and Eq. 9, with the identified peaks and asymptotes.

    Args:
        runs: Runs, each with the fits of its layers 1 … L.
        layers: Which of each; by default the first, the middle and the last of each run.
    """
    chosen = [
        (_measured(run), layer, fits[layer - 1])
        for run, fits in runs
        for layer in (layers or sorted({1, (len(fits) + 1) // 2, len(fits)}))
    ]
    figure, grid = panels(len(chosen), columns=3 if layers is None else None)
    for axes, (run, layer, fit) in zip(grid, chosen, strict=True):
        _fit(axes, run, layer, fit)
        axes.set_title(f"{_name(run)}, {axes.get_title()}" if len(runs) > 1 else axes.get_title(), fontsize=9)
    return finish(figure, grid, _name(runs[0][0]) if len(runs) == 1 else "")


def heat_map(run: Run) -> Figure:
    """The ratio of every layer at every step; pale where not finite. Live sinks draw theirs without matplotlib."""
    values = _measured(run).ratios()
    figure = Figure(figsize=(8, 1.6 + min(0.22 * len(values) + 1, 6)), layout="constrained")
    axes = figure.subplots()
    step_axis(axes, run.steps)
    borders = np.arange(len(values) + 1) + 0.5
    mesh = axes.pcolormesh(edges(axes, run.steps), borders, np.ma.masked_invalid(values), rasterized=True)
    shade(figure, axes, [mesh], RATIO, log=True)
    layer_axis(axes, "y")
    axes.set_title(_name(run), fontsize=10)
    return figure


def depth_map(
    models: Mapping[str, ArrayLike], label: str, *, log: bool = False, limits: tuple[float, float] | None = None
) -> Figure:
    """The paper's Figures 5 and 7b: a row a model, a cell a layer; pale where the number is not known.

    Args:
        models: Name → the number of layers 1 … L, ``[L]``.
        label: What the numbers are.
        log: Whether colour follows their logarithm.
        limits: Ends of the colour scale; the numbers' own by default.
    """
    rows = {name: clean(values) for name, values in models.items()}
    figure = Figure(figsize=(9, 1.4 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    meshes = [
        axes.pcolormesh(
            np.arange(len(values) + 1) + 0.5, [row - 0.5, row + 0.5], np.ma.masked_invalid(values[None]), ec="w", lw=0.5
        )
        for row, values in enumerate(rows.values())
    ]
    shade(figure, axes, meshes, label, log=log, limits=limits)
    axes.set_yticks(range(len(rows)), [words(name) for name in rows], fontsize=8)
    axes.invert_yaxis()
    layer_axis(axes, "x")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def fit_quality(models: Mapping[str, ArrayLike]) -> Figure:
    """The paper's Figure 7a: R² of the fits by relative depth ℓ/L; name → R² of layers 1 … L, ``[L]``."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(models.items(), styles(), strict=False):
        scores = clean(values)
        axes.plot(np.arange(1, len(scores) + 1) / len(scores), scores, marker="o", ms=3, label=words(name), **style)
    plain(axes)
    axes.set_xlabel("relative depth (layer / number of layers)")
    axes.set_ylabel("R²")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def peak_steps(
    lambdas: ArrayLike, gammas: ArrayLike, t0: float, *, last: float | None = None, points: ArrayLike | None = None
) -> Figure:
    """The paper's Figure 8, seen from above: t_peak = (e^W(1/λ) − t₀)/γ of Eq. 13; pale where there is no peak.

    Args:
        lambdas: Decay rates, rising, ``[X]``, above 0.
        gammas: Scales of time, rising, ``[Y]``, above 0, per step.
        t0: Offset of time.
        last: A step whose contour is drawn: where a training ended.
        points: Fitted ``(λ, γ)`` to show, ``[P, 2]``.
    """
    x, y = np.asarray(lambdas, dtype=np.float64), np.asarray(gammas, dtype=np.float64)
    steps = (1 / (x * wrightomega(-np.log(x))) - t0)[None] / y[:, None]
    shown = np.where(steps > 0, steps, np.nan)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(PALE)
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(shown), shading="nearest", rasterized=True)
    shade(figure, axes, [mesh], "step of the peak", log=True)
    if last is not None and (shown < last).any() and (shown > last).any():
        line = axes.contour(x, y, shown, levels=[last], colors="w", linewidths=1.5)
        axes.clabel(line, fmt=lambda value: f"step {value:,.0f}", fontsize=8)
    if points is not None:
        at = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        axes.plot(at[:, 0], at[:, 1], "x", color=ORANGE, ms=5, label="fitted layers")
        axes.legend(fontsize=8, loc="lower left")
    axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axes.set_xlabel("λ (log)")
    axes.set_ylabel("γ per step (log)")
    axes.set_title(f"t₀ = {t0:.4g}; pale: no peak after step 0", fontsize=9)
    return figure


def comparison(document: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """Several runs side by side, a panel a relative depth; median and range are shaded where the document has them.

    Args:
        document: What `ma_monitor.report.comparison.compare_runs` gives.
        names: A name for each run.
    """
    depths, time = document["depths"], np.asarray(document["grid"], dtype=np.float64)
    chosen = _spread(range(len(depths)))
    figure, grid = panels(len(chosen), sharey=True)
    for axes, entry in zip(grid, (depths[index] for index in chosen), strict=True):
        values = {key: clean(entry[key]) for key in ("ratios", "median", "low", "high")}
        if entry["median"] is not None:
            axes.fill_between(time, values["low"], values["high"], color=PALE, lw=0)
            axes.plot(time, values["median"], color=GREY, lw=3, alpha=0.5, label="median, from lowest to highest")
        for name, row, style in zip(names, values["ratios"], styles(), strict=False):
            axes.plot(time, row, marker=marker(time, "."), ms=3, label=words(name), **style)
        plain(axes)
        axes.set_title(f"depth {entry['depth']:.2g}", fontsize=9)
        axes.set_ylabel("ratio to the median of |h|")
        if document["time"] == "steps":
            step_axis(axes, time)
        else:
            axes.set_xlabel("share of the training")
    return finish(figure, grid, "" if len(chosen) == len(depths) else f"{len(chosen)} of {len(depths)} depths")


def forecasts(run: Run, made: Analysis, fits: Sequence[Fit], layers: Sequence[int] | None = None) -> Figure:
    """What was forecast against what came: bands of 80 and 95 %, and the fit to all points.

    Args:
        run: The run.
        made: The analysis whose forecast is shown.
        fits: Fits of layers 1 … L to all points.
        layers: Which; by default all, or 16 evenly spaced ones.
    """
    chosen = _spread(run.layers) if layers is None else tuple(layers)
    figure, grid = panels(len(chosen))
    seen = run.steps <= made.at
    for axes, layer in zip(grid, chosen, strict=True):
        values, prediction, curve = run.ratios()[layer - 1], made.forecast.layers[layer - 1], fits[layer - 1].curve
        axes.plot(run.steps[seen], values[seen], ".", ms=3, color=GREY, label="measured, seen by the forecast")
        axes.plot(run.steps[~seen], values[~seen], ".", ms=3, color=ORANGE, label="measured afterwards")
        for low, high, alpha in ((0, 6, 0.15), (1, 5, 0.3)):
            bands = prediction.quantiles[low], prediction.quantiles[high]
            axes.fill_between(prediction.steps, *bands, color=BLUE, alpha=alpha, lw=0)
        axes.plot(prediction.steps, prediction.quantiles[3], color=BLUE, label="forecast, with its 80 % and 95 % bands")
        if curve is not None:
            dense = np.linspace(0, run.steps[-1], 400)
            axes.plot(dense, curve.evaluate(dense), "--", lw=1, color="k", label="Eq. 14, fitted to everything")
        plain(axes)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel(RATIO)
        axes.xaxis.set_major_formatter(lambda step, _: short(step))
    return finish(figure, grid, _title(run, chosen))


def _fit(axes: Axes, run: Run, layer: int, fit: Fit) -> None:
    """Measured ratios of one layer, its curve, and what of it is identified."""
    values, peak, level = clean(run.ratios()[layer - 1]), fit.peak, fit.asymptote
    axes.plot(run.steps, values, ".", ms=4 if len(values) <= 10 * MARKED else 2, color=GREY, label="measured")
    last = float(run.steps[-1])
    if peak.identified and peak.step is not None and peak.height is not None:
        reach = [[peak.step - (peak.low or 0)], [(peak.high or peak.step) - peak.step]]
        axes.errorbar([peak.step], [peak.height], xerr=reach, fmt="D", ms=4, color=ORANGE, label="peak, 80 % interval")
        last = max(last, peak.step)
    if fit.curve is not None:
        dense = np.unique(np.r_[run.steps, np.linspace(0, last, 300), np.geomspace(1, last, 300)])
        dense = dense[dense >= run.steps[0]]
        axes.plot(dense, fit.curve.evaluate(dense), color=BLUE, lw=1.2, label="Eq. 9")
    if level.identified and level.low is not None and level.high is not None:
        axes.axhspan(level.low, level.high, color=GREEN, alpha=0.2, lw=0, label="asymptote, 80 % interval")
    plain(axes)
    score = "" if fit.r2 is None else f", R² = {fit.r2:.3f}"
    axes.set_title(f"layer {layer}{score}", fontsize=9)
    axes.set_ylabel(RATIO)
    step_axis(axes, np.append(run.steps, last))


def _measured(run: Run) -> Run:
    """The run.

    Raises:
        ConfigError: If it has no measurements.
    """
    if not len(run.steps):
        raise ConfigError(f"{run.path}: a figure needs measurements, and this run holds none")
    return run


def _ranks(run: Run) -> range:
    return range(1, min(run.meta.k, len(RANKS)) + 1)


def _name(run: Run) -> str:
    return words(run.meta.model.name)


def _spread(layers: Sequence[int]) -> tuple[int, ...]:
    """All of these, or as many evenly spaced ones as there are panels, the first and the last among them."""
    if len(layers) <= PANELS:
        return tuple(layers)
    return tuple(layers[index] for index in np.linspace(0, len(layers) - 1, PANELS).round().astype(int))


def _title(run: Run, chosen: Sequence[int]) -> str:
    every = len(run.layers)
    return _name(run) if len(chosen) == every else f"{_name(run)}, {len(chosen)} of {every} layers"
