"""A model whose forward is a collective operation: every process probes, one records, none waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ma_monitor import Run
from ma_monitor.measure.layers import needs_every_rank
from tests.training import tiny_llama

TRAINING = """
import datetime, sys
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerControl, TrainerState
from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe
from ma_monitor.measure.layers import needs_every_rank
from tests.training import Rows, tiny_llama

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
rank = dist.get_rank()
model = tiny_llama(attention_dropout=0.0)
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert needs_every_rank(model)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
ids = Rows().ids[:4]


def life(output, first, last, run_dir=None):
    callback = MassiveActivationCallback(MonitorConfig(every=2), probe=Probe.from_ids(ids.numpy()), run_dir=run_dir)
    args = SimpleNamespace(output_dir=output, train_batch_size=2, gradient_accumulation_steps=1, world_size=2)
    main = rank == 0
    state = TrainerState(global_step=first, max_steps=last, is_world_process_zero=main, is_local_process_zero=main)
    state.stateful_callbacks = {"ma_monitor.v1": {"run": "ma_monitor", "measured": 2}} if first else {}
    event = {"model": model, "lr_scheduler": schedule}
    callback.on_train_begin(args, state, TrainerControl(), **event)
    callback.on_epoch_begin(args, state, TrainerControl(), **event)
    for step in range(first + 1, last + 1):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step = step
        callback.on_step_end(args, state, TrainerControl(), **event)
    callback.on_train_end(args, state, TrainerControl(), **event)


life(sys.argv[1], 0, 4)
dist.barrier()
life(sys.argv[1], 4, 6)
dist.barrier()
if rank == 0:
    Path(sys.argv[1], "file").write_text("in the way")
dist.barrier()
life(sys.argv[1], 0, 3, Path(sys.argv[1], "file", "run"))  # a run that only the first process could not open
print("trained to the end", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("sharded")
    script = folder / "training.py"
    script.write_text(TRAINING)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(script), str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_every_process_trains_to_the_end_through_a_resume_and_a_refused_directory(sharded: tuple[Path, str]) -> None:
    _, output = sharded
    assert output.count("trained to the end") == 2
    assert "ma_monitor: monitoring failed and is left out. StoreError" in output


def test_the_resumed_run_has_every_step_once(sharded: tuple[Path, str]) -> None:
    run = Run.open(sharded[0] / "ma_monitor")
    assert run.steps.tolist() == [0, 1, 2, 4, 6]
    assert run.damage is None


def test_step_zero_is_what_one_process_measures(sharded: tuple[Path, str]) -> None:
    from ma_monitor import Probe
    from ma_monitor.measure.forward import measure
    from tests.training import Rows

    alone = measure(tiny_llama(attention_dropout=0.0), Probe.from_ids(Rows().ids[:4].numpy()), 0, k=3)
    together = Run.open(sharded[0] / "ma_monitor").measurements()[0]
    np.testing.assert_array_equal(together.top, alone.top)
    np.testing.assert_array_equal(together.median, alone.median)


def test_a_whole_model_needs_one_process_only() -> None:
    assert not needs_every_rank(tiny_llama())
