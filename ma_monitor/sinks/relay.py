"""Emissions into any other reporter of the Trainer, through that reporter's own ``on_log``."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ma_monitor.sinks.base import Emission

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RelaySink:
    """Hands the scalars of an emission to one reporting callback, as if the Trainer had logged them.

    The reporter gets copies of the Trainer's state and control: whatever it does with them, the Trainer's own log,
    evaluation and save of this step take place, and ``state.log_history`` stays as it is. (``Trainer.log`` would fill
    the history and, in ``on_step_end``, cancel the Trainer's own log of the step.)

    DVCLive counts calls of ``on_log`` instead of taking the Trainer's step, so its axis counts emissions as well.
    """

    def __init__(
        self,
        callback: TrainerCallback,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
    ) -> None:
        """Takes what the present event gave; a relay is good for that event only.

        Args:
            callback: The reporter.
            args: The Trainer's arguments.
            state: The Trainer's state.
            control: The Trainer's control.
            model: The model, which some reporters read when they set themselves up.
        """
        self.name = type(callback).__name__
        self.pictures = False
        self._callback = callback
        self._args = args
        self._state = state
        self._control = control
        self._model = model

    def emit(self, emission: Emission) -> None:
        """Calls the reporter's ``on_log`` with the scalars as Python floats, at the emission's step."""
        if not emission.scalars:
            return
        state = copy.copy(self._state)
        state.log_history = list(state.log_history)
        state.global_step = emission.step
        logs = {key: float(value) for key, value in emission.scalars.items()}
        self._callback.on_log(self._args, state, copy.copy(self._control), logs=logs, model=self._model)

    def close(self) -> None:
        """Does nothing: the reporter is the Trainer's."""
