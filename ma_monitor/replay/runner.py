"""Replays checkpoints through the same `Monitor` that watches a live training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import ConfigError, SourceError, StoreError
from ma_monitor.monitor import Monitor, Observer
from ma_monitor.replay.ahead import Fetched, one_ahead
from ma_monitor.replay.models import ModelLoader, blank_model, checked_device, checked_dtype, default_dtype
from ma_monitor.replay.sources import Checkpoint, Source
from ma_monitor.runs.documents import remove_documents
from ma_monitor.runs.files import lock
from ma_monitor.runs.log import LogWriter
from ma_monitor.runs.meta import differences
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import EVENTS, LOG, META, Run
from ma_monitor.schedule import planned_rates
from ma_monitor.sinks.base import Sink

if TYPE_CHECKING:
    from ma_monitor.measure.probe import Probe

Progress = Callable[[int, int, str], None]
"""Told how many of how many checkpoints are done, and the name of the next (empty at the end)."""


@dataclass(frozen=True)
class ReplayResult:
    """What a replay did.

    Attributes:
        run: The run's directory.
        measured: Steps measured now, in order.
        skipped: Steps that the run already held.
        problems: What was left out and why, a sentence each; the source's own come first.
    """

    run: Path
    measured: tuple[int, ...]
    skipped: tuple[int, ...]
    problems: tuple[str, ...]


def replay(
    source: Source,
    probe: Probe,
    config: MonitorConfig | None,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    beside: Collection[Path] = (),
    force: bool = False,
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
) -> ReplayResult:
    """Measures every checkpoint of a source that the run does not hold yet.

    May be killed anywhere and run again: no step is measured twice, none is lost. A checkpoint that cannot be loaded
    or measured is named, and the others go on. One model is in memory, whose weights are replaced in place; the next
    checkpoint is fetched while this one is measured. What a source downloads lies under ``out`` until it is loaded.

    Args:
        source: Where the checkpoints are.
        probe: What is measured.
        config: How (None for the defaults); every checkpoint is measured, whatever its ``every``.
        out: The run's directory, made or gone on with.
        dtype: Of weights and arithmetic, whatever a checkpoint was saved in; None for `default_dtype`.
        device: Where the forward runs.
        shard: ``(i, n)`` measures checkpoints i, i + n, i + 2n, … only.
        beside: Runs of other workers: what they hold is left out.
        force: Begin the run anew, once the first checkpoint is loaded, whatever it holds.
        sinks: Where emissions go.
        progress: Told before each checkpoint and at the end.

    Raises:
        ConfigError: If the probe does not fit the model, or there is no such dtype, device or shard.
        ModelError: If the model has no residual stream that can be measured.
        SourceError: If there are checkpoints to measure and not one can be.
        StoreError: If the run in ``out`` is of another model or probe, or cannot be written.
    """
    config = replace(config or MonitorConfig(), every=1)
    replayed = _Replay(source, probe, config, Path(out), dtype, device, shard_of(source, shard), force, sinks)
    replayed.leave_out(beside)
    if replayed.held and not replayed.pending:
        replayed.finish_again()
    elif replayed.pending:
        replayed.measure(progress or (lambda done, total, name: None))
    if replayed.pending and not replayed.held and not replayed.measured:
        raise SourceError(f"no checkpoint of {source.name} could be measured: {'; '.join(replayed.problems[:3])}")
    skipped = tuple(c.step for c in source.checkpoints if c.step in replayed.held)
    return ReplayResult(replayed.out, tuple(replayed.measured), skipped, tuple(replayed.problems))


def shard_of(source: Source, shard: tuple[int, int]) -> tuple[Checkpoint, ...]:
    """The checkpoints of one worker: every n-th, beginning with the i-th.

    Raises:
        ConfigError: If there is no such shard.
    """
    number, count = shard
    if not 0 <= number < count:
        raise ConfigError(f"`shard` must be one of 0/n to (n - 1)/n, got {number}/{count}")
    return source.checkpoints[number::count]


class _Replay:
    """One call of `replay`: what is to be done, and what came of it."""

    def __init__(
        self,
        source: Source,
        probe: Probe,
        config: MonitorConfig,
        out: Path,
        dtype: torch.dtype | str | None,
        device: str,
        checkpoints: Sequence[Checkpoint],
        force: bool,
        sinks: Sequence[Sink],
    ) -> None:
        self.source, self.probe, self.config, self.out, self.sinks = source, probe, config, out, sinks
        self.loader = ModelLoader(checked_dtype(dtype), checked_device(device))
        self.scratch = out / "incoming"
        self.known = Run.open(out) if (out / META).is_file() and not force else None
        if self.known is not None:
            self._refuse_other(self.known)
        self.held = set() if self.known is None else {int(step) for step in self.known.steps}
        self.pending = [checkpoint for checkpoint in checkpoints if checkpoint.step not in self.held]
        self.force = force
        self.plans: list[Plan] = []
        self.measured: list[int] = []
        self.problems = list(source.problems)

    def measure(self, progress: Progress) -> None:
        """Measures what is pending, one after the other; the first that can be loaded opens the run."""
        monitor: Monitor | None = None
        started = time.monotonic()
        with (
            own_scratch(self.scratch, self.out),
            closing(one_ahead(lambda checkpoint: self.source.open(checkpoint, self.scratch), self.pending)) as coming,
        ):
            try:
                for number, checkpoint in enumerate(self.pending):
                    progress(number, len(self.pending), checkpoint.name)
                    monitor = self._measure_one(checkpoint, next(coming), monitor)
                progress(len(self.pending), len(self.pending), "")
                if monitor is not None and monitor.run is not None:
                    self._replan(monitor, before=None)
                    monitor.finish()
                    monitor.run.event("replayed", f"{len(self.measured)} in {time.monotonic() - started:.1f} s")
                    monitor.run.close()  # raises if the disk refused a record, which a monitor's closing only warns of
            finally:
                if monitor is not None:
                    monitor.close()
                self.loader.release()

    def _measure_one(self, checkpoint: Checkpoint, fetched: Fetched, monitor: Monitor | None) -> Monitor | None:
        """Measures a checkpoint, or names why not."""
        try:
            lent, folder = fetched.result()
            with lent:
                model = self.loader.load(folder)
        except SourceError as error:
            self.problems.append(f"{checkpoint.name} left out: {error}")
            return monitor
        monitor = monitor or self._open(model)
        monitor.model = model
        final = checkpoint is self.pending[-1]
        self._replan(monitor, before=None if final else checkpoint.step)
        monitor.step(checkpoint.step, final=final)
        if monitor.run is None or checkpoint.step not in monitor.run.steps:
            self.problems.append(f"{checkpoint.name} left out: its probe failed, the run's events say why")
            return monitor
        self.measured.append(checkpoint.step)
        if self.loader.dtype == torch.float16:
            self._check_overflow(checkpoint, monitor.run)
        return monitor

    def _check_overflow(self, checkpoint: Checkpoint, run: Run) -> None:
        """Names a checkpoint whose activations go beyond float16; an infinity is NaN from the next norm on."""
        stack = run.stack()
        index = stack.steps.searchsorted(checkpoint.step)
        if stack.inf[index].any():
            spoilt = (stack.inf[index] + stack.nan[index]).any(axis=-1)
            self.problems.append(
                f"{checkpoint.name} overflows in {spoilt.sum()} of {len(spoilt)} layers: float16 ends at 65504; "
                "measure it in bfloat16 or float32, in another run"
            )

    def finish_again(self) -> None:
        """With nothing to measure: still refuses another model or probe, and brings fits and forecast up to date.

        Raises:
            StoreError: If the run is of another model or probe.
        """
        from ma_monitor.measure.layers import describe_model

        if self.known is None:
            return
        with own_scratch(self.scratch, self.out), self.source.open_record(self.scratch) as folder:
            blank = blank_model(folder)
        dtype = self.loader.dtype or default_dtype(blank)
        self._refuse_other(self.known, model=describe_model(blank), precision=str(dtype).removeprefix("torch."))
        with closing(Observer(Run.open(self.out, writable=True), self.config)) as observer:
            observer.finish()

    def leave_out(self, beside: Collection[Path]) -> None:
        """Leaves to other workers what they have measured."""
        runs = [Run.open(path) for path in beside]
        for run in runs:
            self._refuse_other(run)
        held = {int(step) for run in runs for step in run.steps}
        self.pending = [checkpoint for checkpoint in self.pending if checkpoint.step not in held]

    def _refuse_other(self, run: Run, **known: Any) -> None:
        """Refuses a run that was measured in another way than this replay measures, as far as that is known."""
        wanted = replace(run.meta, probe=self.probe.info, k=self.config.k, ratio=self.config.ratio, **known)
        if reasons := differences(run.meta, wanted):
            raise StoreError(f"{run.path}: holds another run: {'; '.join(reasons)}; use another run directory")

    def _open(self, model: torch.nn.Module) -> Monitor:
        """Begins the run with the first plan that the training recorded, or goes on with the one in force."""
        recorded = self._recorded_plans()
        unknown = Plan(0, None, None, None, "unknown")
        plan, resume_from = next(iter(recorded), unknown), None
        if self.known is not None:
            # A replay that was killed may have recorded a plan and not yet the checkpoint after it.
            resume_from = max([*self.held, *(held.from_step for held in self.known.plans)])
            plan = self.known.plan_at(resume_from) or unknown
            # A training that went on since tells more of its schedule.
            plan = [plan, *(told for told in recorded if told.from_step <= resume_from)][-1]
        self.plans = [later for later in recorded if later.from_step > max(plan.from_step, resume_from or 0)]
        monitor = Monitor(model, self.probe, self.config, run_dir=None, sinks=self.sinks)
        if self.force:
            forget(self.out)
        monitor.open(self.out, plan, resume_from=resume_from)
        return monitor

    def _replan(self, monitor: Monitor, *, before: int | None) -> None:
        """Adds the plans that came into force before this step, or every one that is left.

        Each comes when it came in the training, so that what is forecast at an earlier step knows nothing of it.
        """
        while self.plans and (before is None or self.plans[0].from_step < before):
            plan = self.plans.pop(0)
            if monitor.run is not None:
                monitor.run.add_plan(plan)

    def _recorded_plans(self) -> tuple[Plan, ...]:
        """The plans of the training in order, from what its last checkpoint holds of it; none where that is nothing."""
        try:
            with self.source.open_record(self.scratch) as folder:
                if (folder / "ma_monitor" / META).is_file():
                    return Run.open(folder / "ma_monitor").plans
                if (folder / "trainer_state.json").is_file():
                    rates = planned_rates(folder / "trainer_state.json", None)
                    total = None if rates.lr is None else len(rates.lr) - 1
                    return (Plan(0, total, rates.lr, None, rates.schedule),)
        except (SourceError, StoreError, ConfigError) as error:
            self.problems.append(f"the learning-rate schedule is taken as unknown: {error}")
        return ()


@contextmanager
def own_scratch(scratch: Path, out: Path) -> Iterator[None]:
    """A folder for downloads that no other process uses; gone afterwards, and so is a run directory left empty.

    What a replay that was killed left there, and beside the run's documents, is removed.

    Raises:
        StoreError: If the folder cannot be made, or another process replays into this run.
    """
    with ExitStack() as held:
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            mine = held.enter_context((scratch / "lock").open("wb"))
            lock(mine)
        except BlockingIOError as error:
            raise StoreError(f"{out}: another process replays into this run; use another directory") from error
        except OSError as error:
            raise StoreError(f"{scratch}: cannot be written ({error.strerror or error})") from error
        for left in scratch.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        for left in out.glob(".[0-9]*-*.json"):
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):
                out.rmdir()


def forget(out: Path) -> None:
    """Removes the run in a directory, and nothing else of what is there.

    Raises:
        StoreError: If another process is writing it.
    """
    if not (out / META).is_file():
        return
    with closing(LogWriter(out / LOG, create=True)):
        for name in (META, LOG, EVENTS):
            (out / name).unlink(missing_ok=True)
    remove_documents(out, "fits", "forecast")
