"""The measurement of a step with what is read besides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ma_monitor.measure.distributed import Team
from ma_monitor.measure.forward import measure, reading_layers, undisturbed_forward
from ma_monitor.measure.layers import find_layers
from ma_monitor.measure.phenomena.base import Reader
from ma_monitor.measure.probe import Probe
from ma_monitor.phenomena import METRICS
from ma_monitor.runs.records import Measurements

READERS = {
    "kurtosis": ("kurtosis", "KurtosisReader"),
    "outliers": ("outliers", "OutliersReader"),
    "super_weights": ("super_weights", "SuperWeightsReader"),
    "emergence": ("emergence", "EmergenceReader"),
    "sinks": ("sinks", "SinksReader"),
    "compression": ("compression", "CompressionReader"),
}
"""Phenomenon → its module in this folder and the class that reads it."""


def measure_with(
    model: nn.Module,
    probe: Probe,
    step: int,
    *,
    k: int,
    phenomena: Sequence[str],
    failed: Callable[[str, Exception], None],
    batch_size: int | None = None,
    team: Team | None = None,
) -> Measurements:
    """The measurements of h_0 … h_L, as `measure` gives them, with phenomena read in the same forwards.

    Args:
        model: As for `measure`, like ``probe``, ``step``, ``k``, ``batch_size`` and ``team``.
        probe: What to run.
        step: Optimizer updates done.
        k: Largest entries kept per sequence.
        phenomena: Names from `ma_monitor.phenomena.PHENOMENA`.
        failed: Told of each phenomenon that could not be read, and why; its metrics are left out or NaN then.
        batch_size: Sequences per forward; None for all at once.
        team: The processes that measure with this one.

    Raises:
        ModelError: As `measure`.
    """
    team = team or Team()
    batches = torch.split(torch.from_numpy(probe.ids), batch_size or len(probe.ids))
    readers = [reader for name in phenomena if (reader := _made(name, model, team, failed)) is not None]
    found: dict[str, list[dict[str, Tensor]]] = {reader.name: [] for reader in readers}
    with _along(model, [reader for reader in readers if reader.tokens is None], found):
        measurements = measure(model, probe, step, k=k, batch_size=batch_size, team=team)
    for reader in readers:
        if reader.tokens is not None:
            for turn in team.turns(len(batches)):
                with _along(model, [reader], found):
                    _short_forward(reader, model, batches[min(turn, len(batches) - 1)])
    together: dict[str, NDArray[np.float64]] = {}
    for reader in readers:
        together |= _merged(reader, found[reader.name], batches, team)
        if reader.failure is not None:
            failed(reader.name, reader.failure)
    return replace(measurements, phenomena=together)


def _made(name: str, model: nn.Module, team: Team, failed: Callable[[str, Exception], None]) -> Reader | None:
    """A reader of this model; None where the model has not what is to be read, on one process or on all."""
    module, kind = READERS[name]
    made: type[Reader] = getattr(import_module(f"ma_monitor.measure.phenomena.{module}"), kind)
    inner = getattr(model, "_orig_mod", model)
    try:
        return team.agreed(lambda: made(inner, find_layers(inner)))
    except Exception as fault:
        failed(name, fault)
        return None


def _short_forward(reader: Reader, model: nn.Module, batch: Tensor) -> None:
    """The forward that a reader has of its own; run also where it has failed, since other processes may wait in it."""
    try:
        undisturbed_forward(model, batch[:, : reader.tokens])
    except Exception as fault:
        reader.failure = reader.failure or fault


@contextmanager
def _along(model: nn.Module, readers: Sequence[Reader], found: dict[str, list[dict[str, Tensor]]]) -> Iterator[None]:
    """While open, every forward of the model is read, and adds to each reader's finds."""
    if not readers:
        yield
        return
    inner: Any = getattr(model, "_orig_mod", model)
    hidden = [(reader, reader.caught(reader.hidden)) for reader in readers]

    def read(row: int, value: Any) -> None:
        stream: Any = value[0] if isinstance(value, (tuple, list)) and value else value
        if not isinstance(stream, Tensor) or stream.ndim != 3:
            return  # the measurement says what is wrong
        gather = getattr(stream, "full_tensor", None)  # of a `DTensor`
        whole = stream if gather is None else gather()
        for _, see in hidden:
            see(row, whole.detach())

    def begin(*_: Any) -> None:
        seen.clear()

    def end(*_: Any) -> None:
        for reader in readers:
            values: dict[str, Tensor] = {}
            reader.caught(lambda kept=values, of=reader: kept.update(of.values()))()
            found[reader.name].append(values)

    with ExitStack() as hooks:
        for reader in readers:
            hooks.enter_context(reader.hooks())
        seen = hooks.enter_context(reading_layers(find_layers(inner), read))
        hooks.callback(inner.register_forward_pre_hook(begin).remove)
        hooks.callback(inner.register_forward_hook(end).remove)
        yield


def _merged(
    reader: Reader, found: Sequence[dict[str, Tensor]], batches: Sequence[Tensor], team: Team
) -> dict[str, NDArray[np.float64]]:
    """Every process's finds of a reader as a number for all sequences, ``[R]`` or ``[R, m]``; NaN where it failed."""
    sequences = sum(map(len, batches))
    merged = {}
    for key, size in reader.sizes.items():
        whole = np.zeros((reader.rows, sequences, size))
        for number, turn in enumerate(team.turns(len(batches))):
            if turn < len(batches):
                mine = whole[:, turn * len(batches[0]) :][:, : len(batches[turn])]
                mine[...] = np.nan
                if reader.failure is None and key in found[number]:
                    reader.caught(_fill)(mine, found[number][key])
        bits = team.merged(torch.from_numpy(whole.view(np.int64))).numpy().view(np.float64)
        reduced = _common(bits) if METRICS[key].index else _mean(bits)
        merged[key] = reduced[:, 0] if size == 1 else reduced
    return merged


def _fill(numbers: NDArray[np.float64], values: Tensor) -> None:
    """Takes over what one forward showed, ``[R, b, m]``."""
    numbers[...] = values.cpu().double().numpy().reshape(numbers.shape)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the sequences that have a number, ``[R, n, m]`` → ``[R, m]``; NaN where none has."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(axis=1) / known.sum(axis=1))


def _common(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What more than half of the sequences have, ``[R, n, m]`` → ``[R, m]``; NaN where there is nothing such."""
    middle = np.sort(values, axis=1)[:, values.shape[1] // 2]
    return np.where(2 * (values == middle[:, None]).sum(axis=1) > values.shape[1], middle, np.nan)
