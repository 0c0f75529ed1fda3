"""What a reader of a phenomenon is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ma_monitor.phenomena import PHENOMENA


class Reader:
    """Reads one phenomenon in each forward of the probe.

    Nothing that a reader does may raise inside a forward, which may be a collective operation: what is hooked goes
    through `caught`, and a reader that has failed reads no more and gives NaN.

    Attributes:
        name: The phenomenon's.
        tokens: None to read along in the probe's forward; else the reader gets a forward of its own, of the first so
            many tokens of each sequence.
        failure: What went wrong, if anything did.
    """

    name: ClassVar[str]
    tokens: ClassVar[int | None] = None

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Looks at a model, whose blocks are ``layers``.

        Raises:
            ModelError: If the model has not what is to be read.
        """
        self.rows = len(layers) + 1
        self.failure: Exception | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Metric → how many numbers it has for a layer; known before any forward, and the same on every process."""
        return {metric.key: 1 for metric in PHENOMENA[self.name]}

    def hooks(self) -> AbstractContextManager[Any]:
        """Own hooks, there while a forward runs; by default none."""
        return nullcontext()

    def hidden(self, row: int, hidden: Tensor) -> None:
        """Sees h_row ``[b, S, d]``, rows in rising order, no gradients; by default does nothing."""

    def values(self) -> dict[str, Tensor]:
        """What this forward showed: metric → ``[R, b]`` or ``[R, b, m]``, any device. Called once after each."""
        raise NotImplementedError

    def caught(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, which does nothing once anything has failed and never raises."""

        def guarded(*args: Any, **kwargs: Any) -> None:
            if self.failure is None:
                try:
                    function(*args, **kwargs)
                except Exception as fault:
                    self.failure = fault

        return guarded


class StreamReader(Reader):
    """A reader for whose numbers one residual stream at a time is enough."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Needs nothing of the model."""
        super().__init__(model, layers)
        self._read: dict[str, list[Tensor]] = {}

    def of_stream(self, hidden: Tensor) -> dict[str, Tensor]:
        """The metrics ``[b]`` of a residual stream ``[b, S, d]`` of any floating type."""
        raise NotImplementedError

    def hidden(self, row: int, hidden: Tensor) -> None:
        """Reads it at once: nothing is kept but the numbers."""
        for key, values in self.of_stream(hidden).items():
            self._read.setdefault(key, []).append(values)

    def values(self) -> dict[str, Tensor]:
        """What was read, a row a residual stream."""
        read, self._read = self._read, {}
        return {key: torch.stack(rows) for key, rows in read.items()}
