"""Is this normal? A run's ratios beside those of past runs at the same relative depth and share of the training.

``data/reference.json`` holds quantiles of the ratio (Eq. 8) over past runs, those trained on GPUs and tiny ones trained
on CPUs apart; ``benchmarks/make_reference.py`` makes it. The past runs are few and small, and `Standing` says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.values import none_if_not_finite

Floats = NDArray[np.float64]

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Levels of the quantiles."""
SHARES = tuple(float(f"{share:.3g}") for share in np.geomspace(0.004, 1.0, 12))
"""Shares of the planned updates at which past runs are compared."""
PAPER = {"Pythia-14M": 83, "Pythia-1.4B": 2350, "Pythia-12B": 3200}
"""Largest ratio of a layer at step 143,000 in the paper (Figure 3)."""


@dataclass(frozen=True, eq=False)
class PastRuns:
    """What past runs of one kind showed.

    Attributes:
        kind: ``GPU`` or ``CPU``.
        runs: How many.
        parameters: Of the smallest and the largest model.
        steps: Updates of the shortest and the longest.
        largest: Largest ratio of any.
        quantiles: Ratio at ``LEVELS`` over the layers of the first, second and last third of depth, every run counting
            alike, at ``SHARES``: ``[3, len(LEVELS), len(SHARES)]``.
    """

    kind: str
    runs: int
    parameters: tuple[int, int]
    steps: tuple[int, int]
    largest: float
    quantiles: Floats

    def at(self, thirds: NDArray[np.intp], share: float) -> Floats:
        """Quantiles of layers in these thirds ``[L]`` at a share of the training: ``[L, len(LEVELS)]``."""
        rows = np.log(self.quantiles).reshape(-1, len(SHARES))
        now = [np.interp(math.log(share), np.log(SHARES), row) for row in rows]
        return np.asarray(np.exp(now).reshape(3, len(LEVELS))[thirds])


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a run's layers stand among those of past runs.

    Attributes:
        share: Of the planned updates, done.
        past: The past runs, of the kind nearest in size.
        ratios: Of the run, ``[L]``.
        quantiles: Of past runs' layers at the same depth and share, at ``LEVELS``: ``[L, len(LEVELS)]``.
        above: The highest of ``LEVELS`` that each ratio is above, 0 where none, None where it is no number.
        times_larger: Parameters over those of the largest past run; None where not known.
    """

    share: float
    past: PastRuns
    ratios: Floats
    quantiles: Floats
    above: tuple[float | None, ...]
    times_larger: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = [f"p{100 * level:.0f}" for level in LEVELS]
        layers = [
            {"layer": layer, "ratio": none_if_not_finite(ratio), "above": above, **dict(zip(names, row, strict=True))}
            for layer, (ratio, above, row) in enumerate(
                zip(self.ratios, self.above, self.quantiles.tolist(), strict=True), start=1
            )
        ]
        past = {key: value for key, value in vars(self.past).items() if key != "quantiles"}
        return {
            "share": self.share,
            "times_larger": self.times_larger,
            "past_runs": past,
            "layers": layers,
            "paper": PAPER,
        }


def standing(ratios: Floats, share: float, parameters: int | None) -> Standing | None:
    """Where layers stand; None in the first moments of a training, and beyond its end.

    Args:
        ratios: Ratios of layers 1 … L, ``[L]``.
        share: Of the planned updates, done.
        parameters: Of the model; the larger past runs are taken where it is not known.
    """
    if not SHARES[0] <= share <= SHARES[-1]:
        return None
    past = min(reference(), key=lambda kind: _distance(parameters or math.inf, kind.parameters))
    quantiles = past.at(thirds(len(ratios)), share)
    beyond = ratios[:, None] > quantiles
    above = tuple(
        None if math.isnan(ratio) else float(np.max(LEVELS, where=row, initial=0.0))
        for ratio, row in zip(ratios, beyond, strict=True)
    )
    return Standing(share, past, ratios, quantiles, above, parameters and parameters / past.parameters[1])


def thirds(layers: int) -> NDArray[np.intp]:
    """Which third of the depth each layer is in, 0 … 2, ``[layers]``."""
    return np.asarray(3 * (np.arange(layers) + 0.5) / layers, dtype=np.intp)


@cache
def reference() -> tuple[PastRuns, ...]:
    """The packaged reference, a kind of past runs each."""
    document = json.loads(resources.files(__package__).joinpath("data/reference.json").read_text(encoding="utf-8"))
    return tuple(PastRuns(**{**kind, "quantiles": np.array(kind["quantiles"])}) for kind in document["kinds"])


def _distance(parameters: float, sizes: Sequence[int]) -> float:
    """How far a model's size is from the sizes of past runs, as a factor: 1 within them."""
    return max(1.0, min(sizes) / parameters, parameters / max(sizes))
