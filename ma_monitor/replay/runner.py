"""Replays checkpoints through the same `Monitor` that watches a live training."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import ConfigError, SourceError, StoreError
from ma_monitor.monitor import Monitor
from ma_monitor.replay.ahead import one_ahead
from ma_monitor.replay.held import PACE, REPLAYED, WEIGHTS, finish, forget, known_run
from ma_monitor.replay.models import ModelLoader, checked_device, checked_dtype
from ma_monitor.replay.sources import Checkpoint, Source
from ma_monitor.replay.weights import fingerprint
from ma_monitor.runs.documents import META
from ma_monitor.runs.files import lock, no_link, writing
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import Run
from ma_monitor.schedule import planned_rates
from ma_monitor.sinks.base import Sink

if TYPE_CHECKING:
    from ma_monitor.measure.probe import Probe

PYTHIA = re.compile(r"EleutherAI/pythia-[\d.]+[mb](-deduped|-seed\d)?")
"""Hub ids of trainings of one known schedule; the first versions (``-v0``) had others."""
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
    checkpoints: Sequence[Checkpoint] | None = None,
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
        checkpoints: Which of the source's; None for all.
        force: Begin the run anew, once the first checkpoint is loaded, whatever it holds.
        sinks: Where emissions go.
        progress: Told before each checkpoint and at the end.

    Raises:
        ConfigError: If the probe does not fit the model, or there is no such dtype or device.
        ModelError: If the model has no residual stream that can be measured.
        SourceError: If there are checkpoints to measure and not one can be.
        StoreError: If the run in ``out`` is of another model or probe, or cannot be written.
    """
    config, out = replace(config or MonitorConfig(), every=1), Path(out)
    loader = ModelLoader(checked_dtype(dtype), checked_device(device))
    known = None if force else known_run(out, source, probe, config, loader.dtype)
    held = set() if known is None else set(known.steps.tolist())
    wanted = source.checkpoints if checkpoints is None else checkpoints
    pending = [checkpoint for checkpoint in wanted if checkpoint.step not in held]
    with _own_scratch(out) as scratch:
        work = _Replay(source, probe, config, out, loader, known, force, sinks, scratch, list(source.problems))
        if pending:
            work.measure(pending, progress or (lambda done, total, name: None))
        elif held:
            finish(out)
    if pending and not held and not work.measured:
        raise SourceError(f"no checkpoint of {source.name} could be measured: {'; '.join(work.problems[:3])}")
    skipped = tuple(checkpoint.step for checkpoint in wanted if checkpoint.step in held)
    return ReplayResult(out, tuple(work.measured), skipped, tuple(work.problems))


@dataclass
class _Replay:
    """One call of `replay`: what is to be done, and what came of it."""

    source: Source
    probe: Probe
    config: MonitorConfig
    out: Path
    loader: ModelLoader
    known: Run | None
    force: bool
    sinks: Sequence[Sink]
    scratch: Path
    problems: list[str]
    measured: list[int] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    monitor: Monitor | None = None

    def measure(self, pending: Sequence[Checkpoint], progress: Progress) -> None:
        """Measures checkpoints, one after the other; the first that can be loaded opens the run."""
        started = time.monotonic()
        coming = one_ahead(lambda checkpoint: self.source.fetch(checkpoint, self._place(checkpoint)), pending)
        try:
            for number, checkpoint in enumerate(pending):
                progress(number, len(pending), checkpoint.name)
                self._measure_one(checkpoint, next(coming), final=number == len(pending) - 1)
            progress(len(pending), len(pending), "")
            if (monitor := self.monitor) is not None and monitor.run is not None:
                self._replan(monitor, before=None)
                monitor.finish()
                if self.measured:
                    pace = (time.monotonic() - started) / len(self.measured)
                    monitor.run.event(REPLAYED, f"{pace:.3f} {PACE} ({len(self.measured)})")
                monitor.run.close()  # raises if the disk refused a record, which a monitor's closing only warns of
        finally:
            if self.monitor is not None:
                self.monitor.close()
            self.loader.release()

    def _measure_one(self, checkpoint: Checkpoint, fetched: Future[Path], *, final: bool) -> None:
        """Measures a checkpoint, or names why not."""
        weights = None
        try:
            folder = fetched.result()
            model = self.loader.load(folder)
            if not self.measured:
                weights = fingerprint(folder)
        except SourceError as error:
            self.problems.append(f"{checkpoint.name} left out: {error}")
            return
        finally:
            shutil.rmtree(self._place(checkpoint), ignore_errors=True)
        monitor = self.monitor or self._open(model)
        monitor.model = model
        self._replan(monitor, before=None if final else checkpoint.step)
        monitor.step(checkpoint.step, final=final)
        if monitor.run is None or checkpoint.step not in monitor.run.steps:
            self.problems.append(f"{checkpoint.name} left out: its probe failed, the run's events say why")
            return
        self.measured.append(checkpoint.step)
        if weights:
            monitor.run.event(WEIGHTS, f"step {checkpoint.step}: {weights}")
        if self.loader.dtype == torch.float16:
            self._check_overflow(checkpoint, monitor.run)

    def _place(self, checkpoint: Checkpoint) -> Path:
        """Where a checkpoint is downloaded to."""
        return self.scratch / f"step{checkpoint.step}"

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

    def _open(self, model: torch.nn.Module) -> Monitor:
        """Begins the run with the first plan that the training recorded, or goes on with the one in force."""
        recorded = self._recorded_plans()
        unknown = Plan(0, None, None, None, "unknown")
        plan, resume_from = next(iter(recorded), unknown), None
        if self.known is not None:
            # A replay that was killed may have recorded a plan and not yet the checkpoint after it.
            resume_from = max([0, *self.known.steps.tolist(), *(held.from_step for held in self.known.plans)])
            # A training that went on since tells more of its schedule.
            told = [told for told in recorded if told.from_step <= resume_from]
            plan = [self.known.plan_at(resume_from) or unknown, *told][-1]
        self.plans = [later for later in recorded if later.from_step > max(plan.from_step, resume_from or 0)]
        # Known here before it opens the run: whatever comes, an interrupt too, the run is closed in the end.
        self.monitor = monitor = Monitor(model, self.probe, self.config, run_dir=None, sinks=self.sinks)
        if self.force:
            forget(self.out)
        on_hub = "/" in self.source.name  # a folder's name says nothing: a copy of it has another
        monitor.open(self.out, plan, resume_from=resume_from, name=self.source.name if on_hub else None)
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
            with tempfile.TemporaryDirectory(dir=self.scratch) as place:
                folder = self.source.fetch(self.source.checkpoints[-1], Path(place), "record")
                if (folder / "ma_monitor" / META).is_file():
                    return Run.open(folder / "ma_monitor").plans
                if (folder / "trainer_state.json").is_file():
                    rates = planned_rates(folder / "trainer_state.json", None)
                    total = None if rates.lr is None else len(rates.lr) - 1
                    return (Plan(0, total, rates.lr, None, rates.schedule, rates.held),)
        except (SourceError, StoreError, ConfigError) as error:
            self.problems.append(f"the learning-rate schedule is taken as unknown: {error}")
            return ()
        return (pythias_plan(),) if PYTHIA.fullmatch(self.source.name) else ()


def pythias_plan() -> Plan:
    """How every Pythia was trained, its rates relative to the highest (Biderman et al. 2023, arXiv:2304.01373).

    143,000 updates of 1,024 sequences; a warm-up over 1 % of them, then a cosine to 10 %.
    """
    rates = planned_rates("cosine:warmup=.01,floor=.1", 143_000)
    return Plan(0, 143_000, rates.lr, 1024, f"Pythia's: {rates.schedule}")


@contextmanager
def _own_scratch(out: Path) -> Iterator[Path]:
    """A folder for downloads that no other process uses; gone afterwards, and so is a run directory left empty.

    What a replay that was killed left there, and beside the run's documents, is removed.

    Raises:
        StoreError: If the folder cannot be made, or another process replays into this run.
    """
    scratch = out / "incoming"
    if scratch.is_symlink():
        raise StoreError(f"{scratch}: is a link, and all that is in this folder is removed; remove the link")
    with writing(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        mine = open(scratch / "lock", "wb", opener=no_link)
    with mine:
        try:
            lock(mine)
        except BlockingIOError as error:
            raise StoreError(f"{out}: another process replays into this run; use another directory") from error
        for folder in filter(Path.is_dir, scratch.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
        for document in out.glob(".[0-9]*-*.json"):
            document.unlink(missing_ok=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):
                out.rmdir()
