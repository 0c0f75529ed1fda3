"""Several processes that a launcher started (accelerate, torchrun) replay one source into one run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ma_monitor.errors import SourceError
from ma_monitor.replay.held import finish, forget, known_run
from ma_monitor.replay.models import checked_dtype
from ma_monitor.replay.runner import ReplayResult, replay
from ma_monitor.replay.sources import Source
from ma_monitor.runs.documents import META
from ma_monitor.runs.merge import merge

if TYPE_CHECKING:
    from ma_monitor.config import MonitorConfig
    from ma_monitor.measure.probe import Probe

SHARDS = "shards"
"""Folder in the run's directory in which each process keeps its own run until they are joined."""
PATIENCE = timedelta(days=7)
"""One may take much longer than another. One that has died is known at once, by its closed connection."""


def launched() -> bool:
    """Whether a launcher started this process together with others."""
    return {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and os.environ.get("WORLD_SIZE", "1") != "1"


def replay_together(
    source: Source,
    probe: Probe,
    config: MonitorConfig,
    out: Path,
    *,
    force: bool = False,
    dtype: str | None = None,
    **options: Any,
) -> ReplayResult | None:
    """Measures this process's share of what the run does not hold; the first process joins the shares in the end.

    When a process dies, the others' shares stay where they are, and the next call, with any number of processes,
    begins with joining them.

    Args:
        source: As for `replay`, like all that follows.
        probe: What is measured.
        config: How.
        out: The run's directory.
        force: Begin the run anew, once there is something to begin it with.
        dtype: Of weights and arithmetic.
        **options: The others.

    Returns:
        What all processes did, in the first; None in the others.

    Raises:
        SourceError: If not one checkpoint can be measured, or another process died.
        StoreError: If the run in ``out`` is of another model or probe, or the shares cannot be joined.
    """
    shards = out / SHARDS
    dist.init_process_group("gloo", timeout=PATIENCE)
    rank, count = dist.get_rank(), dist.get_world_size()
    try:
        if rank == 0:
            if force:
                _remove(shards)
            else:
                _join(shards, out)
        with _all_alive():
            dist.barrier()
        known = None if force else known_run(out, source, probe, config, checked_dtype(dtype))
        held = () if known is None else tuple(known.steps.tolist())
        mine = [c for c in source.checkpoints if c.step not in held][rank::count]
        try:
            share = shards / str(rank)
            result = replay(source, probe, config, share, dtype=dtype, checkpoints=mine, **options)
        except SourceError as error:
            result = ReplayResult(out, (), (), (str(error),))
        results: list[Any] | None = None if rank else [None] * count
        with _all_alive():
            dist.gather_object(result, results)
    finally:
        dist.destroy_process_group()
    if results is None:
        return None
    measured = tuple(sorted(step for one in results for step in one.measured))
    problems = tuple(dict.fromkeys(problem for one in results for problem in one.problems))
    if not measured and not held:
        raise SourceError(f"no checkpoint could be measured: {'; '.join(problems[:3])}")
    if force:  # what is forgotten is replaced at once
        forget(out)
    _join(shards, out)
    finish(out)
    return ReplayResult(out, measured, held, problems)


def _join(shards: Path, out: Path) -> None:
    """Joins what processes have measured, and removes their shares."""
    if runs := sorted(meta.parent for meta in shards.glob(f"*/{META}")):
        merge(runs, out)
    _remove(shards)


def _remove(shards: Path) -> None:
    """Removes all shares, or none of them if killed on the way."""
    gone = shards.with_name(f".{SHARDS}")
    shutil.rmtree(gone, ignore_errors=True)
    if shards.exists():
        shards.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def _all_alive() -> Iterator[None]:
    """Says it in the user's words when processes cannot meet because one of them has died."""
    try:
        yield
    except RuntimeError as error:
        raise SourceError("another process ended early; run the same command again for what is left") from error
