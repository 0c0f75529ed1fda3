"""Plain loops: the same code on every process, unwatched twice and watched once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ma_monitor.measure.phenomena.reading import measure_with
from ma_monitor.phenomena import PHENOMENA
from tests.distributed.common import BATCH, a_model, a_probe, alone, differs, loop


def _thrice(folder: Path, make: Callable[[], nn.Module], single: nn.Module, batch_size: int | None) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    once, again = loop(make(), None), loop(make(), None)
    watched = loop(make(), folder / "run", batch_size=batch_size, strict=True)
    first = watched.pop("first")
    return {
        "repeatable": once == again,
        "untouched": once["trained"] == watched["trained"],
        "differs": None if first is None else differs(first, alone(single, batch_size=batch_size)),
        "runs": sorted(path.name for path in folder.iterdir() if dist.get_rank() == 0),
        **watched,
    }


def ddp_loop(folder: Path, device: torch.device) -> dict[str, Any]:
    def make() -> nn.Module:
        return nn.parallel.DistributedDataParallel(a_model(device))

    split = _thrice(folder / "split", make, a_model(device), 2)
    whole = _thrice(folder / "whole", make, a_model(device), None)
    return {"split": split, "whole": whole}


def fsdp1(folder: Path, device: torch.device) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def make() -> nn.Module:
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return FullyShardedDataParallel(
            a_model(device), auto_wrap_policy=policy, device_id=device, use_orig_params=True
        )

    return _thrice(folder, make, a_model(device), 2)


def fsdp2_loop(folder: Path, device: torch.device) -> dict[str, Any]:
    return _thrice(folder, lambda: sharded(a_model(device), device), a_model(device), 2)


def fsdp2_bf16(folder: Path, device: torch.device) -> dict[str, Any]:
    def make() -> Any:
        return a_model(device).to(torch.bfloat16)

    return _thrice(folder, lambda: sharded(make(), device), make(), 2)


def hsdp(folder: Path, device: torch.device) -> dict[str, Any]:
    """FSDP2 in copies: two axes of processes, over which nothing is split."""
    sizes = (2, dist.get_world_size() // 2)
    return _thrice(folder, lambda: sharded(a_model(device), device, sizes), a_model(device), 2)


def sharded(model: Any, device: torch.device, sizes: tuple[int, ...] | None = None) -> Any:
    """FSDP2 over all processes, in a mesh of these sizes."""
    from torch.distributed.fsdp import fully_shard

    sizes = sizes or (dist.get_world_size(),)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicas", "parts")[-len(sizes) :])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def phenomena(folder: Path, device: torch.device) -> dict[str, Any]:
    """What is read besides, its sequences split over the processes: largest relative difference from one process."""
    names = tuple(PHENOMENA)

    def failed(name: str, error: Exception) -> None:
        raise RuntimeError(name) from error

    expected = measure_with(
        a_model(device), a_probe(), 0, k=3, phenomena=names, failed=failed, batch_size=BATCH
    ).phenomena

    def one(make: Callable[[], nn.Module], name: str) -> dict[str, Any]:
        unwatched, watched = loop(make(), None), loop(make(), folder / name, strict=True, phenomena=names)
        first, worst = watched["first"], {}
        for key, values in expected.items() if first is not None else ():
            found = first.phenomena[key]
            assert (np.isnan(found) == np.isnan(values)).all(), key
            worst[key] = float(np.nanmax(np.abs(found - values) / np.maximum(np.abs(values), 1e-3), initial=0))
        return {"untouched": unwatched["trained"] == watched["trained"], "differs": worst, "steps": watched["steps"]}

    return {
        "ddp": one(lambda: nn.parallel.DistributedDataParallel(a_model(device)), "ddp"),
        "fsdp2": one(lambda: sharded(a_model(device), device), "fsdp2"),
    }


def tp(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    weights = folder / "weights"
    single = a_model(device).to(dtype)
    if dist.get_rank() == 0:
        single.save_pretrained(weights)
    dist.barrier()

    def make() -> Any:
        plan = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
        attention = single.config._attn_implementation
        return AutoModelForCausalLM.from_pretrained(
            weights, dtype=dtype, attn_implementation=attention, distributed_config=plan
        )

    return _thrice(folder / "lives", make, single, 2)


def tp_bf16(folder: Path, device: torch.device) -> dict[str, Any]:
    return tp(folder, device, torch.bfloat16)
