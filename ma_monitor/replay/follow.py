"""A folder of checkpoints that a training, perhaps on another machine, is still writing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ma_monitor.errors import SourceError
from ma_monitor.replay.runner import ReplayResult, finish, held_steps
from ma_monitor.replay.sources import Checkpoint, FolderSource, complete_ones, step_of

POLL = 10.0
"""Seconds between two looks at the folder."""

Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of each file of a checkpoint."""


def follow(root: Path, out: Path, measure: Callable[[FolderSource], ReplayResult]) -> ReplayResult:
    """Measures checkpoints as they are completed, until the training has ended or an interrupt comes (Ctrl-C).

    A checkpoint is taken for complete when nothing is missing from it and no file of it changed between two looks. One
    that could not be measured is tried again when it changes. The training has ended when the ``trainer_state.json``
    of a checkpoint says so.

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
    before: dict[Checkpoint, Stamp] = {}
    tried: dict[Checkpoint, Stamp] = {}
    problems: tuple[str, ...] = ()
    try:
        while True:
            now = _look(root)
            settled = {checkpoint: stamp for checkpoint, stamp in now.items() if before.get(checkpoint) == stamp}
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
            before = now
            time.sleep(POLL)
    except KeyboardInterrupt:
        if held_steps(out):
            finish(out)
    steps = held_steps(out)
    if not steps:
        raise SourceError(f"no checkpoint of {root} was measured: {'; '.join(problems) or 'none was complete'}")
    return ReplayResult(out, tuple(step for step in steps if step not in held), held, problems)


def _look(root: Path) -> dict[Checkpoint, Stamp]:
    """The checkpoints in a folder, whole or not, and the state of their files."""
    steps = {folder: step_of(folder.name) for folder in root.iterdir() if folder.is_dir()}
    return {Checkpoint(step, folder.name): _stamp(folder) for folder, step in steps.items() if step is not None}


def _stamp(folder: Path) -> Stamp:
    try:
        files = [(file.relative_to(folder).as_posix(), file.stat()) for file in sorted(folder.rglob("*"))]
    except OSError:  # renamed or deleted meanwhile
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def _ended(folder: Path) -> bool:
    """Whether a checkpoint is a training's last."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return bool(state["global_step"] >= state["max_steps"] > 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False
