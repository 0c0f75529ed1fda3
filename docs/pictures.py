"""Draws README's picture from the packaged run: what was measured, its fit, and the forecast made half way.

    python docs/pictures.py

Needs matplotlib, which `pip install 'ma_monitor[report]'` brings.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from ma_monitor.analysis import analyse
from ma_monitor.cli.__main__ import main as command
from ma_monitor.report.figures import forecasts
from ma_monitor.runs.store import Run

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Writes ``images/forecast.png``."""
    with tempfile.TemporaryDirectory() as folder:
        command(["demo", "--out", f"{folder}/run"])
        run = Run.open(f"{folder}/run")
        figure = forecasts(run, analyse(run, at=int(run.steps[-1]) // 2), analyse(run).fits)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "forecast.png", dpi=130)


if __name__ == "__main__":
    main()
