"""``ma-monitor report``: one page, several runs, and a page that follows a training."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ma_monitor.runs.store import Run
from tests.cli.conftest import PLAN, STEPS, TOTAL, Call, make_measurements, make_meta, make_run

TITLE = re.compile(r"step ([\d,]+) of 2,000")


def test_one_page(call: Call, run_dir: Path, tmp_path: Path) -> None:
    result = call("report", run_dir, "--out", tmp_path / "a.html")
    assert result.code == 0
    assert result.out == f"{tmp_path / 'a.html'}: 1 run, 1.2 MB; open it in a browser\n"
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(run_dir.iterdir())]
    document = call("report", run_dir, run_dir, "--out", tmp_path / "b.html", "--json").document
    assert document["runs"] == [str(run_dir)] * 2
    assert document["bytes"] == (tmp_path / "b.html").stat().st_size
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(run_dir.iterdir())] == before, "only read"


def test_the_ratio_asked_for(call: Call, run_dir: Path, tmp_path: Path) -> None:
    assert call("report", run_dir, "--out", tmp_path / "a.html", "--ratio", "mean_of_ratios").code == 0
    assert "mean of each sequence&#39;s ratio (Eq. 6 and 7)" in (tmp_path / "a.html").read_text()


def test_bad_input(refused: Callable[..., str], run_dir: Path, tmp_path: Path) -> None:
    assert "not a run" in refused("report", tmp_path)
    assert "cannot be written" in refused("report", run_dir, "--out", tmp_path / "absent" / "a.html")
    assert "must be a tokenizer.json" in refused("report", run_dir, "--tokenizer", tmp_path / "absent.json")
    assert "whole number of at least 1" in refused("report", run_dir, "--live", "0")


def test_live_on_a_finished_run_is_a_report(call: Call, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with Run.open(path, writable=True) as run:
        last = make_measurements()[-1]
        run.append(
            type(last)(
                TOTAL,
                *(getattr(last, name) for name in ("top", "position", "token", "channel", "median", "nan", "inf")),
            )
        )
    assert call("report", path, "--out", tmp_path / "a.html", "--live").code == 0
    assert "data-refresh" not in (tmp_path / "a.html").read_text()[:200]


def test_live_follows_and_ends(tmp_path: Path) -> None:
    """A writer measures on while the command looks every second; an interrupt leaves a page that rests."""
    out, measured = tmp_path / "a.html", make_measurements()
    with Run.create(tmp_path / "run", make_meta(), PLAN) as run:
        for one in measured[:20]:
            run.append(one)
        command = [
            sys.executable,
            "-m",
            "ma_monitor.cli",
            "report",
            str(tmp_path / "run"),
            "--out",
            str(out),
            "--live",
            "1",
        ]
        following = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell's background job ignores
        )
        try:
            shown(out, STEPS[19], following)
            assert '<html lang="en" data-refresh="1">' in out.read_text()
            for one in measured[20:]:
                run.append(one)
            shown(out, STEPS[-1], following)
            run.event("alert", "key Something happened.")
            until(lambda: "Something happened." in out.read_text(), following)
        finally:
            following.send_signal(signal.SIGINT)
            said, noted = following.communicate(timeout=180)
    assert following.returncode == 0
    assert "follows the training until its planned end" in noted
    assert "does not load itself again" in noted
    assert "1 run" in said
    assert "data-refresh" not in out.read_text()[:200]


def shown(page: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until the page shows this step."""

    def shows() -> bool:
        found = TITLE.search(page.read_text()) if page.exists() else None
        return found is not None and int(found[1].replace(",", "")) == step

    until(shows, process)


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits until this is so, while the process lives."""
    for _ in range(600):
        if true():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("this never came")
