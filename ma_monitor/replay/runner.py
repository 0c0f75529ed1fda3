"""Replays checkpoints through the same `Monitor` that watches a live training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import ConfigError, SourceError, StoreError
from ma_monitor.monitor import Monitor, Observer
from ma_monitor.replay.models import blank_model, checked_device, checked_dtype, load_model
from ma_monitor.replay.sources import Checkpoint, Source
from ma_monitor.runs.meta import differences
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import META, Run
from ma_monitor.schedule import planned_rates
from ma_monitor.sinks.base import Sink

if TYPE_CHECKING:
    import torch
    from torch import nn

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
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
) -> ReplayResult:
    """Measures every checkpoint of a source that the run does not hold yet.

    May be killed anywhere and run again: no step is measured twice, none is lost. A checkpoint that cannot be loaded
    or measured is named, and the others go on. One model is in memory at a time; what a source downloads lies under
    ``out`` until it is loaded.

    Args:
        source: Where the checkpoints are.
        probe: What is measured.
        config: How (None for the defaults); every checkpoint is measured, whatever its ``every``.
        out: The run's directory, made or gone on with.
        dtype: Of weights and arithmetic; None for float32, whatever a checkpoint was saved in.
        device: Where the forward runs.
        sinks: Where emissions go.
        progress: Told before each checkpoint and at the end.

    Raises:
        ConfigError: If the probe does not fit the model, or there is no such dtype or device.
        ModelError: If the model has no residual stream that can be measured.
        SourceError: If not one checkpoint can be measured.
        StoreError: If the run in ``out`` is of another model or probe, or cannot be written.
    """
    replayed = _Replay(source, probe, replace(config or MonitorConfig(), every=1), Path(out), dtype, device, sinks)
    if replayed.held and not replayed.pending:
        replayed.finish_again()
    else:
        replayed.measure(progress or (lambda done, total, name: None))
    if not replayed.held and not replayed.measured:
        raise SourceError(f"no checkpoint of {source.name} could be measured: {'; '.join(replayed.problems[:3])}")
    skipped = tuple(c.step for c in source.checkpoints if c.step in replayed.held)
    return ReplayResult(replayed.out, tuple(replayed.measured), skipped, tuple(replayed.problems))


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
        sinks: Sequence[Sink],
    ) -> None:
        self.source, self.probe, self.config, self.out, self.sinks = source, probe, config, out, sinks
        self.dtype, self.device = checked_dtype(dtype), checked_device(device)
        self.scratch = out / "incoming"
        self.known = Run.open(out) if (out / META).is_file() else None
        self.held = set() if self.known is None else {int(step) for step in self.known.steps}
        self.pending = [checkpoint for checkpoint in source.checkpoints if checkpoint.step not in self.held]
        self.plans: list[Plan] = []
        self.measured: list[int] = []
        self.problems = list(source.problems)

    def measure(self, progress: Progress) -> None:
        """Measures what is pending, one after the other; the first that can be loaded opens the run."""
        monitor: Monitor | None = None
        try:
            for number, checkpoint in enumerate(self.pending):
                progress(number, len(self.pending), checkpoint.name)
                model = self._load(checkpoint, like=None if monitor is None else monitor.model)
                if model is None:
                    continue
                if monitor is None:
                    monitor = self._open(model)
                monitor.model = model
                final = checkpoint is self.pending[-1]
                self._replan(monitor, before=None if final else checkpoint.step)
                monitor.step(checkpoint.step, final=final)
                if monitor.run is not None and checkpoint.step in monitor.run.steps:
                    self.measured.append(checkpoint.step)
                else:
                    self.problems.append(f"{checkpoint.name} left out: its probe failed, the run's events say why")
                model.to("meta")  # gives its memory back before the next one comes
            progress(len(self.pending), len(self.pending), "")
            if monitor is not None and monitor.run is not None:
                self._replan(monitor, before=None)
                monitor.finish()
                monitor.run.close()  # raises if the disk refused a record, which a monitor's closing only warns of
        finally:
            if monitor is not None:
                monitor.close()
            self._tidy(mine=monitor is not None)

    def finish_again(self) -> None:
        """With nothing to measure: still refuses another model or probe, and brings fits and forecast up to date.

        Raises:
            StoreError: If the run is of another model or probe.
        """
        from ma_monitor.measure.layers import describe_model

        if self.known is None:
            return
        try:
            with self.source.open_record(self.scratch) as folder:
                shape = describe_model(blank_model(folder, self.dtype))
        finally:
            self._tidy(mine=False)
        precision = str(self.dtype).removeprefix("torch.")
        wanted = replace(
            self.known.meta,
            model=shape,
            probe=self.probe.info,
            k=self.config.k,
            ratio=self.config.ratio,
            precision=precision,
        )
        if reasons := differences(self.known.meta, wanted):
            raise StoreError(f"{self.out}: holds another run: {'; '.join(reasons)}; use another run directory")
        with closing(Observer(Run.open(self.out, writable=True), self.config)) as observer:
            observer.finish()

    def _load(self, checkpoint: Checkpoint, like: nn.Module | None) -> nn.Module | None:
        """A checkpoint's model, None where it is of no use, which is added to the problems then."""
        from ma_monitor.measure.layers import describe_model

        try:
            with self.source.open(checkpoint, self.scratch) as folder:
                model = load_model(folder, self.dtype, self.device)
            if like is not None and describe_model(model) != describe_model(like):
                raise SourceError("its model is of another shape than the one before")
        except SourceError as error:
            self.problems.append(f"{checkpoint.name} left out: {error}")
            return None
        return model

    def _open(self, model: nn.Module) -> Monitor:
        """Begins the run with the first plan that the training recorded, or goes on with the one in force."""
        recorded = self._recorded_plans()
        unknown = Plan(0, None, None, None, "unknown")
        if self.known is None:
            plan, resume_from = next(iter(recorded), unknown), None
        else:
            resume_from = max(self.held, default=0)
            plan = self.known.plan_at(resume_from) or unknown
        self.plans = [later for later in recorded if later.from_step > plan.from_step]
        monitor = Monitor(model, self.probe, self.config, run_dir=None, sinks=self.sinks)
        monitor.open(self.out, plan, resume_from=resume_from)
        shutil.rmtree(self.scratch, ignore_errors=True)  # left by a replay that was killed: the run has one writer
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

    def _tidy(self, *, mine: bool) -> None:
        """Removes the folder of downloads, whatever is in it if it is ours alone, and a run directory left empty."""
        if mine:
            shutil.rmtree(self.scratch, ignore_errors=True)
        for folder in (self.scratch, self.out):
            with suppress(OSError):
                folder.rmdir()
