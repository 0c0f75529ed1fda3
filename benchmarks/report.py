"""How long the report page takes to write and to become usable, and how large it is.

    OMP_NUM_THREADS=1 python -m benchmarks.report

Writes ``results/report.json``. Runs are made from the packaged recording: its layers repeated with other noise, its
steps interpolated. The page is opened in headless Chromium (``$CHROMIUM``, or ``chromium`` on the path); interactive
means: loaded, the visible charts drawn, and a click on a layer answered with a frame. Needs playwright.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run

SIZES = ((6, 163), (36, 154), (80, 5000))
REPEATS = 5
ANSWERED = """async () => {
  const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  await frame();
  const drawn = performance.now(), chip = document.querySelector('.chips button[aria-pressed=false]');
  chip?.click();
  await frame();
  return {drawn, interactive: performance.now(), click: performance.now() - drawn};
}"""


def make(path: Path, layers: int, points: int) -> None:
    """A run of so many layers and points like the packaged one."""
    with resources.files("ma_monitor.learned").joinpath("data/neox-70m.npz").open("rb") as file:
        held = np.load(file)
        steps, stats, lr = held["steps"], held["stats"].astype(np.float64), held["lr"]
    grid = np.unique(np.linspace(steps[0], steps[-1], points).round().astype(np.int64))
    rng, (_, n, rows, recorded) = np.random.default_rng(0), stats.shape
    meta = RunMeta(
        ModelShape(f"{layers} layers", "gpt_neox", layers, 512, 8, 16384, None),
        ProbeInfo("ab" * 32, n, 512, "made from the packaged run"),
        rows - 1,
        1,
        "ratio_of_means",
        "float32",
    )
    zeros = np.zeros((layers, n), dtype=np.int64)
    with Run.create(path, meta, Plan(0, len(lr) - 1, lr, 8, "cosine")) as run:
        for step in grid.tolist():
            after = min(int(np.searchsorted(steps, step)), len(steps) - 1)
            now = stats[after][..., np.arange(layers) % recorded] * np.exp(0.02 * rng.standard_normal((n, 1, layers)))
            now = now.transpose(2, 0, 1)
            place = np.broadcast_to(np.arange(rows - 1, dtype=np.int32), (layers, n, rows - 1))
            run.append(Measurements(step, now[..., :-1], place, place, place, now[..., -1], zeros, zeros))


def written(run: Path, page: Path) -> dict[str, float]:
    """The command, from its start to its end: wall and CPU seconds, and the page's size."""
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "ma_monitor.cli", "report", str(run), "--out", str(page)], check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": time.perf_counter() - started, "cpu_s": cpu, "megabytes": page.stat().st_size / 1e6}


def opened(page: Path) -> list[dict[str, float]]:
    """Milliseconds from the beginning of the navigation, of several openings after a first one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        where = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=where, args=["--no-sandbox", "--disable-gpu"])
        found: list[dict[str, float]] = []
        for _ in range(REPEATS + 1):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready]")
            found.append(tab.evaluate(ANSWERED))
            tab.close()
        browser.close()
    return found[1:]


def main() -> None:
    """Measures every size and writes the result."""
    results: list[dict[str, Any]] = []
    for layers, points in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            run, page = Path(folder, "run"), Path(folder, "report.html")
            make(run, layers, points)
            takes = [written(run, page) for _ in range(3)]
            times = opened(page)
            results.append(
                {
                    "layers": layers,
                    "points": points,
                    **{name: round(statistics.median(take[name] for take in takes), 2) for name in takes[0]},
                    **{f"{name}_ms": round(statistics.median(one[name] for one in times)) for name in times[0]},
                    "interactive_worst_ms": round(max(one["interactive"] for one in times)),
                }
            )
            print(json.dumps(results[-1]))
    out = Path(__file__).parent / "results" / "report.json"
    out.write_text(json.dumps({"load": os.getloadavg()[0], "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
