"""Takes the pictures of what people look at, in headless Chromium, from a real recorded training.

    python docs/screenshots.py [--all FOLDER] [--run RUN]

Writes ``images/report*.png`` for README: the page of the packaged training as it was at 40 % of its way, and at its
end with the forecast that was made at 40 %. With ``--all`` also whole pages of both and of ``--run``, at desktop and
telephone width, light and dark. Needs playwright and Chromium (``$CHROMIUM``, or ``chromium`` on the path).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ma_monitor.cli.__main__ import main as command
from ma_monitor.report.page import write
from ma_monitor.runs.store import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

IMAGES = Path(__file__).parent / "images"
SEEN = 0.4
"""Share of the training after which README's page is shown."""
LARGEST = 200_000
"""Bytes of a picture in README."""
DESKTOP, PHONE = {"width": 1280, "height": 1330}, {"width": 390, "height": 844}


def main() -> None:
    """Takes them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", metavar="FOLDER", type=Path, help="also take whole pages, into this folder")
    parser.add_argument("--run", metavar="RUN", help="with --all: the directory of one more run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        young, finished = recorded(Path(folder), SEEN), recorded(Path(folder), 1.0)
        for_readme(chromium, page_of(young), page_of(finished))
        if args.all is not None:
            args.all.mkdir(parents=True, exist_ok=True)
            runs = {"young": young, "finished": finished, **({"run": Path(args.run)} if args.run else {})}
            for name, run in runs.items():
                whole_pages(chromium, page_of(run), args.all / name)


def for_readme(chromium: Browser, young: Path, finished: Path) -> None:
    """Three pictures: the overview on a desk and on a telephone, and in the dark a forecast under what came."""
    with opened(chromium, young, DESKTOP, "light") as tab:
        save(tab.screenshot(), IMAGES / "report.png")
    with opened(chromium, young, PHONE, "dark") as tab:
        save(tab.screenshot(), IMAGES / "report-phone.png")
    with opened(chromium, finished, {"width": 1280, "height": 990}, "dark") as tab:
        tab.locator("[data-set=origin]").select_option("2")
        tab.locator(".trajectories").evaluate("section => section.scrollIntoView()")
        save(tab.screenshot(), IMAGES / "report-dark.png")


def whole_pages(chromium: Browser, page: Path, stem: Path) -> None:
    """The whole page at both widths, light and dark."""
    for kind, size in (("desktop", DESKTOP), ("phone", PHONE)):
        for scheme in ("light", "dark"):
            with opened(chromium, page, size, scheme) as tab:
                tab.screenshot(path=f"{stem}-{kind}-{scheme}.png", full_page=True)


def recorded(folder: Path, share: float) -> Path:
    """The packaged training as a run, as it was after this share of its steps."""
    with resources.files("ma_monitor.learned").joinpath("data/neox-70m.npz").open("rb") as file:
        held = np.load(file)
        kept = held["steps"] <= share * held["steps"][-1]
        place = folder / f"{share:g}"
        place.mkdir()
        np.savez(place / "neox-70m.npz", steps=held["steps"][kept], stats=held["stats"][kept], lr=held["lr"])
    command(["import", str(place / "neox-70m.npz"), "--out", str(place / "run"), "--json"])
    return place / "run"


def page_of(run: Path) -> Path:
    """The report page of a run, beside nothing of it."""
    page = Path(tempfile.mkdtemp(), "report.html")
    write([Run.open(run)], page)
    return page


@contextmanager
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        where = os.environ.get("CHROMIUM") or shutil.which("chromium")
        chromium = playwright.chromium.launch(executable_path=where, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@contextmanager
def opened(chromium: Browser, page: Path, size: Any, scheme: Any) -> Iterator[Page]:
    """A page of which every chart is drawn."""
    context = chromium.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    for chart in tab.locator(".chart").all():
        chart.scroll_into_view_if_needed()
    tab.evaluate("scrollTo(0, 0)")
    tab.wait_for_timeout(300)
    yield tab
    context.close()


def save(picture: bytes, path: Path) -> None:
    """Writes a picture.

    Raises:
        ValueError: If the file is too large for README.
    """
    Image.open(io.BytesIO(picture)).convert("RGB").save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} must have at most {LARGEST} bytes, has {path.stat().st_size}; show less of the page")


if __name__ == "__main__":
    main()
