"""What a replay would do: which checkpoints, how many bytes, and how long if the run tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ma_monitor.errors import SourceError
from ma_monitor.replay.held import PACE, REPLAYED
from ma_monitor.replay.sources import Checkpoint, Source
from ma_monitor.runs.documents import META
from ma_monitor.runs.store import Run

TOLD = re.compile(rf"([\d.]+) {PACE} \(\d+\)")
"""How a run tells its pace; whatever else stands there, from another version, tells none."""


@dataclass(frozen=True)
class ReplayPlan:
    """What is still to be measured.

    Attributes:
        pending: Checkpoints in step order, and bytes of the weights of each; None where that cannot be known.
        held: Steps that the run holds.
        seconds: What it may take, by the pace of the run's last replay; None where there is none.
        problems: What is left out and why, a sentence each.
    """

    pending: tuple[tuple[Checkpoint, int | None], ...]
    held: tuple[int, ...]
    seconds: float | None
    problems: tuple[str, ...]


def plan_replay(source: Source, out: Path, checkpoints: Sequence[Checkpoint], *, force: bool = False) -> ReplayPlan:
    """Plans a `replay` of these checkpoints; asks the source for their sizes, downloads nothing and writes nothing."""
    run = Run.open(out) if (out / META).is_file() else None
    held = () if force or run is None else tuple(run.steps.tolist())
    pending: list[tuple[Checkpoint, int | None]] = []
    problems = list(source.problems)
    for checkpoint in checkpoints:
        if checkpoint.step not in held:
            size = None
            try:
                size = source.size(checkpoint)
            except SourceError as error:
                problems.append(f"{checkpoint.name}: {error}")
            pending.append((checkpoint, size))
    told = [TOLD.fullmatch(event.message) for event in (run.events if run else ()) if event.kind == REPLAYED]
    paces = [float(match[1]) for match in told if match]
    return ReplayPlan(tuple(pending), held, paces[-1] * len(pending) if paces else None, tuple(problems))
