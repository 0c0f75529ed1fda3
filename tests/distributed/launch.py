"""Starting real processes on ``worker.py`` and collecting what each of them found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 200
"""Seconds after which a launch counts as hanging; the process groups give up after 60."""


def launch(
    folder: Path, scenarios: Sequence[str], *, processes: int = 2, backend: str = "gloo"
) -> dict[str, list[dict[str, Any]]]:
    """Runs scenarios one after another in ``processes`` processes.

    Gives what each process returned, by scenario and rank. Where a scenario raised, that is ``{"error": traceback}``;
    where the processes did not come that far, ``{"error": all they printed}``.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    worker = [str(ROOT / "tests" / "distributed" / "worker.py"), str(folder), backend, *scenarios]
    command = [*run, "--nproc-per-node", str(processes), *worker]
    printed = folder / "printed.txt"
    with printed.open("wb") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as launcher:
        try:
            launcher.wait(LIMIT)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends the processes that it started; killing it would leave them
            launcher.wait()
    return {name: [_result(folder, name, rank) for rank in range(processes)] for name in scenarios}


def _result(folder: Path, name: str, rank: int) -> dict[str, Any]:
    path = folder / f"{name}-{rank}.json"
    if not path.is_file():
        return {"error": "nothing was returned; printed was:\n" + (folder / "printed.txt").read_text(errors="replace")}
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def returned(results: dict[str, list[dict[str, Any]]], scenario: str) -> list[dict[str, Any]]:
    """What each process returned from a scenario that none of them failed in."""
    for rank, result in enumerate(results[scenario]):
        assert "error" not in result, f"{scenario} on process {rank}:\n{result['error']}"
    return results[scenario]
