"""How a monitor behaves: one frozen, validated value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ma_monitor.errors import ConfigError
from ma_monitor.phenomena import PHENOMENA
from ma_monitor.runs.records import Ratio

Source = Literal["probe", "train_batch"]

POWERS_OF_TWO = tuple(2**i for i in range(10))
"""Pythia's early checkpoints, 1 … 512: most of a trajectory's shape in log-step happens there."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """How a monitor behaves. The defaults work.

    Attributes:
        every: Updates between measurements. Step 0, Pythia's powers of two up to 512 and the last step come besides.
        k: Largest entries kept per sequence.
        ratio: How the probe's sequences are reduced: ``ratio_of_means`` (Eq. 8) or ``mean_of_ratios`` (Eq. 6 and 7).
        batch_size: Probe sequences per forward; None for all at once. With ``source="train_batch"``, how many sequences
            of a training batch are read; None for 10.
        source: What is read at due steps: the fixed ``probe``, or the training's own forward, ``train_batch``, which
            costs no forward of its own but has other text every time, padding included.
        phenomena: What to read besides, names from `ma_monitor.phenomena.PHENOMENA`; none by default.
        combiner: File that `ma-monitor learn` wrote, for forecasts that rest on past runs of your own; it is copied
            into the run's directory. None for the packaged one.
        strict: Raise what would otherwise be warned about once and recorded. For tests, never for a real training.
    """

    every: int = 100
    k: int = 3
    ratio: Ratio = "ratio_of_means"
    batch_size: int | None = None
    source: Source = "probe"
    phenomena: tuple[str, ...] = ()
    combiner: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ConfigError: If a value is outside its range.
        """
        for name in ("every", "k", "batch_size"):
            value = getattr(self, name)
            if value is None and name == "batch_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        for name, known in (("ratio", get_args(Ratio)), ("source", get_args(Source))):
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if isinstance(self.phenomena, str) or (unknown := set(self.phenomena) - set(PHENOMENA)):
            given = self.phenomena if isinstance(self.phenomena, str) else sorted(unknown)
            raise ConfigError(f"`phenomena` must be a tuple of {', '.join(map(repr, PHENOMENA))}, got {given!r}")
        if self.phenomena and self.source != "probe":
            raise ConfigError(f'phenomena are read in the probe\'s forward, which source="{self.source}" has not')

    def due(self, step: int) -> bool:
        """Whether a measurement is due at this step (the last step of a training is due besides)."""
        return step % self.every == 0 or step in POWERS_OF_TWO
