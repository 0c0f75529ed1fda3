"""What a notebook shows of a run, a fit and a forecast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.analysis import fit_run, forecast_run
from ma_monitor.html import table
from tests.report.pages import HOSTILE, STEPS, Page, make_page_run, ratios


def cells(html: str) -> list[str]:
    page = Page(html)
    assert page.tags[:2] == ["table", "caption"]
    assert set(page.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    return page.words


def test_of_a_run(tmp_path: Path) -> None:
    values = ratios(3, STEPS)
    values[1, -1] = np.nan
    run = make_page_run(tmp_path / "run", values=values)
    caption, *told = cells(run._repr_html_())
    assert caption == "made: 27 steps, the last 1000"
    assert told[:3] == ["layer", "first ratio", "last ratio"]
    assert told[3:6] == ["1", f"{run.ratios()[0, 0]:.4g}", f"{run.ratios()[0, -1]:.4g}"]
    assert told[8] == "nan"
    empty = make_page_run(tmp_path / "empty", steps=STEPS[:0], name=HOSTILE[:60])
    assert cells(empty._repr_html_()) == [f"{HOSTILE[:60]}: 0 steps, the last None"]


def test_of_fits_and_forecasts(tmp_path: Path) -> None:
    run = make_page_run(tmp_path / "run")
    fits, forecast = fit_run(run), forecast_run(run)
    peaked = fits[0]
    assert peaked.peak.identified
    told = cells(peaked._repr_html_())
    assert told[0] == "Eq. 9: fitted"
    assert f"{peaked.peak.step:.4g} [{peaked.peak.low:.4g}, {peaked.peak.high:.4g}]" in told
    assert any(word in cells(fits[2]._repr_html_()) for word in ("not identified", "none", "not within schedule"))
    told = cells(forecast._repr_html_())
    assert told[0] == "Forecast made at step 1,000"
    assert told.count("forecast") == 3
    unknown = cells(forecast_run(run, at=1)._repr_html_())
    assert unknown.count("–") == 3 * 6, "what is not known is a dash"
    assert cells(replace(forecast, layers=())._repr_html_()) == ["Forecast made at step 1,000"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (12345.6, "12,346"),
        (0.000123456, "0.0001235"),
        (2.78085e41, "2.781e+41"),
        (None, "–"),
        ("<b>", "<b>"),
        ({"value": 3.0, "low": 2.5, "high": None, "identified": True}, "3 [2.5, –]"),
        ({"value": 3.0, "low": 2.5, "high": 4.0, "identified": False}, "not identified"),
        ({"step": None, "identified": False, "status": "not_within_schedule"}, "not within schedule"),
    ],
)
def test_cells(value: object, told: str) -> None:
    assert cells(table("c", [{"k": value}])) == ["c", "k", told]
