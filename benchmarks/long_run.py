"""A training of 150,000 updates of 36 layers, as far as the monitor is concerned: 1500 measurements at full speed.

    OMP_NUM_THREADS=1 python -m benchmarks.long_run

Writes ``results/long_run.json``: memory and time of an observation along the way, the store's size and how long it
takes to open, the report's size and time, and ten resumes in a row. Measurements are the packaged recording's layers,
repeated with other noise and stretched to the length; the observer is that of a live training, with TensorBoard.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

import numpy as np
import psutil

from ma_monitor.config import MonitorConfig
from ma_monitor.monitor import Observer
from ma_monitor.report.page import write
from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run
from ma_monitor.schedule import planned_rates
from ma_monitor.sinks.base import Emission

STEPS, EVERY, LAYERS, SEQUENCES = 150_000, 100, 36, 10
RESUMES = 10
META = RunMeta(
    ModelShape("36 layers", "gpt_neox", LAYERS, 5120, 40, 50_304, None),
    ProbeInfo("ab" * 32, SEQUENCES, 512, "made from the packaged run"),
    3,
    0,
    "ratio_of_means",
    "float32",
)


class Discarding:
    """A sink that shows pictures and keeps nothing."""

    name = "discarding"

    def emit(self, emission: Emission) -> None:
        """Forgets."""

    def close(self) -> None:
        """Nothing to do."""


class Recording:
    """Measurements like the packaged run's, at any step of a training of ``STEPS`` updates."""

    def __init__(self) -> None:
        """Reads the recording."""
        with resources.files("ma_monitor.learned").joinpath("data/neox-70m.npz").open("rb") as file:
            held = np.load(file)
            self.steps, self.stats = held["steps"] * (STEPS / held["steps"][-1]), held["stats"].astype(float)
        self.rng = np.random.default_rng(0)

    def at(self, step: int) -> Measurements:
        """The measurements of a step."""
        after = min(int(np.searchsorted(self.steps, step)), len(self.steps) - 1)
        rows = np.arange(LAYERS + 1) % self.stats.shape[-1]
        now = self.stats[after][..., rows].transpose(2, 0, 1)
        now = now * np.exp(0.02 * self.rng.standard_normal((LAYERS + 1, SEQUENCES, 1)))
        return Measurements.from_statistics(step, now[..., :3], now[..., 3])


def megabytes() -> float:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss / 1e6


def simulate(folder: Path) -> dict[str, object]:
    """Observes the whole training, resumed ten times, and measures."""
    recording = Recording()
    plan = Plan(0, STEPS, planned_rates("cosine:warmup=.01,floor=.1", STEPS).lr, 1024, "cosine")
    due = [step for step in range(STEPS + 1) if MonitorConfig(every=EVERY).due(step)]
    run = Run.create(folder / "run", META, plan)
    observer = Observer(run, MonitorConfig(strict=True), sinks=[Discarding()])
    times, memory, resumes = [], [], []
    stops = {due[len(due) * n // (RESUMES + 1)] for n in range(1, RESUMES + 1)}
    for step in due:
        if step in stops:
            observer.close()
            begin = time.perf_counter()
            run = Run.continue_(folder / "run", META, plan, from_step=step - 1)
            observer = Observer(run, MonitorConfig(strict=True), sinks=[Discarding()])
            resumes.append(time.perf_counter() - begin)
        measured = recording.at(step)
        begin = time.perf_counter()
        observer.observe(measured, final=step == STEPS)
        times.append(time.perf_counter() - begin)
        memory.append(megabytes())
    observer.close()
    quarters = np.array_split(np.array(times[:-1]) * 1e3, 4)
    size = sum(file.stat().st_size for file in (folder / "run").iterdir())
    begin = time.perf_counter()
    opened = Run.open(folder / "run")
    opened.ratios()
    opening = time.perf_counter() - begin
    begin = time.perf_counter()
    page = write([opened], folder / "report.html")
    return {
        "measurements": len(due),
        "observation_ms_mean_by_quarter": [round(float(part.mean()), 2) for part in quarters],
        "observation_ms_median_by_quarter": [round(float(np.median(part)), 2) for part in quarters],
        "observation_ms_longest_by_quarter": [round(float(part.max()), 1) for part in quarters],
        "memory_mb_at_10_25_50_75_100_percent": [
            round(memory[int(share * (len(memory) - 1))]) for share in (0.1, 0.25, 0.5, 0.75, 1)
        ],
        "run_directory_mb": round(size / 1e6, 1),
        "open_s": round(opening, 3),
        "report_s": round(time.perf_counter() - begin, 1),
        "report_mb": round(page / 1e6, 2),
        "resume_s_median": round(statistics.median(resumes), 3),
        "steps_after_ten_resumes": len(opened.steps),
    }


def main() -> None:
    """Measures and writes."""
    with tempfile.TemporaryDirectory() as folder:
        found = simulate(Path(folder))
    (Path(__file__).parent / "results" / "long_run.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
