"""The real callback in a real Trainer, read back from W&B's and TensorBoard's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_monitor import MassiveActivationCallback, MonitorConfig
from tests.training import STEPS, train

DUE = list(range(STEPS + 1))
LOGGED = list(range(1, STEPS + 1))


def test_what_the_callback_measured_is_what_the_reporters_show(
    wandb_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_wandb: Callable[[Path], Any],
    read_events: Callable[[Path], dict[str, Any]],
) -> None:
    """Measured and logged at the same steps, so that neither can hide the other."""
    import wandb

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    callback = MassiveActivationCallback(MonitorConfig(every=1, strict=True))
    result = train(tmp_path / "out", [callback], report_to=["tensorboard", "wandb"])
    wandb.finish()
    assert callback.monitor is not None
    run = callback.monitor.run
    assert run is not None
    assert run.steps.tolist() == DUE

    tags = read_events(tmp_path / "tensorboard")
    assert tags["train/loss"].steps == LOGGED
    for layer in run.layers:
        tag = tags[f"ma/ratio/layer_{layer:02d}"]
        assert tag.steps == DUE
        # TensorBoard keeps float32
        np.testing.assert_array_equal(np.ravel(tag.values), run.ratios()[layer - 1].astype(np.float32))
    assert tags["ma/heatmap"].steps[-1] == STEPS
    assert tags["ma/fan"].steps == tags["ma/heatmap"].steps[:-1], "at the end nothing is ahead"
    assert tags["_hparams_/session_start_info"].plugin == "hparams"
    forecast = callback.forecast()
    assert forecast is not None
    ends = [layer.end[3] for layer in forecast.layers if layer.end is not None]
    assert float(tags["ma/forecast/max_end"].values[-1]) == pytest.approx(max(ends), rel=1e-6)
    assert len(tags["custom_scalars__config__"].steps) == 1

    content = read_wandb(wandb_folder)
    ours = [row for row in content.rows if "ma/max_ratio" in row]
    assert [row["train/global_step"] for row in ours] == DUE
    assert [row["ma/max_ratio"] for row in ours] == run.ratios().max(axis=0).tolist()
    assert [row["train/global_step"] for row in content.rows if "train/loss" in row] == LOGGED
    assert any(key.startswith("ma/heatmap") for key in ours[-1])
    assert content.config["ma_monitor/model"] == "llama"
    assert [row["step"] for row in result.trainer.state.log_history if "loss" in row] == LOGGED
    assert not any(key.startswith("ma/") for row in result.trainer.state.log_history for key in row)
