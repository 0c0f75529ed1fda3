"""Several processes that train one model, over gloo: what is measured, what is left alone, and what fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from ma_monitor.measure.distributed import Team, team_of, unwrapped
from tests.distributed.checks import CHECKS
from tests.distributed.launch import launch, returned
from tests.training import tiny_llama

DEFAULT = ["ddp", "no_probe_on_one", "fsdp2", "fsdp1", "tp", "faults", "faults_ddp", "lives", "sequence_parallel"]
SLOW = ["phenomena", "ddp_loop", "fsdp2_loop", "fsdp2_bf16", "tp_bf16", "spread_statistics"]


def test_two_processes(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """One launch for all, as starting the processes takes longer than most of what they do."""
    results = launch(tmp_path, DEFAULT)
    for scenario in DEFAULT:
        with subtests.test(scenario):
            CHECKS[scenario](returned(results, scenario), True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "scenarios"),
    [(2, SLOW), (3, ["spread_statistics", "sequence_parallel", "fsdp2_loop"]), (4, ["hsdp", "faults_hsdp"])],
)
def test_more_processes_and_ways(
    processes: int, scenarios: list[str], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    results = launch(tmp_path, scenarios, processes=processes)
    for scenario in scenarios:
        with subtests.test(scenario):
            CHECKS[scenario](returned(results, scenario), True)


def test_a_process_alone_measures_alone() -> None:
    model = tiny_llama()
    assert team_of(model, None) == team_of(model, 2) == Team()
    assert unwrapped(model) is model
    assert Team().first
    assert Team().turns(3) == range(3)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        Team().agreed(lambda: 1 / 0)
