"""How fast the run store is at the size of a long training of a large model: 1500 steps × 36 layers × 10 sequences.

Run with ``python benchmarks/store.py``; the result goes to ``benchmarks/results/store.json``. Times are the best of
several repetitions on one core, since whatever else the machine does only adds to them.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ma_monitor.runs.records import Measurements, ModelShape, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run

STEPS, LAYERS, SEQUENCES, RANKS = 1500, 35, 10, 3
REPEAT = 5
META = RunMeta(
    model=ModelShape("synthetic", None, LAYERS, 5120, 40, 50304, None),
    probe=ProbeInfo("0" * 64, SEQUENCES, 512, "random"),
    k=RANKS,
    first_layer=0,
    ratio="ratio_of_means",
    precision="float32",
)


def measurements(step: int) -> Measurements:
    """Random values with the bits of float32, the hardest to compress that a real probe gives."""
    shape = (META.rows, SEQUENCES, RANKS)
    rng = np.random.default_rng(step)
    top = -np.sort(-rng.lognormal(3, 1, shape).astype(np.float32), axis=2)
    median = rng.lognormal(0, 0.3, shape[:2]).astype(np.float32)
    position, token, channel = (rng.integers(0, high, shape, dtype=np.int32) for high in (512, 50304, 5120))
    none = np.zeros(shape[:2], dtype=np.int64)
    return Measurements(step, top.astype(float), position, token, channel, median.astype(float), none, none)


def best(action: Callable[[], object]) -> float:
    """The shortest of several times, in seconds."""
    times = []
    for _ in range(REPEAT):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(folder: Path) -> dict[str, float]:
    """Times in milliseconds, size in bytes."""
    many = [measurements(step) for step in range(STEPS)]
    appends = []
    with Run.create(folder / "run", META, None) as run:
        for m in many:
            begin = time.perf_counter()
            run.append(m)
            appends.append(time.perf_counter() - begin)
        after_append = []
        for step in range(STEPS, STEPS + REPEAT):
            run.ratios()
            run.append(measurements(step))
            begin = time.perf_counter()
            run.ratios()
            after_append.append(time.perf_counter() - begin)
        copy = best(lambda: run.copy_to(folder / "copy"))
        stack = best(run.stack)
        many_back = best(run.measurements)
    return {
        "append, median": float(np.median(appends)) * 1e3,
        "append, 99th percentile": float(np.percentile(appends, 99)) * 1e3,
        "open": best(lambda: Run.open(folder / "run")) * 1e3,
        "open and first ratios": best(lambda: Run.open(folder / "run").ratios()) * 1e3,
        "ratios after an append": min(after_append) * 1e3,
        "stack": stack * 1e3,
        "measurements": many_back * 1e3,
        "copy_to": copy * 1e3,
        "bytes on disk": (folder / "run" / "measurements.bin").stat().st_size,
    }


def main() -> None:
    """Measures, prints and writes the result."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    for name, value in result.items():
        print(f"{name:26} {value:12,.3f}{'' if name.startswith('bytes') else ' ms'}")
    size = f"{STEPS} steps x {META.rows} layer rows x {SEQUENCES} sequences x {RANKS} ranks"
    document = {"size": size, "python": platform.python_version(), "numpy": np.__version__, "result": result}
    (Path(__file__).parent / "results" / "store.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
