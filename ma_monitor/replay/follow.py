"""A folder of checkpoints that a training, perhaps on another machine, is still writing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from ma_monitor.errors import SourceError
from ma_monitor.monitor import Observer
from ma_monitor.replay.runner import ReplayResult
from ma_monitor.replay.sources import Checkpoint, FolderSource, complete_ones, step_of
from ma_monitor.runs.store import META, Run

POLL = 10.0
"""Seconds between two looks at the folder."""

Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of each file of a checkpoint."""


def follow(
    root: Path, out: Path, measure: Callable[[FolderSource], ReplayResult], *, until: int | None = None
) -> ReplayResult:
    """Measures checkpoints as they are completed, until the training has ended or an interrupt comes (Ctrl-C).

    A checkpoint is taken for complete when nothing is missing from it and no file of it changed between two looks. One
    that could not be measured is tried again when it changes.

    Args:
        root: Where checkpoints appear.
        out: The run's directory.
        measure: Replays what a source holds into it.
        until: End once this step or a later one was dealt with; None ends with the checkpoint whose
            ``trainer_state.json`` says that the training is done.

    Returns:
        What was done in all.

    Raises:
        SourceError: If nothing was measured.
    """
    held = _steps(out)
    before: dict[Checkpoint, Stamp] = {}
    tried: dict[Checkpoint, Stamp] = {}
    problems: tuple[str, ...] = ()
    try:
        while True:
            now = _look(root)
            settled = {c: root / c.name for c, stamp in now.items() if before.get(c) == stamp}
            source = complete_ones(root.name, settled)
            if any(tried.get(checkpoint) != now[checkpoint] for checkpoint in source.checkpoints):
                tried |= {checkpoint: now[checkpoint] for checkpoint in source.checkpoints}
                problems = measure(source).problems
            if any(_last(root / c.name, c.step, until) for c in source.checkpoints):
                break
            before = now
            time.sleep(POLL)
    except KeyboardInterrupt:
        left = complete_ones(root.name, {checkpoint: root / checkpoint.name for checkpoint in _look(root)})
        problems = tuple(dict.fromkeys((*problems, *left.problems)))
        if (out / META).is_file():
            with closing(Observer(Run.open(out, writable=True))) as observer:
                observer.finish()
    steps = _steps(out)
    if not steps:
        raise SourceError(f"no checkpoint of {root} was measured: {'; '.join(problems) or 'none was complete'}")
    return ReplayResult(out, tuple(s for s in steps if s not in held), tuple(s for s in steps if s in held), problems)


def _steps(out: Path) -> tuple[int, ...]:
    return tuple(int(step) for step in Run.open(out).steps) if (out / META).is_file() else ()


def _look(root: Path) -> dict[Checkpoint, Stamp]:
    """The checkpoints in a folder, whole or not, and the state of their files."""
    found = {}
    for folder in root.iterdir():
        step = step_of(folder.name)
        if step is not None and folder.is_dir():
            found[Checkpoint(step, folder.name)] = _stamp(folder)
    return found


def _stamp(folder: Path) -> Stamp:
    try:
        files = [(file.relative_to(folder).as_posix(), file.stat()) for file in sorted(folder.rglob("*"))]
    except OSError:  # renamed or deleted meanwhile
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def _last(folder: Path, step: int, until: int | None) -> bool:
    """Whether no later checkpoint is waited for."""
    if until is not None:
        return step >= until
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return bool(state["global_step"] >= state["max_steps"] > 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False
