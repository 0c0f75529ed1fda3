"""A folder of checkpoints that a training, perhaps on another machine, is still writing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ma_monitor.errors import SourceError
from ma_monitor.replay.held import finish, held_steps
from ma_monitor.replay.runner import ReplayResult
from ma_monitor.replay.sources import Checkpoint, FolderSource, complete_ones, step_of
from ma_monitor.runs.files import parse_json, read_bounded

LOGGER = logging.getLogger("ma_monitor")
POLL = 10.0
"""Seconds between two looks at the folder."""

Look = dict[Checkpoint, tuple[tuple[str, int, int], ...]]
"""The checkpoints in a folder, whole or not: name, size and time of change of each file."""


def follow(root: Path, out: Path, measure: Callable[[FolderSource], ReplayResult]) -> ReplayResult:
    """Measures checkpoints as they are completed, until the training has ended or an interrupt comes (Ctrl-C).

    A checkpoint is taken for complete when nothing is missing from it and no file of it changed between two looks. One
    that could not be measured is tried again when it changes. The training has ended when the ``trainer_state.json``
    of a checkpoint says so. A folder that cannot be read is warned about once and waited for.

    Args:
        root: Where checkpoints appear.
        out: The run's directory.
        measure: Replays what a source holds into it.

    Returns:
        What was done in all.

    Raises:
        SourceError: If nothing was, or nothing of the first that are whole can be, measured.
    """
    held = held_steps(out)
    tried: Look = {}
    problems: tuple[str, ...] = ()
    try:
        for settled in _settled(root):
            if any(tried.get(checkpoint) != stamp for checkpoint, stamp in settled.items()):
                tried = settled
                try:
                    source = complete_ones(root.name, {c: root / c.name for c in settled})
                except SourceError as error:  # none is whole yet
                    problems = (str(error),)
                else:
                    problems = measure(source).problems
            if any(_ended(root / checkpoint.name) for checkpoint in settled):
                break
    except KeyboardInterrupt:
        if held_steps(out):
            finish(out)
    steps = held_steps(out)
    if not steps:
        raise SourceError(f"no checkpoint of {root} was measured: {'; '.join(problems) or 'none was complete'}")
    return ReplayResult(out, tuple(step for step in steps if step not in held), held, problems)


def _settled(root: Path) -> Iterator[Look]:
    """Look after look at a folder: the checkpoints that have not changed since the one before."""
    before: Look = {}
    warned = False
    while True:
        try:
            now = _look(root)
        except OSError as error:  # of a network's file system, which comes back
            if not warned:
                LOGGER.warning("%s: cannot be read (%s); waiting until it can", root, error.strerror or error)
            warned = True
        else:
            yield {checkpoint: files for checkpoint, files in now.items() if before.get(checkpoint) == files}
            before = now
        time.sleep(POLL)


def _look(root: Path) -> Look:
    look: Look = {}
    for folder in root.iterdir():
        step = step_of(folder.name)
        if step is None or not folder.is_dir():
            continue
        with suppress(OSError):  # renamed or deleted meanwhile, or not to be read
            found = [(file.relative_to(folder).as_posix(), file.stat()) for file in sorted(folder.rglob("*"))]
            look[Checkpoint(step, folder.name)] = tuple((name, s.st_size, s.st_mtime_ns) for name, s in found)
    return look


def _ended(folder: Path) -> bool:
    """Whether a checkpoint is a training's last."""
    try:
        state = parse_json(read_bounded(folder / "trainer_state.json"))
        return bool(state["global_step"] >= state["max_steps"] > 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False
