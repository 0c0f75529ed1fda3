"""``ma-monitor replay``: checkpoints through the code that watches a live training."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.cli.common import (
    MOST,
    RATIOS,
    Commands,
    Parser,
    add_command,
    add_ratio,
    emit_json,
    note,
    positive,
    say,
    table,
    user_documents,
    user_ids,
)
from ma_monitor.errors import ConfigError
from ma_monitor.phenomena import PHENOMENA, named
from ma_monitor.report.words import UNKNOWN, count, number, printable

if TYPE_CHECKING:
    from ma_monitor.measure.probe import Probe
    from ma_monitor.replay.runner import ReplayResult
    from ma_monitor.replay.sources import Checkpoint, Source


LEFT_OUT = 3
"""Exit code where the run holds something, but not all that was asked for."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "replay",
        run,
        help="measure saved checkpoints as if their training ran now",
        text=(
            "Measures every checkpoint of SOURCE that RUN does not hold yet: a Hub id, a folder that holds\n"
            "checkpoint-<step> or step<step> folders, or a file that lists such folders. May be interrupted and run\n"
            "again. A checkpoint that cannot be measured is named on stderr and left out; the exit code is 3 then,\n"
            "and 2 if nothing could be measured. Started by accelerate or torchrun, the processes share the work."
        ),
        example="ma-monitor replay EleutherAI/pythia-14m --revisions step0,step1000 --out runs/pythia-14m",
    )
    parser.add_argument("source", metavar="SOURCE", help="Hub id, folder of checkpoints, or list of folders")
    parser.add_argument("--out", required=True, metavar="RUN", help="directory of the run, made or gone on with")
    parser.add_argument(
        "--revisions",
        default="all",
        metavar="NAMES",
        help="of a Hub id: `all`, `paper` (37 of Pythia's), `log` (nearest to powers of two), names with commas "
        "between (default: %(default)s)",
    )
    _add_probe(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of weights and arithmetic (default: float32 up to 1.5e9 parameters, bfloat16 above)",
    )
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="sequences in one forward pass (default: all at once)"
    )
    add_ratio(parser, default=RATIOS[0])
    parser.add_argument(
        "--phenomena",
        metavar="NAMES",
        default="",
        help=f"what to read besides, with commas between, or `all`: {', '.join(PHENOMENA)} (default: nothing)",
    )
    parser.add_argument("--force", action="store_true", help="forget what RUN holds and measure everything anew")
    parser.add_argument("--keep", action="store_true", help="keep downloads, in RUN/checkpoints")
    parser.add_argument("--dry-run", action="store_true", help="only say what is to be done, with sizes")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--shard", type=shard, metavar="I/N", help="measure every N-th checkpoint, from the I-th on (0/N to N-1/N)"
    )
    way.add_argument(
        "--follow", action="store_true", help="wait for checkpoints that a training is still writing into the folder"
    )


def _add_probe(parser: Parser) -> None:
    """Declares the three ways to say what is measured."""
    probe = parser.add_mutually_exclusive_group()
    probe.add_argument(
        "--probe",
        choices=("builtin", "paper"),
        default="builtin",
        help="ten built-in passages, or the paper's: ten times 2048 tokens of RedPajama-Data-1T-Sample, which needs "
        "a network (default: %(default)s)",
    )
    probe.add_argument(
        "--probe-ids", metavar="FILE.npy", help="token ids to measure, whole numbers [sequences, tokens]"
    )
    probe.add_argument("--probe-text", metavar="FILE", help="text to measure, a document a line")


def shard(text: str) -> tuple[int, int]:
    """A worker's number and how many there are, as ``0/4``."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) <= MOST):
        raise argparse.ArgumentTypeError(f"must be one of 0/N to (N-1)/N, got {text!r}")
    return int(number), int(count)


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from transformers.utils.logging import disable_progress_bar

    from ma_monitor.replay.sources import open_source

    if args.follow and (args.force or args.keep or args.dry_run or args.revisions != "all"):
        raise ConfigError("--follow goes with none of --force, --keep, --dry-run and --revisions")
    if args.follow and not Path(args.source).is_dir():
        raise ConfigError(f"--follow needs a folder that exists, got {args.source!r}")
    disable_progress_bar()  # one for each checkpoint, and the Hub's client's own
    probe_of = _probe_of(args)
    if args.follow:
        return _tell(_follow(probe_of, args), Path(args.source).name, args)
    source = open_source(args.source, args.revisions, keep=Path(args.out) / "checkpoints" if args.keep else None)
    index, workers = args.shard or (0, 1)
    checkpoints = source.checkpoints[index::workers]
    if args.dry_run:
        return _tell_plan(source, checkpoints, args)
    result = _replay(source, probe_of(source), checkpoints, args)
    return 0 if result is None else _tell(result, source.name, args)


def _tell(result: ReplayResult, name: str, args: argparse.Namespace) -> int:
    """Prints what was done, and gives the exit code."""
    for problem in result.problems:
        note(f"ma-monitor: {problem}")
    code = LEFT_OUT if result.problems else 0
    if args.json:
        steps = {"measured": list(result.measured), "skipped": list(result.skipped)}
        emit_json({"run": str(result.run), "model": name, **steps, "problems": list(result.problems)})
        return code
    held = f", {len(result.skipped)} measured before" if result.skipped else ""
    problems = f", {count(len(result.problems), 'problem')}" if result.problems else ""
    say(f"{result.run}: {count(len(result.measured), 'checkpoint')} of {name} measured{held}{problems}")
    say(f"next: ma-monitor fit {result.run}")
    return code


def _tell_plan(source: Source, checkpoints: Sequence[Checkpoint], args: argparse.Namespace) -> int:
    """Prints what is to be done."""
    from ma_monitor.replay.plan import plan_replay

    plan = plan_replay(source, Path(args.out), checkpoints, force=args.force)
    for problem in plan.problems:
        note(f"ma-monitor: {problem}")
    code = LEFT_OUT if plan.problems else 0
    if args.json:
        rows = [{"step": checkpoint.step, "name": checkpoint.name, "bytes": size} for checkpoint, size in plan.pending]
        facts = {"held": list(plan.held), "seconds": plan.seconds, "problems": list(plan.problems)}
        emit_json({"run": args.out, "model": source.name, "pending": rows, **facts})
        return code
    if plan.pending:
        cells = [(number(c.step), c.name, UNKNOWN if b is None else f"{b / 1e6:,.1f}") for c, b in plan.pending]
        say(table(("step", "name", "MB"), cells))
    total = sum(size or 0 for _, size in plan.pending) / 1e9
    pace = "time unknown until this run has measured something" if plan.seconds is None else f"~{plan.seconds:,.0f} s"
    say(f"{count(len(plan.pending), 'checkpoint')} to measure, {total:.3g} GB, {pace}; {len(plan.held)} held")
    return code


def _probe_of(args: argparse.Namespace) -> Callable[[Source], Probe]:
    """What makes the probe that the user means for a source; files are read at once, before any network is asked."""
    from ma_monitor.measure.probe import Probe
    from ma_monitor.replay.probes import paper_probe, text_probe

    if args.probe_ids is not None:
        given = Probe.from_ids(user_ids(args.probe_ids, "sequences, tokens"), source=Path(args.probe_ids).name)
        return lambda source: given
    if args.probe_text is not None:
        texts = user_documents(args.probe_text, "a probe's text")
        return lambda source: text_probe(source, texts, Path(args.probe_text).name)
    return paper_probe if args.probe == "paper" else text_probe


def _replay(
    source: Source, probe: Probe, checkpoints: Sequence[Checkpoint], args: argparse.Namespace
) -> ReplayResult | None:
    """Replays, alone or with the other processes of a launcher; None in all of those but the first."""
    from ma_monitor.replay.runner import replay
    from ma_monitor.replay.together import launched, replay_together

    with _options(args) as options:
        if args.shard or not launched():
            return replay(source, probe, checkpoints=checkpoints, force=args.force, **options)
        if args.device == "cuda":
            options["device"] = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        return replay_together(source, probe, force=args.force, **options)


def _follow(probe_of: Callable[[Source], Probe], args: argparse.Namespace) -> ReplayResult:
    """Replays what a training leaves, until it ends or the user does."""
    from ma_monitor.replay.follow import follow
    from ma_monitor.replay.runner import replay

    probes: list[Probe] = []
    with _options(args) as options:

        def measure(source: Source) -> ReplayResult:
            if not probes:
                probes.append(probe_of(source))
            return replay(source, probes[0], **options)

        return follow(Path(args.source), Path(args.out), measure)


@contextmanager
def _options(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What every kind of replay takes, a progress bar included."""
    from tqdm import tqdm

    from ma_monitor.config import MonitorConfig

    with tqdm(unit="checkpoint", disable=None) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(printable(name))

        config = MonitorConfig(ratio=args.ratio, batch_size=args.batch_size, phenomena=named(args.phenomena))
        yield {
            "config": config,
            "out": Path(args.out),
            "dtype": args.dtype,
            "device": args.device,
            "progress": progress,
        }
