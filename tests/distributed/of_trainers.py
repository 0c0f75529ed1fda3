"""The real Trainer: unwatched twice, and watched in several ways."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe, Run
from ma_monitor.measure.forward import measure
from tests.distributed.common import BATCH, STEPS, Warned, a_model, a_probe, differs, digest
from tests.training import Rows, train

PROBE = a_probe()


def ddp(folder: Path, device: torch.device) -> dict[str, Any]:
    """With the probe that nobody specified on the first process alone, and one that is split over both."""
    unwatched = _unwatched(folder, device)
    return {
        "whole": _watched(folder / "whole", device, unwatched, batch_size=None, probe=None, **_reporting(device)),
        "split": _watched(folder / "split", device, unwatched, batch_size=BATCH),
    }


def fsdp2(folder: Path, device: torch.device) -> dict[str, Any]:
    with _fsdp_on_any_device(device):
        config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        changes: dict[str, Any] = {"fsdp": True, "fsdp_config": config}
        return _watched(folder, device, _unwatched(folder, device, **changes), batch_size=BATCH, **changes)


def zero3(folder: Path, device: torch.device) -> dict[str, Any]:
    settings = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000},
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 4 * dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    unwatched = _unwatched(folder, device, deepspeed=settings)
    return _watched(folder, device, unwatched, batch_size=BATCH, deepspeed=settings)


def no_probe_on_one(folder: Path, device: torch.device) -> dict[str, Any]:
    """The last process finds no probe: monitoring is off on all of them, and the training goes on."""
    from ma_monitor import callback as module

    def fails(*_: Any) -> Any:
        raise OSError("no rows here")

    def find(*arguments: Any) -> Any:
        return (fails if dist.get_rank() else default)(*arguments)

    default = module.default_probe
    watching = MassiveActivationCallback(MonitorConfig(every=2, batch_size=BATCH))
    with mock.patch.object(module, "default_probe", find), Warned() as warnings:
        result = train(folder / "out", [watching], model=a_model(device), max_steps=STEPS, **_on(device))
    steps = result.trainer.state.global_step
    return {"steps": steps, "monitors": watching.monitor is not None, "warnings": warnings}


def _life(folder: Path, device: torch.device, callbacks: list[Any], **changes: Any) -> tuple[Any, str]:
    model = a_model(device, attention_dropout=0.1)
    result = train(folder, callbacks, model=model, max_steps=STEPS, **_on(device), **changes)
    losses = torch.tensor([row.get("loss", 0.0) for _, row in result.losses], dtype=torch.float64)
    return result, digest([*result.weights.values(), losses, torch.get_rng_state()])


def _unwatched(folder: Path, device: torch.device, **changes: Any) -> list[str]:
    return [_life(folder / name, device, [], **changes)[1] for name in ("once", "again")]


def _watched(
    folder: Path,
    device: torch.device,
    unwatched: list[str],
    *,
    batch_size: int | None,
    probe: Probe | None = PROBE,
    **changes: Any,
) -> dict[str, Any]:
    config = MonitorConfig(every=2, batch_size=batch_size, strict=True)
    watching = MassiveActivationCallback(config, probe=probe)
    result, trained = _life(folder / "watched", device, [watching], **changes)
    single = _whole(result, device)
    run = Run.open(folder / "watched" / "ma_monitor")
    measured = run.measurements()
    expected = measure(
        single,
        probe or Probe.from_rows(Rows()[i] for i in range(len(Rows()))),
        STEPS,
        k=config.k,
        batch_size=batch_size,
    )
    return {
        "repeatable": unwatched[0] == unwatched[1],
        "untouched": unwatched[0] == trained,
        "differs": differs(measured[-1], expected),
        "steps": [m.step for m in measured],
        "runs": sorted(path.name for path in (folder / "watched").iterdir() if path.name.startswith("ma_monitor")),
        "records": watching.monitor is not None and watching.monitor.run is not None,
        "takes_part": watching.monitor is not None,
        "rows_an_update": run.plans[0].batch,
        "event_files": len(list((folder / "watched").rglob("events.out.tfevents.*"))),
    }


def _whole(result: Any, device: torch.device) -> Any:
    """The trained weights in a model of one process; the same on each."""
    if hasattr(result.trainer.model_wrapped, "zero_optimization"):
        gathered = importlib.import_module("deepspeed.zero").GatheredParameters  # not among the tests' requirements
        with gathered(list(result.trainer.model.parameters())):
            whole = {name: value.detach().clone() for name, value in result.trainer.model.named_parameters()}
    else:
        whole = {name: _full(value) for name, value in result.weights.items()}
    single = a_model(device)
    single.load_state_dict({name.removeprefix("module."): value for name, value in whole.items()})
    return single


def _full(value: Tensor) -> Tensor:
    full: Any = getattr(value, "full_tensor", None)
    return value if full is None else full()


def _reporting(device: torch.device) -> dict[str, Any]:
    """TensorBoard, which a bare machine with GPUs may not have."""
    return {"report_to": "tensorboard"} if device.type == "cpu" else {}


def _on(device: torch.device) -> dict[str, Any]:
    return {"use_cpu": device.type == "cpu", "ddp_find_unused_parameters": False}


def _fsdp_on_any_device(device: torch.device) -> Any:
    """accelerate trains by FSDP2 on a CPU as on any device, but turns to DDP there unless its state says otherwise."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialise(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and device.type == "cpu":
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return mock.patch.object(AcceleratorState, "__init__", initialise)
