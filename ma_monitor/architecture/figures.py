"""Figures of the kinds of the paper's Figures 9 and 10, and partial dependence; nothing here touches pyplot."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ma_monitor.architecture.explain import Explanation
from ma_monitor.architecture.features import FEATURES
from ma_monitor.report.axes import BLUE, GREY, ORANGE, panels, plain, small

Floats = NDArray[np.float64]
SHOWN = 10
"""Features that one figure shows, the largest first."""


def _largest(explanation: Explanation) -> list[int]:
    return [int(i) for i in np.argsort(-explanation.size)[:SHOWN]]


def _source(explanation: Explanation) -> str:
    return f"{explanation.target}: {len(explanation.values)} layers of {explanation.models} models"


def summary(explanation: Explanation) -> Figure:
    """The paper's Figures 9a and 10: every row's Shapley values, a line a feature, coloured by the feature's value."""
    chosen = _largest(explanation)
    figure = Figure(figsize=(6.5, 1.2 + 0.34 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    for line, feature in enumerate(reversed(chosen)):
        parts, value = explanation.contributions[:, feature], explanation.values[:, feature]
        span = np.ptp(value)
        colour = (value - value.min()) / span if span > 0 else np.full(len(value), 0.5)
        axes.scatter(parts, line + _swarm(parts), c=colour, cmap="viridis", vmin=0, vmax=1, s=7, linewidths=0)
    axes.axvline(0, color=GREY, lw=0.8)
    plain(axes)
    axes.set_yticks(range(len(chosen)), [FEATURES[i] for i in reversed(chosen)])
    axes.set_xlabel("Shapley value (transformed units)")
    axes.set_title(_source(explanation), fontsize=9)
    bar = figure.colorbar(ScalarMappable(cmap=colormaps["viridis"]), ax=axes, pad=0.02, ticks=[0, 1])
    bar.ax.set_yticklabels(["low", "high"])
    bar.set_label("value of the feature", fontsize=8)
    small(bar.ax)
    return figure


def _swarm(parts: Floats) -> Floats:
    """Heights that spread points which lie close together, at most 0.35 up or down."""
    bins = np.rint((parts - parts.min()) / max(np.ptp(parts), 1e-12) * 60).astype(int)
    heights = np.zeros(len(parts))
    for one in np.unique(bins):
        rows = np.flatnonzero(bins == one)
        heights[rows] = (np.arange(len(rows)) - (len(rows) - 1) / 2) * 0.08
    return np.asarray(np.clip(heights, -0.35, 0.35))


def waterfall(explanation: Explanation, row: int) -> Figure:
    """The paper's Figure 9b: from the base to one row's prediction, a bar a feature; the smaller ones are one bar."""
    parts = explanation.contributions[row]
    order = [int(i) for i in np.argsort(-np.abs(parts))]
    kept, rest = order[: SHOWN - 1], order[SHOWN - 1 :]
    names = [f"{FEATURES[i]} = {explanation.values[row, i]:.3g}" for i in kept] + [f"{len(rest)} others"]
    sizes = np.array([*parts[kept], parts[rest].sum()])
    starts = explanation.base + np.concatenate([[0.0], np.cumsum(sizes)[:-1]])
    figure = Figure(figsize=(6.5, 1.2 + 0.34 * len(sizes)), layout="constrained")
    axes = figure.subplots()
    lines = np.arange(len(sizes))[::-1]
    axes.barh(lines, sizes, left=starts, color=[ORANGE if size > 0 else BLUE for size in sizes], height=0.6)
    for line, start, size in zip(lines, starts, sizes, strict=True):
        axes.text(start + max(size, 0), line, f" {size:+.2f}", va="center", fontsize=7)
    axes.axvline(explanation.base, color=GREY, lw=0.8, ls="--")
    plain(axes)
    axes.set_yticks(lines, names)
    axes.use_sticky_edges = False
    axes.margins(x=0.1)
    axes.set_xlabel(
        f"base {explanation.base:.3g} → prediction {explanation.base + parts.sum():.3g} (transformed units)"
    )
    axes.set_title(_source(explanation), fontsize=9)
    return figure


def dependence(explanation: Explanation) -> Figure:
    """Partial dependence of the six features that matter most, a panel each. Ticks are where models are."""
    chosen = _largest(explanation)[:6]
    figure, grid = panels(len(chosen), sharey=True)
    for axes, feature in zip(grid, chosen, strict=True):
        axes.step(explanation.grid[feature], explanation.dependence[feature], where="mid", color=BLUE, lw=1.4)
        seen = np.unique(explanation.values[:, feature])
        axes.plot(seen, np.full(len(seen), 0.02), "|", color=GREY, ms=5, transform=axes.get_xaxis_transform())
        plain(axes)
        axes.set_xlabel(FEATURES[feature])
    figure.supylabel("mean prediction (transformed units)", fontsize=9)
    figure.suptitle(_source(explanation), fontsize=9)
    return figure
