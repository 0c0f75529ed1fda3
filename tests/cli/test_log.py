"""``ma-monitor log``: a finished run in TensorBoard and W&B, as live logging would have left it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_monitor.analysis import refit_due
from ma_monitor.cli.log import emissions
from ma_monitor.config import MonitorConfig
from ma_monitor.monitor import Observer
from ma_monitor.runs.store import Run
from ma_monitor.sinks.base import Emission, MemorySink
from tests.cli.conftest import LAYERS, PLAN, STEPS, Call, make_measurements, make_meta, make_run

SHORT = STEPS[:14]
WAIT = 30.0
"""Seconds until W&B has written a run that is finished; at once on an idle machine."""
DUE = [int(step) for count, step in enumerate(SHORT, start=1) if refit_due(count) or count == len(SHORT)]


@pytest.fixture
def short_run(tmp_path: Path) -> Path:
    """A run short enough to be logged in a moment."""
    return make_run(tmp_path / "short", steps=SHORT)


def test_the_same_as_live(tmp_path: Path) -> None:
    live = MemorySink()
    run = Run.create(tmp_path / "live", make_meta(), PLAN)
    measurements = make_measurements(SHORT)
    with closing(Observer(run, MonitorConfig(strict=True), sinks=[live])) as observer:
        for m in measurements:
            observer.observe(m, final=m is measurements[-1])
    logged = list(emissions(Run.open(tmp_path / "live")))
    assert [comparable(e) for e in logged] == [comparable(e) for e in live.emissions]
    assert [e.step for e in logged if e.tables] == DUE
    assert len(DUE) > 3


def comparable(emission: Emission) -> tuple[object, ...]:
    """An emission as a value that equality understands."""
    images = {key: image.tobytes() for key, image in emission.images.items()}
    return emission.step, emission.scalars, images, emission.tables, emission.config


def read_events(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Tag → steps and tensors of the only event file in a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    (path,) = folder.glob("events.out.tfevents.*")
    tags: dict[str, list[tuple[int, Any]]] = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append((event.step, tensor_util.make_ndarray(value.tensor)))
    return tags


def test_tensorboard(call: Call, refused: Callable[..., str], short_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tb"
    result = call("log", short_run, "--to", "tensorboard", "--dir", folder, "--json")
    assert result.document == {
        "run": str(short_run),
        "to": "tensorboard",
        "where": str(folder),
        "steps": len(SHORT),
    }
    assert result.err == "", "progress is shown although stderr is no terminal"
    tags = read_events(folder)
    ratios = Run.open(short_run).ratios()
    for layer in range(1, LAYERS + 1):
        steps, values = zip(*tags[f"ma/ratio/layer_{layer:02d}"], strict=True)
        assert list(steps) == list(SHORT)
        np.testing.assert_array_equal(np.array(values), ratios[layer - 1].astype(np.float32))
    assert [step for step, _ in tags["ma/heatmap"]] == DUE
    ends = {e.step: e.scalars.get("ma/forecast/max_end", math.nan) for e in emissions(Run.open(short_run)) if e.tables}
    logged = {step: float(value) for step, value in tags["ma/forecast/max_end"]}
    assert logged == {step: np.float32(value) for step, value in ends.items() if math.isfinite(value)}
    assert "already holds TensorBoard events" in refused("log", short_run, "--to", "tensorboard", "--dir", folder)


def test_tensorboard_beside_the_run(call: Call, short_run: Path) -> None:
    result = call("log", short_run, "--to", "tensorboard")
    assert result.code == 0
    assert f"{len(SHORT)} steps logged to {short_run}/tensorboard" in result.out
    assert f"tensorboard --logdir {short_run}/tensorboard" in result.out
    assert "ma/max_ratio" in read_events(short_run / "tensorboard")
    Run.open(short_run)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B without a network, writing under a folder of the test's own."""
    import wandb

    wandb.teardown()
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    yield tmp_path
    wandb.teardown()


def test_wandb_offline(call: Call, short_run: Path, offline: Path) -> None:
    result = call("log", short_run, "--to", "wandb", "--project", "p", "--name", "n", "--dir", offline, "--json")
    document = result.document
    assert (document["to"], document["steps"]) == ("wandb", len(SHORT))
    where = Path(document["where"])
    assert where.parent.parent == offline
    inspect = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(where)]
    printed = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    ratios = Run.open(short_run).ratios()
    assert [row["train/global_step"] for row in rows] == list(SHORT)
    for layer in range(1, LAYERS + 1):
        np.testing.assert_array_equal([row[f"ma/ratio/layer_{layer:02d}"] for row in rows], ratios[layer - 1])
    shown = [row["train/global_step"] for row in rows if any(key.startswith("ma/heatmap") for key in row)]
    assert shown == DUE
    (facts,) = (record["run"] for record in records if record["type"] == "run")
    assert (facts["project"], facts["display_name"]) == ("p", "n")
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [0]


def test_a_name_that_could_do_harm(call: Call, tmp_path: Path, offline: Path) -> None:
    path = make_run(tmp_path / "run", name="<b>\x1b[2J\u202e" + "x" * 10_000, steps=SHORT[:2])
    assert call("log", path, "--to", "wandb", "--dir", offline).code == 0
    (file,) = offline.rglob("*.wandb")
    name = "<b>\\x1b[2J\\u202e".ljust(128, "x").encode()
    deadline = time.monotonic() + WAIT
    while name not in (written := file.read_bytes()):  # W&B's own process may still be writing
        assert time.monotonic() < deadline, "the name did not come"
        time.sleep(0.05)
    assert name + b"x" not in written


def test_wandb_that_refuses(
    refused: Callable[..., str], short_run: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def init(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    error = refused("log", short_run, "--to", "wandb")
    assert "W&B did not begin a run (No API key configured" in error
    assert "WANDB_MODE=offline" in error


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_missing_packages(
    refused: Callable[..., str], short_run: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert f"{name} is not installed; run: pip install 'ma_monitor[{name}]'" in refused("log", short_run, "--to", name)
