"""``ma-monitor learn``: what finished runs teach the forecast of others."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ma_monitor.cli.backtest import configuration, opened
from ma_monitor.cli.common import Commands, add_command, add_ratio, emit_json, note, say, user_file

if TYPE_CHECKING:
    from ma_monitor.learned.training import PastRun
    from ma_monitor.runs.store import Run


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "learn",
        run,
        help="train the forecast's learned part on finished runs",
        text=(
            "Trains on runs whose schedule is known: directories of runs, or what `ma-monitor import` reads. Runs of\n"
            "the same shape and schedule count as seeds of one configuration, and bands are calibrated on whole\n"
            "configurations left out. The file is used by every run whose directory holds it as combiner.json."
        ),
        example="ma-monitor learn runs/a runs/b measured/*.npz --out runs/c/combiner.json",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a finished run, or an .npz")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the trained part goes")
    parser.add_argument("--card", metavar="FILE", help="text on where the runs come from, kept in the file")
    add_ratio(parser)


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.learned.training import train
    from ma_monitor.runs.files import replace_file

    with user_file(args.card, "a card must be a text file") if args.card else nullcontext() as file:
        card = {} if file is None else {"about": file.read_text(encoding="utf-8").strip()}
    runs: list[PastRun] = []
    for path in dict.fromkeys(args.runs):
        with opened(path, args.ratio) as sources:
            found = [past for _, source in sources if (past := past_run(source)) is not None]
        if not found:
            note(f"ma-monitor: {path}: left out: its schedule is not known, or a ratio is not finite and above 0")
        runs += found
    combiner = train(runs, card=card)
    text = json.dumps(combiner.to_dict(), separators=(",", ":"))
    replace_file(Path(args.out), lambda new: new.write_text(text, encoding="utf-8"))
    if args.json:
        emit_json({"out": args.out, **combiner.card})
    else:
        facts = combiner.card
        say(f"learned from {facts['runs']} runs of {facts['configurations']} configurations: {args.out}")
    return 0


def past_run(source: Run) -> PastRun | None:
    """A run to learn from; None where its schedule is not known, or a ratio is not finite and above 0."""
    import numpy as np

    from ma_monitor.analysis import rates_in_force
    from ma_monitor.learned.training import PastRun

    ratios, plan = source.ratios(), source.plans[-1] if source.plans else None
    lr = None if plan is None or plan.held else rates_in_force(source.plans, plan, int(source.steps[-1]))
    if lr is None or not (np.isfinite(ratios) & (ratios > 0)).all():
        return None
    return PastRun(configuration(source), source.steps.astype(float), ratios, lr)
