"""What a run's measurements say at some step: its fits and its forecast, always computed cold from all points.

Live, replayed, resumed and offline use all come through here, which is why they agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError
from ma_monitor.learned.correction import Corrections
from ma_monitor.numerics.fit import Fit, fit_trajectories
from ma_monitor.numerics.forecast import THRESHOLDS, Forecast, forecast
from ma_monitor.numerics.values import MIN_POINTS
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import Run

GROWTH = 1.05
"""A refit is due when the history has grown by this factor."""


@dataclass(frozen=True)
class Analysis:
    """Fits and forecast of a run's layers 1 … L, from the measurements up to step ``at``."""

    at: int
    fits: tuple[Fit, ...]
    forecast: Forecast

    @cached_property
    def fits_document(self) -> dict[str, Any]:
        """The fits as ``ma-monitor fit --json`` prints them."""
        return {"at": self.at, "layers": [{"layer": i, **fit.to_dict()} for i, fit in enumerate(self.fits, start=1)]}

    @cached_property
    def forecast_document(self) -> dict[str, Any]:
        """The forecast as ``ma-monitor forecast --json`` prints it."""
        return self.forecast.to_dict()


def refit_due(points: int) -> bool:
    """Whether a history of this many points is to be fitted again.

    A function of the number alone (6, 7, …, 20, 21, 23, 25, …): a resumed or replayed run refits at the same points.
    """
    return points in refits(points)


def refits(points: int) -> Iterator[int]:
    """How many points there were at every refit of a history that has grown to so many."""
    due = MIN_POINTS
    while due <= points:
        yield due
        due = max(due + 1, math.ceil(GROWTH * due))


def analyse(run: Run, *, at: int | None = None, compare: bool = False) -> Analysis:
    """Fits the curve and forecasts, from a run's measurements up to step ``at`` (default: all).

    With ``compare`` the other hypotheses are fitted too, as ``ma-monitor fit`` shows them.

    Raises:
        ConfigError: If nothing was measured up to ``at``.
    """
    fits = fit_run(run, at=at, compare=compare)
    prediction = forecast_run(run, at=at)
    return Analysis(int(prediction.at), fits, prediction)


def fit_run(run: Run, *, at: int | None = None, rank: int = 1, compare: bool = True) -> tuple[Fit, ...]:
    """The paper's curve and, to ``compare``, the other hypotheses, fitted to layers 1 … L in steps."""
    seen = _seen(run, at)
    end = planned_end(run, int(run.steps[seen - 1]))
    return fit_trajectories(run.steps[:seen], run.ratios(rank)[:, :seen], total_steps=end, compare=compare)


def sequence_ratios(run: Run, *, at: int | None = None, rank: int = 1) -> NDArray[np.float64]:
    """The ratio of each sequence of the probe, of layers 1 … L up to step ``at``: ``[L, T, n]``.

    NaN or infinite where a median is 0 or a sequence has no numbers.
    """
    seen, layers = _seen(run, at), len(run.ratios(rank))
    stack = run.stack()
    top, median = np.abs(stack.top[:seen, -layers:, :, rank - 1]), stack.median[:seen, -layers:]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return (top / median).swapaxes(0, 1)


def forecast_run(
    run: Run,
    *,
    at: int | None = None,
    until: int | None = None,
    grid: Sequence[int] | None = None,
    rank: int = 1,
    plan: Plan | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Forecast:
    """The forecast of layers 1 … L; uses no measurement after ``at``, and the plan in force then unless given another.

    What past runs teach and the architecture let expect comes in as ``learned.correction`` says. With ``plan``
    it answers "what if", and must not be shown as the run's own forecast.
    """
    seen = _seen(run, at)
    own_plan = plan is None
    plan = plan or run.plan_at(int(run.steps[seen - 1]))
    return forecast(
        run.steps[:seen],
        run.ratios(rank)[:, :seen],
        until=until,
        grid=None if grid is None else np.asarray(grid, dtype=np.int64),
        lr=None if plan is None else rates_in_force(run.plans, plan, int(run.steps[seen - 1])),
        total_steps=None if plan is None else plan.total_steps,
        thresholds=thresholds,
        correct=Corrections(run.path, expected=rank == 1 and own_plan),
        held=plan is not None and plan.held,
    )


def planned_end(run: Run, at: int) -> int | None:
    """The planned number of updates, by the plan in force at step ``at``; None where it is not known."""
    plan = run.plan_at(at)
    return None if plan is None else plan.total_steps


def rates_in_force(plans: Sequence[Plan], plan: Plan, now: int) -> NDArray[np.float64] | None:
    """``lr[s]`` as it was up to ``now``, then as ``plan`` has it: a resume does not change the past.

    None where no rate is known or all are 0: a clock that stands still carries no forecast.
    """
    if plan.lr is None:
        return None
    rates = plan.lr.copy()
    done = np.arange(min(now, rates.size))
    for held in plans:  # in the order of their steps: each holds until the next, and its last rate beyond its end
        if held.lr is not None:
            steps = done[held.from_step :]
            rates[steps] = held.lr[np.minimum(steps, held.lr.size - 1)]
    return rates if rates.max() > 0 else None


def _seen(run: Run, at: int | None) -> int:
    """How many measured steps lie at or before ``at``."""
    seen = len(run.steps) if at is None else int(np.searchsorted(run.steps, at, side="right"))
    if seen == 0:
        have = f"its first is step {run.steps[0]}" if len(run.steps) else "it holds none"
        raise ConfigError(f"a fit or forecast needs a measurement at or before step {at}; of {run.path.name}, {have}")
    return seen
