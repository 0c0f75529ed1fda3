"""The track record and the places, against slow and obvious ways to compute them."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.analysis import forecast_run
from ma_monitor.report.places import places
from ma_monitor.report.track import (
    Record,
    origins,
    scores,
    track_document,
    track_key,
    track_record,
    track_words,
)
from ma_monitor.runs.store import Run
from tests.cli.conftest import make_run
from tests.report.pages import STEPS, make_page_run, ratios

VALUES = ratios(3, STEPS)
VALUES[1, 20] = np.nan


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_page_run(tmp_path_factory.mktemp("record") / "run", values=VALUES)


def test_origins() -> None:
    """The first refit, of 6, 7 … 20, 21, 23 … points, in every octave of steps."""
    steps = np.concatenate([[0], 2 ** np.arange(6), np.arange(50, 1001, 50)])
    assert [int(steps[points - 1]) for points in origins(steps)] == [16, 32, 100, 150, 300, 550]
    assert origins(steps[:5]) == []


def test_record(run: Run) -> None:
    record = track_record(run)
    assert [one.at for one in record] == [100, 150, 300, 550], "the latest, with three measurements after each"
    assert [one.at for one in track_record(run, at=600)] == [32, 100, 150, 300]
    for one in record:
        later = [int(step) for step in run.steps if step > one.at]
        assert one.steps.tolist() == later, "few enough to be compared all"
        said = forecast_run(run, at=one.at, grid=later)
        seen = int(np.flatnonzero(run.steps == one.at)[0])
        rows = []
        for layer, values in zip(said.layers, run.ratios(), strict=True):
            for column, came in enumerate(values[seen + 1 :]):
                if np.isnan(came):
                    continue
                outer, low, _, middle, _, high, upper = layer.quantiles[:, column]
                errors = abs(np.log(middle / came)), abs(np.log(values[seen] / came))
                rows.append((*errors, low <= came <= high, outer <= came <= upper, later[column] / one.at))
        for over, up_to in ((1.0, math.inf), (1.0, 1.5), (1.5, 3.0), (3.0, math.inf)):
            wanted = [row[:4] for row in rows if over < row[4] <= up_to]
            fared = scores([one], over, up_to)
            assert fared.pop("compared") == len(wanted)
            assert tuple(fared.values()) == (pytest.approx(np.mean(wanted, axis=0)) if wanted else (None,) * 4)


def test_nothing_later_is_used(run: Run, tmp_path: Path) -> None:
    """Another future leaves what was said before it as it was."""
    first = track_record(run)[2]
    other = track_record(make_page_run(tmp_path / "other", values=VALUES * np.where(STEPS > first.at, 3, 1)))[2]
    np.testing.assert_array_equal(other.quantiles, first.quantiles)
    assert scores([other])["error"] > scores([first])["error"]


def test_the_document_says_what_was_said(run: Run) -> None:
    record = track_record(run)
    document = json.loads(json.dumps(track_document(record), allow_nan=False))
    assert [one["at"] for one in document["forecasts"]] == [one.at for one in record]
    last = document["forecasts"][-1]
    assert last["step"] == run.steps[-1]
    said = forecast_run(run, at=last["at"], grid=[last["step"]])
    for entry, layer, came in zip(last["layers"], said.layers, run.ratios()[:, -1], strict=True):
        assert (entry["p10"], entry["median"], entry["p90"]) == tuple(layer.quantiles[[1, 3, 5], 0])
        assert entry["came"] == came
    assert sum(part["compared"] for part in document["ahead"]) == document["compared"]
    assert [(part["over"], part["up_to"]) for part in document["ahead"]] == [(1.0, 1.5), (1.5, 3.0), (3.0, None)]


def test_no_record_of_the_young(tmp_path: Path) -> None:
    for points in (1, 6, 8):
        assert track_record(make_page_run(tmp_path / str(points), steps=STEPS[:points])) == []
    assert "too young" in track_words([])
    assert track_key([]) == "No track record yet"
    assert track_document([])["held"] is None


def test_record_in_words() -> None:
    """Forecasts of ratio 1, made at step 10: each (share held, factor of the error, points, how far ahead)."""
    made = []
    for held, factor, points, ahead in ((0.5, 1.5, 30, 1.2), (0.9, 1.5, 10, 4.0)):
        came = np.full((1, points), factor)
        high = np.where(np.arange(points) < held * points, 2.0, 1.1)
        bands = np.stack([np.ones(points)] * 3 + [high, np.full(points, 3.0)])[:, None]
        made.append(Record(10, np.full(points, round(10 * ahead)), bands, np.array([2 * factor]), came))
    told = track_words(made)
    assert "after 2 earlier forecasts" in told
    assert track_key(made) == "80 % bands held 60 %"
    assert "held 60 %" in told, "every value counts alike"
    assert "factor of 1.50" in told
    assert "the last value: 2.00" in told
    assert told.endswith(
        "By how far ahead a forecast looked: up to 1.5 times its step 50 %, a factor of 1.50; "
        "beyond 3 times its step 90 %, a factor of 1.50."
    )


def test_places(run: Run) -> None:
    found = places(run)
    stack = run.stack()
    for row in found["rows"]:
        layer = row["layer"] - 1
        for name in ("channel", "position", "token"):
            values = getattr(stack, name)[:, layer, :, 0]
            ((usual, times),) = Counter(values[-1].tolist()).most_common(1)
            assert (row[name], row[f"{name}_share"]) == (usual, times / values.shape[1])
        shares = [(at == row["channel"]).mean() for at in stack.channel[:, layer, :, 0]]
        np.testing.assert_allclose(found["channel"][layer], shares)
        since = [step for k, step in enumerate(run.steps) if all(share >= 0.5 for share in shares[k:])]
        assert row["since"] == since[0] == 100
        assert row["sign"] == "−"
        assert row["text"] is None


def test_places_that_never_settle(tmp_path: Path) -> None:
    rows = places(make_page_run(tmp_path / "run", steps=STEPS[STEPS < 100]))["rows"]
    assert any(row["since"] is None for row in rows)


def test_half_of_the_sequences_are_enough(tmp_path: Path) -> None:
    """Four sequences: two in channel 5 all the time, the others on their way there."""
    run = make_page_run(tmp_path / "run", layers=1, steps=np.array([100]))
    with Run.open(run.path, writable=True) as writer:
        last = run.stack().at(0)
        for step, share in ((200, 1), (300, 2), (400, 4)):
            channel = np.where(np.arange(4)[None, :, None] < share, 5, 9 + np.arange(4)[None, :, None])
            moved = channel.astype(np.int32) * np.ones_like(last.channel)
            writer.append(replace(last, step=step, channel=moved))
    assert [row["since"] for row in places(Run.open(run.path))["rows"]] == [300]


def test_places_of_imported_data(tmp_path: Path) -> None:
    found = places(Run.open(make_run(tmp_path / "run")))
    assert found["rows"] == []
    assert np.isnan(found["channel"]).all()
