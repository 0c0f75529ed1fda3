"""What a replay would do: which checkpoints, how many bytes, and how long if the run tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ma_monitor.errors import SourceError
from ma_monitor.replay.sources import Checkpoint, Source
from ma_monitor.runs.store import META, Run

REPLAYED = re.compile(r"(?P<count>[1-9]\d*) in (?P<seconds>[\d.]+) s")
"""What a replay notes in the run's diary, as the event ``replayed``."""


@dataclass(frozen=True)
class ReplayPlan:
    """What is still to be measured.

    Attributes:
        pending: Checkpoints in step order.
        sizes: Bytes of the weights of each; None where that cannot be known.
        held: Steps that the run holds.
        seconds: What it may take, by the pace of the run's last replay; None where there is none.
        problems: What is left out and why, a sentence each.
    """

    pending: tuple[Checkpoint, ...]
    sizes: tuple[int | None, ...]
    held: tuple[int, ...]
    seconds: float | None
    problems: tuple[str, ...]


def plan_replay(source: Source, out: Path, checkpoints: Sequence[Checkpoint], *, anew: bool = False) -> ReplayPlan:
    """Plans a replay of these checkpoints; asks the source for their sizes, downloads nothing and writes nothing.

    Args:
        source: Where they are.
        out: The run's directory; it need not be there.
        checkpoints: What is asked for.
        anew: Whether what the run holds is to be measured again.
    """
    run = Run.open(out) if (out / META).is_file() else None
    held = () if run is None or anew else tuple(int(step) for step in run.steps)
    pending = tuple(checkpoint for checkpoint in checkpoints if checkpoint.step not in held)
    sizes: list[int | None] = []
    problems = list(source.problems)
    for checkpoint in pending:
        try:
            sizes.append(source.size(checkpoint))
        except SourceError as error:
            sizes.append(None)
            problems.append(f"{checkpoint.name}: {error}")
    paces = [] if run is None else [REPLAYED.fullmatch(e.message) for e in run.events if e.kind == "replayed"]
    pace = next((float(match["seconds"]) / int(match["count"]) for match in reversed(paces) if match), None)
    seconds = None if pace is None else pace * len(pending)
    return ReplayPlan(pending, tuple(sizes), held, seconds, tuple(problems))
