"""TensorBoard: what TensorBoard's own loader reads back."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ma_monitor.errors import MissingExtraError
from ma_monitor.sinks.base import Emission, Table
from ma_monitor.sinks.tensorboard import TensorBoardSink, markdown

LAYOUT = "custom_scalars__config__"


def test_event_file(
    tmp_path: Path,
    read_events: Callable[[Path], dict[str, Any]],
    make_emission: Callable[[int], Emission],
    picture: NDArray[np.uint8],
) -> None:
    sink = TensorBoardSink.to_directory(tmp_path)
    for step in (0, 7, 8):
        sink.emit(make_emission(step))
    sink.close()
    sink.close()

    tags = read_events(tmp_path)
    assert tags["ma/ratio/layer_01"].steps == [0, 7, 8]
    assert [float(value) for value in tags["ma/ratio/layer_01"].values] == [5.0, 5.875, 6.0]
    assert tags["ma/heatmap"].plugin == "images"
    assert tags["ma/heatmap"].steps == [0, 8]
    with Image.open(io.BytesIO(tags["ma/heatmap"].values[-1][2])) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
    table = tags["ma/layers/text_summary"]
    assert table.plugin == "text"
    assert table.values[-1].item().decode().splitlines()[-1] == "| 2 | decay | 8.5 |"
    facts = tags["ma_monitor/config/text_summary"]
    assert facts.steps == [0]
    assert r"| ma\_monitor/model | tiny |" in facts.values[0].item().decode()


def test_layers_of_a_quantity_share_a_chart(tmp_path: Path, read_events: Callable[[Path], dict[str, Any]]) -> None:
    sink = TensorBoardSink.to_directory(tmp_path)
    ratios = {f"ma/ratio/layer_{layer:02d}": 1.0 for layer in range(1, 4)}
    for step in range(4):
        sink.emit(Emission(step, ratios))
    sink.emit(Emission(4, {"ma/kurtosis/layer_01": 3.0}))
    sink.close()

    layout = read_events(tmp_path)[LAYOUT]
    assert layout.plugin == "custom_scalars"
    assert len(layout.steps) == 2, "one layout, and one more for the quantity that came later"
    first, last = (_charts(value.item()) for value in layout.values)
    assert set(first) == {
        "ratio of every layer",
        "largest ratio",
        "number of layers past 100 and past 1000",
        "largest ratio at the end, forecast",
    }
    assert set(last) == set(first) | {"kurtosis of every layer"}
    (pattern,) = first["ratio of every layer"]
    drawn = [
        key for key in (*ratios, "ma/ratio/layer_1x", "ma/ratio/layers", "ama/ratio/layer_1") if re.match(pattern, key)
    ]
    assert drawn == list(ratios)
    assert last["largest ratio at the end, forecast"] == [
        "ma/forecast/max_end",
        "ma/forecast/max_end_low",
        "ma/forecast/max_end_high",
    ]


def test_given_writer_stays_open_and_alone(
    tmp_path: Path, read_events: Callable[[Path], dict[str, Any]], make_emission: Callable[[int], Emission]
) -> None:
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer)
    writer.add_scalar("loss", 1.0, 0)
    sink.emit(make_emission(1))
    sink.close()
    writer.add_scalar("loss", 0.5, 1)
    writer.close()
    sink.close()

    tags = read_events(tmp_path)
    assert tags["loss"].steps == [0, 1]
    assert tags["ma/max_ratio"].steps == [1]


def test_what_others_wrote_at_our_first_step_stays(tmp_path: Path, make_emission: Callable[[int], Emission]) -> None:
    """Only what an earlier life left in this directory is taken back, and here there was none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 1.0, 7)
    TensorBoardSink(writer).emit(make_emission(7))
    writer.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in shown.Scalars("loss")] == [7]
    assert [point.step for point in shown.Scalars("ma/max_ratio")] == [7]


def test_markdown() -> None:
    table = Table(("a|b", "value"), ((None, 3), ("two\nlines", 0.123456), (True, 23456.7), ("x|y", float("nan"))))
    assert markdown(table).splitlines() == [
        r"| a\|b | value |",
        "| --- | --- |",
        "| - | 3 |",
        "| two lines | 0.1235 |",
        "| True | 23,457 |",
        r"| x\|y | nan |",
    ]


def test_an_interval_stands_in_the_cell_of_its_value() -> None:
    columns = ("layer", "end", "end low", "end high", "floor low")
    lines = markdown(Table(columns, ((1, 5.0, 2.5, 12345.0, 1), (2, None, None, None, 2)))).splitlines()
    assert lines == [
        r"| layer | end \[80 %\] | floor low |",
        "| --- | --- | --- |",
        r"| 1 | 5 \[2.5, 12,345\] | 1 |",
        "| 2 | - | 2 |",
    ]


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ma_monitor\[tensorboard\]'"):
        TensorBoardSink.to_directory(tmp_path)


def _charts(layout: bytes) -> dict[str, list[str]]:
    """Title → tags of the charts of a layout's only category."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (category,) = Layout.FromString(layout).category
    return {
        chart.title: list(chart.multiline.tag)
        or [tag for series in chart.margin.series for tag in (series.value, series.lower, series.upper)]
        for chart in category.chart
    }
