"""Several runs of one training joined into the run that one process would have made."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from ma_monitor.errors import StoreError
from ma_monitor.runs.codec import encode_measurements
from ma_monitor.runs.documents import EVENTS, LOG, META, copy_given, remove_documents
from ma_monitor.runs.events import add_event, line_of
from ma_monitor.runs.files import replace_file, writing
from ma_monitor.runs.log import LogWriter
from ma_monitor.runs.meta import differences
from ma_monitor.runs.records import Measurements, Plan
from ma_monitor.runs.store import Run


def merge(paths: Sequence[str | Path], out: str | Path) -> int:
    """Joins runs that measured different steps of one training in the same way.

    Records are written in step order, each plan before the first step after it came into force, as a replay in one
    process writes them: metadata and measurements are that run's to the byte. The diaries are joined in the order of
    their times, what several of them hold once. Fits and forecast are left to the caller. The runs stay as they are;
    killed anywhere, the same call does it all again.

    Args:
        paths: The runs. What a metadata's free parts (names, versions) say is taken from the first.
        out: Directory of the joined run. A run that is there already is joined too, as the first.

    Returns:
        How many steps the joined run holds.

    Raises:
        StoreError: If one of them is no run or was measured in another way than the first, if two hold the same step
            with different numbers, or if ``out`` cannot be written.
    """
    out = Path(out)
    there = (out / META).is_file()
    runs = [Run.open(path) for path in ([out] if there else []) + [Path(path) for path in paths]]
    if not runs:
        raise StoreError(f"{out}: there is no run to join")
    measured = _joined(runs)
    plans = _plans(runs)
    diary = _diary(runs)
    if not there:  # an empty run is a run, wherever the rest is cut off
        Run.create(out, runs[0].meta, None).close()
    with ExitStack() as held:
        held.callback(LogWriter(out / LOG).close)  # keeps other writers off until the file is replaced
        with writing(out):
            for left in out.glob(".merge-*"):  # by a process that was killed
                shutil.rmtree(left)
            beside = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=".merge-", dir=out)))
        with Run.create(beside / "run", runs[0].meta, plans.pop(0) if plans else None) as joined:
            for step in sorted(measured):
                while plans and (plans[0].from_step < step or step == max(measured)):
                    joined.add_plan(plans.pop(0))
                joined.append(measured[step])
        with writing(out):
            replace_file(out / EVENTS, lambda file: file.write_text(diary, encoding="utf-8"))
            (beside / "run" / LOG).replace(out / LOG)
    copy_given(runs[0].path, out)
    remove_documents(out, "fits", "forecast")
    add_event(out / EVENTS, "merged", f"{len(runs)} runs, {len(measured)} steps")
    return len(measured)


def _joined(runs: Sequence[Run]) -> dict[int, Measurements]:
    """The measurements of all runs by step, with all that any of them read besides."""
    found: dict[int, Measurements] = {}
    origin: dict[int, Path] = {}
    for run in runs:
        if reasons := differences(runs[0].meta, run.meta):
            raise StoreError(
                f"{run.path}: runs are joined only if they were measured in one way, and this differs from "
                f"{runs[0].path}: {'; '.join(reasons)}"
            )
        for m in run.measurements():
            held = found.get(m.step, m)
            if not _alike(held, m):
                raise StoreError(
                    f"{run.path}: step {m.step} has other numbers than in {origin[m.step]}; leave one of the two out"
                )
            origin.setdefault(m.step, run.path)
            found[m.step] = replace(held, phenomena={**m.phenomena, **held.phenomena})
    return found


def _alike(one: Measurements, other: Measurements) -> bool:
    """Whether two have the same numbers, also of what both read besides."""
    shared = one.phenomena.keys() & other.phenomena.keys()
    return encode_measurements(one) == encode_measurements(other) and all(
        np.array_equal(one.phenomena[key], other.phenomena[key], equal_nan=True) for key in shared
    )


def _diary(runs: Sequence[Run]) -> str:
    """The diaries of all runs in order, each event once."""
    events = dict.fromkeys(event for run in runs for event in run.events)
    return "".join(line_of(event) for event in sorted(events, key=lambda event: event.time))


def _plans(runs: Sequence[Run]) -> list[Plan]:
    """The plans of all runs in order; of several for one step the first that says something."""
    found: dict[int, Plan] = {}
    for plan in (plan for run in runs for plan in run.plans):
        held = found.setdefault(plan.from_step, plan)
        if held.lr is None and held.total_steps is None:
            found[plan.from_step] = plan
    return [found[step] for step in sorted(found)]
