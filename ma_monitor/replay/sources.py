"""Where checkpoints come from: a folder of checkpoints, a list of folders, or the revisions of a model on the Hub.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ma_monitor.errors import SourceError, redacted
from ma_monitor.runs.files import parse_json, read_bounded

STEP_NAME = re.compile(r"(?:.*[-_])?(?:checkpoint-|step[-_]?)(?P<step>\d+)(?:-tokens\d+[KMBT])?")
UNFINISHED = "tmp-"
"""How the name of a checkpoint begins that a Trainer is still writing, or died over."""
TOKENIZER_FILES = re.compile(r"tokenizer[^/]*|special_tokens_map\.json|added_tokens\.json|vocab\.[^/]+|merges\.txt")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

Part = Literal["model", "record", "tokenizer"]
"""Of a checkpoint: configuration and weights; what it tells of itself (``config.json`` and, where they are kept,
``trainer_state.json`` and ``ma_monitor/``); the tokenizer."""


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

    def size(self, checkpoint: Checkpoint) -> int:
        """Bytes of its weights."""

    def fetch(self, checkpoint: Checkpoint, into: Path, part: Part = "model") -> Path:
        """A folder that holds a part of a checkpoint; what is not on this machine is downloaded ``into`` a folder.

        Raises:
            SourceError: If it cannot be had.
        """


def step_of(name: str) -> int | None:
    """Step that the name of a folder or revision tells (``checkpoint-500``, ``step1000``, ``step500-tokens2B``)."""
    match = STEP_NAME.fullmatch(name)
    return int(match["step"]) if match else None


def open_source(text: str, revisions: str = "all", *, keep: Path | None = None) -> Source:
    """The source that a user means: a folder or a file of that name if there is one, else a model on the Hub.

    Args:
        text: Path of a folder of checkpoints or of a list of them, or a Hub id such as ``EleutherAI/pythia-14m``.
        revisions: For a Hub id only: as `ma_monitor.replay.hub.hub_source` takes them.
        keep: For a Hub id only: where downloads stay; None deletes each after use.

    Raises:
        SourceError: If there is nothing of that name, or nothing in it that can be measured, or it is on this machine
            and revisions are asked for.
    """
    from ma_monitor.replay.hub import hub_source

    path = Path(os.path.expanduser(text))  # Path's own raises where there is no such user
    if path.exists() and revisions != "all":
        raise SourceError(
            f"revisions are of a model on the Hub, and {text!r} is on this machine; list folders in a file"
        )
    if path.is_dir():
        return folder_source(path)
    if path.is_file():
        return list_source(path)
    if not REPOSITORY.fullmatch(text):
        raise SourceError(
            f"a source must be an existing folder or a Hub id such as EleutherAI/pythia-14m, or a file that lists "
            f"folders, and {redacted(text)!r} is none of them"
        )
    return hub_source(text, revisions, keep=keep)


@dataclass(frozen=True)
class FolderSource:
    """Checkpoints in folders of this machine; nothing is copied."""

    name: str
    folders: Mapping[Checkpoint, Path]
    problems: tuple[str, ...]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """What can be measured, in step order."""
        return tuple(self.folders)

    def size(self, checkpoint: Checkpoint) -> int:
        """Bytes of the checkpoint's weights."""
        return sum(file.stat().st_size for file in weight_files(self.folders[checkpoint]))

    def fetch(self, checkpoint: Checkpoint, into: Path, part: Part = "model") -> Path:
        """The checkpoint's own folder; for the tokenizer the folder around it where it holds none.

        Raises:
            SourceError: If a tokenizer is asked for and neither holds one.
        """
        own = self.folders[checkpoint]
        for folder in (own, own.parent):
            if part != "tokenizer" or any(TOKENIZER_FILES.fullmatch(file.name) for file in folder.iterdir()):
                return folder
        raise SourceError(
            f"a probe of text needs the model's tokenizer, and {own.parent} holds none; "
            "give token ids, or put tokenizer.json into the folder"
        )


def folder_source(root: Path) -> FolderSource:
    """The checkpoints in a folder, or the folder itself where it is one; half-written ones are left out and named.

    Raises:
        SourceError: If no complete checkpoint is found.
    """
    root = root.resolve()
    if (root / "config.json").is_file() and step_of(root.name) is not None:
        folders, root = [root], root.parent
    else:
        folders = [path for path in root.iterdir() if path.is_dir()]
    found = {Checkpoint(step, path.name): path for path in folders if (step := step_of(path.name)) is not None}
    return complete_ones(root.name, found)


def list_source(file: Path) -> FolderSource:
    """The checkpoints that a text file lists.

    Args:
        file: A folder a line, relative to the file's own; the step stands before it where its name does not tell it
            (``1000 exports/early``).

    Raises:
        SourceError: If the file cannot be read as text, or lists no complete checkpoint.
    """
    try:
        lines = [line.strip() for line in read_bounded(file).decode().replace("\0", "").splitlines()]
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: a list of checkpoints must be UTF-8 text, a folder a line ({error})") from error
    found: dict[Checkpoint, Path] = {}
    problems = []
    for line in filter(None, lines):
        number, _, rest = line.partition(" ")
        step, name = (int(number), rest.strip()) if number.isdecimal() and rest else (step_of(Path(line).name), line)
        if step is None:
            problems.append(f"{name} left out: its name does not tell a step; write the step before it")
        else:
            found[Checkpoint(step, name)] = file.parent / os.path.expanduser(name)
    return complete_ones(file.stem, found, problems)


def complete_ones(name: str, found: Mapping[Checkpoint, Path], problems: Iterable[str] = ()) -> FolderSource:
    """A source of the folders that hold a whole checkpoint; the others are named among its problems.

    Raises:
        SourceError: If there is none.
    """
    left_out = list(problems)
    whole = []
    for checkpoint, folder in found.items():
        try:
            check_whole(folder)
            whole.append(checkpoint)
        except (SourceError, OSError) as error:
            left_out.append(f"{checkpoint.name} left out: {error}")
    kept = one_per_step(whole, left_out)
    if not kept:
        raise SourceError(
            f"a source must hold checkpoint-<step> or step<step> folders with config.json and weights, and "
            f"{'; '.join([f'{name} holds none', *left_out[:3]])}"
        )
    return FolderSource(name, {checkpoint: found[checkpoint] for checkpoint in kept}, tuple(sorted(left_out)))


def check_whole(folder: Path) -> None:
    """Refuses a folder that is no whole checkpoint.

    Raises:
        SourceError: If something is not there.
    """
    if folder.name.startswith(UNFINISHED):
        raise SourceError(f"half written, its name begins with {UNFINISHED}")
    if not (folder / "config.json").is_file():
        raise SourceError("half written, there is no config.json")
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights; safetensors go before pickled ones.

    Raises:
        SourceError: If there are none, or an index cannot be read or names what is not there.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    raise SourceError(f"half written, there is no {' or '.join(WEIGHTS)}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(n) for n in parse_json(read_bounded(index))["weight_map"].values()})
        absent = [name for name in names if not (index.parent / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"half written, {index.name} cannot be read") from error
    if outside := [name for name in names if Path(name).name != name or name == ".."]:
        raise SourceError(f"{index.name} may only name files beside it, and names {outside[0][:80]!r}")
    if absent:
        raise SourceError(f"half written, there is no {', '.join(absent)}")
    return [index.parent / name for name in names]


def one_per_step(found: Iterable[Checkpoint], problems: list[str]) -> tuple[Checkpoint, ...]:
    """Checkpoints in step order; of several with one step that of the shortest name, the others being named."""
    kept: dict[int, Checkpoint] = {}
    for checkpoint in sorted(set(found), key=lambda c: (c.step, len(c.name), c.name)):
        first = kept.setdefault(checkpoint.step, checkpoint)
        if first is not checkpoint:
            problems.append(f"{checkpoint.name} left out: {first.name} is of the same step")
    return tuple(kept.values())
