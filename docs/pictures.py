"""Draws README's picture from the packaged run: what was measured, its fit, and the forecast made half way.

    python docs/pictures.py

Needs matplotlib, which `pip install -e '.[dev]'` brings.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ma_monitor.analysis import Analysis, analyse
from ma_monitor.cli.__main__ import main as command
from ma_monitor.runs.store import Run

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's colours, told apart by everybody


def draw(run: Run, half: Analysis, whole: Analysis, layer: int, axes: Axes) -> None:
    """One layer: measured points, the fit to all of them, and the forecast from the first half."""
    steps, values = run.steps, run.ratios()[layer - 1]
    seen = steps <= half.at
    axes.plot(steps[seen], values[seen], ".", ms=3, color=GREY, label="measured, seen by the forecast")
    axes.plot(steps[~seen], values[~seen], ".", ms=3, color=ORANGE, label="measured afterwards")
    prediction = half.forecast.layers[layer - 1]
    for low, high, alpha in ((0, 6, 0.15), (1, 5, 0.3)):
        axes.fill_between(
            prediction.steps, prediction.quantiles[low], prediction.quantiles[high], color=BLUE, alpha=alpha, lw=0
        )
    axes.plot(prediction.steps, prediction.quantiles[3], color=BLUE, label="forecast, with its 80 % and 95 % bands")
    fit = whole.fits[layer - 1]
    if fit.curve is not None:
        dense = np.linspace(0, steps[-1], 400)
        axes.plot(dense, fit.curve.evaluate(dense), "--", lw=1, color="black", label="Eq. 14, fitted to everything")
    axes.set_title(f"layer {layer}", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)


def main() -> None:
    """Writes ``images/forecast.png``."""
    with tempfile.TemporaryDirectory() as folder:
        command(["demo", "--out", f"{folder}/run"])
        run = Run.open(f"{folder}/run")
        half, whole = analyse(run, at=int(run.steps[-1]) // 2), analyse(run)
        figure, grid = plt.subplots(2, 3, figsize=(10, 4.6), sharex=True, layout="constrained")
        for layer, axes in zip(run.layers, grid.flat, strict=True):
            draw(run, half, whole, layer, axes)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("top-1 / median of |h|", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "forecast.png", dpi=130)


if __name__ == "__main__":
    main()
