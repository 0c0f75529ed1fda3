"""What a run's directory holds already, and whether a replay may go on with it."""

from __future__ import annotations

import tempfile
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import SourceError, StoreError
from ma_monitor.measure.layers import describe_model
from ma_monitor.monitor import Observer
from ma_monitor.replay.models import blank_model
from ma_monitor.replay.sources import FolderSource, Source
from ma_monitor.replay.weights import fingerprint
from ma_monitor.runs.documents import EVENTS, LOG, META, remove_documents
from ma_monitor.runs.log import LogWriter
from ma_monitor.runs.meta import differences
from ma_monitor.runs.records import ModelShape
from ma_monitor.runs.store import Run

if TYPE_CHECKING:
    from ma_monitor.measure.probe import Probe

REPLAYED = "replayed"
"""Event in which a replay notes its pace."""
PACE = "seconds a checkpoint"
WEIGHTS = "weights"
"""Event in which a replay notes a step and the fingerprint of the first checkpoint that it measured."""


def known_run(out: Path, source: Source, probe: Probe, config: MonitorConfig, dtype: torch.dtype | None) -> Run | None:
    """The run in a directory, None where there is none.

    Raises:
        StoreError: If it is of another model, as far as names, shape and what the run noted of weights tell, or was
            measured in another way than this probe, configuration and dtype (if not None) would.
    """
    if not (out / META).is_file():
        return None
    run = Run.open(out)
    model = replace(_shape(source) or run.meta.model, name=source.name)
    wanted = replace(run.meta, model=model, probe=probe.info, k=config.k, ratio=config.ratio)
    if dtype is not None:
        wanted = replace(wanted, precision=str(dtype).removeprefix("torch."))
    if reasons := [*differences(run.meta, wanted), *_other_weights(run, source)]:
        raise StoreError(f"{out}: holds another run: {'; '.join(reasons)}; use another run directory")
    return run


def _shape(source: Source) -> ModelShape | None:
    """The shape of a source's model as its last configuration tells it, None where that cannot be had."""
    with suppress(SourceError), tempfile.TemporaryDirectory(prefix="ma_monitor-") as place:
        return describe_model(blank_model(source.fetch(source.checkpoints[-1], Path(place), "record")))
    return None


def _other_weights(run: Run, source: Source) -> list[str]:
    """Why a folder's checkpoints are of another training: the earliest whose weights the run noted has others.

    Only the earliest, since a training that goes on from a checkpoint may write those after it anew.
    """
    if not isinstance(source, FolderSource):  # a model on the Hub is known by its id, and has to be downloaded
        return []
    noted = dict(event.message.partition(": ")[::2] for event in run.events if event.kind == WEIGHTS)
    known = next((checkpoint for checkpoint in source.checkpoints if f"step {checkpoint.step}" in noted), None)
    if known is None or fingerprint(source.folders[known]) in (None, noted[f"step {known.step}"]):
        return []
    return [f"{known.name} has other weights than those that were measured as step {known.step}"]


def held_steps(out: Path) -> tuple[int, ...]:
    """The steps that the run in a directory holds; none where there is no run."""
    return tuple(Run.open(out).steps.tolist()) if (out / META).is_file() else ()


def finish(out: Path) -> None:
    """Brings a run's fits and forecast up to date."""
    with closing(Observer(Run.open(out, writable=True))) as observer:
        observer.finish()


def forget(out: Path) -> None:
    """Removes the run in a directory, and nothing else that is there; killed on the way, the next call does the rest.

    Raises:
        StoreError: If another process is writing it.
    """
    remove = (META, EVENTS, LOG)  # the log last: while it is there, something is left to be removed
    if not any((out / name).is_file() for name in remove):
        return
    with closing(LogWriter(out / LOG, create=True)):
        remove_documents(out, "fits", "forecast")
        for name in remove:
            (out / name).unlink(missing_ok=True)
