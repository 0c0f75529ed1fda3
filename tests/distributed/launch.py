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

    Gives what each process returned, by scenario and rank; ``{"error": traceback}`` where one raised.

    Raises:
        AssertionError: If the processes did not come to their end, with all they printed.
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
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as hanging:
        raise AssertionError(f"the processes hang; they had printed\n{hanging.stdout}\n{hanging.stderr}") from hanging
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]
        for name in scenarios
    }


def returned(results: dict[str, list[dict[str, Any]]], scenario: str) -> list[dict[str, Any]]:
    """What each process returned from a scenario that none of them failed in."""
    for rank, result in enumerate(results[scenario]):
        assert "error" not in result, f"{scenario} on process {rank}:\n{result['error']}"
    return results[scenario]
