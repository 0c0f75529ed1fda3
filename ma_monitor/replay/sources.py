"""Where checkpoints come from: a folder of checkpoints, or the revisions of a model on the Hub.

A source says which checkpoints there are, in step order, what it had to leave out and why, and lends a local folder for
one checkpoint at a time. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ma_monitor.errors import SourceError

STEP_NAME = re.compile(r"(?P<prefix>.*[-_])?(?:checkpoint-|step[-_]?)(?P<step>\d+)(?:-tokens\d+[KMBT])?")
UNFINISHED = "tmp-"
"""How the name of a checkpoint begins that a Trainer is still writing, or died over."""
TOKENIZER_FILES = re.compile(r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..+|merges\.txt")
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """One saved state of a training: optimizer updates done, and the folder's or revision's name."""

    step: int
    name: str


class Source(Protocol):
    """Checkpoints of one model."""

    @property
    def name(self) -> str:
        """What the model is called in the run."""

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """What can be measured, in step order, no step twice."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What was left out and why, a sentence each."""

    def open(self, checkpoint: Checkpoint, scratch: Path) -> AbstractContextManager[Path]:
        """Lends a folder that ``from_pretrained`` can read; ``scratch`` is where a source may put what it downloads."""

    def open_tokenizer(self, scratch: Path) -> AbstractContextManager[Path]:
        """Lends a folder with the tokenizer's files."""

    def open_record(self, scratch: Path) -> AbstractContextManager[Path]:
        """Lends a folder with what the last checkpoint tells of itself.

        That is ``config.json`` and, where they are kept, ``trainer_state.json`` and ``ma_monitor/``.
        """


def step_of(name: str) -> int | None:
    """Step that the name of a folder or revision tells (``checkpoint-500``, ``step1000``, ``step500-tokens2B``)."""
    match = STEP_NAME.fullmatch(name)
    return int(match["step"]) if match else None


def open_source(text: str, revisions: str = "all") -> Source:
    """The source that a user means: a folder if there is one of that name, else a model on the Hub.

    Args:
        text: Path of a folder of checkpoints, or a Hub id such as ``EleutherAI/pythia-14m``.
        revisions: For a Hub id only: ``all``, ``paper``, or names with commas between.

    Raises:
        SourceError: If there is neither, or nothing in it that can be measured.
    """
    from ma_monitor.replay.hub import hub_source

    if Path(text).expanduser().is_dir():
        return folder_source(Path(text).expanduser())
    if not REPOSITORY.fullmatch(text):
        raise SourceError(
            f"a source must be an existing folder or a Hub id such as EleutherAI/pythia-14m, and {text!r} is neither"
        )
    return hub_source(text, revisions)


@dataclass(frozen=True)
class FolderSource:
    """Checkpoints in the folders ``checkpoint-<step>`` or ``step<step>`` of one folder."""

    root: Path
    checkpoints: tuple[Checkpoint, ...]
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.name

    @contextmanager
    def open(self, checkpoint: Checkpoint, scratch: Path) -> Iterator[Path]:
        """Lends the checkpoint's own folder; nothing is copied."""
        yield self.root / checkpoint.name

    def open_record(self, scratch: Path) -> AbstractContextManager[Path]:
        """Lends the last checkpoint's folder."""
        return self.open(self.checkpoints[-1], scratch)

    @contextmanager
    def open_tokenizer(self, scratch: Path) -> Iterator[Path]:
        """Lends the last checkpoint's folder if it holds a tokenizer, else the folder of checkpoints.

        Raises:
            SourceError: If neither holds one.
        """
        for folder in (self.root / self.checkpoints[-1].name, self.root):
            if any(TOKENIZER_FILES.fullmatch(file.name) for file in folder.iterdir()):
                yield folder
                return
        raise SourceError(
            f"a probe of text needs the model's tokenizer, and {self.root} holds none; "
            "give token ids, or put tokenizer.json into the folder"
        )


def folder_source(root: Path) -> FolderSource:
    """The checkpoints in a folder, or the folder itself where it is one.

    Args:
        root: An existing folder. A checkpoint in it that is only half written is left out and named.

    Raises:
        SourceError: If no complete checkpoint is found.
    """
    root = root.resolve()
    if (root / "config.json").is_file() and step_of(root.name) is not None:
        folders, root = [root], root.parent
    else:
        folders = [path for path in root.iterdir() if path.is_dir()]
    found: list[Checkpoint] = []
    problems: list[str] = []
    for folder in folders:
        step = step_of(folder.name)
        if step is None:
            continue
        missing = _missing_from(folder)
        if missing:
            problems.append(f"{folder.name} left out: {missing}")
        else:
            found.append(Checkpoint(step, folder.name))
    checkpoints = one_per_step(found, problems)
    if not checkpoints:
        details = "".join(f"; {problem}" for problem in sorted(problems))
        raise SourceError(
            f"a folder of checkpoints must hold checkpoint-<step> or step<step> folders with config.json and weights, "
            f"and {root} holds none{details}"
        )
    return FolderSource(root, checkpoints, tuple(sorted(problems)))


def _missing_from(folder: Path) -> str | None:
    """What a checkpoint's folder lacks, None if it is whole."""
    if folder.name.startswith(UNFINISHED):
        return f"half written, its name begins with {UNFINISHED}"
    if not (folder / "config.json").is_file():
        return "half written, there is no config.json"
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (folder / kind).is_file():
            return None
        index = folder / f"{kind}.index.json"
        if index.is_file():
            return _missing_shards(index)
    return "half written, there is no model.safetensors or pytorch_model.bin"


def _missing_shards(index: Path) -> str | None:
    """What an index of shards names and the folder lacks, None if nothing."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"half written, {index.name} cannot be read"
    absent = [name for name in shards if not (index.parent / name).is_file()]
    return f"half written, there is no {', '.join(absent)}" if absent else None


def one_per_step(found: Iterable[Checkpoint], problems: list[str]) -> tuple[Checkpoint, ...]:
    """Checkpoints in step order.

    Of two with one step the one without a prefix is kept, else the first by name, and the other named.
    """
    kept: dict[int, Checkpoint] = {}
    for checkpoint in sorted(set(found), key=lambda c: (c.step, _prefixed(c.name), c.name)):
        first = kept.setdefault(checkpoint.step, checkpoint)
        if first is not checkpoint:
            problems.append(f"{checkpoint.name} left out: {first.name} is of the same step")
    return tuple(kept.values())


def _prefixed(name: str) -> bool:
    """Whether something stands before what tells the step, as in ``backup-checkpoint-10``."""
    match = STEP_NAME.fullmatch(name)
    return match is not None and match["prefix"] is not None
