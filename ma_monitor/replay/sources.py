"""Where checkpoints come from: a folder of checkpoints, a list of folders, or the revisions of a model on the Hub.

A source says which checkpoints there are, in step order, what it had to leave out and why, and lends a local folder for
one checkpoint at a time. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ma_monitor.errors import SourceError

STEP_NAME = re.compile(r"(?P<prefix>.*[-_])?(?:checkpoint-|step[-_]?)(?P<step>\d+)(?:-tokens\d+[KMBT])?")
UNFINISHED = "tmp-"
"""How the name of a checkpoint begins that a Trainer is still writing, or died over."""
TOKENIZER_FILES = re.compile(r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..+|merges\.txt")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
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

    def size(self, checkpoint: Checkpoint) -> int:
        """Bytes of its weights.

        Raises:
            SourceError: If that cannot be known.
        """

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


def open_source(text: str, revisions: str = "all", *, keep: Path | None = None) -> Source:
    """The source that a user means: a folder or a file of that name if there is one, else a model on the Hub.

    Args:
        text: Path of a folder of checkpoints or of a list of them, or a Hub id such as ``EleutherAI/pythia-14m``.
        revisions: For a Hub id only: as `ma_monitor.replay.hub.hub_source` takes them.
        keep: For a Hub id only: where downloads stay; None deletes each after use.

    Raises:
        SourceError: If there is nothing of that name, or nothing in it that can be measured.
    """
    from ma_monitor.replay.hub import hub_source

    path = Path(text).expanduser()
    if path.is_dir():
        return folder_source(path)
    if path.is_file():
        return list_source(path)
    if not REPOSITORY.fullmatch(text):
        raise SourceError(
            f"a source must be an existing folder or a Hub id such as EleutherAI/pythia-14m, or a file that lists "
            f"folders, and {text!r} is none of them"
        )
    return hub_source(text, revisions, keep=keep)


@dataclass(frozen=True)
class FolderSource:
    """Checkpoints in folders of this machine; nothing is copied, nothing deleted."""

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

    @contextmanager
    def open(self, checkpoint: Checkpoint, scratch: Path) -> Iterator[Path]:
        """Lends the checkpoint's own folder."""
        yield self.folders[checkpoint]

    def open_record(self, scratch: Path) -> AbstractContextManager[Path]:
        """Lends the last checkpoint's folder."""
        return self.open(self.checkpoints[-1], scratch)

    @contextmanager
    def open_tokenizer(self, scratch: Path) -> Iterator[Path]:
        """Lends the last checkpoint's folder if it holds a tokenizer, else the folder around it.

        Raises:
            SourceError: If neither holds one.
        """
        last = self.folders[self.checkpoints[-1]]
        for folder in (last, last.parent):
            if any(TOKENIZER_FILES.fullmatch(file.name) for file in folder.iterdir()):
                yield folder
                return
        raise SourceError(
            f"a probe of text needs the model's tokenizer, and {last.parent} holds none; "
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
    found = {Checkpoint(step, path.name): path for path in folders if (step := step_of(path.name)) is not None}
    source = complete_ones(root.name, found)
    if not source.folders:
        details = "".join(f"; {problem}" for problem in source.problems)
        raise SourceError(
            f"a folder of checkpoints must hold checkpoint-<step> or step<step> folders with config.json and weights, "
            f"and {root} holds none{details}"
        )
    return source


def list_source(file: Path) -> FolderSource:
    """The checkpoints that a text file lists.

    Args:
        file: A folder a line, relative to the file's own; the step stands before it where its name does not tell it
            (``1000 exports/early``). Empty lines and those that begin with # are left out.

    Raises:
        SourceError: If the file cannot be read as text, or lists no complete checkpoint.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: a list of checkpoints must be UTF-8 text, a folder a line ({error})") from error
    found: dict[Checkpoint, Path] = {}
    problems = []
    for line in lines:
        if not line or line.startswith("#"):
            continue
        number, _, rest = line.partition(" ")
        step, name = (int(number), rest.strip()) if number.isdecimal() and rest else (step_of(Path(line).name), line)
        if step is None:
            problems.append(f"{name} left out: its name does not tell a step; write the step before it")
        else:
            found[Checkpoint(step, name)] = file.parent / Path(name).expanduser()
    source = complete_ones(file.stem, found, problems)
    if not source.folders:
        raise SourceError(f"{file} lists no complete checkpoint{''.join(f'; {p}' for p in source.problems)}")
    return source


def complete_ones(name: str, found: Mapping[Checkpoint, Path], problems: Iterable[str] = ()) -> FolderSource:
    """A source of the folders that hold a whole checkpoint; the others are named among its problems."""
    left_out = list(problems)
    whole = []
    for checkpoint, folder in found.items():
        try:
            check_whole(folder)
            whole.append(checkpoint)
        except SourceError as error:
            left_out.append(f"{checkpoint.name} left out: {error}")
    kept = one_per_step(whole, left_out)
    return FolderSource(name, {checkpoint: found[checkpoint] for checkpoint in kept}, tuple(sorted(left_out)))


def check_whole(folder: Path) -> None:
    """Refuses a folder that lacks a part of a checkpoint.

    Raises:
        SourceError: If something is not there.
    """
    if folder.name.startswith(UNFINISHED):
        raise SourceError(f"half written, its name begins with {UNFINISHED}")
    if not folder.is_dir():
        raise SourceError("there is no such folder")
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
        names = sorted({str(n) for n in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"half written, {index.name} cannot be read") from error
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise SourceError(f"half written, there is no {', '.join(absent)}")
    return [index.parent / name for name in names]


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
