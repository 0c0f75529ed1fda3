"""Trainer events → Monitor. No arithmetic and no metric names here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import ConfigError, StoreError
from ma_monitor.measure.forward import random_states_kept
from ma_monitor.measure.layers import context_length, needs_every_rank
from ma_monitor.measure.probe import LENGTH, Probe
from ma_monitor.monitor import Monitor
from ma_monitor.runs.store import Run
from ma_monitor.sinks.trainer import TrainerSinks, find_handler

if TYPE_CHECKING:
    from torch import nn
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
        """
        self.config = config or MonitorConfig()
        self.monitor: Monitor | None = None
        self._probe = probe
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._trainer: Trainer | None = None
        self._reporters = TrainerSinks()

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
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
        main = bool(state.is_world_process_zero)
        if not main and not needs_every_rank(model):
            return
        trainer, checkpoint = _training_loop()
        with self._guarded():
            self.monitor = self._opened(args, state, model, kwargs, trainer or self._trainer, checkpoint, main)
            self._remember(state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the state before the first update, when every reporter is open."""
        self._step(args, state, control, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures where due, and at the last step while weights and reporters are still those of the training."""
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
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if monitor is None or monitor.run is None or not folder.is_dir():
            return
        try:
            monitor.run.copy_to(folder / CHECKPOINT_COPY)
        except Exception as error:
            if self.config.strict:
                raise
            monitor.fault("copying the run into the checkpoint", error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the run. Nothing is measured: the best model may have been loaded, and the writers are closed."""
        if self.monitor is not None:
            self.monitor.sinks = ()
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
        with self._guarded():
            monitor.model = model
            handler = self._trainer.callback_handler if self._trainer is not None else find_handler()
            monitor.sinks = self._reporters(handler, args, state, control, model)
            monitor.step(state.global_step, final=final, force=force)
            self._remember(state)

    def _opened(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        event: dict[str, Any],
        trainer: Trainer | None,
        checkpoint: Path | None,
        main: bool,
    ) -> Monitor:
        probe = self._probe
        if probe is None:
            length = min(LENGTH, context_length(model) or LENGTH)
            probe = default_probe(trainer, event.get("train_dataloader"), event.get("processing_class"), length)
        path = self._run_dir or Path(str(args.output_dir)) / "ma_monitor"
        resume_from = None
        if main:
            path, resume_from = self._place(path, args, state, checkpoint)
        settings: dict[str, Any] = {
            "schedule": event.get("lr_scheduler"),
            "total_steps": state.max_steps,
            "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "writes": main,
        }
        try:
            return Monitor(model, probe, self.config, run_dir=path, resume_from=resume_from, **settings)
        except StoreError as refused:
            if self.config.strict or resume_from is None:
                raise
            fresh = _free(path)
            _LOGGER.warning("ma_monitor: %s A new run is begun in %s.", refused, fresh)
            return Monitor(model, probe, self.config, run_dir=fresh, **settings)

    def _place(
        self, path: Path, args: TrainingArguments, state: TrainerState, checkpoint: Path | None
    ) -> tuple[Path, int | None]:
        """Directory of the run, and the step from which it is continued (None for a new run)."""
        if state.global_step == 0:
            return _free(path), None
        known = _carried(state).get(STATE_KEY)
        known = known if isinstance(known, dict) else {}
        candidates = [path.with_name(Path(str(known.get("run", path.name))).name), path]
        wanted = known.get("measured", 0)
        for candidate in candidates:
            if _measured(candidate, state.global_step) >= wanted and _holds_run(candidate):
                return candidate, state.global_step
        copy = (checkpoint or Path(str(args.output_dir)) / f"checkpoint-{state.global_step}") / CHECKPOINT_COPY
        fresh = _free(path)
        if _holds_run(copy):
            with Run.open(copy) as run:
                run.copy_to(fresh)
            return fresh, state.global_step
        _LOGGER.warning(
            "ma_monitor: training resumes from step %d, but neither %s nor the checkpoint holds its run; "
            "a new one begins here",
            state.global_step,
            path,
        )
        return fresh, None

    def _remember(self, state: TrainerState) -> None:
        """Puts into the Trainer's state, which every checkpoint saves, what a resume needs."""
        if self.monitor is not None and self.monitor.run is not None:
            run = self.monitor.run
            _carried(state)[STATE_KEY] = {"run": run.path.name, "measured": len(run.steps)}

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Keeps a monitor that cannot be built or driven from the training."""
        try:
            yield
        except Exception as error:
            if self.config.strict:
                raise
            if self.monitor is not None:
                self.monitor.fault("monitoring", error)
            else:
                _LOGGER.warning("ma_monitor: monitoring is off for this training. %s: %s", type(error).__name__, error)


def default_probe(trainer: Trainer | None, train_dataloader: Any, tokenizer: Any, length: int) -> Probe:
    """The probe nobody specified: evaluation rows, else rows of a map-style training set, else built-in passages.

    Raises:
        ConfigError: If none of them can be had.
    """
    evaluation: Any = getattr(trainer, "eval_dataset", None)
    if isinstance(evaluation, dict):
        evaluation = next(iter(evaluation.values()), None)
    training: Any = getattr(train_dataloader, "dataset", None)
    datasets: list[tuple[Any, str]] = [(evaluation, "evaluation data"), (training, "training data")]
    for dataset, source in datasets:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            continue
        try:
            with random_states_kept(torch.device("cpu")):
                return Probe.from_rows((dataset[i] for i in range(len(dataset))), length=length, source=source)
        except ConfigError:
            continue
    if tokenizer is None:
        raise ConfigError(
            "a probe needs evaluation or training rows with `input_ids`, or a `processing_class` for the built-in "
            "passages, and this Trainer has neither; pass probe=Probe.from_texts(texts, tokenizer)"
        )
    return Probe.builtin(tokenizer, length=length)


def _training_loop() -> tuple[Trainer | None, Path | None]:
    """The Trainer that is calling, and the checkpoint it resumes from.

    No event carries either. Both are locals of the training loop's frame, which is private to transformers; where it
    is not found, ``attach`` and the default folder of checkpoints stand in.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop":
            trainer, checkpoint = frame.f_locals.get("self"), frame.f_locals.get("resume_from_checkpoint")
            if isinstance(trainer, Trainer):
                return trainer, Path(checkpoint) if isinstance(checkpoint, str) else None
        frame = frame.f_back
    return None, None


def _carried(state: TrainerState) -> dict[str, Any]:
    """What the Trainer's state saves for callbacks: JSON by name, which transformers types as a list."""
    carried: Any = state.stateful_callbacks
    return carried if isinstance(carried, dict) else {}


def _holds_run(path: Path) -> bool:
    return (path / "run.json").is_file()


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
