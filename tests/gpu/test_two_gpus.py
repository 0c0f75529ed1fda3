"""The same scenarios over NCCL on two GPUs: the numbers of one GPU, and training as if unwatched.

Needs no fixture and no plug-in: ``python -m pytest --noconftest -o addopts= -m gpu tests/gpu/test_two_gpus.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.checks import CHECKS
from tests.distributed.launch import launch, returned

pytestmark = pytest.mark.gpu
SCENARIOS = [
    "ddp",
    "ddp_loop",
    "no_probe_on_one",
    "fsdp2",
    "fsdp2_loop",
    "fsdp2_bf16",
    "fsdp1",
    "phenomena",
    "tp",
    "tp_bf16",
    "faults",
    "faults_ddp",
    "lives",
    "spread_statistics",
    "sequence_parallel",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    assert torch.cuda.device_count() >= 2, f"needs two CUDA devices, has {torch.cuda.device_count()}"
    folder: Path = tmp_path_factory.mktemp("two_gpus")
    return launch(folder, SCENARIOS, backend="nccl")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_gpus(scenario: str, results: dict[str, list[dict[str, Any]]]) -> None:
    found = returned(results, scenario)
    print(scenario, found)  # shown where it fails, or with -s: whether trainings repeat, how far numbers differ
    CHECKS[scenario](found, False)
