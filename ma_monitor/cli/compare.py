"""``ma-monitor compare``: several runs side by side, at equal relative depth."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ma_monitor.cli.common import Commands, add_command, add_rank, add_ratio, emit_json, note, open_run, say, table
from ma_monitor.errors import ConfigError
from ma_monitor.report.words import asymptote_words, band, count, number

PICTURES = (".png", ".pdf", ".svg")
SHOWN = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Which of the compared times the table shows, as shares of the last one."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "compare",
        run,
        help="show several runs side by side, at equal relative depth",
        text=(
            "Ratios of several runs (seeds, sizes) at relative depth l/L, by steps that all have measured or by share\n"
            "of the training; ratio, class and asymptote of each at its end; median and range where all models have\n"
            "one shape. How the runs differ otherwise (probe, ratio, ranks, precision) is said, and they are compared."
        ),
        example="ma-monitor compare runs/seed-1 runs/seed-2 --out seeds.png",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directories of at least two runs")
    parser.add_argument("--out", metavar="FILE", help="also write a figure (.png, .pdf, .svg) or a table (.csv)")
    parser.add_argument(
        "--time", choices=("steps", "share"), help="compare at equal steps (default where lengths agree), or share"
    )
    add_rank(parser)
    add_ratio(parser)


def run(args: argparse.Namespace) -> int:
    """Does it."""
    suffix = Path(args.out or "none.csv").suffix.lower()
    if suffix not in (*PICTURES, ".csv"):
        raise ConfigError(f"a comparison is written to a name in {', '.join(PICTURES)} or .csv, got {args.out!r}")
    if len(args.runs) < 2:
        raise ConfigError(f"a comparison needs at least two runs, got {len(args.runs)}")
    from ma_monitor.report.comparison import compare_runs

    document = compare_runs([open_run(path, args.ratio) for path in args.runs], rank=args.rank, time=args.time)
    if args.out is not None:
        write(document, Path(args.out), suffix)
    for name, values in document["differences"].items():
        told = "; ".join(f"{label}: {value}" for label, value in zip(labels(document), values, strict=True))
        note(f"ma-monitor: the runs differ, or are not known to agree, in {name} ({told})")
    if args.json:
        emit_json(document)
        return 0
    unit = "steps that all have measured" if document["time"] == "steps" else "share of the training"
    say(f"{count(len(args.runs), 'run')} at {count(len(document['depths']), 'relative depth')}, by {unit}")
    say()
    say(depth_table(document))
    return 0


def depth_table(document: dict[str, Any]) -> str:
    """A line a depth and run, then one for the median and range of all where they can be given."""
    grid = document["grid"]
    shown = sorted({min(range(len(grid)), key=lambda i: abs(grid[i] - share * grid[-1])) for share in SHOWN})
    times = [f"step {grid[i]:,}" if document["time"] == "steps" else f"at {grid[i]:.0%}" for i in shown]
    names = labels(document)
    rows = []
    for entry in document["depths"]:
        own = zip(
            names, entry["layers"], entry["ratios"], entry["last"], entry["class"], entry["asymptote"], strict=True
        )
        for name, layer, ratios, final, kind, asymptote in own:
            cells = (*(number(ratios[i]) for i in shown), number(final), kind, asymptote_words(asymptote))
            rows.append((f"{entry['depth']:.3g}", name, str(layer), *cells))
        if entry["median"] is not None:
            cells = tuple(band(*(entry[key][i] for key in ("median", "low", "high"))) for i in shown)
            rows.append(("", "median [range]", "", *cells, "", "", ""))
    return table(("depth", "run", "layer", *times, "last", "class", "asymptote [80 %]"), rows, left=2)


def labels(document: dict[str, Any]) -> list[str]:
    """A short name for each run: its folder's, or the whole path where two are the same."""
    names = [Path(one["run"]).name for one in document["runs"]]
    return names if len(set(names)) == len(names) else [one["run"] for one in document["runs"]]


def write(document: dict[str, Any], path: Path, suffix: str) -> None:
    """Writes the figure, or a row for each run, depth and time.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        StoreError: If the file cannot be written.
    """
    from ma_monitor.runs.files import replace_file, writing

    def rows(file: Path) -> None:
        head = ("run", "depth", "layer", "step" if document["time"] == "steps" else "share", "ratio")
        body = (
            (one["run"], entry["depth"], layer, at, ratio)
            for entry in document["depths"]
            for one, layer, ratios in zip(document["runs"], entry["layers"], entry["ratios"], strict=True)
            for at, ratio in zip(document["grid"], ratios, strict=True)
        )
        with file.open("w", newline="", encoding="utf-8") as text:
            csv.writer(text, lineterminator="\n").writerows([head, *body])

    put: Callable[[Path], object] = rows
    if suffix != ".csv":
        from ma_monitor.report.figures import comparison

        put = comparison(document, labels(document)).savefig
    with writing(path):
        replace_file(path, put)
