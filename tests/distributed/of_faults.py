"""One process fails, before, in and after a forward that needs all: none waits, all train on alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from ma_monitor.measure import forward
from ma_monitor.measure.phenomena import reading
from tests.distributed.common import Warned, a_model, loop
from tests.distributed.of_loops import sharded

PLACES = {"before": "find_layers", "inside": "statistics_of", "after": "_check_seen"}
"""Where a probe can fail → the function of ``measure.forward`` that is made to."""


def faults(folder: Path, device: torch.device) -> dict[str, Any]:
    """The last process fails in each place; then all of them do, in the middle of the forward."""

    def make() -> Any:
        return sharded(a_model(device), device)

    one = {where: _failing(folder / where, name, make) for where, name in PLACES.items()}
    return one | {"everywhere": _failing(folder / "everywhere", "forward", make, owner=LlamaMLP, everywhere=True)}


def faults_ddp(folder: Path, device: torch.device) -> dict[str, Any]:
    """Of the processes that share the micro-batches; and a forward that only the failing one ever ran."""

    def make() -> nn.Module:
        return nn.parallel.DistributedDataParallel(a_model(device))

    return {name: _failing(folder / name, name, make) for name in ("statistics_of", "undisturbed_forward")}


def faults_hsdp(folder: Path, device: torch.device) -> dict[str, Any]:
    """Of the processes of a mesh of two axes."""
    sizes = (2, dist.get_world_size() // 2)
    return _failing(folder, "statistics_of", lambda: sharded(a_model(device), device, sizes))


def _failing(
    folder: Path, name: str, make: Callable[[], nn.Module], *, owner: Any = forward, everywhere: bool = False
) -> dict[str, Any]:
    """A training in which the last process, or all, fail in the second and the third probe."""
    folder.mkdir(parents=True, exist_ok=True)
    unwatched = loop(make(), None)
    works, measured = getattr(owner, name), forward.measure
    concerned = everywhere or dist.get_rank() == dist.get_world_size() - 1
    now: list[int] = []

    def fails(*arguments: Any, **options: Any) -> Any:
        if concerned and now in ([1], [2]):
            raise MemoryError(f"none left in {name}")
        return works(*arguments, **options)

    def at(model: nn.Module, probe: Any, step: int, **options: Any) -> Any:
        now[:] = [step]
        try:
            return measured(model, probe, step, **options)
        finally:
            now.clear()

    with mock.patch.object(owner, name, fails), mock.patch.object(reading, "measure", at), Warned() as warnings:
        watched = loop(make(), folder / "run")
    return {
        "untouched": unwatched["trained"] == watched["trained"],
        "steps": watched["steps"],
        "faults": watched["faults"],
        "warnings": warnings,
    }
