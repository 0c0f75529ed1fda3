"""The single path: measure → record → refit → forecast → emit. Live training and replay both drive this."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.analysis import Analysis, analyse, forecast_run, refit_due
from ma_monitor.architecture.prediction import write_prior
from ma_monitor.config import MonitorConfig
from ma_monitor.errors import ConfigError, StoreError, redacted
from ma_monitor.learned.combiner import adopt, load
from ma_monitor.planning import make_plan, moved_plan
from ma_monitor.runs.meta import installed_versions
from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run
from ma_monitor.sinks.alerts import Alert, due_alerts, probe_failed
from ma_monitor.sinks.base import Emission, Sink
from ma_monitor.sinks.metrics import emission, facts
from ma_monitor.sinks.telling import tell, told_of

if TYPE_CHECKING:
    from torch import nn

    from ma_monitor.measure.distributed import Team
    from ma_monitor.measure.probe import Probe
    from ma_monitor.numerics.forecast import Forecast

_LOGGER = logging.getLogger("ma_monitor")


class Observer:
    """Keeps a run and shows what it says, wherever the measurements come from.

    Nothing that goes wrong in here reaches the caller: it is warned about once, recorded in the run as a ``fault``
    event, and left out (``MonitorConfig(strict=True)`` raises instead).

    Attributes:
        run: The open run; None on a process that only takes part in a sharded model's forward.
        config: How to behave.
        sinks: Where emissions go; may be replaced at any time.
        latest: Fits and forecast of the last refit, None before the first.
        told: Keys of the alerts of this run, also of earlier lives.
        seconds: Wall seconds spent in here.
    """

    def __init__(self, run: Run | None, config: MonitorConfig | None = None, *, sinks: Sequence[Sink] = ()) -> None:
        """Observes for ``run``, which it closes in the end."""
        self.run = run
        self.config = config or MonitorConfig()
        self.sinks = sinks
        self.latest: Analysis | None = None
        self.told: list[str] = [] if run is None else told_of(run)
        self.seconds = 0.0
        self._warning_level = logging.WARNING
        self._warned: set[tuple[str, str]] = set()
        self._last: Emission | None = None
        self._final: int | None = None
        self._fault = ""

    def observe(self, measurements: Measurements, *, final: bool = False) -> None:
        """Records measurements, refits and forecasts where due, and emits.

        Args:
            measurements: What was measured.
            final: Whether the training ends here.
        """
        run = self.run
        if run is None:
            return
        with self.timed():
            with self._guarded("recording a measurement"):
                run.append(measurements)
            if len(run.steps) and run.steps[-1] == measurements.step:  # kept in memory even where the disk refuses
                self._show(run, analysed=final or refit_due(len(run.steps)), final=final)

    def finish(self) -> None:
        """Refits and forecasts from everything measured, unless the last measurement was the final one."""
        run = self.run
        if run is None or len(run.steps) == 0 or self._final == run.steps[-1]:
            return
        with self.timed():
            self._show(run, analysed=True, final=True)

    def forecast(self) -> Forecast | None:
        """The forecast from everything measured so far, None before the first measurement."""
        if self.run is None or len(self.run.steps) == 0:
            return None
        if self.latest is None or self.latest.at != self.run.steps[-1]:
            return forecast_run(self.run)
        return self.latest.forecast

    def close(self) -> None:
        """Flushes the sinks and closes the run. May be called twice."""
        for sink in self.sinks:
            with self._guarded(f"closing {sink.name}"):
                sink.close()
        if self.run is not None:
            with self._guarded("closing the run"):
                self.run.close()

    def fault(self, what: str, error: Exception) -> None:
        """Warns once of this kind of fault in ``what`` and records it in the run."""
        kind = (what, type(error).__name__)
        self._fault = f"{kind[1]}: {redacted(str(error))}"
        if kind in self._warned:
            return
        self._warned.add(kind)
        message = f"{what} failed and is left out. {self._fault}"
        _LOGGER.log(self._warning_level, "ma_monitor: %s", message)
        try:
            if self.run is not None:
                self.run.event("fault", message)
        except (OSError, StoreError):
            _LOGGER.warning("ma_monitor: the run directory cannot be written, so this fault is not recorded there")

    def _show(self, run: Run, *, analysed: bool, final: bool) -> None:
        """Emits the last measurement, with fits and forecast where those are due; in the end with all hypotheses."""
        analysis = None
        if final:
            self._final = int(run.steps[-1])
        if analysed:
            with self._guarded("the fit and forecast"):
                analysis = self.latest = analyse(run, compare=final)
                run.write_document("fits", analysis.fits_document)
                run.write_document("forecast", analysis.forecast_document)
        seen = len(run.steps)
        alerts: tuple[Alert, ...] = ()
        with self._guarded("the alerts"):
            alerts = due_alerts(facts(run, seen, analysis), self.told)
            self.told += tell(run, alerts)
        if not self.sinks:
            return
        with self._guarded("preparing what is shown"):
            pictures = any(getattr(sink, "pictures", True) for sink in self.sinks)
            last = self._last
            shown = emission(run, seen, analysis, alerts=alerts, with_config=last is None, with_pictures=pictures)
            self._last = shown
            if last is not None and last.step == shown.step:  # the end, of which the last step is shown already
                shown = replace(shown, scalars={k: v for k, v in shown.scalars.items() if k not in last.scalars})
            self._emit(shown)

    def _emit(self, shown: Emission) -> None:
        """Shows an emission everywhere; a sink that fails keeps it from no other."""
        for sink in self.sinks:
            with self._guarded(f"the {sink.name} sink"):
                sink.emit(shown)

    def _missed(self, step: int) -> None:
        """Tells of a measurement that could not be made."""
        if self.run is None:
            return
        with self.timed(), self._guarded("the alerts"):
            if alerts := probe_failed(step, self._fault, self.told):
                self.told += tell(self.run, alerts, log=False)  # the fault is logged
                self._emit(Emission(step, {}, alerts=alerts))

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Keeps a fault in ``what`` from the training."""
        try:
            yield
        except Exception as error:
            if self.config.strict:
                raise
            self.fault(what, error)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the wall time spent."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


class Monitor(Observer):
    """Measures a model at due steps, keeps the run, and shows what it says.

    In any training loop: build it before the first update and call ``monitor.step(updates_done)`` after each, 0
    included; call ``monitor.step(updates_done, final=True)`` and ``monitor.close()`` at the end.

    With ``source="train_batch"`` there is no probe (pass None), and the training's own forward is read instead: put
    ``with monitor.train_batch(updates_done):`` around it.

    In a loop of several processes every process does all of that alike, with the model as the loop calls it; the first
    of the processes that share the model records and warns. What fails on one of them is left out on all.

    Attributes:
        model: What is measured; assign another of the same shape to go on with that one.
        schedule: The schedule in training, looked at again where its rates cannot be foreseen.
        optimizer: The optimizer in training, for a schedule that has none of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe | None,
        config: MonitorConfig | None = None,
        *,
        run_dir: str | Path | None,
        schedule: Any = None,
        total_steps: int | None = None,
        batch: int | None = None,
        sinks: Sequence[Sink] = (),
        resume_from: int | None = None,
    ) -> None:
        """Checks model and probe and opens the run.

        Args:
            model: A causal language model or anything with a residual stream; as the training calls it, with the
                `DistributedDataParallel` around it.
            probe: What is measured, None for training batches. Of several processes the first one's counts.
            config: How; the defaults work.
            run_dir: Where the first process keeps the run. None keeps none.
            schedule: The planned learning rate: an array, a name such as ``cosine:warmup=.01``, a file, a scheduler.
            total_steps: Planned number of updates.
            batch: Sequences per update, for the record.
            sinks: Where emissions go.
            resume_from: Continue the run in ``run_dir`` from this step, whose later measurements are superseded; None
                starts a new run.

        Raises:
            ModelError: If the model cannot be measured.
            ConfigError: If the probe does not fit the model, or the schedule breaks a rule.
            StoreError: If ``run_dir`` already holds a run that is not to be continued, or cannot be.
        """
        from ma_monitor.measure.distributed import team_of, unwrapped

        super().__init__(None, config, sinks=sinks)
        self.model: nn.Module | None = None
        self.schedule, self.optimizer = schedule, None
        if (probe is None) != (self.config.source == "train_batch"):
            raise ConfigError(
                'a monitor needs a probe with source="probe" and takes none with source="train_batch", '
                f"got source={self.config.source!r} and {'no probe' if probe is None else 'a probe'}"
            )
        self._probe = probe
        self._last_step: int | None = None
        self._team = team_of(model, self.config.batch_size if probe else None)
        if self._team is None:
            return
        team, model = self._team, unwrapped(model)
        self.model = model
        if not team.first:
            self._warning_level = logging.DEBUG
        with self.timed():
            self._probe = probe and replace(probe, ids=team.from_first(probe.ids))
            self._meta = self._described(team, model)
            plan = team.agreed(lambda: make_plan(schedule, total_steps, batch, from_step=resume_from or 0))
            if run_dir is not None:
                team.agreed(lambda: self.open(run_dir, plan, resume_from=resume_from) if team.first else None)

    def open(self, run_dir: str | Path, plan: Plan, *, resume_from: int | None = None, name: str | None = None) -> None:
        """Opens the run of a monitor that was made without one.

        Args:
            run_dir: Where the run is kept.
            plan: What is planned.
            resume_from: As for the monitor.
            name: What the model is called; None for its family.

        Raises:
            StoreError, ConfigError: As for the monitor; the latter too where the combiner cannot be used.
        """
        meta = self._meta if name is None else replace(self._meta, model=replace(self._meta.model, name=name))
        if self.config.combiner:
            load(Path(self.config.combiner))  # what cannot be used is refused before the run is made
        if resume_from is None:
            self.run = Run.create(run_dir, meta, plan)
        else:
            self.run = Run.continue_(run_dir, meta, plan, from_step=resume_from)
        with self._guarded("what forecasts rest on"):
            if resume_from is None:
                write_prior(getattr(self.model, "config", None), plan, self.run.path)
            adopt(self.config.combiner, self.run.path)
        self.told = told_of(self.run)

    def step(self, step: int, *, final: bool = False, force: bool = False) -> bool:
        """Tells the monitor that ``step`` updates are done; it measures where that is due.

        Args:
            step: Optimizer updates done.
            final: Whether the training ends here: measures (unless this step was), refits and forecasts.
            force: Measure although it is not due.

        Returns:
            Whether a measurement was made with this process.
        """
        if self._team is None:
            return False
        if self._probe is None or step == self._last_step or not (final or force or self.config.due(step)):
            if final:
                self.finish()
            return False
        self._last_step = step
        measurements = None
        with self.timed(), self._guarded("the probe"):
            measurements = self._measure(self._probe, step)
        if measurements is not None:
            self._take(measurements, final=final)
        else:
            self._missed(step)
        return measurements is not None

    @contextmanager
    def train_batch(self, step: int) -> Iterator[None]:
        """Reads the training forward that is run inside, where ``step`` is due; for ``source="train_batch"``.

        The last state of a training is not measured so: no forward follows it.

        Args:
            step: Optimizer updates done before that forward.
        """
        from ma_monitor.measure.forward import reading_training

        if self._team is None or self._probe is not None or step == self._last_step or not self.config.due(step):
            yield
            return
        self._last_step = step
        measurements = None
        with ExitStack() as hooks:
            measured: Any = None
            with self.timed(), self._guarded("reading the training's forward"):
                reading = reading_training(self._model(), k=self.config.k, sequences=self._meta.probe.sequences)
                measured = self._team.agreed(lambda: hooks.enter_context(reading))
            yield
            if measured is not None:
                with self.timed(), self._guarded("reading the training's forward"):
                    measurements = self._team.agreed(lambda: measured(step))
        if measurements is not None:
            self._take(measurements, final=False)
        else:
            self._missed(step)

    def close(self) -> None:
        """Flushes the sinks, closes the run and lets go of what is in training. May be called twice."""
        super().close()
        self.model = self.schedule = self.optimizer = None

    def _described(self, team: Team, model: nn.Module) -> RunMeta:
        """What is fixed for the run; looks at the model's forward, which may need every process."""
        from ma_monitor.measure.forward import precision_of
        from ma_monitor.measure.layers import context_length, describe_model
        from ma_monitor.measure.probe import COUNT

        def described() -> ModelShape:
            shape = describe_model(model)
            if self._probe is not None:
                self._probe.check(shape.vocabulary, context_length(model))
            return shape

        shape = team.agreed(described)
        precision = team.agreed(lambda: precision_of(model))
        count = self.config.batch_size or COUNT
        read = self._probe.info if self._probe else ProbeInfo(None, count, None, "training batches")
        return RunMeta(shape, read, self.config.k, 0, self.config.ratio, precision, installed_versions())

    def _model(self) -> nn.Module:
        if self.model is None:
            raise ConfigError("a closed monitor has no model to measure; make a new one with resume_from")
        return self.model

    def _measure(self, probe: Probe, step: int) -> Measurements:
        from ma_monitor.measure.phenomena.reading import measure_with

        def failed(name: str, error: Exception) -> None:
            with self._guarded(f"reading {name}"):
                raise error

        model, c = self._model(), self.config
        return measure_with(
            model, probe, step, k=c.k, phenomena=c.phenomena, failed=failed, batch_size=c.batch_size, team=self._team
        )

    def _take(self, measurements: Measurements, *, final: bool) -> None:
        """Observes, unless a resumed run holds this step already.

        Whether to measure is decided without looking at the run: where the forward is a collective operation, every
        process must decide alike, and only one of them has the run.
        """
        run, step = self.run, measurements.step
        if run is not None and len(run.steps) and run.steps[-1] == step:
            if final:
                self.finish()
            return
        with self._guarded("the learning-rate schedule"):
            if run is not None and (moved := moved_plan(run.plan_at(step), self.schedule, step, self.optimizer)):
                run.add_plan(moved)
        self.observe(measurements, final=final)
