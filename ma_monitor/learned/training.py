"""Trains the learned correction on past runs, and calibrates its bands on runs left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError
from ma_monitor.learned.boosting import import_xgboost, read_trees
from ma_monitor.learned.combiner import LENGTHS, Combiner, kind_of, nearest, part_of
from ma_monitor.learned.inputs import NAMES, Inputs, inputs_of
from ma_monitor.numerics.clock import learning_rate_clock
from ma_monitor.numerics.mixture import make_mixture

Floats = NDArray[np.float64]

CUTOFFS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of every run from which the rest is forecast."""
KNOTS = 16
"""At most so many later measurements are compared, evenly chosen."""
LEAST_POINTS = 8
"""Measurements that must lie before a cutoff."""
FOLDS = 5
"""Parts of the configurations that are left out in turn, to calibrate."""
STATES = 400
"""At most so many states of past runs are kept, to tell how alike a run is."""
WIDER = 1.15
"""Factor on the calibrated band: runs to come are less alike to past ones than those are to each other."""
BAND = (0.1, 0.9)
TREES = 100
PARAMETERS = {
    "objective": "reg:quantileerror",
    "quantile_alpha": np.array([BAND[0], 0.5, BAND[1]]),
    "max_depth": 5,
    "eta": 0.08,
    "subsample": 0.5,
    "colsample_bytree": 0.5,
    "reg_lambda": 5.0,
    "min_child_weight": 100,
    "tree_method": "hist",
    "max_bin": 64,
    "nthread": 1,
    "seed": 0,
}


@dataclass(frozen=True, eq=False)
class PastRun:
    """A finished run.

    Attributes:
        configuration: Its name; runs that differ in nothing but the seed share it and are left out together.
        steps: Measured steps, ``[T]``.
        ratios: Ratios, ``[L, T]``, finite and above 0.
        lr: Rate of every update, ``[total_steps + 1]``.
    """

    configuration: str
    steps: Floats
    ratios: Floats
    lr: Floats


@dataclass(frozen=True, eq=False)
class Case:
    """A run as it was at a cutoff, and what came: ``came [L, K]`` in ln ratio."""

    run: int
    configuration: str
    inputs: Inputs
    came: Floats


def cases_of(run: PastRun, number: int = 0) -> list[Case]:
    """A run, one of a ``number``, at every cutoff that has enough points before it and any after."""
    clock, end = learning_rate_clock(run.lr), run.lr.size - 1
    out = []
    for cutoff in CUTOFFS:
        seen = int((run.steps <= cutoff * run.steps[-1]).sum())
        later = np.arange(seen, run.steps.size)
        if seen < LEAST_POINTS or not later.size or np.unique(clock.time(run.steps[:seen])).size < LEAST_POINTS:
            continue
        picked = later[np.unique(np.linspace(0, later.size - 1, KNOTS).astype(int))]
        mixture = make_mixture(clock, run.steps[:seen], run.ratios[:, :seen], float(end))
        inputs = inputs_of(mixture, run.steps[picked], end)
        out.append(Case(number, run.configuration, inputs, np.log(run.ratios[:, picked])))
    return out


def train(runs: Sequence[PastRun], *, card: Mapping[str, object] | None = None) -> Combiner:
    """Learns from finished runs.

    Raises:
        ConfigError: If there are fewer than ``2 · FOLDS`` configurations.
        MissingExtraError: If XGBoost is not installed.
    """
    _configurations(run.configuration for run in runs)
    return train_on([case for number, run in enumerate(runs) for case in cases_of(run, number)], card=card)


def train_on(cases: Sequence[Case], *, card: Mapping[str, object] | None = None) -> Combiner:
    """The same from cases made before (``cases_of``)."""
    names = _configurations(case.configuration for case in cases)
    np.random.default_rng(0).shuffle(names)
    fold = {name: i % FOLDS for i, name in enumerate(names)}
    centre, spread, states, usual = _states(cases)
    length = float(np.quantile([max(c.inputs.planned for c in cases if c.configuration == n) for n in names], 0.9))
    beyond: list[tuple[Case, Floats]] = []
    for left_out in range(FOLDS):
        document = _boost([case for case in cases if fold[case.configuration] != left_out])
        part = Combiner(
            document, read_trees(document, len(NAMES)), np.ones((3, 3, 2)), centre, spread, states, usual, length, {}
        )
        beyond += [(case, _beyond(part, case)) for case in cases if fold[case.configuration] == left_out]
    widen = WIDER * np.stack([_widths(beyond, kind) for kind in range(len(LENGTHS) + 1)])
    facts = {"runs": len({case.run for case in cases}), "configurations": len(names)}
    document = _boost(cases)
    trees, told = read_trees(document, len(NAMES)), {**facts, **(card or {})}
    return Combiner(document, trees, widen, centre, spread, states, usual, length, told)


def _configurations(names: Iterable[str]) -> list[str]:
    """Each once, in order, if they are enough."""
    found = sorted(set(names))
    if len(found) < 2 * FOLDS:
        raise ConfigError(
            f"a forecast learns from at least {2 * FOLDS} configurations with a known schedule, got {len(found)}; "
            "give more runs"
        )
    return found


def _boost(cases: Sequence[Case]) -> dict[str, Any]:
    """Trees for the scaled change to come; every case weighs the same."""
    xgboost = import_xgboost()
    values = np.concatenate([case.inputs.values.reshape(-1, len(NAMES)) for case in cases]).astype(np.float32)
    changes = [(case.came - case.inputs.now[:, None]) / case.inputs.scale for case in cases]
    weights = np.concatenate([np.full(change.size, 1 / change.size) for change in changes])
    data = xgboost.QuantileDMatrix(
        values,
        np.concatenate([change.ravel() for change in changes]),
        weight=weights / weights.mean(),
        max_bin=PARAMETERS["max_bin"],
        nthread=1,
    )
    document: dict[str, Any] = json.loads(bytes(xgboost.train(PARAMETERS, data, TREES).save_raw("json")))
    return document


def _beyond(part: Combiner, case: Case) -> Floats:
    """How far what came lies from the median, in widths of the band on that side; below negative, ``[L·K]``."""
    inputs = case.inputs
    correction = part.correct_at(inputs)
    low, middle, high = inputs.mixture
    away = case.came - (middle + correction.shift)
    width = np.where(away < 0, correction.below * (middle - low), correction.above * (high - middle))
    return np.asarray((away / np.maximum(width, 1e-9)).ravel())


def _widths(beyond: Sequence[tuple[Case, Floats]], kind: int) -> Floats:
    """Factors for runs of one kind of length, by share of the run seen, ``[3, 2]``: of such runs if they are enough."""

    def parts(group: Sequence[tuple[Case, Floats]]) -> list[list[Floats]]:
        return [[away for case, away in group if part_of(case.inputs.seen) == part] for part in range(3)]

    own = [(case, away) for case, away in beyond if kind_of(case.inputs.planned) == kind]
    enough = len({case.configuration for case, _ in own}) >= 2 * FOLDS and all(parts(own))
    return np.stack([_conformal(part) for part in parts(own if enough else beyond)])


def _conformal(beyond: Sequence[Floats]) -> Floats:
    """Factors on both sides' widths with which a share ``BAND`` lies beyond them, every case weighing the same."""
    if not beyond:
        raise ConfigError(
            "a forecast learns from whole trainings, got none from some part of their plans; give finished runs"
        )
    values = np.concatenate(beyond)
    weights = np.concatenate([np.full(b.size, 1 / b.size) for b in beyond])
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    low, high = (values[order[min(int(np.searchsorted(share, q)), values.size - 1)]] for q in BAND)
    return np.maximum([-low, high], 0.1)


def _states(cases: Sequence[Case]) -> tuple[Floats, Floats, Floats, float]:
    """Centre, spread, kept states, and the distance to the nearest state of another configuration that is usual."""
    states = np.concatenate([case.inputs.state for case in cases])
    owner = np.concatenate([[case.configuration] * len(case.came) for case in cases])
    centre = np.median(states, axis=0)
    spread = np.maximum(np.percentile(np.abs(states - centre), 90, axis=0), 1e-3)
    kept = np.random.default_rng(0).permutation(len(states))[:STATES]
    scaled = (states - centre) / spread
    apart = [nearest(scaled[owner == name], scaled[kept][owner[kept] != name]) for name in np.unique(owner)]
    return centre, spread, scaled[kept], max(float(np.percentile(np.concatenate(apart), 95)), 1e-3)
