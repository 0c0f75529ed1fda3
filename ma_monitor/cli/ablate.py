"""``ma-monitor ablate``: what a checkpoint's massive activations do to its loss and to its quantisation."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.cli.common import (
    Commands,
    add_command,
    emit_json,
    note,
    open_run,
    positive,
    say,
    table,
    user_documents,
    user_ids,
)
from ma_monitor.errors import ConfigError, SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ma_monitor.replay.sources import Checkpoint, Source
    from ma_monitor.runs.records import ModelShape


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "ablate",
        run,
        help="find out what a checkpoint's massive activations do",
        text=(
            "Loss of a text with the massive entries set to zero, to their mean or to half, with the feed-forward of\n"
            "each layer softened at the massive token, and without each candidate for a super weight: each against a\n"
            "control of its own, with 95 % intervals over documents. Then the error of 8 and 4 bit quantisation of\n"
            "every layer's output with and without massive entries, after a Hadamard and an orthogonal rotation.\n"
            "The checkpoint is not changed."
        ),
        example="ma-monitor ablate checkpoints/checkpoint-3000 --text held-out.txt --run runs/a",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a causal language model, or a Hub id")
    parser.add_argument("--revision", default="main", metavar="NAME", help="of a Hub id (default: %(default)s)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="held-out documents, one a line (default: built-in passages)")
    text.add_argument("--ids", metavar="FILE.npy", help="their token ids instead, whole numbers [documents, tokens]")
    massive = parser.add_mutually_exclusive_group()
    massive.add_argument(
        "--top", type=positive, default=3, metavar="K", help="the K largest entries of a layer count (default: 3)"
    )
    massive.add_argument(
        "--threshold", type=times, metavar="RATIO", help="those of at least RATIO times the layer's median count"
    )
    parser.add_argument("--dtype", default="auto", help="of weights and arithmetic (default: as for replay)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument(
        "--run", dest="run_dir", metavar="RUN", help="keep the result in this run, whose report shows it then"
    )


def times(text: str) -> float:
    """A finite number above 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a ratio to the median above 1, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.report.ablation import lines, tables
    from ma_monitor.runs.documents import write_document

    target = None if args.run_dir is None else open_run(args.run_dir)
    document = ablated(args, None if target is None else target.meta.model)
    for problem in document["problems"]:
        note(f"ma-monitor: {problem}")
    if target is not None:
        write_document(target.path, "ablation", document)
    if args.json:
        emit_json(document)
        return 0
    say("\n".join(lines(document)))
    for one in tables(document):
        rows = [[words for _, words in row] for row in one.cells]
        say(f"\n{one.title}\n{one.note}\n\n{table(one.columns, rows)}")
    if target is not None:
        say(f"\nnext: ma-monitor report {target.path}")
    return 0


def ablated(args: argparse.Namespace, shape: ModelShape | None) -> dict[str, Any]:
    """Loads the checkpoint, and ablates it.

    Args:
        args: The command line.
        shape: Of the run that keeps the result; None where none does.
    """
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from ma_monitor.ablation.experiment import ablate
    from ma_monitor.ablation.interventions import Rule
    from ma_monitor.measure.layers import context_length, describe_model
    from ma_monitor.measure.probe import Probe
    from ma_monitor.replay.models import ModelLoader, checked_device, checked_dtype

    disable_progress_bar()
    documents_of = _documents_of(args)
    loader = ModelLoader(checked_dtype(args.dtype), checked_device(args.device))
    source, checkpoint = source_of(args.checkpoint, args.revision)
    with tempfile.TemporaryDirectory(prefix="ma_monitor-") as scratch:
        folder = source.fetch(checkpoint, Path(scratch))
        model = loader.load(folder)
        check_head(model, folder, source.name)
        documents = documents_of(source)
    for ids in documents:
        Probe.from_ids(ids[None]).check(describe_model(model).vocabulary, context_length(model))
    if shape is not None and loader.shape is not None:
        check_shape(shape, loader.shape, args.run_dir)
    with tqdm(total=len(documents), unit="document", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)

        document = ablate(model, documents, Rule(args.top, args.threshold), progress=progress)
    name = checkpoint.name if Path(args.checkpoint).exists() else f"{source.name}@{checkpoint.name}"
    return {"checkpoint": name, "text": Path(args.text or args.ids or "built-in passages").name, **document}


def _documents_of(args: argparse.Namespace) -> Callable[[Source], Sequence[NDArray[np.int64]]]:
    """What gives the documents in a source's tokens; files are read at once, before any model is loaded."""
    from ma_monitor.measure.probe import Probe
    from ma_monitor.replay.probes import text_documents

    if args.ids is not None:
        given = Probe.from_ids(user_ids(args.ids, "documents, tokens"))
        return lambda source: list(given.ids)
    texts = None if args.text is None else user_documents(args.text, "held-out text")
    return lambda source: text_documents(source, texts)


def source_of(text: str, revision: str) -> tuple[Source, Checkpoint]:
    """The one checkpoint that a user means: a folder's, else a revision's of a model on the Hub.

    Raises:
        ConfigError: If a revision of a folder is asked for.
        SourceError: If there is no whole checkpoint of that name.
    """
    from ma_monitor.replay.hub import HubSource
    from ma_monitor.replay.sources import REPOSITORY, Checkpoint, FolderSource, check_whole, step_of

    path = Path(text).expanduser()
    if path.exists():
        if revision != "main":
            raise ConfigError(f"--revision is of a model on the Hub, and {text!r} is on this machine")
        if not path.is_dir():
            raise SourceError(f"a checkpoint must be a folder with config.json and weights, and {text!r} is a file")
        path = path.resolve()
        try:
            check_whole(path)
        except SourceError as error:
            raise SourceError(f"{text}: {error}") from error
        checkpoint = Checkpoint(step_of(path.name) or 0, path.name)
        return FolderSource(path.name, {checkpoint: path}, ()), checkpoint
    if not REPOSITORY.fullmatch(text):
        raise SourceError(f"a checkpoint must be an existing folder or a Hub id, and {text!r} is neither")
    checkpoint = Checkpoint(step_of(revision) or 0, revision)
    return HubSource(text, (checkpoint,), ()), checkpoint


def check_head(model: Any, folder: Path, name: str) -> None:
    """Refuses a checkpoint without the weights that its logits need: the loader leaves a head at random values.

    Raises:
        SourceError: If they are not there.
    """
    from ma_monitor.ablation.losses import scores_head
    from ma_monitor.replay.weights import stored_tensors

    with stored_tensors(folder) as stored:
        if not scores_head(model, stored):
            raise SourceError(f"a loss needs a language model's head, and the weights of {name} hold none")


def check_shape(run: ModelShape, model: ModelShape, path: str) -> None:
    """Refuses to keep a result in a run of another model.

    Raises:
        ConfigError: If layers or width differ.
    """
    if (run.layers, run.width or model.width) != (model.layers, model.width):
        raise ConfigError(
            f"--run keeps a result with the run of the same model; {path} has {run.layers} layers of width "
            f"{run.width}, the checkpoint {model.layers} of {model.width}"
        )
