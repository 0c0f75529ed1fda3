"""How long the first process's recording, refit, forecast and images hold the other processes of a training.

Run with ``python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/distributed.py [--backend nccl]``;
the result goes to ``benchmarks/results/distributed.json``. The first process observes one more measurement of a run of
36 layers and 10 sequences, with TensorBoard as its sink where that is installed; the others wait for it in a barrier,
as they would in the next step's first collective operation. The probe's own forward is not in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ma_monitor.analysis import refit_due
from ma_monitor.monitor import Observer
from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run
from ma_monitor.sinks.tensorboard import TensorBoardSink

LAYERS, SEQUENCES, RANKS, EVERY = 36, 10, 3, 100
LENGTHS = (21, 154, 500, 1500)
"""Measurements in the run, about: the next number at which a refit is due is taken."""
REPEAT = 5
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
RESULT = Path(__file__).resolve().parent / "results" / "distributed.json"
META = RunMeta(
    ModelShape("synthetic", None, LAYERS, 5120, 40, 50304, None), ProbeInfo("0" * 64, SEQUENCES, 512, "random"),
    RANKS, 0, "ratio_of_means", "float32",
)  # fmt: skip


def measurements(number: int, total: int) -> Measurements:
    """Layers of every class: early peaks, rises and decays, with 5 % of noise."""
    time_seen, depth = number / total, np.arange(LAYERS + 1)[:, None, None]
    rate = 10 ** (depth % 5 - 2.0)
    curve = 20 + (1 + depth) * np.exp(-rate * time_seen) * np.log1p(100 * time_seen)
    noise = np.random.default_rng(number).normal(1, 0.05, (LAYERS + 1, SEQUENCES, RANKS))
    top = -np.sort(-(curve * noise).astype(np.float32), axis=2)
    return Measurements.from_statistics(number * EVERY, top, np.ones(top.shape[:2]))


def held(points: int, folder: Path) -> float:
    """Seconds that this process waits while the first one observes the measurement number ``points``."""
    observer = last = None
    if dist.get_rank() == 0:
        lr = np.cos(np.linspace(0, np.pi / 2, points * EVERY + 1))
        run = Run.create(folder, META, Plan(0, points * EVERY, lr, 64, "cosine"))
        for number in range(points - 1):
            run.append(measurements(number, points))
        sinks = [TensorBoardSink.to_directory(folder / "board")] if HAS_TENSORBOARD else []
        observer = Observer(run, sinks=sinks)
        last = measurements(points - 1, points)
    dist.barrier()
    started = time.perf_counter()
    if observer is not None and last is not None:
        observer.observe(last)
    dist.barrier()
    waited = time.perf_counter() - started
    if observer is not None:
        observer.close()
    return waited


def main(backend: str) -> None:
    """Measures at every length, with and without a refit; the last process prints and stores."""
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    result = {}
    for length in LENGTHS:
        due = next(n for n in range(length, 2 * length) if refit_due(n))
        plain = next(n for n in range(due, 2 * due) if not refit_due(n))
        for name, points in (("refit", due), ("no refit", plain)):
            waits = []
            for _ in range(REPEAT):
                with tempfile.TemporaryDirectory() as folder:
                    waits.append(held(points, Path(folder) / "run"))
            result[f"{points} measurements, {name}"] = {
                "median ms": round(1e3 * float(np.median(waits)), 2), "worst ms": round(1e3 * max(waits), 2)
            }  # fmt: skip
    if dist.get_rank() == dist.get_world_size() - 1:
        document = {
            "size": f"{LAYERS} layers x {SEQUENCES} sequences x {RANKS} ranks",
            "tensorboard": HAS_TENSORBOARD,
            "backend": backend,
            "processes": dist.get_world_size(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "others wait": result,
        }
        print(json.dumps(document, indent=1))
        RESULT.write_text(json.dumps(document, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="gloo", choices=("gloo", "nccl"))
    main(parser.parse_args().backend)
