"""Residual streams that are spread over the processes, against one process that has the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ma_monitor.errors import ModelError
from ma_monitor.measure import sharded
from ma_monitor.measure.distributed import Team
from ma_monitor.measure.forward import measure
from ma_monitor.measure.probe import Probe
from ma_monitor.measure.statistics import Statistics, activation_statistics

SHAPES = [(1, 1, 1), (2, 5, 4), (3, 2, 3), (4, 7, 2), (2, 33, 17)]
"""Among them axes that two or three processes cannot share evenly, or at all."""
BFLOAT16 = (4, 7, 2)
"""The shape whose values are in bfloat16."""


def spread_statistics(folder: Path, device: torch.device) -> dict[str, Any]:
    """Every way of spreading, every shape, ordinary and adversarial values."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    wrong, compared = [], 0
    for shape in SHAPES:
        for name, whole in _values(shape, generator).items():
            whole = whole.to(device)
            whole = whole.to(torch.bfloat16) if shape == BFLOAT16 else whole
            for placement, k in (Shard(0), 3), (Shard(1), 3), (Shard(1), 40), (Shard(2), 1), (Replicate(), 3):
                compared += 1
                got = sharded.statistics_of(distribute_tensor(whole, mesh, [placement]), k)
                if not _equal(got, activation_statistics(whole, k)):
                    wrong.append(f"{name} {shape} {placement} k={k}")
    whole = torch.randint(-9, 9, (2, 5, 4), generator=generator).to(device, torch.float32)
    partial = DTensor.from_local(whole * (dist.get_rank() + 1), mesh, [Partial()])
    parts = dist.get_world_size() * (dist.get_world_size() + 1) // 2
    if not _equal(sharded.statistics_of(partial, 3), activation_statistics(whole * parts, 3)):
        wrong.append("partial")
    return {"wrong": wrong, "compared": compared, "refused": _refused(whole, mesh)}


def _values(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    normal = torch.randn(shape, generator=generator)
    broken = normal.clone()
    broken[0] = torch.nan
    broken[-1, -1, -1], broken[-1, 0, 0] = -torch.inf, torch.nan
    return {
        "normal": normal,
        "ties": normal.round(),
        "equal": torch.full(shape, -2.0),
        "zeros": torch.where(normal > 0, 0.0, -0.0),
        "denormal": normal * 1e-40,
        "nan and infinities": broken,
    }


def _equal(one: Statistics, other: Statistics) -> bool:
    """To the bit, where the kind of NaN does not count."""
    for name in ("top", "index", "median", "nan", "inf"):
        a, b = getattr(one, name), getattr(other, name)
        if a.dtype != b.dtype or not torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7)):
            return False
    return torch.equal(one.top.isnan(), other.top.isnan())


def _refused(whole: Tensor, mesh: Any) -> list[str]:
    """What is said of parts that are not chunks, and of a stream without its three axes."""
    rows = 1 if dist.get_rank() == 0 else 3
    uneven = DTensor.from_local(
        whole[:, :rows], mesh, [Shard(1)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    said = []
    for wrong in (uneven, distribute_tensor(whole[0], mesh, [Shard(0)])):
        try:
            sharded.statistics_of(wrong, 1)
        except ModelError as error:
            said.append(str(error))
    return said


class Spread(nn.Module):
    """Blocks between which the tokens are spread over the processes, as under sequence parallelism."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 6)
        self.layers = nn.ModuleList([nn.Tanh(), nn.Identity()])
        self.mesh = mesh

    def forward(self, ids: Tensor) -> Any:
        hidden: Any = self.embedding(ids)
        hidden = hidden if self.mesh is None else distribute_tensor(hidden, self.mesh, [Shard(1)])
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def sequence_parallel(folder: Path, device: torch.device) -> dict[str, Any]:
    """Measured through hooks; then with statistics that fail on the last process in the first block only."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    team = Team((mesh.get_group(),), together=True)
    probe = Probe.from_ids(torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(0)).numpy())
    together = measure(Spread(mesh).to(device), probe, 0, k=3, batch_size=2, team=team)
    alone = measure(Spread(None).to(device), probe, 0, k=3, batch_size=2)
    equal = all((getattr(together, n) == getattr(alone, n)).all() for n in ("top", "position", "channel", "median"))
    calls = []

    def fails_once(hidden: Tensor, k: int) -> Statistics:
        calls.append(k)
        if dist.get_rank() == dist.get_world_size() - 1 and len(calls) == 2:
            raise RuntimeError("out of memory")
        return activation_statistics(hidden, k)

    said = None
    with mock.patch.object(sharded, "activation_statistics", fails_once):
        try:
            measure(Spread(mesh).to(device), probe, 1, k=3, batch_size=2, team=team)
        except (ModelError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
    return {"equal": bool(equal), "said": said}
