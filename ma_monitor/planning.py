"""The plan of a training as a run keeps it, from whatever tells its schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ma_monitor.runs.records import Plan

MOVED = 0.1
"""A rate that is held, since nobody can foresee it, is planned anew once it has moved by more than this share."""


def make_plan(
    schedule: Any, total_steps: int | None, batch: int | None, *, from_step: int = 0, optimizer: Any = None
) -> Plan:
    """The plan as a run stores it; ``optimizer`` is for a schedule that has none of its own.

    Raises:
        ConfigError: If the schedule breaks a rule.
    """
    if schedule is None and optimizer is None:
        return Plan(from_step, total_steps, None, batch, "unknown")
    if isinstance(schedule, Plan):  # a replay knows the plan of the training that it repeats
        return replace(schedule, from_step=from_step)
    import torch

    from ma_monitor.measure.forward import random_states_kept
    from ma_monitor.schedule import planned_rates

    with random_states_kept(torch.device("cpu")):  # a scheduler may draw its rates
        planned = planned_rates(schedule, total_steps, optimizer)
    return Plan(from_step, total_steps, planned.lr, batch, planned.schedule, planned.held)


def moved_plan(plan: Plan | None, schedule: Any, step: int, optimizer: Any = None) -> Plan | None:
    """What is planned from ``step`` on where a held rate has moved; None where it has not, or is known in advance.

    Args:
        plan: The plan in force.
        schedule: The scheduler in training.
        step: Updates done.
        optimizer: As for `make_plan`.
    """
    if plan is None or plan.lr is None or not plan.held:
        return None
    present = make_plan(schedule, plan.total_steps, plan.batch, from_step=step, optimizer=optimizer)
    if present.lr is None or math.isclose(present.lr[0], plan.lr[0], rel_tol=MOVED):
        return None
    return present
