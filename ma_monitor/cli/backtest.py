"""``ma-monitor backtest``: how good forecasts of finished runs would have been."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ma_monitor.cli.common import Commands, add_command, add_ratio, emit_json, note, open_run, say, table
from ma_monitor.errors import ConfigError
from ma_monitor.report.words import UNKNOWN, count
from ma_monitor.report.words import percent as in_percent

if TYPE_CHECKING:
    from ma_monitor.numerics.backtest import Trial
    from ma_monitor.runs.records import Ratio
    from ma_monitor.runs.store import Run

SHOWN = {
    "forecast": "forecast",
    "last_value": "last value",
    "linear_trend": "linear trend",
    "log_trend": "log trend",
    "curve": "Eq. 14",
}
"""How methods are called in the table."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "backtest",
        run,
        help="score forecasts of finished runs against simple rules",
        text=(
            "Each run is forecast again at several shares of its length, from nothing measured later, and compared\n"
            "with what came: mean abs error of ln ratio, CRPS, 80 % interval score, and how much of what came the\n"
            "50/80/95 % bands held; beside the last value, a linear and a log trend of ln ratio, and Eq. 14 in steps\n"
            "extrapolated. A rule's bands are its errors in the other runs (those of the same shape and schedule left\n"
            "out), so with one configuration alone rules have none. Scores are averaged over layers, then over runs.\n"
            "Runs that the learned part of the forecast was trained on are scored too kindly."
        ),
        example="ma-monitor backtest runs/a runs/b measured.npz --at 25,50",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="directory of a run, or what `ma-monitor import` reads, such as an .npz"
    )
    parser.add_argument(
        "--at",
        type=percents,
        metavar="PERCENTS",
        help="forecast from these percents of the last measured step (default: 10,20,40,60,80)",
    )
    add_ratio(parser)


def percents(text: str) -> tuple[int, ...]:
    """Whole percents between 0 and 100, separated by commas, in order."""
    try:
        found = {int(word) for word in text.split(",")}
    except ValueError:
        found = {0}
    if not all(0 < one < 100 for one in found):
        raise argparse.ArgumentTypeError(f"must be whole percents from 1 to 99 such as 10,50, got {text!r}")
    return tuple(sorted(found))


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.numerics.backtest import CUTOFFS, SCORED, score_trials, summarize

    trials: list[Trial] = []
    for path in dict.fromkeys(args.runs):
        with opened(path, args.ratio) as sources:
            made = [trial for name, source in sources for trial in _trials(source, name, args.at or CUTOFFS)]
        if not made:
            note(f"ma-monitor: {path}: nothing to score, for no forecast of it can be made or compared")
        trials += made
    if not trials:
        raise ConfigError(
            "a backtest needs a run with six measurements before a cutoff and four after it; give another"
        )
    scores = score_trials(trials)
    names = list(dict.fromkeys(score.run for score in scores))
    keys = ("percent", "method", *SCORED)
    own = {name: [{key: getattr(s, key) for key in keys} for s in scores if s.run == name] for name in names}
    document = {"runs": [{"run": name, "scores": rows} for name, rows in own.items()], **summarize(scores)}
    if args.json:
        emit_json(document)
        return 0
    say(f"{count(len(names), 'run')}; mean abs error of ln ratio over the rest, and scores of the forecast's bands")
    say()
    say(score_table(document))
    return 0


@contextmanager
def opened(path: str, ratio: Ratio | None) -> Iterator[list[tuple[str, Run]]]:
    """A run directory, or every model that a file or folder of measurements holds, each with its name."""
    from ma_monitor.runs.documents import META
    from ma_monitor.runs.published import import_run

    if not Path(path).exists() or (Path(path) / META).exists():
        yield [(path, open_run(path, ratio))]
        return
    with TemporaryDirectory() as scratch:
        found = import_run(path, Path(scratch) / "run", ratio=ratio or "ratio_of_means")
        for model in found:
            for problem in model.problems:
                note(f"ma-monitor: {path}: left out: {problem}")
        names = [
            (str(model.path), path if len(found) == 1 else f"{path}/{model.name}") for model in found if model.path
        ]
        yield [(name, open_run(place)) for place, name in names]


def _trials(source: Run, name: str, cutoffs: tuple[int, ...]) -> list[Trial]:
    """Forecasts of one run, each with the plan that was in force then."""
    from ma_monitor.analysis import forecast_run
    from ma_monitor.numerics.backtest import run_trials

    return run_trials(
        source.steps,
        source.ratios(),
        lambda at, grid: forecast_run(source, at=at, grid=grid.tolist()),
        run=name,
        configuration=configuration(source),
        cutoffs=cutoffs,
    )


def configuration(source: Run) -> str:
    """What runs have in common that differ in their seed alone, as far as is known: the shape and the last plan."""
    plan = source.plans[-1] if source.plans else None
    rates = b"" if plan is None or plan.lr is None else plan.lr.tobytes()
    shape = {key: value for key, value in vars(source.meta.model).items() if key != "name"}
    facts = (shape, plan and plan.total_steps, plan and plan.batch, hashlib.sha256(rates).hexdigest())
    return repr(facts)


def score_table(document: dict[str, Any]) -> str:
    """A line for each cutoff."""
    from ma_monitor.numerics.backtest import BANDS

    columns = ("seen", "runs", *SHOWN.values(), "forecast/best", "CRPS/best", "CRPS", "in 50 %", "in 80 %", "in 95 %")
    rows = []
    for cutoff in document["cutoffs"]:
        forecast = cutoff["methods"]["forecast"]
        errors = (cutoff["methods"][method]["error"] for method in SHOWN)
        numbers = (*errors, cutoff["ratio"]["error"], cutoff["ratio"]["crps"], forecast["crps"])
        held = (in_percent(forecast[name]) for name in BANDS)
        cells = (UNKNOWN if value is None else f"{value:.3f}" for value in numbers)
        rows.append((f"{cutoff['percent']} %", str(cutoff["runs"]), *cells, *held))
    return table(columns, rows)
