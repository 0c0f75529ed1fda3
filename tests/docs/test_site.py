"""The documentation site, built as a reader gets it: it builds, asks no other server for anything, and looks whole.

Needs the extra ``docs``, and Chromium and playwright as the report's browser tests do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ma_monitor
from tests.docs.blocks import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.docs
PHONE, DESK = 390, 1280


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Building it runs the notebook."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pages_of(site: Path) -> list[str]:
    return sorted(str(page.parent.relative_to(site)).removeprefix(".") for page in site.rglob("index.html"))


def text_of(site: Path, page: str) -> str:
    return re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_page_opens_without_another_server(site: Path, address: str, browser: Browser, width: int) -> None:
    said: list[str] = []
    asked: set[str] = set()
    context = browser.new_context(viewport={"width": width, "height": 900})
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("response", lambda answer: said.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    context.on("request", lambda request: asked.add(request.url))
    for page in pages_of(site):
        tab.goto(f"{address}/{page}".rstrip("/") + "/", wait_until="load")
        assert "ma_monitor" in tab.title()
        scroll, room = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert scroll <= room, f"{page} is {scroll} wide at {width}"
        whole = "[...document.images].every(i => i.loading === 'lazy' || (i.complete && i.naturalWidth > 0))"
        assert tab.evaluate(whole), page
    context.close()
    assert said == []
    assert {url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))} == set()


def test_search_finds_a_page(address: str, browser: Browser) -> None:
    tab = browser.new_page(viewport={"width": DESK, "height": 900})
    tab.goto(f"{address}/")
    tab.get_by_role("textbox", name="Search").press_sequentially("not_within_schedule")  # it listens to keys alone
    tab.wait_for_selector(".md-search-result__item a")
    assert tab.locator(".md-search-result__item a").count() >= 1
    tab.close()


def test_the_notebook_ran(site: Path) -> None:
    page = (site / "notebook" / "index.html").read_text(encoding="utf-8")
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["outputs"]] == []
    assert len(re.findall(r'<img alt="png" src="[^"]+\.png"', page)) == 3
    words = text_of(site, "notebook")
    assert re.search(r"Forecast made at step \d+", words)
    assert all(column in words for column in ("off by factor", "if it stayed", "identified"))
    assert "Traceback" not in words


def test_python_pages_have_the_public_names(site: Path) -> None:
    ids = {
        found
        for page in (site / "api").rglob("index.html")
        for found in re.findall(r'id="(ma_monitor\.[\w.]+)"', page.read_text(encoding="utf-8"))
    }
    homes = {f"{value.__module__}.{name}" for name in ma_monitor.__all__ for value in [getattr(ma_monitor, name)]}
    assert homes <= ids
    results = ("fit.Fit", "fit.Peak", "fit.Asymptote", "forecast.Forecast", "forecast.LayerForecast", "events.Crossing")
    assert {f"ma_monitor.numerics.{name}" for name in results} <= ids
    assert {"ma_monitor.schedule.planned_rates", "ma_monitor.runs.store.Run.trajectory"} <= ids
    assert not [name for name in ids if re.search(r"\._[a-z]", name)], "private names are nobody's business"


def test_the_site_is_not_kept() -> None:
    ignored = subprocess.run(["git", "check-ignore", "-q", "site/index.html"], cwd=ROOT)
    assert ignored.returncode == 0
