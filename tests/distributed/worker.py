"""What each process of a launch runs: scenarios in turn, each result in a file. ``worker.py FOLDER BACKEND NAME…``."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MODULES = {
    "spread_statistics": "of_streams",
    "sequence_parallel": "of_streams",
    "ddp": "of_trainers",
    "fsdp2": "of_trainers",
    "zero3": "of_trainers",
    "no_probe_on_one": "of_trainers",
    "lives": "of_events",
    "fsdp1": "of_loops",
    "fsdp2_loop": "of_loops",
    "fsdp2_bf16": "of_loops",
    "hsdp": "of_loops",
    "ddp_loop": "of_loops",
    "phenomena": "of_loops",
    "tp": "of_loops",
    "tp_bf16": "of_loops",
    "faults": "of_faults",
    "faults_ddp": "of_faults",
    "faults_hsdp": "of_faults",
}
"""Scenario → the module ``tests.distributed.of_…`` whose function of that name it is."""


def main(folder: Path, backend: str, names: list[str]) -> None:
    """Runs the scenarios; one that raises leaves its traceback and the others go on."""
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            scenario = getattr(importlib.import_module(f"tests.distributed.{MODULES[name]}"), name)
            result: dict[str, Any] = scenario(place, device)
        except Exception:
            result = {"error": traceback.format_exc()}
        result["seconds"] = round(time.perf_counter() - started, 2)
        (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
