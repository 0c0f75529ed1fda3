"""Which objective should Eq. 14 be fitted by, if the curve is to say what comes?

    python benchmarks/objectives.py RUN.npz... [--out results/objectives.json]

At 20, 40, 60 and 80 % of each run the curve is fitted to the measurements so far and read off at the rest: mean
absolute error of the ln ratio, first averaged over the layers of a run, then over runs; the last value beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ma_monitor.numerics.batch import Loss, fit_curves
from ma_monitor.numerics.clock import Clock, learning_rate_clock, step_clock

Floats = NDArray[np.float64]

CUTOFFS = (0.2, 0.4, 0.6, 0.8)
LOWEST = 0.1
"""Predicted ratios are raised to this before the logarithm; one of a largest to a median value is never below 1."""
LEAST_SPREAD = 1e-3
"""Least spread over the probe's sequences, as a share of the ratio."""


@dataclass(frozen=True)
class Recorded:
    """One run.

    Attributes:
        steps: Steps measured, ``[T]``.
        ratios: Mean largest over mean median magnitude, ``[L, T]``.
        spread: Standard deviation of the ratio over the probe's sequences, ``[L, T]``.
        clock: The learning-rate clock of its schedule.
    """

    steps: Floats
    ratios: Floats
    spread: Floats
    clock: Clock


def load(file: Path) -> Recorded:
    """Reads a recorded run."""
    with np.load(file) as data:
        statistics = data["stats"].astype(float)  # [T, sequences, statistics, L]
        means = statistics.mean(axis=1)
        ratios = (means[:, 0] / means[:, -1]).T
        spread = (statistics[:, :, 0] / statistics[:, :, -1]).std(axis=1).T
        clock = learning_rate_clock(data["lr"])
        return Recorded(data["steps"].astype(float), ratios, np.maximum(spread, LEAST_SPREAD * ratios), clock)


def by_curve(
    run: Recorded, seen: int, *, loss: Loss = "squares", weighted: bool = False, log: bool = False, lr: bool = False
) -> Floats:
    """The ln ratio at the steps after the first ``seen`` by Eq. 14 fitted to these, ``[L, T - seen]``."""
    time = (run.clock if lr else step_clock()).time(run.steps)
    values = np.log(run.ratios) if log else run.ratios
    weights = run.spread[:, :seen] ** -2 if weighted else None
    curve = fit_curves(time[:seen], values[:, :seen], weights=weights, loss=loss).evaluate(time[seen:])
    return np.maximum(curve, np.log(LOWEST)) if log else np.log(np.maximum(curve, LOWEST))


def by_last_value(run: Recorded, seen: int) -> Floats:
    """The ratio stays where it is."""
    return np.log(run.ratios[:, seen - 1 : seen])


OBJECTIVES: dict[str, Callable[[Recorded, int], Floats]] = {
    "squares": by_curve,
    "weights": partial(by_curve, weighted=True),
    "huber": partial(by_curve, loss="huber"),
    "log": partial(by_curve, log=True),
    "clock": partial(by_curve, lr=True),
    "log, clock": partial(by_curve, log=True, lr=True),
    "huber, clock": partial(by_curve, loss="huber", lr=True),
    "last value": by_last_value,
}


def errors(run: Recorded, cutoff: float) -> dict[str, float]:
    """Mean absolute error of the ln ratio after the cutoff by each objective."""
    seen = int((run.steps <= cutoff * run.steps[-1]).sum())
    came = np.log(run.ratios[:, seen:])
    return {name: float(np.abs(predict(run, seen) - came).mean()) for name, predict in OBJECTIVES.items()}


def main() -> None:
    """Prints the table and, where asked, writes it with each run's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = {file.stem: load(file) for file in options.runs}
    by_run = {name: {f"{cutoff:.0%}": errors(run, cutoff) for cutoff in CUTOFFS} for name, run in runs.items()}
    table = {
        seen: {key: float(np.mean([of[seen][key] for of in by_run.values()])) for key in OBJECTIVES}
        for seen in next(iter(by_run.values()))
    }
    print("seen  " + "  ".join(f"{name:>12}" for name in OBJECTIVES))
    for seen, row in table.items():
        print(f"{seen:>4}  " + "  ".join(f"{error:12.3f}" for error in row.values()))
    if options.out:
        rounded = json.loads(
            json.dumps({"table": table, "by_run": by_run}), parse_float=lambda text: round(float(text), 4)
        )
        options.out.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
