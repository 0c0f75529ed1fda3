"""The processes that run a probe together: which they are, how they agree, and how they share the work.

Which they are is read from the model itself, never from the default process group: the mesh of its parameters, FSDP's
or ZeRO-3's group, the group of a `DistributedDataParallel` around it. So a process that trains something else, or
nothing, is never waited for. Every collective operation is an ``all_reduce`` over each of those groups in turn, which
reaches all processes of a mesh of any number of axes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ma_monitor.errors import ModelError
from ma_monitor.measure.layers import needs_every_rank

T = TypeVar("T")
_MESSAGE = 400
"""Bytes of a failure's message that reach the other processes."""


@dataclass(frozen=True)
class Team:
    """The processes that measure one model together; by default this process alone.

    Attributes:
        groups: Process groups whose product is the team, in the same order on every process.
        together: Whether the forward is a collective operation, so that all must run as many forwards.
        splits: Whether the micro-batches are split over the one group: its processes are data-parallel.
    """

    groups: tuple[Any, ...] = ()
    together: bool = False
    splits: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one process of the team that records and warns."""
        return all(dist.get_rank(group) == 0 for group in self.groups)

    def agreed(self, work: Callable[[], T]) -> T:
        """Does this process's ``work``, and returns only if that of every process succeeded.

        ``work`` must wait for nobody, unless what it waits for can fail only on all processes alike.

        Raises:
            Exception: Whatever ``work`` raised here.
            ModelError: If it succeeded here and failed elsewhere.
        """
        failed: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failed = error
        self._agree(failed)
        return result

    def from_first(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """What the first process has, ``[n, S]`` of non-negative numbers, whatever the others have."""
        if not self.groups:
            return values
        shape = self._reduced(torch.tensor(values.shape if self.first else (0, 0), device="cpu"))
        mine = torch.from_numpy(values) if self.first else torch.zeros(*shape.tolist(), dtype=torch.long, device="cpu")
        return self._reduced(mine.clone()).numpy()

    def turns(self, count: int) -> range:
        """The micro-batches ``0 … count - 1`` that this process runs, as many on every process.

        Numbers from ``count`` on stand for repeats of the last one, whose results are dropped: where the forward is
        a collective operation, a process without work of its own must run it all the same.
        """
        if not self.splits:
            return range(count)
        size = dist.get_world_size(self.groups[0])
        return range(dist.get_rank(self.groups[0]), -(-count // size) * size, size)

    def merged(self, parts: Tensor) -> Tensor:
        """All processes' results ``[…]`` int64, each of which is zero where another process's are not."""
        return self._reduced(parts, "SUM") if self.splits else parts

    def _agree(self, failed: Exception | None) -> None:
        me = dist.get_rank() + 1 if self.groups else 1
        culprit = int(self._reduced(torch.tensor([me if failed is not None else 0], device="cpu")))
        if culprit == 0:
            return
        text = f"{type(failed).__name__}: {failed}".encode()[:_MESSAGE] if culprit == me else b""
        said = self._reduced(torch.tensor(list(text.ljust(_MESSAGE, b"\0")), device="cpu"))
        if failed is not None:
            raise failed
        message = bytes(said.tolist()).rstrip(b"\0").decode(errors="replace")
        raise ModelError(f"every process must succeed, or it is left out on all; process {culprit - 1} had {message}")

    def _reduced(self, values: Tensor, operation: str = "MAX") -> Tensor:
        for group in self.groups:
            values = values.to(_device_of(group))
            dist.all_reduce(values, getattr(dist.ReduceOp, operation), group=group)
        return values.cpu()


def team_of(model: nn.Module, batch_size: int | None) -> Team | None:
    """The processes that this one measures ``model`` with; None where another process does it alone.

    Micro-batches are split where the model is wrapped in `DistributedDataParallel`, or sharded by FSDP alone over one
    axis of processes. In every other layout each process of a sharded model runs all of them.

    Args:
        model: As the training calls it, with its wrapper.
        batch_size: Probe sequences per forward; None for all at once, which cannot be split.
    """
    if not dist.is_available() or not dist.is_initialized():
        return Team()
    if needs_every_rank(model):
        groups, data_parallel = _sharding_groups(model)
        return Team(groups, True, splits=data_parallel and len(groups) == 1 and batch_size is not None)
    wrapper = _data_parallel_wrapper(model)
    group = None if wrapper is None else wrapper.process_group
    if group is None or dist.get_world_size(group) == 1:
        return Team()
    if batch_size is not None:
        return Team((group,), splits=True)
    return Team() if dist.get_rank(group) == 0 else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedDataParallel`, whose own forward may not be called by one process alone."""
    wrapper = _data_parallel_wrapper(model)
    return model if wrapper is None else wrapper.module


@contextmanager
def resharded(modules: Sequence[nn.Module]) -> Iterator[None]:
    """In the end FSDP2's parameters are in parts again, as between two updates.

    A forward without a backward leaves the outermost module's parameters whole: an update would not reach those.
    """
    try:
        yield
    finally:
        if "torch.distributed.fsdp" in sys.modules:  # where it was never loaded nothing is sharded by it
            from torch.distributed.fsdp import FSDPModule

            for module in modules:
                if isinstance(module, FSDPModule):
                    module.reshard()


def _data_parallel_wrapper(model: nn.Module) -> Any:
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def _sharding_groups(model: nn.Module) -> tuple[tuple[Any, ...], bool]:
    """The process groups over which a model is sharded, and whether they are data-parallel for certain."""
    fsdp1 = [m.process_group for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]
    if fsdp1:
        return _distinct(fsdp1), True
    from torch.distributed.fsdp import FSDPModule

    meshes = list(dict.fromkeys(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")))
    fsdp2 = any(isinstance(m, FSDPModule) for m in model.modules())
    of_meshes = [group for mesh in meshes for group in mesh.get_all_groups()]
    of_zero3 = [p.ds_process_group for p in model.parameters() if hasattr(p, "ds_process_group")]
    return _distinct(of_meshes + of_zero3), fsdp2 and len(meshes) == 1 and meshes[0].ndim == 1


def _distinct(groups: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(group for group in dict.fromkeys(groups) if dist.get_world_size(group) > 1)


def _device_of(group: Any) -> torch.device:
    """Where a group takes its tensors: gloo and MPI on the CPU, the others on this process's accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
