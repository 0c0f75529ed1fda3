"""What every sink gets and what it must do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ma_monitor.sinks.alerts import Alert

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """A small table: column names and rows of plain values (None = not known)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Emission:
    """What one measurement gives to look at.

    Attributes:
        step: Optimizer updates done.
        scalars: Key → Python float. Keys such as ``ma/ratio/layer_07``.
        images: Key → RGB picture ``[height, width, 3]``, uint8.
        tables: Key → table.
        config: Facts of the run for a dashboard's configuration; only on a process's first emission, else empty.
        summary: What the run has come to so far, for a dashboard's list of runs; where fit and forecast were due.
        alerts: What deserves attention. An emission may consist of nothing else.
    """

    step: int
    scalars: dict[str, float]
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    config: dict[str, Cell] = field(default_factory=dict)
    summary: dict[str, Cell] = field(default_factory=dict)
    alerts: tuple[Alert, ...] = ()


class Sink(Protocol):
    """Somewhere to show emissions. A sink may raise; whoever calls it decides what that means.

    One with an attribute ``pictures`` that is False shows neither pictures nor tables; where all sinks are such, none
    are made.
    """

    name: str

    def emit(self, emission: Emission) -> None:
        """Shows one emission."""

    def close(self) -> None:
        """Flushes; never closes what the sink does not own, and may be called twice."""


class MemorySink:
    """Keeps what it is given: for tests and notebooks."""

    def __init__(self) -> None:
        """Starts empty."""
        self.name = "memory"
        self.emissions: list[Emission] = []

    def emit(self, emission: Emission) -> None:
        """Keeps the emission."""
        self.emissions.append(emission)

    def close(self) -> None:
        """Does nothing."""
