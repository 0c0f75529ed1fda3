"""What is measured and what is known about a run, as frozen values.

Array axes, everywhere in the package: ``T`` measured steps, ``R`` layer rows, ``n`` probe sequences, ``k`` ranks.
A layer row is a layer number ``first_layer … first_layer + R - 1``: layer 0 is h_0, the first block's input, and
layer ℓ ≥ 1 is the output of the ℓ-th decoder block (paper, Eq. 1). Imported data have no layer 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError

Ratio = Literal["ratio_of_means", "mean_of_ratios"]
UNKNOWN = -1
"""Position, token or channel of an entry whose place is not known (imported data, or fewer than k finite entries)."""


@dataclass(frozen=True)
class Measurements:
    """The measurements of one step, a row a layer.

    Attributes:
        step: Optimizer updates done when the probe ran.
        top: Signed values of the k largest abs(h) of each sequence, largest first, ``[R, n, k]``; NaN where a
            sequence has fewer than k entries that are not NaN.
        position: Token position of each, ``[R, n, k]``.
        token: Token id at that position, ``[R, n, k]``.
        channel: Channel of each, ``[R, n, k]``.
        median: Lower median of abs(h) over all S·d entries of a sequence, NaN left out, ``[R, n]``.
        nan: Entries that are NaN, ``[R, n]``.
        inf: Entries that are infinite, ``[R, n]``.
        phenomena: What was read besides, by name (`ma_monitor.phenomena`), for all sequences (a mean; of an index what
            most agree on): a number a layer row, ``[R]``, or several, ``[R, m]``. NaN where a row has none.
    """

    step: int
    top: NDArray[np.float64]
    position: NDArray[np.int32]
    token: NDArray[np.int32]
    channel: NDArray[np.int32]
    median: NDArray[np.float64]
    nan: NDArray[np.int64]
    inf: NDArray[np.int64]
    phenomena: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that the arrays agree in shape.

        Raises:
            ConfigError: If the step is negative or a shape is not the one that ``top`` and ``median`` imply.
        """
        if self.step < 0:
            raise ConfigError(f"a step is the number of updates done and cannot be negative, got {self.step}")
        if self.top.ndim != 3:
            raise ConfigError(f"`top` must have the axes [layer, sequence, rank], got shape {self.top.shape}")
        for name in ("position", "token", "channel"):
            if getattr(self, name).shape != self.top.shape:
                raise ConfigError(
                    f"`{name}` must have the shape of `top`, {self.top.shape}, got {getattr(self, name).shape}"
                )
        for name in ("median", "nan", "inf"):
            if getattr(self, name).shape != self.top.shape[:2]:
                raise ConfigError(f"`{name}` must have the shape {self.top.shape[:2]}, got {getattr(self, name).shape}")
        for name, values in self.phenomena.items():
            if values.ndim not in (1, 2) or len(values) != len(self.top):
                raise ConfigError(
                    f"{name!r} must have the axes [layer] or [layer, number] of {len(self.top)} layers, "
                    f"got shape {values.shape}"
                )

    @classmethod
    def from_statistics(cls, step: int, top: NDArray[np.floating], median: NDArray[np.floating]) -> Measurements:
        """Measurements of which only magnitudes are known, as published data give them.

        Args:
            step: Optimizer updates done.
            top: ``[R, n, k]``, largest first.
            median: ``[R, n]``.
        """
        unknown = np.full(top.shape, UNKNOWN, dtype=np.int32)
        zero = np.zeros(median.shape, dtype=np.int64)
        return cls(step, top.astype(np.float64), unknown, unknown, unknown, median.astype(np.float64), zero, zero)


@dataclass(frozen=True)
class Trajectory:
    """The ratio of one layer against step: ``steps [T]`` and ``values [T]``."""

    layer: int
    rank: int
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """One thing read besides the measurements: ``steps [T]`` and ``values [T, R]`` or ``[T, R, m]``."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides whether two runs can be one. None where it is not known (imported data)."""

    name: str
    family: str | None
    layers: int
    width: int | None
    heads: int | None
    vocabulary: int | None
    parameters: int | None


@dataclass(frozen=True)
class ProbeInfo:
    """Identity of a probe: SHA-256 of its token ids (None for imported data), its shape and where the text is from."""

    hash: str | None
    sequences: int
    length: int | None
    source: str


@dataclass(frozen=True)
class RunMeta:
    """What is fixed for the whole of a run; a run is never continued under another one.

    Attributes:
        model: Shape of the model.
        probe: Identity of the probe.
        k: Ranks measured.
        first_layer: 0 where h_0 was measured, 1 for imported data.
        ratio: How sequences are reduced (``ratio_of_means`` is Eq. 8, ``mean_of_ratios`` Eq. 6 and 7).
        precision: Arithmetic of the probe's forward, such as ``float32`` or ``float32 under bfloat16 autocast``.
        versions: Package name → version when the run was made. Informative: may differ when a run is continued.
    """

    model: ModelShape
    probe: ProbeInfo
    k: int
    first_layer: int
    ratio: Ratio
    precision: str
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of layer rows R of every measurement."""
        return self.model.layers + 1 - self.first_layer


@dataclass(frozen=True)
class Plan:
    """What was planned at some step: how long the training is and how its learning rate goes.

    Attributes:
        from_step: First step at which this plan was in force (0, or the step of a resume).
        total_steps: Planned number of updates, None where unknown.
        lr: ``lr[s]``, rate of the update from s to s + 1 for s = 0 … planned end; None where unknown.
        batch: Sequences per update, None where unknown.
        schedule: The schedule in words, such as ``cosine`` or ``from trainer_state.json``.
        held: Whether rates to come are not known, and a known one is held in their place: a forecast is less sure.
    """

    from_step: int
    total_steps: int | None
    lr: NDArray[np.float64] | None
    batch: int | None
    schedule: str
    held: bool = False

    def same_as(self, other: Plan) -> bool:
        """Whether both plan the same future, whenever they came into force."""
        same_lr = (self.lr is None) == (other.lr is None) and (
            self.lr is None or other.lr is None or np.array_equal(self.lr, other.lr)
        )
        mine, theirs = ((plan.total_steps, plan.batch, plan.held) for plan in (self, other))
        return same_lr and mine == theirs
