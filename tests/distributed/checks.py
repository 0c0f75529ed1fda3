"""What must hold of each scenario's results, on CPUs and on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ma_monitor.phenomena import METRICS
from tests.distributed.common import STEPS

Results = list[dict[str, Any]]
FLOAT32 = 1e-4
"""Sharded matrix products sum in another order: relative room of every number in float32."""
SENSITIVE = 1e-3
"""Ten times that for what is read besides, such as fourth powers."""
BFLOAT16 = 2 * 2.0**-7
"""The same in bfloat16: two units in the last place of eight bits, where those are largest."""
SAYS = "the probe failed and is left out. ModelError: every process must succeed, or it is left out on all; "


def watched(results: Results, *, room: float, steps: list[int], always: bool = False) -> None:
    """Trained as if unwatched, the numbers of one process, and one process that records.

    Args:
        results: Of every process.
        room: Largest relative difference from one process.
        steps: What must have been measured.
        always: Whether two unwatched trainings must be alike, without which nothing can be said.
    """
    assert [result["records"] for result in results] == [True] + [False] * (len(results) - 1)
    for result in results:
        assert result["repeatable"] or not always, "two unwatched trainings differ"
        assert result["untouched"] or not result["repeatable"], "watched and unwatched trainings differ"
        assert result["differs"] is None or result["differs"] <= room
    assert results[0]["differs"] is not None
    assert results[0]["steps"] == steps
    assert len(results[0]["runs"]) == 1


def in_loop(results: Results, room: float, always: bool) -> None:
    watched(results, room=room, steps=list(range(STEPS + 1)), always=always)


def in_trainer(results: Results, room: float, always: bool) -> None:
    watched(results, room=room, steps=[0, 1, 2, STEPS], always=always)
    assert {result["rows_an_update"] for result in results} == {4 * len(results)}


def one_fails(results: Results, function: str) -> None:
    """Skipped on all, warned of once by the first, in the diary, and measured again when it works."""
    said = f"{SAYS}process {len(results) - 1} had MemoryError: none left in {function}"
    assert all(result["untouched"] for result in results)
    assert results[0]["steps"] == [0, 3, 4]
    assert results[0]["faults"] == [said]
    assert results[0]["warnings"] == [f"ma_monitor: {said}"]
    assert not any(result["warnings"] for result in results[1:])


def _ddp(check: Callable[[Results, float, bool], None], results: Results, always: bool) -> None:
    for layout in ("split", "whole"):
        check([result[layout] for result in results], 0.0, always)
        others = {result[layout]["takes_part"] for result in results[1:]}
        assert others == {layout == "split"}, f"{layout}: which processes measure"
    if "event_files" in results[0]["whole"] and always:
        assert results[0]["whole"]["event_files"] == 1


def _faults(results: Results, always: bool) -> None:
    functions = {"before": "find_layers", "inside": "statistics_of", "after": "_check_seen"}
    for where, function in functions.items():
        one_fails([result[where] for result in results], function)
    everywhere = [result["everywhere"] for result in results]
    assert all(result["untouched"] for result in everywhere)
    assert everywhere[0]["steps"] == [0, 3, 4]
    assert everywhere[0]["faults"] == ["the probe failed and is left out. MemoryError: none left in forward"]


def _faults_ddp(results: Results, always: bool) -> None:
    for function in ("statistics_of", "undisturbed_forward"):
        one_fails([result[function] for result in results], function)


def _no_probe(results: Results, always: bool) -> None:
    assert all(result["steps"] == STEPS and not result["monitors"] for result in results)
    assert len(results[0]["warnings"]) == 1
    assert results[0]["warnings"][0].endswith(f"process {len(results) - 1} had OSError: no rows here")
    assert results[-1]["warnings"] == []


def _lives(results: Results, always: bool) -> None:
    assert results[0]["warnings"][0].startswith("ma_monitor: monitoring failed and is left out. StoreError")
    assert results[1]["warnings"] == []
    for result in results:
        assert result["steps"] == [0, 1, 2, 4, 6]
        assert result["damage"] is None
        assert result["differs"] <= FLOAT32


def _spread(results: Results, always: bool) -> None:
    for result in results:
        assert result["wrong"] == []
        assert result["compared"] > 100
        chunks, axes = result["refused"]
        assert "must be spread in equal chunks" in chunks
        assert "got shape (5, 4) with (Shard(dim=0),)" in axes


def _sequence_parallel(results: Results, always: bool) -> None:
    assert all(result["equal"] for result in results)
    assert results[-1]["said"] == "RuntimeError: out of memory"
    assert results[0]["said"].endswith(f"process {len(results) - 1} had RuntimeError: out of memory")


def _phenomena(results: Results, always: bool) -> None:
    for way, room in (("ddp", FLOAT32), ("fsdp2", SENSITIVE)):
        each = [result[way] for result in results]
        assert all(one["untouched"] or not always for one in each)
        assert each[0]["steps"] == list(range(STEPS + 1))
        assert set(each[0]["differs"]) == set(METRICS)
        assert max(each[0]["differs"].values()) <= room, (way, each[0]["differs"])


CHECKS: dict[str, Callable[[Results, bool], None]] = {
    "ddp": lambda results, always: _ddp(in_trainer, results, always),
    "ddp_loop": lambda results, always: _ddp(in_loop, results, always),
    "fsdp2": lambda results, always: in_trainer(results, FLOAT32, always),
    "zero3": lambda results, always: in_trainer(results, FLOAT32, always),
    "fsdp1": lambda results, always: in_loop(results, FLOAT32, always),
    "fsdp2_loop": lambda results, always: in_loop(results, FLOAT32, always),
    "hsdp": lambda results, always: in_loop(results, FLOAT32, always),
    "fsdp2_bf16": lambda results, always: in_loop(results, BFLOAT16, always),
    "tp": lambda results, always: in_loop(results, FLOAT32, always),
    "tp_bf16": lambda results, always: in_loop(results, BFLOAT16, always),
    "phenomena": _phenomena,
    "faults": _faults,
    "faults_ddp": _faults_ddp,
    "faults_hsdp": lambda results, always: one_fails(results, "statistics_of"),
    "no_probe_on_one": _no_probe,
    "lives": _lives,
    "spread_statistics": _spread,
    "sequence_parallel": _sequence_parallel,
}
"""Scenario → its check, of every process's result and of whether unwatched trainings must repeat."""
