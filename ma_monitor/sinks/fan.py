"""A picture of where the largest layers are heading: measured ratios, and the forecast's median and bands."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.forecast import Forecast, LayerForecast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYERS = 3
"""Layers shown: those that are forecast to end largest."""
_DOTS_PER_INCH = 110
_MEDIAN = 3
_BANDS = ((0, 6, 0.15), (1, 5, 0.3))
"""Outer and inner band: index of its two quantiles, and opacity."""


def fan(steps: NDArray[np.int64], ratios: NDArray[np.float64], forecast: Forecast) -> NDArray[np.uint8] | None:
    """Draws the layers that are forecast to end largest, a panel each on one scale, the largest first.

    Args:
        steps: Measured steps, ``[T]``.
        ratios: Ratios of layers 1 … L, ``[L, T]``.
        forecast: What was forecast from them.

    Returns:
        RGB picture ``[height, width, 3]``; None where no layer is forecast any further, and where matplotlib is not
        installed, which is warned of once.
    """
    known = [layer for layer in forecast.layers if layer.steps.size and np.isfinite(layer.quantiles).all()]
    shown = sorted(known, key=lambda layer: -layer.quantiles[_MEDIAN, -1])[:LAYERS]
    if not shown or not _matplotlib():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ma_monitor.report.axes import value_axis

    figure = Figure(figsize=(0.6 + 2.8 * len(shown), 3.1), dpi=_DOTS_PER_INCH)
    grid = list(figure.subplots(1, len(shown), squeeze=False, sharey=True).flat)
    for axes, layer in zip(grid, shown, strict=True):
        _panel(axes, steps, ratios[layer.layer - 1], layer)
    value_axis(grid)
    grid[0].set_ylabel("largest / median of |h|")
    entries = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="upper center", ncols=3, fontsize=8, frameon=False)
    # Fixed margins: finding them out takes matplotlib longer than drawing, and training waits.
    figure.subplots_adjust(left=0.75 / figure.get_figwidth(), right=0.985, bottom=0.15, top=0.82, wspace=0.08)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _panel(axes: Axes, steps: NDArray[np.int64], values: NDArray[np.float64], layer: LayerForecast) -> None:
    from ma_monitor.report.axes import BLUE, GREY, ORANGE, clean, plain, short

    now = int(steps[-1])
    axes.plot(steps, clean(values), ".", ms=3, color=GREY, label="measured")
    for low, high, alpha in _BANDS:
        axes.fill_between(layer.steps, layer.quantiles[low], layer.quantiles[high], color=BLUE, alpha=alpha, lw=0)
    axes.plot(layer.steps, layer.quantiles[_MEDIAN], color=BLUE, label="forecast, with its 80 % and 95 % bands")
    axes.axvline(now, color=GREY, lw=0.6, ls=":")
    peak = layer.peak
    if peak is not None and peak.identified and peak.step is not None and peak.height is not None:
        reach = [[peak.step - (peak.low or 0)], [(peak.high or peak.step) - peak.step]]
        axes.errorbar([peak.step], [peak.height], xerr=reach, fmt="D", ms=4, color=ORANGE, label="peak, 80 % interval")
    plain(axes)
    axes.set_title(f"layer {layer.layer}", fontsize=9)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(lambda step, _: short(step))


@cache
def _matplotlib() -> bool:
    """Whether matplotlib is installed; says once what is missing where it is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logging.getLogger("ma_monitor").warning(
            "ma_monitor: the forecast's picture is left out, for matplotlib is not installed; "
            "run: pip install 'ma_monitor[report]'"
        )
        return False
    return True
