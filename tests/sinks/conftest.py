"""Readers of what the sinks write, and a Trainer small enough to run in a test."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.sinks.base import Emission, Table

LOG_BLOCK = 32 * 1024
"""W&B's transaction log is LevelDB's: blocks of 32 KiB, a record's frame never crossing from one into the next."""
FRAME_HEADER = struct.Struct("<IHB")
WAIT_FOR_EXIT = 30.0
"""Seconds until a finished run's last record must be on disk; on an idle machine it is there at once."""


@dataclass
class WandbFile:
    """What a run's transaction log holds."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    run_id: str = ""
    finished: bool = False


@dataclass
class Tag:
    """One tag of an event file: plugin and what it was given first, steps and tensors."""

    plugin: str = ""
    content: bytes = b""
    steps: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for offline runs; no run is left open and no session of an earlier test is reused."""
    import wandb

    folder = tmp_path / "wandb_files"
    folder.mkdir()
    wandb.teardown()
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    yield folder
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


@pytest.fixture
def read_wandb() -> Callable[[Path], WandbFile]:
    """Reads the only run under a folder, waiting for its exit record."""

    def read(folder: Path) -> WandbFile:
        deadline = time.monotonic() + WAIT_FOR_EXIT
        while True:
            (path,) = folder.rglob("*.wandb")
            content = _wandb_file(path.read_bytes())
            if content.finished:
                return content
            if time.monotonic() > deadline:
                raise TimeoutError(f"no exit record in {path}")
            time.sleep(0.05)

    return read


@pytest.fixture
def read_events() -> Callable[[Path], dict[str, Tag]]:
    """Reads the only event file under a folder."""

    def read(folder: Path) -> dict[str, Tag]:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util import tensor_util

        (path,) = folder.rglob("events.out.tfevents.*")
        tags: dict[str, Tag] = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                tag = tags.setdefault(value.tag, Tag())
                tag.plugin = value.metadata.plugin_data.plugin_name or tag.plugin
                tag.content = tag.content or value.metadata.plugin_data.content
                tag.steps.append(event.step)
                tag.values.append(tensor_util.make_ndarray(value.tensor))
        return tags

    return read


@pytest.fixture
def picture() -> NDArray[np.uint8]:
    """A small picture without two equal rows, columns or channels."""
    return np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


@pytest.fixture
def make_emission(picture: NDArray[np.uint8]) -> Callable[[int], Emission]:
    """What a monitor of a two-layer model emits at a step: step 0 is the first, even steps have a picture and table."""

    def make(step: int) -> Emission:
        full = step % 2 == 0
        return Emission(
            step,
            {
                "ma/ratio/layer_01": 5.0 + step / 8,
                "ma/ratio/layer_02": 50.0 + step / 8,
                "ma/max_ratio": 50.0 + step / 8,
            },
            images={"ma/heatmap": picture} if full else {},
            tables={"ma/layers": Table(("layer", "class", "peak"), ((1, "flat", None), (2, "decay", step + 0.5)))}
            if full
            else {},
            config={"ma_monitor/layers": 2, "ma_monitor/model": "tiny", "ma_monitor/width": None} if step == 0 else {},
        )

    return make


def _wandb_file(data: bytes) -> WandbFile:
    """Takes the records of a transaction log apart."""
    from wandb.proto import wandb_internal_pb2

    content = WandbFile()
    for payload in _log_records(data):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            content.rows.append(_values(record.history.item))
        elif kind == "run":
            content.config.update(_values(record.run.config.update))
            content.run_id = record.run.run_id
        elif kind == "config":
            content.config.update(_values(record.config.update))
        elif kind == "summary":
            content.summary.update(_values(record.summary.update))
        elif kind == "metric" and record.metric.step_metric:
            content.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "alert":
            content.alerts.append((record.alert.title, record.alert.text, record.alert.level))
        elif kind == "exit":
            content.finished = True
    return content


def _values(items: Any) -> dict[str, Any]:
    """Key → value of a record's items; a nested key is joined by slashes."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind W&B's file header, up to its end or the first incomplete one."""
    position = struct.calcsize("<4sHB")
    record = b""
    while True:
        room = LOG_BLOCK - position % LOG_BLOCK
        if room < FRAME_HEADER.size:
            position += room
            continue
        start = position + FRAME_HEADER.size
        if start > len(data):
            return
        _, length, kind = FRAME_HEADER.unpack_from(data, position)
        if kind == 0 or start + length > len(data):
            return
        whole, first, _, last = 1, 2, 3, 4
        record = (b"" if kind in (whole, first) else record) + data[start : start + length]
        if kind in (whole, last):
            yield record
        position = start + length
