"""A Trainer's events by hand, through a resume and a directory that only the first process cannot use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState

from ma_monitor import MassiveActivationCallback, MonitorConfig, Run
from tests.distributed.common import Warned, a_model, a_probe, alone, differs
from tests.distributed.of_loops import sharded
from tests.training import Rows


def lives(folder: Path, device: torch.device) -> dict[str, Any]:
    model = sharded(a_model(device), device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    ids = Rows().ids[:4].to(device)

    def life(first: int, last: int, run_dir: Path | None = None) -> None:
        callback = MassiveActivationCallback(MonitorConfig(every=2, batch_size=2), probe=a_probe(), run_dir=run_dir)
        args: Any = SimpleNamespace(
            output_dir=str(folder), train_batch_size=2, gradient_accumulation_steps=1, world_size=2
        )
        main = dist.get_rank() == 0
        state = TrainerState(global_step=first, max_steps=last, is_world_process_zero=main, is_local_process_zero=main)
        carried: Any = {"ma_monitor.v1": {"run": "ma_monitor", "measured": 2}} if first else {}
        state.stateful_callbacks = carried
        control, event = TrainerControl(), {"model": model, "lr_scheduler": schedule}
        callback.on_train_begin(args, state, control, **event)
        callback.on_epoch_begin(args, state, control, **event)
        for step in range(first + 1, last + 1):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state.global_step = step
            callback.on_step_end(args, state, control, **event)
        callback.on_train_end(args, state, control, **event)

    life(0, 4)
    dist.barrier()
    life(4, 6)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "file").write_text("in the way")
    with Warned() as warnings:
        life(0, 3, folder / "file" / "run")
    run = Run.open(folder / "ma_monitor")
    first = differs(run.measurements()[0], alone(a_model(device)))
    return {"warnings": warnings, "steps": run.steps.tolist(), "damage": run.damage, "differs": first}
