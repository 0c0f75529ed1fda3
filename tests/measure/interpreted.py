"""Run with Triton's interpreter by test_kernels.py: its kernels against PyTorch's back end, on a CPU."""

from __future__ import annotations

import os
import sys

import torch

from ma_monitor.measure import launch
from ma_monitor.measure.statistics import activation_statistics
from tests.measure.activations import SEQUENCES, misleading

SHAPE = (1, 31, 300)
"""More entries than are sampled, and more than one chunk, the last one not full."""
KINDS = ("ordinary", "not finite", "all NaN", "all equal", "two values", "half zero", "channels apart")
"""One for each way through the kernels; a GPU runs all, in tests/gpu."""


def differing() -> list[str]:
    """Names of the cases in which the back ends differ."""
    made = {kind: SEQUENCES[kind](*SHAPE) for kind in KINDS} | {"misleading": misleading(*SHAPE)}
    cases = [(kind, hidden.to(dtype)) for kind, hidden in made.items() for dtype in (torch.float32, torch.bfloat16)]
    cases += [(kind, SEQUENCES[kind](*SHAPE).half()) for kind in ("ordinary", "denormal")]
    found = []
    for kind, hidden in cases:
        expected = activation_statistics(hidden, 3, backend="torch").packed
        if not torch.equal(launch.packed_statistics(hidden, 3), expected):
            found.append(f"{kind} in {hidden.dtype}")
    small = torch.tensor([[[3.0, -4.0]]])
    if not torch.equal(launch.packed_statistics(small, 3), activation_statistics(small, 3, backend="torch").packed):
        found.append("fewer entries than ranks")
    return found


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("must be run with TRITON_INTERPRET=1 in the environment")
    print(differing())
