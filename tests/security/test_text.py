"""Other people's words in tables, on the terminal and on the page: a run's documents, and names of what was read."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ma_monitor import Run
from ma_monitor.cli import watch
from ma_monitor.cli.__main__ import main
from ma_monitor.errors import StoreError
from ma_monitor.report import page
from tests.report.pages import HOSTILE, Page, hostile_run
from tests.runs.makers import make_measurements
from tests.security.targets import META, run_files

MARKUP = "[bold red]x[/nothing][link=https://evil]\x1b]0;owned\x07\x1b[2J"


def changed(folder: Path, name: str, **changes: Any) -> Path:
    """The short run with the entries of a document changed."""
    folder.mkdir()
    for other, content in run_files().items():
        (folder / other).write_bytes(content)
    document = json.loads((folder / name).read_text())
    for entry in document["layers"]:
        entry.update(changes)
    (folder / name).write_text(json.dumps(document))
    return folder


def seen(folder: Path) -> str:
    """What the terminal of somebody who watches gets."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200, height=40)
    console.print(watch.view(watch.read(folder), console, 0.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_class_is_no_markup(tmp_path: Path) -> None:
    shown = seen(changed(tmp_path / "run", "fits.json", **{"class": MARKUP}))
    assert "[bold red]x[/nothing]" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_a_peak_is_no_markup(tmp_path: Path) -> None:
    peak = {"status": MARKUP, "identified": True, "step": 5, "low": 1, "high": 9}
    shown = seen(changed(tmp_path / "run", "forecast.json", peak=peak))
    assert "[bold red]x[/nothing]" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("fits.json", {"layer": "1"}),
        ("fits.json", {"class": 5}),
        ("forecast.json", {"end": {"median": "much", "p10": 1, "p90": 2}}),
        ("forecast.json", {"end": {"median": 1e301, "p10": 1, "p90": 2}}),
        ("forecast.json", {"end": {"median": True, "p10": 1, "p90": 2}}),
        ("forecast.json", {"end": [1, 2, 3]}),
        ("forecast.json", {"peak": {"status": "ahead"}}),
    ],
)
def test_a_document_of_another_shape_is_named(tmp_path: Path, name: str, entry: dict[str, Any]) -> None:
    folder = changed(tmp_path / "run", name, **entry)
    with pytest.raises(StoreError, match=f"{name} is not what ma_monitor writes there; remove it"):
        watch.read(folder)


def test_every_table_of_a_hostile_run_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = hostile_run(tmp_path / "run", HOSTILE)
    for command in ("fit", "forecast", "watch", "compare"):
        assert main([command, str(run.path), *([str(run.path)] if command == "compare" else [])]) == 0
        out, err = capsys.readouterr()
        assert out
        assert all(character.isprintable() or character == "\n" for character in out + err), command


def test_names_of_what_was_read_are_text(tmp_path: Path) -> None:
    name = HOSTILE.encode("utf-8", "replace").decode()
    pages = []
    for folder, called in (("hostile", name), ("tame", "kurtosis")):
        with Run.create(tmp_path / folder, META, None) as run:
            for step in range(8):
                read = {called: np.full(META.rows, 3.0 + step)}
                run.append(replace(make_measurements(step, META), phenomena=read))
        pages.append(Page(page.render([Run.open(tmp_path / folder)])))
    hostile, tame = pages
    assert hostile.tags.count("script") == tame.tags.count("script")
    assert "img" not in hostile.tags
    assert all(character.isprintable() or character in "\n\xa0" for character in "".join(hostile.words))
