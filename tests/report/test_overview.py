"""The three boxes of the overview, from rows as the table has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ma_monitor.report.overview import headlines, reasons
from ma_monitor.report.track import Record


def row(layer: int, now: float | None, **other: Any) -> dict[str, Any]:
    band = {"middle": 2 * (now or 1.0), "end_words": "2 [1, 3]", "at": 500, "heading": "rising", "sure": "unsure"}
    facts = {"peak": None, "passes": (0.0, None), "status": "forecast", "infinite": False}
    return {"layer": layer, "now": now, **band, **facts, **other}


def boxes(rows: list[dict[str, Any]], now: int = 250, end: int | None = 500) -> list[tuple[str, str]]:
    return [(box["key"], box["text"]) for box in headlines(rows, now, end, [])]


def test_which() -> None:
    (key, text), *_ = boxes([row(1, 5.0), row(2, 99.0)])
    assert key == "0 of 2 layers massive"
    assert text.startswith("Largest at step 250: layer 2, 99 times the median. From 100 times on")
    (key, text), *_ = boxes([row(1, 100.0), row(2, 99.0), row(3, None)])
    assert key == "1 of 3 layers massive"
    assert text.startswith("Layer 1 is at 100 times the median or more.")
    assert text.endswith("None beyond 1,000.")
    (key, text), *_ = boxes([row(1, 100.0), row(2, None, infinite=True), row(3, 1000.0)])
    assert key == "3 of 3 layers massive"
    assert "Layers 1–3 are at 100" in text
    assert "layer 2, inf times" in text
    assert text.endswith("2 beyond 1,000.")
    assert boxes([row(1, None)])[0] == ("Not known", "No ratio is a number at step 250.")


def test_whither() -> None:
    rows = [
        row(1, 5.0, passes=(0.49, 300.0)),
        row(2, 60.0, passes=(0.5, 301.4)),
        row(3, 60.0, passes=(1.0, 20.0), heading="falling", middle=90.0),
        row(4, 30.0, peak=280.0),
        row(5, 30.0, peak=240.0, passes=None),
    ]
    _, (key, text), _ = boxes(rows)
    assert key == "Layer 2: 60 → 2 [1, 3]"
    assert text.startswith("The largest at the planned end, step 500, with its 80 % band.")
    assert "passes 100 near" in text
    assert text.count("passes 100 near") == 1, "neither the unlikely nor what has passed"
    assert "Layer 2 passes 100 near step 301 (50 % likely)." in text
    assert text.count("peaks at") == 1, "a peak that is over is not ahead"
    assert "Layer 4 peaks at step 280." in text
    assert text.endswith("Layers 1–2, 4–5: rising; layer 3: falling.")
    _, (_, text), _ = boxes(rows, end=None)
    assert "at step 500 (no end is planned)" in text
    _, (key, text), _ = boxes([row(1, 5.0, middle=None)])
    assert (key, text) == ("Not forecast yet", "A forecast needs six finite measurements that differ.")


def test_a_finished_training() -> None:
    rows = [row(layer, 5.0, heading="rose until the last step", sure="-") for layer in (1, 2)]
    rows.append(row(3, 5.0, heading="no clear shape", sure="-"))
    _, (key, text), (_, sure) = boxes(rows, now=500)
    assert key == "Rose until the last step"
    assert (
        text
        == "The training has reached its planned end. Layers 1–2: rose until the last step; layer 3: no clear shape."
    )
    assert "The forecast is" not in sure


def test_how_sure() -> None:
    *_, (key, text) = boxes([row(1, 5.0), row(2, 5.0, sure="sure"), row(3, 5.0), row(4, 5.0, sure="unknown")])
    assert key == "No track record yet"
    assert text.startswith("The forecast is sure for 1 layer, unsure for 2 layers. This run is too young")
    steps, came = np.array([20, 30]), np.array([[3.0, 3.0]])
    record = Record(10, steps, came * np.array([0.5, 0.5, 2.0, 2.5, 3.0])[:, None, None], np.array([1.0]), came)
    *_, box = headlines([row(1, 5.0)], 250, 500, [record])
    assert box["key"] == "80 % bands held 100 %"
    assert "off by a factor of 2.00 on average" in box["text"]


def test_reasons() -> None:
    rows = [row(1, 5.0), row(2, 5.0, status="too few"), row(3, 5.0, status="too few"), row(4, 5.0, status="other")]
    assert reasons(rows) == ["layers 2–3: too few", "layer 4: other"]
