"""What the scenarios share: models and probes, a plain loop, and digests that tell to the bit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ma_monitor import Monitor, MonitorConfig, Probe
from ma_monitor.measure.forward import measure
from ma_monitor.runs.records import Measurements
from tests.training import Rows, tiny_llama

SEQUENCES, BATCH = 5, 2
"""A probe of three micro-batches, the last of which is short: two processes cannot share them evenly."""
STEPS = 4


def a_probe() -> Probe:
    return Probe.from_ids(Rows().ids[:SEQUENCES].numpy())


def a_model(device: torch.device, **changes: Any) -> Any:
    """The same weights on every process; on a GPU of a size that is worth it, and deterministic in its backward."""
    large = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "attn_implementation": "eager"}
    sizes: dict[str, Any] = {} if device.type == "cpu" else large
    model: Any = tiny_llama(**({"attention_dropout": 0.0} | sizes | changes))
    return model.to(device)


def digest(values: Iterable[Tensor]) -> str:
    """Of the bits of tensors; of a sharded one, of this process's part."""
    found = hashlib.sha256()
    for value in values:
        local = value.to_local() if hasattr(value, "to_local") else value
        found.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def alone(model: nn.Module, *, batch_size: int | None = BATCH) -> Measurements:
    """What one process measures."""
    return measure(model, a_probe(), 0, k=3, batch_size=batch_size)


def differs(one: Measurements, other: Measurements) -> float:
    """Largest relative difference of any number; 0 only if every number is equal to the bit, places included.

    Signs are compared where both found the same entry: of two entries that rounding makes equal, either may be found.
    """
    worst = 0.0
    for a, b in ((np.abs(one.top), np.abs(other.top)), (one.median, other.median)):
        worst = max(worst, float(np.max(np.abs(a - b) / np.maximum(np.abs(b), np.finfo(np.float32).tiny))))
    same_entry = (one.position == other.position) & (one.channel == other.channel)
    if (np.sign(one.top) != np.sign(other.top))[same_entry].any():
        return float("inf")
    same = all(
        np.array_equal(getattr(one, n), getattr(other, n)) for n in ("top", "position", "token", "channel", "nan")
    )
    return worst if same or worst else float("inf")


def loop(model: nn.Module, run_dir: Path | None, *, batch_size: int | None = BATCH, **options: Any) -> dict[str, Any]:
    """A plain training loop, watched where there is a ``run_dir``; the same code on every process."""
    config = MonitorConfig(every=1, batch_size=batch_size, **options)
    monitor, took_part = None, 0
    if run_dir is not None:
        monitor = Monitor(model, a_probe(), config, run_dir=run_dir, schedule="constant", total_steps=STEPS)
        monitor.step(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=False)  # under TP some are DTensors, some not
    ids = Rows().ids[:4].to(next(model.parameters()).device)
    losses = []
    for step in range(1, STEPS + 1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if monitor is not None:
            took_part += monitor.step(step, final=step == STEPS)
    trained = digest([*model.parameters(), *losses])
    if monitor is None:
        return {"trained": trained}
    run = monitor.run
    measured = [] if run is None else run.measurements()
    found = {
        "trained": trained,
        "records": run is not None,
        "takes_part": bool(took_part),
        "steps": [m.step for m in measured],
        "faults": [] if run is None else [event.message for event in run.events if event.kind == "fault"],
        "first": measured[0] if measured else None,
    }
    monitor.close()
    return found


class Warned(logging.Handler):
    """Collects what the package warns of while it is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("ma_monitor").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ma_monitor").removeHandler(self)
