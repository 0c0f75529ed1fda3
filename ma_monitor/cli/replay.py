"""``ma-monitor replay``: checkpoints through the code that watches a live training."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ma_monitor.cli.common import (
    RATIO_HELP,
    RATIOS,
    Commands,
    add_command,
    count,
    emit_json,
    note,
    positive,
    printable,
    say,
    user_file,
)
from ma_monitor.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from ma_monitor.config import MonitorConfig
    from ma_monitor.measure.probe import Probe
    from ma_monitor.replay.runner import ReplayResult
    from ma_monitor.replay.sources import Source


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "replay",
        run,
        help="measure saved checkpoints as if their training ran now",
        text=(
            "Measures every checkpoint of SOURCE that RUN does not hold yet: a Hub id, or a folder that holds\n"
            "checkpoint-<step> or step<step> folders. May be interrupted and run again. A checkpoint that cannot be\n"
            "measured is named on stderr and left out; the exit code is 0 if anything was measured."
        ),
        example="ma-monitor replay EleutherAI/pythia-14m --revisions step0,step1000 --out runs/pythia-14m",
    )
    parser.add_argument("source", metavar="SOURCE", help="Hub id or folder of checkpoints")
    parser.add_argument("--out", required=True, metavar="RUN", help="directory of the run, made or gone on with")
    parser.add_argument(
        "--revisions",
        default="all",
        metavar="NAMES",
        help="of a Hub id: names with commas between, `paper` or `all` (default: %(default)s)",
    )
    probe = parser.add_mutually_exclusive_group()
    probe.add_argument(
        "--probe-ids", metavar="FILE.npy", help="token ids to measure, whole numbers [sequences, tokens]"
    )
    probe.add_argument(
        "--probe-text", metavar="FILE", help="text to measure, a document a line (default: ten built-in passages)"
    )
    parser.add_argument("--dtype", default="float32", help="of weights and arithmetic (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="sequences in one forward pass (default: all at once)"
    )
    parser.add_argument("--ratio", choices=RATIOS, default=RATIOS[0], help=f"{RATIO_HELP} (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Does it."""
    ids = None if args.probe_ids is None else probe_of_ids(args.probe_ids)
    texts = None if args.probe_text is None else read_texts(args.probe_text)

    from ma_monitor.config import MonitorConfig
    from ma_monitor.replay.sources import open_source

    config = MonitorConfig(ratio=args.ratio, batch_size=args.batch_size)
    source = open_source(args.source, args.revisions)
    with _one_bar():
        probe = ids or probe_of_texts(source, texts, args.probe_text)
        result = _replay(source, probe, config, args)
    for problem in result.problems:
        note(f"ma-monitor: {problem}")
    if args.json:
        emit_json(
            {
                "run": str(result.run),
                "model": source.name,
                "measured": list(result.measured),
                "skipped": list(result.skipped),
                "problems": list(result.problems),
            }
        )
        return 0
    held = f", {len(result.skipped)} measured before" if result.skipped else ""
    problems = f", {count(len(result.problems), 'problem')}" if result.problems else ""
    say(f"{result.run}: {count(len(result.measured), 'checkpoint')} of {source.name} measured{held}{problems}")
    say(f"next: ma-monitor fit {result.run}")
    return 0


def probe_of_ids(path: str) -> Probe:
    """The probe of a ``.npy`` file of token ids.

    Raises:
        ConfigError: If the file cannot be read or holds something else.
    """
    import numpy as np

    from ma_monitor.measure.probe import Probe

    rule = "token ids must be one array [sequences, tokens] of whole numbers, saved by np.save"
    with user_file(path, rule) as file:
        ids = np.load(file, allow_pickle=False)
    if not isinstance(ids, np.ndarray):
        raise ConfigError(f"{path}: {rule}, and this is an archive of several arrays")
    return Probe.from_ids(ids, source=file.name)


def read_texts(path: str) -> list[str]:
    """The documents of a text file, one a line, empty lines left out.

    Raises:
        ConfigError: If the file cannot be read or holds no text.
    """
    with user_file(path, "a probe's text must be UTF-8, a document a line") as file:
        texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ConfigError(f"{path}: a probe needs text, a document a line, and this file is empty")
    return texts


def probe_of_texts(source: Source, texts: list[str] | None, path: str | None) -> Probe:
    """A probe in the source's own tokens, no longer than its model's context.

    Args:
        source: Whose tokenizer and context count.
        texts: Documents; None for the built-in passages.
        path: Where the documents came from.

    Raises:
        ConfigError: If the texts are too short.
        SourceError: If the source has no tokenizer that can be read.
    """
    import tempfile
    from pathlib import Path

    from transformers import AutoTokenizer

    from ma_monitor.measure.layers import context_length
    from ma_monitor.measure.probe import LENGTH, Probe
    from ma_monitor.replay.models import blank_model

    with tempfile.TemporaryDirectory(prefix="ma_monitor-") as scratch:
        with source.open_record(Path(scratch)) as folder:
            length = min(LENGTH, context_length(blank_model(folder)) or LENGTH)
        with source.open_tokenizer(Path(scratch)) as folder:
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:  # every kind of tokenizer fails in its own way
                raise SourceError(
                    f"the tokenizer of {source.name} cannot be read ({type(error).__name__}: {error}); give --probe-ids"
                ) from error
    if texts is None or path is None:
        return Probe.builtin(tokenizer, length=length)
    return Probe.from_texts(texts, tokenizer, length=length, source=Path(path).name)


@contextmanager
def _one_bar() -> Iterator[None]:
    """Keeps transformers and the Hub's client from drawing a progress bar for each checkpoint beside ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _replay(source: Source, probe: Probe, config: MonitorConfig, args: argparse.Namespace) -> ReplayResult:
    """Replays under a progress bar."""
    from tqdm import tqdm

    from ma_monitor.replay.runner import replay

    with tqdm(total=len(source.checkpoints), unit="checkpoint", disable=None) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(printable(name))

        return replay(source, probe, config, args.out, dtype=args.dtype, device=args.device, progress=progress)
