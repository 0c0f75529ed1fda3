"""The page in a real browser: what a person does with a mouse, a keyboard or a telephone.

Needs Chromium (``$CHROMIUM``, or ``chromium`` on the path) and playwright; downloads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ma_monitor.report import page
from ma_monitor.runs.store import Run
from tests.report.pages import LONG, STEPS, hostile_run, make_page_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

pytestmark = pytest.mark.browser
LINES = """layer => echarts.getInstanceByDom(document.querySelector('[data-chart=trajectories]')).getOption()
    .series.filter(s => s.type === 'line' && s.lineStyle.width === 2 && s.data.length).length"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_page_run(tmp_path_factory.mktemp("browser") / "run", layers=5)


Show = Callable[..., "Tab"]


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Show]:
    """Opens the page of these runs; in the end nothing may have been complained about, or asked of a network."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def opened(*runs: Run, refresh: int | None = None, width: int = 1280, **options: Any) -> Tab:
        file = tmp_path / "report.html"
        page.write(runs, file, refresh=refresh)
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(dialog.message))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        tab.wait_for_selector("html[data-ready]")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert {re.sub(r".*/", "", url) for url in asked} == {"report.html"}, "the page itself and nothing else"


def scrolled(tab: Tab, kind: str) -> Any:
    """A chart, in sight and drawn."""
    chart = tab.locator(f"article:not([hidden]) [data-chart={kind}]")
    chart.scroll_into_view_if_needed()
    tab.wait_for_selector(f"article:not([hidden]) [data-chart={kind}][data-drawn] canvas")
    return chart


def column(tab: Tab, place: int) -> list[str]:
    return [text.strip() for text in tab.locator(f"table.layers tbody tr td:nth-child({place})").all_inner_texts()]


def test_every_chart_is_drawn(show: Show, run: Run) -> None:
    tab = show(run)
    kinds = [chart.get_attribute("data-chart") for chart in tab.locator(".chart").all()]
    assert kinds[:4] == ["overview", "trajectories", "track", "map"]
    for kind in kinds:
        box = scrolled(tab, str(kind)).bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
    colours = """kind => { const c = document.querySelector(`[data-chart=${kind}] canvas`);
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return new Set(new Uint32Array(d.buffer)).size }"""
    assert all(tab.evaluate(colours, kind) > 10 for kind in kinds), "not blank"


def test_hovering_shows_what_was_measured(show: Show, run: Run) -> None:
    tab = show(run)
    box = scrolled(tab, "trajectories").bounding_box()
    for share in (0.3, 0.5):
        tab.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)
        tip = tab.locator("[data-chart=trajectories] .tip")
        tip.wait_for(state="visible")
        told = tip.inner_text()
        step = int(re.findall(r"step ([\d,]+)", told)[0].replace(",", ""))
        (found,) = np.flatnonzero(run.steps == step)
        layers = {int(layer): float(value) for layer, value in re.findall(r"layer (\d+): ([\d.]+)", told)}
        assert sorted(layers) == [3, 4, 5], "the three largest"
        for layer, value in layers.items():
            assert value == pytest.approx(run.ratios()[layer - 1, found], rel=1e-3)


@pytest.mark.parametrize("kind", ["overview", "track", "map", "strip0", "strip2", "sizes1"])
def test_hovering_elsewhere(show: Show, run: Run, kind: str) -> None:
    tab = show(run)
    box = scrolled(tab, kind).bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + min(40, box["height"] / 3))
    tip = tab.locator(f"[data-chart={kind}] .tip")
    tip.wait_for(state="visible")
    assert re.search(r"(layer|step) \d+", tip.inner_text())


def test_choosing_layers(show: Show, run: Run) -> None:
    tab = show(run)
    scrolled(tab, "trajectories")
    chip = tab.locator(".chips button", has_text="1")
    assert (chip.get_attribute("aria-pressed"), tab.evaluate(LINES)) == ("false", 3)
    chip.click()
    assert (chip.get_attribute("aria-pressed"), tab.evaluate(LINES)) == ("true", 4)
    chip.press("Enter")
    assert (chip.get_attribute("aria-pressed"), tab.evaluate(LINES)) == ("false", 3)
    tab.locator(".pick", has_text="2").click()
    assert tab.locator(".chips [aria-pressed=true]").all_inner_texts() == ["2"]
    assert tab.evaluate(LINES) == 1
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(".chips [aria-pressed=true]").all_inner_texts() == ["2"], "kept when the page loads again"
    tab.locator(".chips button", has_text="2").click()
    assert tab.locator(".chips [aria-pressed=true]").count() == 0


def test_controls(show: Show, run: Run) -> None:
    tab = show(run)
    scrolled(tab, "trajectories")
    count = (
        "() => echarts.getInstanceByDom(document.querySelector('[data-chart=trajectories]')).getOption().series.length"
    )
    before = tab.evaluate(count)
    tab.locator("[data-set=ranks]").check()
    assert tab.evaluate(count) == before + 3 * 2
    tab.locator("[data-set=fit]").uncheck()
    assert tab.evaluate(count) == before + 3 * 2 - 3
    tab.locator("[data-set=x]").select_option("log")
    tab.locator("[data-set=origin]").select_option("0")
    tab.locator("[data-set=map]").select_option("2")
    scrolled(tab, "map")


def test_sorting(show: Show, run: Run) -> None:
    tab = show(run)
    now = run.ratios()[:, -1]
    assert column(tab, 1) == ["1", "2", "3", "4", "5"]
    tab.get_by_role("button", name="ratio now").click()
    assert column(tab, 1) == [str(layer) for layer in np.argsort(now) + 1]
    head = tab.locator("table.layers th", has_text="ratio now")
    assert head.get_attribute("aria-sort") == "ascending"
    tab.get_by_role("button", name="ratio now").press("Enter")
    assert column(tab, 1) == [str(layer) for layer in np.argsort(-now) + 1]
    assert head.get_attribute("aria-sort") == "descending"
    tab.locator("table.layers").get_by_role("button", name="heading").click()
    assert column(tab, 3) == sorted(column(tab, 3))
    assert head.get_attribute("aria-sort") == "none"
    peaks = tab.locator("table.layers").get_by_role("button", name="peak step")
    for _ in range(2):
        peaks.click()
        known = ["[" in text for text in column(tab, 6)]
        assert known == sorted(known, reverse=True), "what is not known comes last either way"


def test_theme(show: Show, run: Run) -> None:
    paper = "() => getComputedStyle(document.body).backgroundColor"
    tab = show(run, color_scheme="dark")
    scrolled(tab, "overview")
    dark = tab.evaluate(paper)
    letters = """() => echarts.getInstanceByDom(document.querySelector('[data-chart=overview]')).getOption()
        .xAxis[0].axisLabel.color"""
    assert tab.evaluate(letters) == "#9aa7b4"
    tab.get_by_role("button", name="theme").click()
    light = tab.evaluate(paper)
    assert (dark, light) == ("rgb(15, 20, 25)", "rgb(255, 255, 255)")
    assert tab.evaluate(letters) == "#57606a", "charts follow"
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert tab.evaluate(paper) == light
    assert show(run, color_scheme="light").evaluate(paper) == light


def test_the_keyboard_reads_measurements_out(show: Show, run: Run) -> None:
    tab = show(run)
    chart = scrolled(tab, "trajectories")
    chart.focus()
    tab.keyboard.press("ArrowLeft")
    told = tab.locator("[data-live]").inner_text()
    assert told.startswith("step 1,000: layer 5 ")
    assert float(re.findall(r"layer 5 ([\d.]+)", told)[0]) == pytest.approx(run.ratios()[4, -1], rel=1e-3)
    tab.keyboard.press("ArrowRight")
    assert "forecast" in tab.locator("[data-live]").inner_text()


def test_everything_can_be_reached_and_has_a_name(show: Show, run: Run) -> None:
    tab = show(run)
    nameless = """() => [...document.querySelectorAll('button, select, input, [role=img], [role=region], [tabindex]')]
        .filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML.slice(0, 80))"""
    assert tab.evaluate(nameless) == []
    tab.keyboard.press("Tab")
    assert tab.evaluate("() => document.activeElement.className") == "skip"
    for _ in range(60):
        tab.keyboard.press("Tab")
        if tab.evaluate("() => document.activeElement.dataset.chart === 'trajectories'"):
            break
    else:
        pytest.fail("the trajectories are not reached by the tab key")


@pytest.mark.parametrize("width", [390, 320])
def test_on_a_telephone(show: Show, run: Run, width: int) -> None:
    tab = show(run, width=width, has_touch=True, is_mobile=True)
    for kind in ("overview", "trajectories", "map"):
        scrolled(tab, kind)
    assert tab.evaluate("() => document.documentElement.scrollWidth") == width, "nothing sticks out"


@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_text(show: Show, tmp_path: Path, width: int) -> None:
    tab = show(hostile_run(tmp_path / "run", LONG), make_page_run(tmp_path / "tame"), width=width)
    for kind in ("overview", "trajectories", "map"):
        scrolled(tab, kind)
    assert tab.locator("img").count() == 0
    assert tab.locator("article:not([hidden]) h1").inner_text().startswith("</script></title><script>alert(1)</script>")
    assert tab.title().startswith("Massive activations: </script></title>")
    assert tab.evaluate("() => document.documentElement.scrollWidth") == width


@pytest.mark.parametrize(("layers", "points"), [(1, 1), (1, 27), (80, 1), (80, 27), (3, 0)])
def test_of_any_size(show: Show, tmp_path: Path, layers: int, points: int) -> None:
    tab = show(make_page_run(tmp_path / "run", layers=layers, steps=STEPS[:points]))
    for chart in tab.locator(".chart").all():
        scrolled(tab, str(chart.get_attribute("data-chart")))


def test_several_runs_are_tabs(show: Show, run: Run, tmp_path: Path) -> None:
    tab = show(run, make_page_run(tmp_path / "other", name="another"))
    assert tab.locator("h1:visible").all_inner_texts() == ["made"]
    tab.get_by_role("button", name="another").click()
    assert tab.locator("h1:visible").all_inner_texts() == ["another"]
    assert scrolled(tab, "trajectories").bounding_box()["width"] > 500


def test_a_live_page_follows(show: Show, tmp_path: Path) -> None:
    tab = show(make_page_run(tmp_path / "young", steps=STEPS[:20]), refresh=1)
    tab.locator(".chips button", has_text="1").click()
    tab.get_by_text("Parameters of the fitted curve").click()
    page.write([make_page_run(tmp_path / "older")], tmp_path / "report.html")
    tab.get_by_text("step 1,000 of 2,000").wait_for()
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(".chips [aria-pressed=true]").all_inner_texts() == ["2", "3"], "what was chosen is kept"
    assert tab.get_by_role("region", name="Fitted parameters").is_visible(), "and what was opened stays open"
    assert tab.locator("#live").count() == 0, "a page that is final does not load itself again"
