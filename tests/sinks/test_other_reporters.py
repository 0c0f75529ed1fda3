"""MLflow, trackio and Comet, where they are installed: what a real Trainer's callback leaves in their own stores."""

from __future__ import annotations

import json
import sqlite3
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ma_monitor import MassiveActivationCallback, MonitorConfig, Run
from tests.training import STEPS, train

DUE = list(range(STEPS + 1))
LOGGED = list(range(1, STEPS + 1))
ANYTHING = "ignore::Warning"
"""What these packages and theirs warn about is not ours to judge."""


def trained(folder: Path, reporter: str) -> Run:
    """A training watched at every step that reports there."""
    train(folder, [MassiveActivationCallback(MonitorConfig(every=1, strict=True))], report_to=[reporter])
    return Run.open(folder / "ma_monitor")


@pytest.mark.skipif(not find_spec("mlflow"), reason="mlflow is not installed")
@pytest.mark.filterwarnings(ANYTHING)
def test_mlflow_with_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = trained(tmp_path / "out", "mlflow")

    import mlflow

    client = mlflow.MlflowClient()
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    for layer, row in enumerate(run.ratios(), start=1):
        history = client.get_metric_history(found.info.run_id, f"ma/ratio/layer_{layer:02d}")
        assert [point.step for point in history] == DUE
        assert [point.value for point in history] == row.tolist()
    losses = client.get_metric_history(found.info.run_id, "loss")
    assert [point.step for point in losses] == LOGGED


@pytest.mark.skipif(not find_spec("trackio"), reason="trackio is not installed")
@pytest.mark.filterwarnings(ANYTHING)
def test_trackio_with_its_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    run = trained(tmp_path / "out", "trackio")

    rows: list[dict[str, Any]] = []
    for file in (tmp_path / "store").rglob("*.db"):
        with sqlite3.connect(file) as store:
            rows += [
                json.loads(text) | {"step": step} for step, text in store.execute("select step, metrics from metrics")
            ]
    ours = [row for row in rows if any(key.endswith("ma/max_ratio") for key in row)]
    key = next(key for key in ours[0] if key.endswith("ma/ratio/layer_01"))
    assert [row[key] for row in ours] == run.ratios()[0].tolist()
    assert [row["train/global_step"] for row in ours] == DUE
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == LOGGED


@pytest.mark.skipif(not find_spec("comet_ml"), reason="comet_ml is not installed")
@pytest.mark.filterwarnings(ANYTHING)
def test_comet_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it leaves a folder of its own wherever it is started
    settings = {"COMET_START_ONLINE": "0", "COMET_OFFLINE_DIRECTORY": str(tmp_path / "store")}
    for name, value in (settings | {"COMET_API_KEY": "none", "COMET_DISABLE_AUTO_LOGGING": "1"}).items():
        monkeypatch.setenv(name, value)
    run = trained(tmp_path / "out", "comet_ml")

    import comet_ml

    comet_ml.end()
    (file,) = (tmp_path / "store").glob("*.zip")
    with zipfile.ZipFile(file) as store:
        records = [json.loads(line) for line in store.read("messages.json").decode().splitlines()]
    metrics = [record["payload"]["metric"] for record in records if record["type"] == "metric_msg"]
    ours = [metric for metric in metrics if metric["metricName"] == "train/ma/ratio/layer_01"]
    assert [metric["step"] for metric in ours] == DUE
    assert [float(metric["metricValue"]) for metric in ours] == run.ratios()[0].tolist()
    assert [metric["step"] for metric in metrics if metric["metricName"] == "train/loss"] == LOGGED
