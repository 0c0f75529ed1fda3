"""Several processes that a launcher started (accelerate, torchrun) replay one source into one run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ma_monitor.errors import ConfigError, SourceError
from ma_monitor.monitor import Observer
from ma_monitor.replay.runner import ReplayResult, forget
from ma_monitor.runs.merge import merge
from ma_monitor.runs.store import META, Run

SHARDS = "shards"
"""Folder in the run's directory in which each process keeps its own run until they are joined."""
PATIENCE = timedelta(days=7)
"""The others may take much longer than the first. One that has died is known at once, by its closed connection."""

Measure = Callable[[Path, tuple[int, int], Collection[Path]], ReplayResult]
"""Replays one shard into a run of its own, without what is held by the runs beside it."""


@dataclass(frozen=True)
class Worker:
    """One of ``count`` processes; ``local`` is its number on its own machine, which is that of its GPU."""

    rank: int
    count: int
    local: int


def launched(environment: Mapping[str, str]) -> Worker | None:
    """Which process of a launcher this is; None where there is no launcher, or it started a single process.

    Raises:
        ConfigError: If the launcher does not tell where the processes meet.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        return None
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if absent:
        raise ConfigError(
            f"WORLD_SIZE is {count}, so a launcher must set {', '.join(absent)} too; start with accelerate or "
            "torchrun, or give each process its own --shard i/n and --out, and join their runs by `ma-monitor merge`"
        )
    return Worker(int(environment["RANK"]), count, int(environment.get("LOCAL_RANK", "0")))


def replay_together(worker: Worker, out: Path, measure: Measure, *, force: bool = False) -> ReplayResult | None:
    """Measures this process's share; the first process joins all shares once the others are done or dead.

    What was measured by a process that died is kept; the same command, with any number of processes, does the rest.

    Args:
        worker: Which process this is.
        out: The run's directory.
        measure: Replays one shard.
        force: Forget what earlier calls measured.

    Returns:
        What all processes did, in the first; None in the others.

    Raises:
        SourceError: If not one checkpoint can be measured.
        StoreError: If the shares cannot be joined with each other or with the run in ``out``.
    """
    shards = out / SHARDS
    with _meeting():
        if force:
            if worker.rank == 0:
                forget(out)
                _remove(shards)
            dist.barrier()
        mine = shards / f"{worker.rank}-of-{worker.count}"
        try:
            beside = [run for run in (out, *_runs(shards)) if run != mine and (run / META).is_file()]
            result = measure(mine, (worker.rank, worker.count), beside)
        except SourceError as error:
            result = ReplayResult(mine, (), (), (str(error),))
        if worker.rank:
            _tell(result)
            return None
        results, dead = _hear(worker.count)
    joined = _join(shards, out, whole=not dead)
    measured = sorted({step for told in (result, *results) for step in told.measured})
    skipped = tuple(step for step in joined if step not in measured)
    problems = dict.fromkeys(problem for told in (result, *results) for problem in told.problems)
    if not joined:
        raise SourceError(f"no checkpoint could be measured: {'; '.join([*problems][:3])}")
    late = [f"worker {rank} ended early; run the same command again for what it left" for rank in dead]
    return ReplayResult(out, tuple(measured), skipped, (*problems, *late))


def _join(shards: Path, out: Path, *, whole: bool) -> tuple[int, ...]:
    """Joins what all processes ever measured, and says which steps that are."""
    if runs := _runs(shards):
        merge(runs, out)
        with closing(Observer(Run.open(out, writable=True))) as observer:
            observer.finish()
    if whole:
        _remove(shards)
    if not (out / META).is_file():
        return ()
    return tuple(int(step) for step in Run.open(out).steps)


def _remove(shards: Path) -> None:
    """Removes all shares, or none of them if killed on the way."""
    gone = shards.with_name(f".{SHARDS}")
    shutil.rmtree(gone, ignore_errors=True)
    if shards.exists():
        shards.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _runs(shards: Path) -> list[Path]:
    return sorted(meta.parent for meta in shards.glob(f"*/{META}"))


@contextmanager
def _meeting() -> Iterator[None]:
    """Connects the processes."""
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _tell(result: ReplayResult) -> None:
    try:
        dist.send_object_list([result], dst=0)
    except RuntimeError:  # the first process is dead; the next call joins what was measured
        return


def _hear(count: int) -> tuple[list[ReplayResult], list[int]]:
    """What the other processes did, and which of them are dead."""
    results: list[ReplayResult] = []
    dead = []
    for rank in range(1, count):
        heard: list[ReplayResult | None] = [None]
        try:
            dist.recv_object_list(heard, src=rank)
        except RuntimeError:
            dead.append(rank)
        results += [result for result in heard if result is not None]
    return results, dead
