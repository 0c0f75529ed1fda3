"""Axes, colours and layout that the figures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, PALE = "#555555", "#D9D9D9"
LINES = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, "#000000")
DASHES = ("-", "--", "-.", ":")
DECADES = 30.0
"""Values that span more than this factor get a logarithmic axis."""
MARKED = 60
"""Lines of more points are drawn without markers."""
LONGEST = 60
"""Characters of a name that are shown."""


def clean(values: ArrayLike) -> Floats:
    """The values, NaN where they are not finite."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def words(name: str) -> str:
    """A name as it is: no formula, no control characters, not hidden from the legend, not endless."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def marker(points: ArrayLike, kind: str) -> str:
    """The marker of a line: none where there are so many points that they would touch."""
    return kind if np.size(points) <= MARKED else "None"


def styles() -> Iterator[dict[str, Any]]:
    """A colour and a dash for each line, without end: seven colours, then the same ones dashed otherwise."""
    for dash in cycle(DASHES):
        for colour in LINES:
            yield {"color": colour, "linestyle": dash, "linewidth": 1.2}


def panels(count: int, *, columns: int | None = None, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels in a grid, in reading order."""
    columns = min(count, columns or (count if count <= 3 else math.ceil(math.sqrt(count))))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.0, 0.6 + 2.7 * columns), 1.1 + 2.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def plain(axes: Axes) -> None:
    """Takes away what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=PALE, lw=0.5)
    axes.set_axisbelow(True)
    small(axes)


def small(axes: Axes) -> None:
    """Sizes of the letters along the axes."""
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)


def finish(figure: Figure, shown: Sequence[Axes], title: str = "") -> Figure:
    """Gives a figure of panels its ratio axes, one title, one legend, and one label an axis where all have the same."""
    for axis, place in (("x", figure.supxlabel), ("y", figure.supylabel)):
        labels = {getattr(axes, f"get_{axis}label")() for axes in shown}
        if len(labels) == 1:
            place(labels.pop(), fontsize=9)
            for axes in shown:
                getattr(axes, f"set_{axis}label")("")
    value_axis(shown)
    entries = {label: handle for axes in shown for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if entries:
        columns = min(len(entries), max(2, int(figure.get_figwidth() // 1.8)))
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside upper center",
            ncols=columns,
            fontsize=8,
            frameon=False,
            title=title,
        )
    return figure


def step_axis(axes: Axes, steps: ArrayLike) -> None:
    """A logarithmic axis of steps that has room for step 0: linear below the first step after it, and saying so."""
    known = np.unique(np.asarray(steps, dtype=np.float64))
    after = known[known > 0]
    if len(known) < 2:
        axes.set_xlabel("step")
        axes.set_xticks(known, [short(step) for step in known])
        return
    first, last = float(after[0]), float(after[-1])
    axes.set_xscale("symlog", linthresh=first, linscale=0.5)
    axes.set_xlabel("step (log)" if known[0] > 0 else f"step (log; linear below {short(first)})")
    powers = [10.0**p for p in range(math.ceil(math.log10(first)), math.floor(math.log10(last)) + 1)]
    powers = powers[:: -max(1, math.ceil(len(powers) / 4))][::-1] if len(powers) > 1 else [first, last]
    axes.xaxis.set_major_locator(FixedLocator([*known[known == 0], *powers]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short(step)))


def short(step: float) -> str:
    """A step in few characters: 512, 1k, 143k, 1.5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= unit:
            return f"{step / unit:.3g}{letter}"
    return f"{step:.3g}"


def spans_decades(values: ArrayLike) -> bool:
    """Whether values need a logarithmic scale."""
    positive = clean(values)[np.nan_to_num(clean(values)) > 0]
    return positive.size > 0 and float(positive.max()) > DECADES * float(positive.min())


def value_axis(shown: Sequence[Axes]) -> None:
    """Ratio axes of one kind for panels read together: logarithmic where an axis spans decades, else from 0."""
    held = []
    for axes in shown:
        lines = [line for one in axes.get_shared_y_axes().get_siblings(axes) for line in one.lines]
        held.append(clean(np.concatenate([np.empty(0), *(line.get_ydata() for line in lines)])))
    log = any(spans_decades(values) for values in held)
    for axes, values in zip(shown, held, strict=True):
        if log:
            axes.set_yscale("log")
            decades(axes.yaxis, values, lambda value: f"{value:,g}")
        else:
            axes.set_ylim(bottom=0)


def decades(axis: Axis, values: ArrayLike, words: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis: powers of ten, and 2 and 5 between them where there are few."""
    known = np.asarray(values)[np.asarray(values) > 0]
    few = known.size == 0 or known.max() < 300 * known.min()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def layer_axis(axes: Axes, axis: str) -> None:
    """Whole numbers on the axis of layers."""
    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    getattr(axes, f"set_{axis}label")("layer")


def edges(axes: Axes, steps: ArrayLike) -> Floats:
    """Borders of the cells of steps ``[T]`` on this axis' scale, half way between neighbours: ``[T + 1]``."""
    scale = axes.xaxis.get_transform()
    at = np.asarray(scale.transform(np.asarray(steps, dtype=np.float64)), dtype=np.float64)
    borders = np.r_[at[0], (at[1:] + at[:-1]) / 2, at[-1]] if len(at) > 1 else at[0] + np.array([-0.5, 0.5])
    return np.asarray(scale.inverted().transform(borders), dtype=np.float64)


def shade(
    figure: Figure,
    axes: Axes,
    meshes: Sequence[QuadMesh],
    label: str,
    *,
    log: bool | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Colours cells by one scale of viridis, pale where not known, and draws its bar.

    Args:
        figure: The figure.
        axes: Where the cells are.
        meshes: The cells.
        label: What they show.
        log: Whether the scale is logarithmic; None for as the values need.
        limits: Its ends; None for the values'.
    """
    values = np.concatenate([np.ma.filled(np.ma.asarray(mesh.get_array()), np.nan).ravel() for mesh in meshes])
    log = spans_decades(values) if log is None else log
    known = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = limits or ((known.min(), known.max()) if known.size else (1.0, 2.0))
    if not low < high:
        low, high = (low - 0.5, high + 0.5) if low < 1 else (low * 0.9, high * 1.1)
    norm = LogNorm(low, high) if log else Normalize(low, high)
    for mesh in meshes:
        mesh.set_norm(norm)
        mesh.set_cmap(colormaps["viridis"].with_extremes(bad=PALE))
    bar = figure.colorbar(meshes[0], ax=axes, pad=0.02)
    bar.set_label(f"{label} (log)" if log else label, fontsize=8)
    if log:
        decades(bar.ax.yaxis, [low, high], short)
    else:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    small(axes)
    small(bar.ax)
    bar.outline.set_visible(False)
