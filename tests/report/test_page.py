"""The page as a file: what it holds, what it says, and what other people's text cannot do to it."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_monitor.analysis import fit_run, forecast_run
from ma_monitor.errors import ConfigError, StoreError
from ma_monitor.report import page
from ma_monitor.report.normal import among_past_runs, normal_words
from ma_monitor.report.overview import OUTCOMES
from ma_monitor.runs.records import Measurements, RunMeta
from ma_monitor.runs.store import Run
from tests.cli.conftest import make_meta, make_run
from tests.report.pages import HOSTILE, LONG, STEPS, Page, hostile_run, make_page_run, ratios

FIVE_DIGITS = 5.1e-5
"""Relative error of a number that is written in five significant digits."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_page_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def made(run: Run) -> Page:
    return Page(page.render([run]))


def test_nothing_is_loaded(made: Page) -> None:
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & set(made.tags)
    references = [value for name, value in made.attributes if name in ("src", "href", "action", "srcset", "data")]
    assert references == ["#main"]
    assert not [name for name, _ in made.attributes if name.startswith("on") or name == "style"]
    (policy,) = (value for name, value in made.attributes if name == "content" and value and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    for kind, raw in made.raw:
        digest = base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()
        assert kind == "application/json" or f"'sha256-{digest}'" in policy


def test_the_numbers_behind_the_charts(run: Run, made: Page) -> None:
    (data,) = made.data
    drawn = data["drawn"]
    assert drawn["steps"] == run.steps.tolist()
    np.testing.assert_allclose(drawn["ratios"], run.ratios(), rtol=FIVE_DIGITS)
    for rank, shown in enumerate(drawn["ranks"], start=2):
        np.testing.assert_allclose(shown, run.ratios(rank), rtol=FIVE_DIGITS)
    prediction = forecast_run(run)
    assert drawn["future"] == prediction.layers[0].steps.tolist()
    for layer, bands in zip(prediction.layers, drawn["bands"], strict=True):
        np.testing.assert_allclose(bands, layer.quantiles[[0, 1, 3, 5, 6]], rtol=FIVE_DIGITS)
    for fit, curve in zip(fit_run(run), drawn["curves"], strict=True):
        assert fit.curve is not None
        np.testing.assert_allclose(curve, fit.curve.evaluate(drawn["curve_steps"]), rtol=1e-3)
    stack = run.stack()
    for when, sizes in zip((0, -1), drawn["sizes"], strict=True):
        assert sizes["step"] == run.steps[when]
        for rank, line in enumerate(sizes["lines"]):
            np.testing.assert_allclose(line, np.abs(stack.top[when, ..., rank]).mean(axis=1), rtol=FIVE_DIGITS)
        np.testing.assert_allclose(sizes["median"], stack.median[when].mean(axis=1), rtol=FIVE_DIGITS)


def test_heat_maps(run: Run, made: Page) -> None:
    maps = made.data[0]["drawn"]["maps"]
    assert maps["steps"] == run.steps.tolist()
    ratio, channel, position, spread = (np.array(one["values"]) for one in maps["shown"])
    np.testing.assert_allclose(ratio, run.ratios(), rtol=FIVE_DIGITS)
    late = run.steps >= 100
    assert (channel[:, late] == 100).all()
    assert (position[:, late] == 100).all()
    assert channel[:, ~late].mean() < 50, "before step 100 the entries are anywhere"
    assert np.ptp(spread) < 1e-9, "the made sequences differ by the same shares always: |top| and median alike"


def test_strips(run: Run, made: Page) -> None:
    highest, peaks, r2 = (one["values"] for one in made.data[0]["drawn"]["strips"])
    np.testing.assert_allclose(highest, run.ratios().max(axis=1), rtol=FIVE_DIGITS)
    said = [layer.peak for layer in forecast_run(run).layers]
    assert peaks == [peak.step if peak and peak.identified else None for peak in said]
    assert r2 == [fit.r2 for fit in fit_run(run)]


def test_long_runs_are_thinned_but_no_spike_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ma_monitor.report import summary

    values = ratios(2, STEPS)
    values[1, 9] = 5e6
    run = make_page_run(tmp_path / "run", layers=2, values=values)
    for name, most in (("POINTS", 20), ("THINNED", 10), ("COLUMNS", 6)):
        monkeypatch.setattr(summary, name, most)
    (data,) = Page(page.render([run])).data
    drawn = data["drawn"]
    assert len(drawn["steps"]) == len(drawn["ratios"][0]) == 20
    assert [drawn["steps"][0], drawn["steps"][-1]] == [run.steps[0], run.steps[-1]]
    assert len(drawn["few"]) == len(drawn["ranks"][0][0]) == 10
    (shown, *_) = drawn["maps"]["shown"]
    assert len(drawn["maps"]["steps"]) == len(shown["values"][0]) == 6
    assert max(shown["values"][1]) == 5e6


def test_what_it_says(run: Run, made: Page) -> None:
    text, now = made.text, run.ratios()[:, -1]
    assert (now >= 100).tolist() == [False, True, True]
    assert "2 of 3 layers massive Layers 2–3 are at 100 times the median or more." in text
    assert f"Largest at step 1,000: layer 3, {now[2]:.4g} times the median. None beyond 1,000." in text
    assert f"Layer 3: {now[2]:.4g} → " in text
    assert "The largest at the planned end, step 2,000, with its 80 % band." in text
    assert "Of what came after" in text
    assert "channel" in text
    assert "Not known: published and imported data hold magnitudes only." not in text


def test_imported_data_have_no_places(tmp_path: Path) -> None:
    made = Page(page.render([Run.open(make_run(tmp_path / "run"))]))
    assert "Not known: published and imported data hold magnitudes only." in made.text
    assert len(made.data[0]["drawn"]["maps"]["shown"]) == 2, "no places, no maps of them"


def test_a_finished_training(tmp_path: Path) -> None:
    made = Page(page.render([make_page_run(tmp_path / "run", total=1000)]))
    assert "The training has reached its planned end." in made.text
    assert made.data[0]["live"] is False
    assert {(row["heading"], row["sure"]) for row in made.data[0]["rows"]} <= {
        (told, "-") for told in OUTCOMES.values()
    }


def test_beside_past_runs(run: Run, made: Page, tmp_path: Path) -> None:
    found = among_past_runs(run, int(run.steps[-1]))
    assert found is not None
    assert " ".join(normal_words(found).split()) in made.text
    unplanned = Page(page.render([make_page_run(tmp_path / "run", total=None)]))
    assert "Beside past runs" not in unplanned.text, "its share of the training is not known"


def test_without_a_planned_end(tmp_path: Path) -> None:
    made = Page(page.render([make_page_run(tmp_path / "run", total=None)]))
    assert "The largest at step 2,000 (no end is planned), with its 80 % band." in made.text
    assert "progress" not in made.tags


@pytest.mark.parametrize("points", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("layers", [1, 80])
def test_few_points(tmp_path: Path, points: int, layers: int) -> None:
    made = Page(page.render([make_page_run(tmp_path / "run", layers=layers, steps=STEPS[:points])]))
    if points == 0:
        assert "nothing measured yet" in made.text
    else:
        rows = made.data[0]["rows"]
        assert len(rows) == layers
        assert all((row["middle"] is None) == (points < 6) for row in rows)
        assert ("fewer than 6 measurements are finite" in made.text) == (points < 6)
    assert "this run is too young" in made.text.lower() or points == 0


def test_what_is_not_finite(tmp_path: Path) -> None:
    values = ratios(3, STEPS)
    values[0, 5], values[1, -1], values[2, -1] = np.nan, np.inf, np.nan
    run = make_page_run(tmp_path / "run", values=values)
    with Run.open(run.path, writable=True) as writer:
        last = run.stack().at(-1)
        bad = np.zeros_like(last.nan)
        bad[1, 2] = 7
        writer.append(Measurements(2000, last.top, last.position, last.token, last.channel, last.median, bad, 2 * bad))
        writer.event("fault", "the disk is full")
    made = Page(page.render([Run.open(run.path)]))
    assert "Not finite at step 2,000, layer 2: 21 activations." in made.text
    assert "1 fault on record; the latest: the disk is full" in made.text
    assert [row["now"] is None for row in made.data[0]["rows"]] == [False, True, True]
    assert "∞" in made.text
    assert "1 of 3 layers massive Layer 2 is at 100 times" in made.text, "an infinite ratio is beyond every bound"


def test_the_latest_alerts(tmp_path: Path) -> None:
    run = make_page_run(tmp_path / "run")
    assert "Latest alerts" not in page.render([run])
    with Run.open(run.path, writable=True) as writer:
        for number in range(7):
            writer.event("alert", f"past_100@{number}:2 Layer 2 is past 100. Number {number}: <b>look</b>.")
    _, told = page.render([Run.open(run.path)]).split('aria-label="Latest alerts">')
    text = Page(told.partition("</ul>")[0]).text
    assert [f"Layer 2 is past 100. Number {n}: <b>look</b>." in text for n in range(7)] == [False] * 2 + [True] * 5
    assert text.index("Number 6") < text.index("Number 5"), "the latest first"


def test_without_jinja_the_extra_is_named() -> None:
    code = "import sys; sys.modules['jinja2'] = None; import ma_monitor.report.page"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "jinja2 is not installed; run: pip install 'ma_monitor[report]'" in done.stderr


def test_damage_is_told(tmp_path: Path) -> None:
    run = make_page_run(tmp_path / "run")
    log = run.path / "measurements.bin"
    log.write_bytes(log.read_bytes()[:-3])
    damaged = Run.open(run.path)
    assert damaged.damage
    assert damaged.damage in Page(page.render([damaged])).text


@pytest.mark.parametrize("text", [HOSTILE, LONG], ids=["hostile", "10 kB"])
def test_hostile_text_is_text(tmp_path: Path, text: str) -> None:
    hostile = Page(page.render([hostile_run(tmp_path / "hostile", text)], refresh=5))
    tame = Page(page.render([hostile_run(tmp_path / "tame", "tame")], refresh=5))
    assert hostile.tags == tame.tags, "no element more or less"
    assert [name for name, _ in hostile.attributes] == [name for name, _ in tame.attributes]
    assert [raw for kind, raw in hostile.raw if kind != "application/json"] == [
        raw for kind, raw in tame.raw if kind != "application/json"
    ]
    beginning = (
        "</script></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&amp;{{7*7}}\\x1b[31m\\u202eabc"
    )
    assert hostile.text.count(beginning) >= 9  # name, title, probe, hash, precision, versions, plan, diary
    assert all(character.isprintable() or character in "\n\xa0" for character in "".join(hostile.words))
    assert hostile.text.count("</script></title><script>alert(1)") >= 9 + 3, "and each of three layers' tokens"
    if text is LONG:
        assert "characters)" in hostile.text
        assert max(map(len, hostile.words)) < 1000


def test_token_texts(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run", "le")
    file = run.path / "tokenizer.json"
    assert "le2" in Page(page.render([run])).text, "channel 5 has token 5 % 3"
    elsewhere = file.rename(tmp_path / "other.json")
    assert "le2" not in Page(page.render([run])).text
    assert "le2" in Page(page.render([run], tokenizer=elsewhere)).text
    elsewhere.write_text("no tokenizer")
    assert "id 2" in Page(page.render([run], tokenizer=elsewhere)).text


def test_several_runs(run: Run, tmp_path: Path) -> None:
    other = make_page_run(tmp_path / "other", layers=5, name="another")
    made = Page(page.render([run, other]))
    assert [len(data["rows"]) for data in made.data] == [3, 5]
    assert made.tags.count("article") == 2
    with pytest.raises(ConfigError, match="at least one run, got none"):
        page.render([])


def test_write_is_whole_or_not_at_all(run: Run, tmp_path: Path) -> None:
    size = page.write([run], tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size == size
    with pytest.raises(StoreError, match="cannot be written"):
        page.write([run], tmp_path / "absent" / "a.html")


def test_size_of_a_usual_run(tmp_path: Path) -> None:
    steps = np.unique(np.concatenate([[0], 2 ** np.arange(10), np.arange(1000, 144_000, 1000)]))[:154]
    run = make_page_run(tmp_path / "run", layers=36, steps=steps, total=143_000)
    assert len(run.steps) == 154
    assert page.write([run], tmp_path / "a.html") <= 3e6


@pytest.mark.slow
def test_size_of_a_large_run(tmp_path: Path) -> None:
    run = make_page_run(tmp_path / "run", layers=80, steps=2 * np.arange(5000), total=20_000)
    assert page.write([run], tmp_path / "a.html") <= 8e6


def test_the_ratio_is_the_run_s(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    meta: RunMeta = make_meta()
    assert meta.ratio == "ratio_of_means"
    text: Any = Page(page.render([Run.open(path)])).text
    assert "mean of the largest over mean of the medians (Eq. 8)" in text
