"""W&B: what a finished offline run holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ma_monitor.errors import ConfigError, MissingExtraError
from ma_monitor.sinks.base import Emission
from ma_monitor.sinks.wandb import WandbSink


def test_run_of_a_plain_loop(
    wandb_folder: Path,
    read_wandb: Callable[[Path], Any],
    make_emission: Callable[[int], Emission],
    picture: NDArray[np.uint8],
) -> None:
    import wandb

    with pytest.raises(ConfigError, match=r"active run and there is none; call wandb.init"):
        WandbSink.active()
    run = wandb.init(project="tests")
    sink = WandbSink.active()
    for step in (0, 7, 8):
        run.log({"loss": 1.0 / (step + 1), "train/global_step": step})
        sink.emit(make_emission(step))
    sink.close()
    sink.close()
    assert wandb.run is run, "the sink finished a run that is not its own"
    run.finish()

    content = read_wandb(wandb_folder)
    ours = [row for row in content.rows if "ma/max_ratio" in row]
    assert [row["train/global_step"] for row in ours] == [0, 7, 8]
    assert [row["ma/ratio/layer_02"] for row in ours] == [50.0, 50.875, 51.0]
    assert [row["loss"] for row in content.rows if "loss" in row] == [1.0, 1 / 8, 1 / 9]
    assert content.step_metrics["ma/*"] == "train/global_step"
    assert content.summary["ma/ratio/layer_01"] == 6.0
    assert content.config["ma_monitor/layers"] == 2
    assert content.config["ma_monitor/model"] == "tiny"

    files = Path(run.dir)
    shown = [row for row in ours if any(key.startswith("ma/heatmap") for key in row)]
    assert [row["train/global_step"] for row in shown] == [0, 8], "picture, table and scalars must share one row"
    with Image.open(files / _path(shown[-1], "ma/heatmap")) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
    table = json.loads((files / _path(shown[-1], "ma/layers")).read_text())
    assert table["columns"] == ["layer", "class", "peak"]
    assert table["data"] == [[1, "flat", None], [2, "decay", 8.5]]


def _path(row: dict[str, Any], key: str) -> str:
    """Where the file of a picture or table lies, whether the log keeps its facts nested or flat."""
    value = row.get(f"{key}/path") or row[key]["path"]
    return str(value)


@pytest.mark.parametrize("build", [WandbSink.active, lambda: WandbSink(cast(Any, None))])
def test_missing_package(build: Callable[[], WandbSink], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"wandb is not installed; run: pip install 'ma_monitor\[wandb\]'"):
        build()
