"""``ma-monitor merge``: the runs of several workers as one."""

from __future__ import annotations

import argparse
from contextlib import closing

from ma_monitor.cli.common import Commands, add_command, emit_json, say
from ma_monitor.report.words import count


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "merge",
        run,
        help="join the runs of several workers into one",
        text=(
            "Joins runs that measured different steps of one training in the same way, as `replay --shard` leaves\n"
            "them: the joined run is the one that a single process would have made. A run that is already at --out is\n"
            "joined too. Runs of another model, probe or precision are refused, and steps that have different numbers."
        ),
        example="ma-monitor merge runs/pythia-14m/shard-* --out runs/pythia-14m/all",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument("--out", required=True, metavar="RUN", help="directory of the joined run")


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.monitor import Observer
    from ma_monitor.runs.merge import merge
    from ma_monitor.runs.store import Run

    steps = merge(args.runs, args.out)
    with closing(Observer(Run.open(args.out, writable=True))) as observer:
        observer.finish()
    if args.json:
        emit_json({"run": args.out, "runs": args.runs, "steps": steps})
    else:
        say(f"{args.out}: {count(steps, 'step')} of {count(len(args.runs), 'run')}")
        say(f"next: ma-monitor fit {args.out}")
    return 0
