"""``ma-monitor report``: one self-contained page of a run, or of several."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ma_monitor.cli.common import Commands, add_command, add_ratio, emit_json, note, open_run, positive, say
from ma_monitor.errors import ConfigError
from ma_monitor.report.words import count

if TYPE_CHECKING:
    from ma_monitor.runs.store import Run

REFRESH = 30
"""Seconds between two looks at a live run."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "report",
        run,
        help="write one self-contained page of a run",
        text=(
            "One HTML file that loads nothing from the network: which layers carry massive activations, where each is\n"
            "heading and how sure that is, what earlier forecasts of the run were worth, and every number behind it.\n"
            "With --live it is written anew as the run grows, and the open page follows, until the planned end."
        ),
        example="ma-monitor report runs/a --out report.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directories of runs, a tab each")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: %(default)s)")
    parser.add_argument(
        "--live",
        type=positive,
        nargs="?",
        const=REFRESH,
        metavar="SECONDS",
        help=f"keep the page up to date while the training goes on, looking every so often (default: {REFRESH})",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.json for the tokens' text (default: one beside the run)"
    )
    add_ratio(parser)


def run(args: argparse.Namespace) -> int:
    """Does it."""
    tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    if tokenizer is not None and not tokenizer.is_file():
        raise ConfigError(f"--tokenizer must be a tokenizer.json, and {tokenizer} is no file")
    from ma_monitor.report.page import write

    out = Path(args.out)
    sources = follow(args, out, tokenizer) if args.live else opened(args)
    size = write(sources, out, tokenizer=tokenizer)
    if args.json:
        emit_json({"runs": [str(source.path) for source in sources], "file": str(out), "bytes": size})
    else:
        say(f"{out}: {count(len(sources), 'run')}, {size / 1e6:.1f} MB; open it in a browser")
    return 0


def opened(args: argparse.Namespace) -> list[Run]:
    """The runs as they are now."""
    return [open_run(path, args.ratio) for path in args.runs]


def follow(args: argparse.Namespace, out: Path, tokenizer: Path | None) -> list[Run]:
    """Keeps the page up to date until every run has reached its planned end, or the user interrupts.

    A look costs a few file sizes; only a run that has grown is read.
    """
    from ma_monitor.report.page import write

    note(f"ma-monitor: {out} follows the training until its planned end; end it with Ctrl-C")
    try:
        while True:
            seen = sizes(args.runs)
            sources = opened(args)
            if over(sources):
                return sources
            write(sources, out, refresh=args.live, tokenizer=tokenizer)
            while sizes(args.runs) == seen:
                time.sleep(args.live)
    except KeyboardInterrupt:
        note("ma-monitor: interrupted; the page is left as it is now and does not load itself again")
        return opened(args)


def sizes(runs: Sequence[str]) -> list[int]:
    """Sizes of the files that grow with a run: its measurements and its diary."""
    from ma_monitor.runs.documents import EVENTS, LOG

    return [file.stat().st_size for run in runs for name in (LOG, EVENTS) if (file := Path(run, name)).exists()]


def over(sources: Sequence[Run]) -> bool:
    """Whether every run has reached the end that is planned for it."""
    from ma_monitor.analysis import planned_end

    ends = [(source.steps[-1], planned_end(source, int(source.steps[-1]))) for source in sources if len(source.steps)]
    return len(ends) == len(sources) and all(end is not None and step >= end for step, end in ends)
