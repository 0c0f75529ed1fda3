"""``ma-monitor log``: a finished run into a dashboard."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.cli.common import Commands, add_command, add_ratio, emit_json, note, open_run, say
from ma_monitor.errors import ConfigError, MissingExtraError, StoreError
from ma_monitor.report.words import count, printable

if TYPE_CHECKING:
    from ma_monitor.runs.store import Run
    from ma_monitor.sinks.base import Emission, Sink, Table

NAME = 128
"""Characters that W&B allows in a run's name."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "log",
        run,
        help="send a finished run into W&B or TensorBoard",
        text=(
            "Logs what live logging would have logged: every measured step's scalars, and the forecast, table and\n"
            "picture where fit and forecast were due; with the last one what `ma-monitor ablate` left with the run."
        ),
        example="ma-monitor log runs/a --to tensorboard --dir tb",
    )
    parser.add_argument("run_dir", metavar="RUN", help="directory of a run")
    parser.add_argument("--to", required=True, choices=("wandb", "tensorboard"), help="which dashboard")
    parser.add_argument("--project", default="ma_monitor", help="W&B project (default: %(default)s)")
    parser.add_argument("--name", help="name of the new W&B run (default: the model's)")
    parser.add_argument(
        "--dir", metavar="DIR", help="where event files go, or W&B's own (default: RUN/tensorboard, W&B's default)"
    )
    add_ratio(parser)


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from tqdm import tqdm

    source = open_run(args.run_dir, args.ratio)
    if len(source.steps) == 0:
        raise ConfigError(f"{source.path}: holds no measurements, so there is nothing to log")
    opened = to_wandb(source, args) if args.to == "wandb" else to_tensorboard(source, args.dir)
    with opened as (sink, where):
        for shown in tqdm(emissions(source), total=len(source.steps), unit="step", disable=None):
            sink.emit(shown)
    if args.json:
        emit_json({"run": str(source.path), "to": args.to, "where": where, "steps": len(source.steps)})
    else:
        say(f"{source.path}: {count(len(source.steps), 'step')} logged to {where}")
        if args.to == "tensorboard":
            say(f"next: tensorboard --logdir {where}")
        elif Path(where).is_dir():
            say(f"next: wandb sync {where}")
    return 0


def emissions(source: Run) -> Iterator[Emission]:
    """What live logging emitted at every measured step, and at the last one as if the training ended there."""
    from ma_monitor.analysis import analyse, refit_due
    from ma_monitor.sinks.alerts import due_alerts
    from ma_monitor.sinks.metrics import emission, facts

    told: list[str] = []
    for seen, step in enumerate(source.steps, start=1):
        due = refit_due(seen) or seen == len(source.steps)
        analysis = analyse(source, at=int(step)) if due else None
        alerts = due_alerts(facts(source, seen, analysis), told)
        told += [alert.key for alert in alerts]
        shown = emission(source, seen, analysis, alerts=alerts, with_config=seen == 1)
        last = seen == len(source.steps)
        yield replace(shown, tables=shown.tables | ablation_tables(source)) if last else shown


def ablation_tables(source: Run) -> dict[str, Table]:
    """What `ma-monitor ablate` left with the run; a file that cannot be read is left out, and named on stderr."""
    from ma_monitor.report.ablation import read_ablation
    from ma_monitor.sinks.base import Table

    try:
        found = read_ablation(source.path)
    except StoreError as error:
        note(f"ma-monitor: ablation left out: {error}")
        return {}
    return {f"ma/ablation/{one.key}": Table(*one.plain) for one in (found.tables if found else ())}


@contextmanager
def to_tensorboard(source: Run, folder: str | None) -> Iterator[tuple[Sink, str]]:
    """Opens a sink into event files; says where they are.

    Raises:
        ConfigError: If the folder holds events already, which TensorBoard would mix with these.
        MissingExtraError: If tensorboard is not installed.
    """
    from ma_monitor.sinks.tensorboard import TensorBoardSink

    target = source.path / "tensorboard" if folder is None else Path(folder)
    if target.is_dir() and any(target.glob("events.out.tfevents.*")):
        raise ConfigError(f"{target}: already holds TensorBoard events, which would be mixed; give another --dir")
    sink = TensorBoardSink.to_directory(target)
    try:
        yield sink, str(target)
    finally:
        sink.close()


@contextmanager
def to_wandb(source: Run, args: argparse.Namespace) -> Iterator[tuple[Sink, str]]:
    """Begins a W&B run and a sink into it; says where the run is; finishes it.

    Raises:
        ConfigError: If W&B refuses to begin a run.
        MissingExtraError: If wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError("wandb", "wandb") from error
    from ma_monitor.sinks.wandb import WandbSink

    settings = wandb.Settings(console="off", silent=True)
    name = printable(args.name or source.meta.model.name)[:NAME]
    try:
        run: Any = wandb.init(project=args.project, name=name, dir=args.dir, settings=settings)
    except wandb.errors.Error as error:
        raise ConfigError(
            f"W&B did not begin a run ({error}); log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    code = 1
    try:
        yield WandbSink(run), str(Path(run.dir).parent if run.offline else run.url)
        code = 0
    finally:
        run.finish(exit_code=code)
