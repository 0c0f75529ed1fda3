"""The reporters of a Hugging Face Trainer as sinks.

A callback is told neither who else reports nor through what: adding keys to the ``logs`` of ``on_log`` reaches nobody,
as reporters come first, and ``Trainer.log`` has side effects on the training (see `RelaySink`). So the callback handler
is asked who reports, and each is served through its own public means: ``wandb.run``, ``tb_writer``, ``on_log``.

Everything that transformers does not promise is in this module: that the frame that calls a callback is
``CallbackHandler.call_event`` (`find_handler`) and the training loop's ``_inner_training_loop`` (`training_loop`), that
the handler keeps its callbacks in a list, ``callbacks``, and that ``INTEGRATION_TO_CALLBACK`` names the reporters.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from ma_monitor.sinks.base import Emission, Sink
from ma_monitor.sinks.relay import RelaySink
from ma_monitor.sinks.tensorboard import TensorBoardSink
from ma_monitor.sinks.wandb import WandbSink

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

_HELD = 4
"""Emissions kept for a reporter that is not open yet. One does for step 0; one that never opens must cost little."""


def find_handler() -> CallbackHandler | None:
    """The handler that is calling a callback right now, or None outside of a Trainer's event.

    Local variables are read of ``call_event``'s frame only. Before Python 3.13, reading those of the training loop's
    frame would keep the batch and the loss of that moment alive until the loop returns.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "call_event":
            owner = frame.f_locals.get("self")
            if isinstance(owner, CallbackHandler):
                return owner
        frame = frame.f_back
    return None


def is_reporter(callback: TrainerCallback) -> bool:
    """Whether transformers knows the callback as a reporter that takes scalars by ``on_log``."""
    known = isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values()))
    return known and type(callback).on_log is not TrainerCallback.on_log


def training_loop() -> tuple[Trainer | None, Path | None]:
    """The Trainer that is calling, and the checkpoint it resumes from; for ``on_train_begin`` only.

    No event carries either; both are locals of the training loop's frame. That frame holds no batch then, so reading
    it keeps nothing alive. Where it is not found, ``attach`` and the default folder of checkpoints stand in.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop":
            trainer, checkpoint = frame.f_locals.get("self"), frame.f_locals.get("resume_from_checkpoint")
            if isinstance(trainer, Trainer):
                return trainer, Path(checkpoint) if isinstance(checkpoint, str) else None
        frame = frame.f_back
    return None, None


class TrainerSinks:
    """The Trainer's reporters as sinks, looked up anew at each emission.

    A callback keeps one object of this class and asks it for the sinks of the moment whenever it has something to
    emit, in any event from ``on_train_begin`` until the last one before ``on_train_end``::

        handler = self._trainer.callback_handler if self._trainer else find_handler()
        sinks = self._reporters(handler, args, state, control, model)

    Reporters count however they came: by ``report_to``, as an instance, by ``add_callback``, before this callback or
    after it. One that is not open yet, as in the ``on_train_begin`` of a callback that comes before it, gets that
    emission together with its next one. One that has closed, in ``on_train_end``, is not opened again: that would make
    a second event file or W&B run. (In a hyperparameter search a W&B callback that comes later has the run of the
    previous trial still open in ``on_train_begin``; step 0 emitted in ``on_epoch_begin`` goes right always.)
    """

    def __init__(self) -> None:
        """Starts without sinks."""
        self._wandb = _WhenOpen("wandb", _active_run, WandbSink)
        self._tensorboard: dict[TensorBoardCallback, _WhenOpen] = {}

    def __call__(
        self,
        handler: CallbackHandler | None,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
    ) -> list[Sink]:
        """The sinks of this moment, none on ranks other than the first.

        Args:
            handler: The Trainer's callback handler. Without one, an active W&B run is the only sink there can be.
            args: The Trainer's arguments, as the event gave them.
            state: The Trainer's state.
            control: The Trainer's control, which no sink gets to change.
            model: The model.

        Returns:
            One sink a reporter. Those of W&B and TensorBoard are the same objects each time.
        """
        if not state.is_world_process_zero:
            return []
        if handler is None:
            return [self._wandb] if _active_run() is not None else []
        sinks: list[Sink] = []
        for callback in handler.callbacks:
            if isinstance(callback, WandbCallback):
                if self._wandb not in sinks:
                    sinks.append(self._wandb)
            elif isinstance(callback, TensorBoardCallback):
                sinks.append(self._of_tensorboard(callback))
            elif is_reporter(callback):
                sinks.append(RelaySink(callback, args, state, control, model))
        return sinks

    def _of_tensorboard(self, callback: TensorBoardCallback) -> _WhenOpen:
        """The sink of a TensorBoard callback, which may have no writer yet."""
        if callback not in self._tensorboard:
            self._tensorboard[callback] = _WhenOpen("tensorboard", lambda: callback.tb_writer, TensorBoardSink)
        return self._tensorboard[callback]


class _WhenOpen:
    """A sink for a run or writer that may not be open yet, and that may be replaced by another one."""

    def __init__(self, name: str, find: Callable[[], Any], make: Callable[[Any], Sink]) -> None:
        """Takes what finds the run or writer (None while there is none) and what makes a sink of it."""
        self.name = name
        self._find = find
        self._make = make
        self._target: Any = None
        self._sink: Sink | None = None
        self._held: deque[Emission] = deque(maxlen=_HELD)

    def emit(self, emission: Emission) -> None:
        """Shows the emission, after those that had to wait; or lets it wait."""
        self._held.append(emission)
        target = self._find()
        if target is None:
            return
        if self._sink is None or target is not self._target:
            self._sink, self._target = self._make(target), target
        while self._held:
            self._sink.emit(self._held.popleft())

    def close(self) -> None:
        """Flushes what has been opened."""
        if self._sink is not None:
            self._sink.close()


def _active_run() -> Any:
    """The active W&B run, without importing wandb for it; None if there is none."""
    return getattr(sys.modules.get("wandb"), "run", None)
