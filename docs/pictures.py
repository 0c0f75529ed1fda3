"""Draws the pictures of forecasts: the packaged run, forecast by what other runs teach.

    python docs/pictures.py

Learns from `benchmarks/runs` alone (two minutes), so that the packaged run is a new one. Needs
`pip install 'ma_monitor[report,predict]'`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from ma_monitor.analysis import analyse
from ma_monitor.cli.__main__ import main as command
from ma_monitor.report.figures import forecasts
from ma_monitor.runs.store import Run

IMAGES = Path(__file__).parent / "images"
RUNS = Path(__file__).parents[1] / "benchmarks" / "runs"
PICTURES = {"forecast.png": 0.5, "forecast-early.png": 0.1, "forecast-late.png": 0.4}
"""Each picture, and the share of the run that its forecast had seen."""


def main() -> None:
    """Writes every picture."""
    with tempfile.TemporaryDirectory() as folder:
        command(["demo", "--out", f"{folder}/run"])
        others = [str(path) for path in sorted(RUNS.rglob("*.npz"))]
        command(["learn", *others, "--out", f"{folder}/run/combiner.json"])
        run = Run.open(f"{folder}/run")
        fits = analyse(run).fits
        for name, share in PICTURES.items():
            figure = forecasts(run, analyse(run, at=int(share * run.steps[-1])), fits)
            figure.savefig(IMAGES / name, dpi=130)


if __name__ == "__main__":
    main()
