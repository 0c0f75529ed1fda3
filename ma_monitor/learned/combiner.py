"""What past runs teach the forecast: quantile boosting on the members' forecasts, mixed with the run's own mixture.

From inputs without units (each member's change of ln ratio, the shape of what was seen in e-folds of time, the
schedule) gradient-boosted trees say the 10, 50 and 90 % quantiles of the change still to come, relative to a scale that
grows with the horizon. Their say is the larger the less of the run has been seen, and fades where the run is unlike
every past one; where it has faded the in-run mixture answers, with a wider band. Bands are widened so that they hold
what they promise on runs left out (split conformal calibration).

The packaged model is plain JSON with its data card; XGBoost made the trees and is not needed to use them. Axes as in
``numerics.members``, and ``K`` knots between now and the planned end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError
from ma_monitor.learned.boosting import Trees, read_trees
from ma_monitor.learned.inputs import NAMES, STATE, Inputs, inputs_of
from ma_monitor.numerics.mixture import Correction, Mixture
from ma_monitor.runs.documents import COMBINER
from ma_monitor.runs.files import read_json, replace_file
from ma_monitor.runs.log import SCHEMA_VERSION

Floats = NDArray[np.float64]

KNOTS = 12
"""Steps between now and the planned end at which the trees are asked; between them their answer is interpolated."""
HALF_SEEN = 0.3
"""Share of the run after which the trees and the run's own mixture count the same."""
UNLIKE_WIDER = 1.3
"""Factor on the band of a run unlike all past ones."""
FLAT = 0.1
"""Layers that moved less than this in ln ratio are left to their own mixture, those that moved twice as far are not."""
LENGTHS = (2500, 5000)
"""Planned updates at which kinds of run begin; each is calibrated with runs of its own kind where they are enough."""
LONGER_WIDER = 1.5
"""What an e-fold of length beyond that of past runs adds to the band, times the square of the trees' share."""


@dataclass(frozen=True, eq=False)
class Combiner:
    """Trees and what is needed to use them.

    Attributes:
        document: XGBoost's JSON of the trees.
        trees: The same as they are followed: 10, 50 and 90 % quantiles of the scaled change, from ``inputs.NAMES``.
        widen: Factor on the distances of the band's lower and upper ends from the median, by planned length
            (``LENGTHS``) and share of the run seen (``part_of``), ``[3, 3, 2]``.
        centre: Medians of the state's inputs over past runs, ``[S]``.
        spread: Their spreads, ``[S]``.
        states: States of past runs in these units, ``[N, S]``.
        usual: Distance to the nearest state of another run that 95 % of past layers keep.
        length: Planned updates that nine of ten past configurations keep within. A longer run has time for what none of
            them could show, so that its band is wider.
        card: How it was made, of what, and what it is not for.
    """

    document: dict[str, Any]
    trees: Trees
    widen: Floats
    centre: Floats
    spread: Floats
    states: Floats
    usual: float
    length: float
    card: dict[str, Any]

    def correct(self, mixture: Mixture, end: int | None) -> Correction:
        """What past runs change in a run's own mixture.

        Where the schedule or the end is not known nothing is said but why.
        """
        now = float(mixture.steps[-1])
        if end is None or mixture.clock.name != "learning_rate":
            return Correction.none("the in-run mixture alone: no schedule that has moved, or no end, is known")
        if end <= now:
            return Correction.none("the in-run mixture alone: the planned end is reached")
        return self.correct_at(inputs_of(mixture, knots_of(now, end), end))

    def correct_at(self, inputs: Inputs) -> Correction:
        """The same at given knots."""
        layers, knots, _ = inputs.values.shape
        distance = self._distance(inputs.state)
        alike = float(np.clip(2 - np.median(distance) / self.usual, 0.0, 1.0))
        weight = alike / (1 + inputs.seen / HALF_SEEN)
        moves = np.clip(inputs.movement / FLAT - 1, 0.0, 1.0)[:, None]  # what does not move is no new training
        low, middle, high = _predict(self.trees, inputs.values.reshape(layers * knots, -1)).reshape(3, layers, knots)
        centre = inputs.now[:, None] + middle * inputs.scale
        longer = float(np.log(max(1.0, inputs.planned / self.length)))
        wider = (1 + (UNLIKE_WIDER - 1) * (1 - alike)) * (1 + LONGER_WIDER * longer * weight**2)
        below, above = (
            wider * (1 + moves * (factor - 1)) for factor in self.widen[kind_of(inputs.planned), part_of(inputs.seen)]
        )
        own = moves * weight
        return Correction(
            ahead=inputs.ahead,
            shift=own * (centre - inputs.mixture[1]),
            below=below * _blend(own, (middle - low) * inputs.scale, inputs.mixture[1] - inputs.mixture[0]),
            above=above * _blend(own, (high - middle) * inputs.scale, inputs.mixture[2] - inputs.mixture[1]),
            weight=float(own.mean()),
            words=_words(alike, moves=bool(moves.any())) + (", longer than most: a wider band" if longer > 0 else ""),
        )

    def _distance(self, state: Floats) -> Floats:
        """Distance of states ``[L, S]`` to the nearest past one, ``[L]``."""
        return nearest((state - self.centre) / self.spread, self.states)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "card": self.card,
            "inputs": list(NAMES),
            "widen": self.widen.round(4).tolist(),
            "centre": self.centre.round(5).tolist(),
            "spread": self.spread.round(5).tolist(),
            "states": self.states.round(3).tolist(),
            "usual": round(self.usual, 4),
            "length": self.length,
            "trees": self.document,
        }


def from_dict(document: dict[str, Any]) -> Combiner:
    """What ``Combiner.to_dict`` wrote.

    Raises:
        ValueError: If it is of another version, or for other inputs than this version's.
    """
    if document["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {document['schema_version']!r}, this ma_monitor reads {SCHEMA_VERSION}")
    if document["inputs"] != list(NAMES):
        raise ValueError("it is for other inputs than this version's; train it again")
    trees = read_trees(document["trees"], len(NAMES))
    if trees.base.size != 3:
        raise ValueError("its trees give other outputs than three quantiles")
    widen, centre, spread, states = (
        np.array(document[key], dtype=float) for key in ("widen", "centre", "spread", "states")
    )
    size, whole = len(STATE), (len(LENGTHS) + 1, 3, 2)
    widen = np.broadcast_to(widen, whole) if widen.shape == whole[1:] else widen  # of before lengths were told apart
    if (widen.shape, centre.shape, spread.shape, states.shape[1:]) != (whole, (size,), (size,), (size,)):
        raise ValueError("its arrays have other shapes than this version's")
    usual, length = float(document["usual"]), float(document["length"])
    finite = all(np.isfinite(values).all() for values in (widen, centre, spread, states, usual, length))
    if not finite or min(widen.min(), spread.min(), usual, length) <= 0:
        raise ValueError("its numbers must be finite, and its widths above 0")
    return Combiner(document["trees"], trees, widen, centre, spread, states, usual, length, document["card"])


def load(path: Path) -> Combiner:
    """Reads a combiner's file.

    Raises:
        ConfigError: If it is not one of this version's.
    """
    try:
        return from_dict(read_json(path))
    except Exception as error:  # json and numpy raise anything on what is cut short or hostile
        why = (str(error) or repr(error)).splitlines()[0][:200]
        raise ConfigError(
            f"a combiner must be a file that `ma-monitor learn` wrote; {path.name} is not: {why}"
        ) from error


def adopt(file: str | None, folder: Path) -> None:
    """Copies a combiner, where there is one, into a run's directory, whose forecasts then use it."""
    if file is not None and Path(file).resolve() != (folder / COMBINER).resolve():
        data = Path(file).read_bytes()
        replace_file(folder / COMBINER, lambda new: new.write_bytes(data))


def knots_of(now: float, end: int) -> Floats:
    """Steps after ``now`` up to ``end`` at which a correction is worked out."""
    return np.unique(np.ceil(np.linspace(now, end, KNOTS + 1)[1:]))


def _predict(trees: Trees, values: Floats) -> Floats:
    """Quantiles in ascending order, ``[3, rows]``: trees of different quantiles may cross."""
    return np.sort(trees.predict(values).T, axis=0)


def _blend(weight: Floats, learned: Floats, own: Floats) -> Floats:
    """Width of the mixed band as a factor on the in-run mixture's own."""
    return np.asarray((weight * learned + (1 - weight) * own) / np.maximum(own, 1e-9))


def part_of(seen: float) -> int:
    """Which of the calibration's three parts of a run this share lies in."""
    return int(np.searchsorted((0.25, 0.5), seen, side="right"))


def kind_of(planned: int) -> int:
    """Which of the calibration's three kinds of run this length makes: a tenth of a long one tells less of the rest."""
    return int(np.searchsorted(LENGTHS, planned, side="right"))


def nearest(states: Floats, among: Floats) -> Floats:
    """Distance of states ``[L, S]`` to the nearest of others ``[N, S]``, ``[L]``."""
    return np.asarray(np.sqrt(((states[:, None] - among[None]) ** 2).mean(axis=2).min(axis=1)))


def _words(alike: float, *, moves: bool) -> str:
    if alike == 0:
        return "the in-run mixture alone: this run is unlike every past one"
    if not moves:
        return "the in-run mixture alone: nothing has moved yet"
    return "past runs and the in-run mixture" + ("" if alike == 1 else ", which counts more: this run is unusual")
