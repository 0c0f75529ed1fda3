"""What a real TensorBoard server says of our event files, and what Chromium draws of it."""

from __future__ import annotations

import importlib.util
import json
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ma_monitor.sinks.base import Emission
from ma_monitor.sinks.tensorboard import TensorBoardSink

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "screenshots_tensorboard.py"
LIVES = (range(0, 900, 100), range(700, 1300, 100))
"""Steps of a training that was killed after step 800, and went on from step 600."""


@pytest.fixture(scope="module")
def script() -> Any:
    """The program that takes the documentation's picture."""
    spec = importlib.util.spec_from_file_location("screenshots_tensorboard", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Event files of both lives, in one directory."""
    folder = tmp_path_factory.mktemp("tensorboard")
    for life, steps in enumerate(LIVES):
        sink = TensorBoardSink.to_directory(folder / "run")
        for step in steps:
            scalars = {f"ma/ratio/layer_{layer:02d}": float(layer * 10 + life) for layer in range(1, 37)}
            sink.emit(Emission(step, scalars | {"ma/max_ratio": 9.0 + life}, config={"ma_monitor/model": "tiny"}))
        sink.close()
    return folder


def asked(address: str, path: str, **query: str) -> Any:
    """The JSON of an answer."""
    url = f"{address}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_dashboard_is_there_without_set_up(script: Any, events: Path) -> None:
    with script.server(events) as address:
        layout = asked(address, "custom_scalars/layout")
        (category,) = layout["category"]
        charts = {chart["title"]: chart for chart in category["chart"]}
        (pattern,) = charts["ratio of every layer"]["multiline"]["tag"]
        answer = asked(address, "custom_scalars/scalars", run="run", tag=pattern)
        tags = answer["tag_to_events"]
        assert sorted(tags) == [f"ma/ratio/layer_{layer:02d}" for layer in range(1, 37)]
        # of step 700 and 800, the later life's values
        for layer, tag in enumerate(sorted(tags), start=1):
            points = [(step, value) for _, step, value in tags[tag]]
            assert [step for step, _ in points] == list(range(0, 1300, 100))
            assert [value % 10 for _, value in points] == [0] * 7 + [1] * 6
            assert {value // 10 for _, value in points} == {layer}


@pytest.mark.browser
def test_chromium_draws_it(script: Any, events: Path, tmp_path: Path) -> None:
    with script.server(events) as address:
        script.screenshot(f"{address}/#custom_scalars", tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as page:
        pixels = np.asarray(page.convert("RGB")).reshape(-1, 3).astype(int)
    orange = (np.abs(pixels - (0xFF, 0x70, 0x43)).max(axis=1) < 8).sum()
    assert orange > 1000, "no line of a chart"
