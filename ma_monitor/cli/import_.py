"""``ma-monitor import``: published measurements as runs."""

from __future__ import annotations

import argparse

from ma_monitor.cli.common import Commands, add_command, count, emit_json, note, say


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "import",
        run,
        help="make runs of published measurements",
        text=(
            "Reads the published data's layout (pythia_<size>/stats/exp2_<model>_step<N>, one model or a folder of\n"
            "several) or an .npz with `steps`, `stats` and optionally `lr`. Several models give RUN/<model> each.\n"
            "What is malformed is named on stderr and left out; the exit code is 0 if anything was read."
        ),
        example="ma-monitor import published/pythia_14m --out runs/pythia-14m",
    )
    parser.add_argument("path", metavar="PATH", help="folder or .npz file")
    parser.add_argument("--out", required=True, metavar="RUN", help="directory of the new run")


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.runs.published import import_run

    imported = import_run(args.path, args.out)
    for model in imported:
        for problem in model.problems:
            note(f"ma-monitor: {model.name}: left out: {problem}")
    if args.json:
        runs = [
            {
                "name": model.name,
                "run": None if model.path is None else str(model.path),
                "steps": model.steps,
                "problems": list(model.problems),
            }
            for model in imported
        ]
        emit_json({"runs": runs})
        return 0
    for model in imported:
        left_out = f", {len(model.problems)} left out" if model.problems else ""
        say(f"{model.path or 'no run'}: {model.name}, {count(model.steps, 'step')}{left_out}")
    return 0
