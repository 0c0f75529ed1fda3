"""Triton's kernels, in its interpreter; tests/gpu runs them where they belong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ma_monitor.measure import launch

ROOT = Path(__file__).parents[2]


def test_the_kernels_equal_pytorchs_back_end() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.measure.interpreted"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("hidden", "supported"),
    [
        (torch.zeros(1, 2, 3), True),
        (torch.zeros(1, 2, 3, dtype=torch.float16), True),
        (torch.zeros(1, 3, 3, dtype=torch.bfloat16), False),
        (torch.zeros(1, 2, 3, dtype=torch.float64), False),
        (torch.zeros(1, 3, 2).transpose(1, 2), False),
        (torch.zeros(1, 0, 3), False),
        (torch.zeros(0, 2, 3), False),
        (torch.zeros(9, dtype=torch.float16)[1:].view(1, 2, 4), False),
        (torch.zeros(1, 1, 1).expand(1, 2**15, 2**14), False),
    ],
    ids=["single", "half", "odd", "double", "turned", "no tokens", "no sequences", "half a word in", "too long"],
)
def test_what_the_kernels_can_read_is_known(hidden: torch.Tensor, supported: bool) -> None:
    assert launch.supports(hidden) is supported
