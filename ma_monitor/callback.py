"""Trainer events → Monitor. No arithmetic and no metric names here."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import ConfigError, StoreError
from ma_monitor.measure.distributed import team_of, unwrapped
from ma_monitor.measure.forward import random_states_kept
from ma_monitor.measure.layers import context_length
from ma_monitor.measure.probe import LENGTH, Probe
from ma_monitor.monitor import Monitor
from ma_monitor.planning import make_plan
from ma_monitor.runs.documents import META
from ma_monitor.runs.store import Run
from ma_monitor.sinks.alerts import told_in
from ma_monitor.sinks.trainer import TrainerSinks, find_handler, training_loop

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ma_monitor.numerics.forecast import Forecast

STATE_KEY = "ma_monitor.v1"
"""Where the Trainer's state carries what a resume needs. No class has this name, so the Trainer leaves it alone."""
CHECKPOINT_COPY = "ma_monitor"
"""Folder inside each ``checkpoint-N`` that holds a copy of the run."""
_LOGGER = logging.getLogger("ma_monitor")


class MassiveActivationCallback(TrainerCallback):
    """Watches massive activations while a Hugging Face Trainer trains.

    ``Trainer(..., callbacks=[MassiveActivationCallback()])`` is all there is to set up: the probe comes from the
    evaluation data, else from a map-style training set, else from ten built-in passages; the run is kept in
    ``<output_dir>/ma_monitor``; what is seen goes wherever the Trainer reports to.

    A new training never touches an old run: if its directory is taken, ``ma_monitor-2`` is used, and so on. A training
    resumed from a checkpoint continues the run that the checkpoint knows, from its directory or from the copy inside
    the checkpoint.

    Besides the configuration's steps, the end of an epoch is measured where an evaluation follows it
    (``eval_strategy="epoch"``): that evaluation may end the training, and afterwards it is too late.

    Attributes:
        monitor: The monitor, from the beginning of the training on; None before, and where monitoring is impossible.
    """

    def __init__(
        self, config: MonitorConfig | None = None, *, probe: Probe | None = None, run_dir: str | Path | None = None
    ) -> None:
        """Keeps the settings; everything else waits for the training to begin.

        Args:
            config: How to behave; the defaults work.
            probe: What to measure.
            run_dir: Where to keep the run.

        Raises:
            ConfigError: If there is a probe and training batches are to be read.
        """
        self.config = config or MonitorConfig()
        if probe is not None and self.config.source == "train_batch":
            raise ConfigError(
                'a callback takes no probe with source="train_batch", which reads the training\'s own batches'
            )
        self.monitor: Monitor | None = None
        self._main = True
        self._probe = probe
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._trainer: Trainer | None = None
        self._reporters = TrainerSinks()
        self._reading = ExitStack()

    def attach(self, trainer: Trainer) -> None:
        """Tells the callback its Trainer. Needed only where a Trainer's internals differ from transformers' own."""
        self._trainer = trainer

    def forecast(self) -> Forecast | None:
        """Per layer: peak, asymptote, value at the planned end, with intervals; None before the first measurement."""
        return None if self.monitor is None else self.monitor.forecast()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the run, or continues it where the training is resumed."""
        model = kwargs["model"]
        with self._guarded():
            self._reading.close()
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
        self._main = bool(state.is_world_process_zero)
        started = time.perf_counter()
        trainer, checkpoint = training_loop()
        trainer = trainer or self._trainer
        with self._guarded():
            wrapped = _wrapped(trainer, model)
            team = team_of(wrapped, self.config.batch_size)
            if team is None or not (self._main or team.groups):
                return
            probe = None
            if self.config.source == "train_batch":
                _refuse_compiled(args)
            else:
                given = trainer, kwargs.get("train_dataloader"), kwargs.get("processing_class"), _probe_length(model)
                probe = team.agreed(lambda: self._probe or default_probe(*given))
            monitor = Monitor(wrapped, probe, self.config, run_dir=None)
            if team.groups:  # from here on this process takes part, whatever becomes of its run
                self.monitor = monitor
            if self._main:
                monitor.schedule, monitor.optimizer = kwargs.get("lr_scheduler"), kwargs.get("optimizer")
                self._open(monitor, args, state, checkpoint)
                monitor.told += [key for key in _known_alerts(state) if key not in monitor.told]
                self.monitor = monitor
                self._remember(state)
            monitor.seconds = time.perf_counter() - started

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the state before the first update, when every reporter is open."""
        self._step(args, state, control, kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the forward that comes now, where training batches are the source."""
        if self.monitor is not None and self.config.source == "train_batch" and self.config.due(state.global_step):
            self._ready(self.monitor, args, state, control, kwargs["model"])
            with self._guarded():
                self._reading.enter_context(self.monitor.train_batch(state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures where due, and at the last step while weights and reporters are still those of the training."""
        with self._guarded():
            self._reading.close()
            self._remember(state)
        final = state.global_step >= state.max_steps or control.should_training_stop
        self._step(args, state, control, kwargs["model"], final=final)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures when the training stopped early, or may do so in the evaluation that follows."""
        if control.should_training_stop or control.should_evaluate:
            self._step(args, state, control, kwargs["model"], final=control.should_training_stop, force=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts a copy of the run into the checkpoint just written."""
        monitor = self.monitor
        if monitor is None or monitor.run is None:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        with monitor.timed(), self._guarded("copying the run into the checkpoint"):
            if folder.is_dir():
                monitor.run.copy_to(folder / CHECKPOINT_COPY)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the run. Nothing is measured: the best model may have been loaded, and the writers are closed."""
        if self.monitor is not None:
            self.monitor.sinks = ()
            with self._guarded():
                self._reading.close()  # a training that was stopped between two micro-batches ended no step
                self.monitor.finish()
                self.monitor.close()

    def _step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        *,
        final: bool = False,
        force: bool = False,
    ) -> None:
        monitor = self.monitor
        if monitor is None or not (final or force or self.config.due(state.global_step)):
            return
        self._ready(monitor, args, state, control, model)
        with self._guarded():
            monitor.step(state.global_step, final=final, force=force)
            self._remember(state)

    def _ready(
        self, monitor: Monitor, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module
    ) -> None:
        """The reporters and the model of this moment: both may be others than at the last measurement."""
        monitor.model = model
        with self._guarded("finding the reporters"):
            handler = self._trainer.callback_handler if self._trainer is not None else find_handler()
            monitor.sinks = self._reporters(handler, args, state, control, model)

    def _open(self, monitor: Monitor, args: TrainingArguments, state: TrainerState, checkpoint: Path | None) -> None:
        """Opens a new run, or the one that is resumed: from its directory, else from the copy in the checkpoint."""
        path = self._run_dir or Path(str(args.output_dir)) / "ma_monitor"
        resumed = state.global_step or None
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        total, now = state.max_steps, state.global_step
        plan = make_plan(monitor.schedule, total, batch, from_step=now, optimizer=monitor.optimizer)
        if resumed is None:
            monitor.open(_free(path), plan)
            return
        copy = (checkpoint or Path(str(args.output_dir)) / f"checkpoint-{resumed}") / CHECKPOINT_COPY
        for candidate in (*self._candidates(path, state), copy):
            if not _holds_run(candidate):
                continue
            target = _free(path) if candidate == copy else candidate
            try:
                if candidate == copy:
                    with Run.open(copy) as run:
                        run.copy_to(target)
                monitor.open(target, plan, resume_from=resumed)
                return
            except StoreError as refused:
                if candidate == copy:
                    shutil.rmtree(target, ignore_errors=True)
                if self.config.strict:
                    raise
                _LOGGER.warning("ma_monitor: the run in %s is not continued. %s", candidate, refused)
        fresh = _free(path)
        _LOGGER.warning("ma_monitor: training resumes from step %d without its run; one begins in %s", resumed, fresh)
        monitor.open(fresh, plan)

    def _candidates(self, path: Path, state: TrainerState) -> list[Path]:
        """Directories of runs that hold at least what the checkpoint knew of."""
        known = _known(state)
        name = Path(str(known.get("run", ""))).name  # never a path: anybody may have written the checkpoint
        named = path if name in ("", "..") else path.with_name(name)
        return [p for p in dict.fromkeys((named, path)) if _measured(p, state.global_step) >= known.get("measured", 0)]

    def _remember(self, state: TrainerState) -> None:
        """Puts into the Trainer's state, which every checkpoint saves, what a resume needs."""
        if self.monitor is not None and self.monitor.run is not None:
            run, told = self.monitor.run, self.monitor.told
            _carried(state)[STATE_KEY] = {"run": run.path.name, "measured": len(run.steps), "told": told}

    @contextmanager
    def _guarded(self, what: str = "monitoring") -> Iterator[None]:
        """Keeps a monitor that cannot be built or driven from the training."""
        try:
            yield
        except Exception as error:
            if self.config.strict:
                raise
            if self.monitor is not None:
                self.monitor.fault(what, error)
            else:
                level = logging.WARNING if self._main else logging.DEBUG  # what failed on one process is off on all
                name = type(error).__name__
                _LOGGER.log(level, "ma_monitor: monitoring is off for this training. %s: %s", name, error)


def _refuse_compiled(args: TrainingArguments) -> None:
    if args.torch_compile:
        raise ConfigError(
            'source="train_batch" cannot look into a compiled forward, got torch_compile=True; use source="probe"'
        )


def _wrapped(trainer: Trainer | None, model: nn.Module) -> nn.Module:
    """The model with the `DistributedDataParallel` that the Trainer put around it, which no event carries."""
    wrapped = getattr(trainer, "model_wrapped", None)
    return wrapped if isinstance(wrapped, nn.Module) and unwrapped(wrapped) is model else model


def _probe_length(model: nn.Module) -> int:
    """Tokens of a probe sequence that nobody specified."""
    return min(LENGTH, context_length(model) or LENGTH)


def default_probe(trainer: Trainer | None, train_dataloader: Any, tokenizer: Any, length: int) -> Probe:
    """The probe nobody specified: evaluation rows, else rows of a map-style training set, else built-in passages.

    A dataset that cannot give rows of tokens, for whatever reason, is passed over.

    Raises:
        ConfigError: If none of them can be had.
    """
    evaluation: Any = getattr(trainer, "eval_dataset", None)
    if isinstance(evaluation, dict):
        evaluation = next(iter(evaluation.values()), None)
    training: Any = getattr(train_dataloader, "dataset", None)
    datasets: list[tuple[Any, str]] = [(evaluation, "evaluation data"), (training, "training data")]
    for dataset, source in datasets:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            continue
        with suppress(Exception), random_states_kept(torch.device("cpu")):
            return Probe.from_rows((dataset[i] for i in range(len(dataset))), length=length, source=source)
    if tokenizer is None:
        raise ConfigError(
            "a probe needs evaluation or training rows with `input_ids`, or a `processing_class` for the built-in "
            "passages, and this Trainer has neither; pass probe=Probe.from_texts(texts, tokenizer)"
        )
    return Probe.builtin(tokenizer, length=length)


def _carried(state: TrainerState) -> dict[str, Any]:
    """What the Trainer's state saves for callbacks: JSON by name, which transformers types as a list."""
    carried: Any = state.stateful_callbacks
    return carried if isinstance(carried, dict) else {}


def _known(state: TrainerState) -> dict[str, Any]:
    """What a callback of an earlier life put there; nothing where there was none."""
    known = _carried(state).get(STATE_KEY)
    return known if isinstance(known, dict) else {}


def _known_alerts(state: TrainerState) -> list[str]:
    """Keys of the alerts that an earlier life told."""
    told = _known(state).get("told")
    return told_in(map(str, told)) if isinstance(told, list) else []


def _holds_run(path: Path) -> bool:
    return (path / META).is_file()


def _measured(path: Path, until: int) -> int:
    """How many measurements up to this step the run in ``path`` holds, -1 where there is none that can be read."""
    if not _holds_run(path):
        return -1
    try:
        with Run.open(path) as run:
            return int((run.steps <= until).sum())
    except StoreError:
        return -1


def _free(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, … that is not there or empty."""
    candidate, number = path, 1
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
