"""Measured trainings of many shapes, packed into one file: what the predictor learns from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ma_monitor.architecture.features import Shape
from ma_monitor.errors import SourceError
from ma_monitor.numerics.clock import learning_rate_clock

Floats = NDArray[np.float64]
PACKAGED = Path(__file__).with_name("data") / "sweep.npz"
UNREADABLE = (OSError, EOFError, KeyError, ValueError, TypeError, BadZipFile)
"""What numpy raises on an archive that is not there, cut short, foreign, pickled, or lacks something."""
DIGITS = 12
"""Bits of a measurement's fraction that are kept: its rounding is 0.01 %, far below the noise."""


@dataclass(frozen=True, eq=False)
class Training:
    """One training of the sweep.

    Attributes:
        name: Its name.
        kind: ``gpu`` or ``cpu``: two sweeps of different sizes, texts' shares and rates, scored apart.
        shape: What was trained.
        seed: Of weights and data order.
        schedule: Name of the learning-rate schedule.
        batch: Tokens an update.
        lr: Rate of the update from s to s + 1, ``[total_steps + 1]``.
        steps: Measured steps, ``[T]``.
        means: Means over the probe's sequences of the largest entries and last the median, ``[T, k + 1, L]``.
    """

    name: str
    kind: str
    shape: Shape
    seed: int
    schedule: str
    batch: int
    lr: Floats
    steps: NDArray[np.int64]
    means: Floats

    @property
    def ratios(self) -> Floats:
        """Largest entry over median (paper, Eq. 8), ``[L, T]``."""
        return np.asarray((self.means[:, 0] / self.means[:, -1]).T)

    @cached_property
    def clock(self) -> Floats:
        """Share of all updates, each weighed by its rate, that was done at each measured step: ``[T]``, 0 … 1."""
        clock = learning_rate_clock(self.lr)
        return np.asarray(clock.time(self.steps) / clock.time(len(self.lr) - 1))


def save_sweep(trainings: Sequence[Training], path: Path) -> None:
    """Packs trainings; equal steps and rates of one shape are kept once, measurements to ``DIGITS`` bits."""
    arrays: dict[str, NDArray[Any]] = {}
    curves: list[NDArray[np.float32]] = []
    measured: dict[bytes, int] = {}
    facts = []
    for number, one in enumerate(trainings):
        peak = float(one.lr.max())
        curve = (one.lr / peak).astype(np.float32)
        same = [
            i for i, other in enumerate(curves) if other.shape == curve.shape and np.allclose(other, curve, 0, 1e-6)
        ]
        if not same:
            curves.append(curve)
        steps = one.steps.astype(np.int32)
        kept = measured.setdefault(steps.tobytes(), len(measured))
        facts.append(
            {
                "name": one.name,
                "kind": one.kind,
                "seed": one.seed,
                "schedule": one.schedule,
                "batch": one.batch,
                "rate": peak,
                "curve": same[0] if same else len(curves) - 1,
                "steps": kept,
                "shape": one.shape.to_dict(),
            }
        )
        fraction, exponent = np.frexp(one.means)
        rounded = np.ldexp(np.round(fraction * 2**DIGITS) / 2**DIGITS, exponent)
        arrays |= {f"steps_{kept}": steps, f"means_{number}": rounded.astype(np.float32)}
    arrays |= {f"curve_{i}": curve for i, curve in enumerate(curves)}
    np.savez_compressed(path, allow_pickle=False, facts=json.dumps(facts), **arrays)


def load_sweep(path: Path = PACKAGED) -> tuple[Training, ...]:
    """Trainings that `save_sweep` packed; by default the packaged ones.

    Raises:
        SourceError: If the file is not there or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            facts: list[dict[str, Any]] = json.loads(str(data["facts"]))
            return tuple(_training(fact, number, data) for number, fact in enumerate(facts))
    except UNREADABLE as error:
        raise SourceError(
            f"{path}: a sweep is an .npz that this package wrote, and this cannot be read ({error})"
        ) from error


def _training(fact: dict[str, Any], number: int, data: Any) -> Training:
    return Training(
        name=fact["name"],
        kind=fact["kind"],
        shape=Shape(**fact["shape"]),
        seed=fact["seed"],
        schedule=fact["schedule"],
        batch=fact["batch"],
        lr=fact["rate"] * data[f"curve_{fact['curve']}"].astype(np.float64),
        steps=data[f"steps_{fact['steps']}"].astype(np.int64),
        means=data[f"means_{number}"].astype(np.float64),
    )
