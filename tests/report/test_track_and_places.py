"""The track record and the places, against slow and obvious ways to compute them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.analysis import forecast_run
from ma_monitor.report.places import places
from ma_monitor.report.track import SHARES, Record, track_key, track_record, track_words
from ma_monitor.runs.store import Run
from tests.cli.conftest import make_run
from tests.report.pages import STEPS, make_page_run, ratios

VALUES = ratios(3, STEPS)
VALUES[1, 20] = np.nan


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_page_run(tmp_path_factory.mktemp("record") / "run", values=VALUES)


def test_record(run: Run) -> None:
    record = track_record(run)
    wanted = [max(step for step in run.steps if step <= share * run.steps[-1]) for share in SHARES]
    assert [one.at for one in record] == wanted
    for one in record:
        later = [int(step) for step in run.steps if step > one.at]
        assert one.steps.tolist() == later, "few enough to be compared all"
        said = forecast_run(run, at=one.at, grid=later)
        seen = int(np.flatnonzero(run.steps == one.at)[0])
        errors, held, held95, stayed = [], [], [], []
        for layer, values in zip(said.layers, run.ratios(), strict=True):
            for column, came in enumerate(values[seen + 1 :]):
                if np.isnan(came):
                    continue
                outer, low, _, middle, _, high, upper = layer.quantiles[:, column]
                errors.append(abs(np.log(middle / came)))
                stayed.append(abs(np.log(values[seen] / came)))
                held.append(low <= came <= high)
                held95.append(outer <= came <= upper)
        assert one.compared == len(errors)
        got = (one.error, one.last_value, one.held, one.held95)
        assert got == pytest.approx(tuple(map(np.mean, (errors, stayed, held, held95))))


def test_nothing_later_is_used(run: Run, tmp_path: Path) -> None:
    """Another future leaves what was said before it as it was."""
    first = track_record(run)[2]
    other = track_record(make_page_run(tmp_path / "other", values=VALUES * np.where(STEPS > first.at, 3, 1)))[2]
    np.testing.assert_array_equal(other.quantiles, first.quantiles)
    assert other.error > first.error


def test_no_record_of_the_young(tmp_path: Path) -> None:
    for points in (1, 6, 8):
        assert track_record(make_page_run(tmp_path / str(points), steps=STEPS[:points])) == []
    assert "too young" in track_words([])
    assert track_key([]) == "No track record yet"


def test_record_in_words() -> None:
    nothing = np.zeros(0)
    made = [
        Record(1, nothing.astype(int), nothing, compared, float(np.log(factor)), float(np.log(2)), held, 1.0)
        for compared, factor, held in ((30, 1.5, 0.5), (10, 1.5, 0.9))
    ]
    told = track_words(made)
    assert "after 2 earlier forecasts" in told
    assert track_key(made) == "80 % bands held 60 %"
    assert "held 60 %" in told, "every value counts alike"
    assert "factor of 1.50" in told
    assert "the last value: 2.00" in told


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


def test_places_of_imported_data(tmp_path: Path) -> None:
    found = places(Run.open(make_run(tmp_path / "run")))
    assert found["rows"] == []
    assert np.isnan(found["channel"]).all()
