"""``ma-monitor export``: a run as a long table."""

from __future__ import annotations

import argparse

from ma_monitor.cli.common import Commands, add_command, emit_json, say
from ma_monitor.report.words import count


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "export",
        run,
        help="write a run's measurements to a .csv or .parquet file",
        text="Writes a row for each step, layer and sequence: step, layer, sequence, top1, top2, …, median.",
        example="ma-monitor export runs/a --out a.csv",
    )
    parser.add_argument("run_dir", metavar="RUN", help="directory of a run")
    parser.add_argument("--out", required=True, metavar="FILE", help="name that ends in .csv or .parquet")


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.runs.store import Run

    source = Run.open(args.run_dir)
    source.export(args.out)
    steps, layers, sequences, _ = source.stack().top.shape
    rows = steps * layers * sequences
    if args.json:
        emit_json({"run": str(source.path), "file": args.out, "rows": rows})
    else:
        parts = (count(steps, "step"), count(layers, "layer"), count(sequences, "sequence"))
        say(f"{args.out}: {count(rows, 'row')} of {', '.join(parts)}")
    return 0
