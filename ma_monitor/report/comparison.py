"""Several runs side by side, at equal relative depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ma_monitor.analysis import fit_run, planned_end
from ma_monitor.errors import ConfigError
from ma_monitor.runs.records import RunMeta
from ma_monitor.runs.store import Run

RANGE = ("median", "low", "high")
DIGITS = 5
"""Significant digits of a number on a page."""
SHARES = 100
"""Into how many parts a training is cut where runs are compared by share of it."""


def compare_runs(runs: Sequence[Run], *, rank: int = 1, time: str | None = None) -> dict[str, Any]:
    """The comparison as ``ma-monitor compare --json`` prints it.

    Depths are i/B for i = 1 … B, B being the number of layers of the shallowest model; a model's layer there is the
    nearest to i·L/B. Median and range over runs are given where all models have one shape, or one name where
    the shape is not known.

    Args:
        runs: The runs.
        rank: Which of the largest entries.
        time: ``steps`` or ``share``; None for steps where all trainings are equally long and have two in common.

    Raises:
        ConfigError: If a run holds nothing or has no such rank, or no step is common to all and ``time`` wants one.
    """
    fits = [fit_run(run, rank=rank, compare=False) for run in runs]
    ratios = [run.ratios(rank) for run in runs]
    time, grid, sampled = _sampled(runs, ratios, time)
    differences = _differences([run.meta for run in runs])
    models = [replace(run.meta.model, name="") if run.meta.model.width else run.meta.model for run in runs]
    one_shape = all(model == models[0] for model in models)
    depths = []
    for depth in np.arange(1, min(map(len, ratios)) + 1) / min(map(len, ratios)):
        rows = [max(int(depth * len(values) + 0.5), 1) - 1 for values in ratios]
        series = np.stack([values[row] for values, row in zip(sampled, rows, strict=True)])
        both = (np.median(series, axis=0), series.min(axis=0), series.max(axis=0)) if one_shape else (None,) * 3
        own = [fit[row].to_dict() for fit, row in zip(fits, rows, strict=True)]
        depths.append(
            {
                "depth": float(depth),
                "layers": [row + 1 for row in rows],
                "ratios": listed(series),
                **{name: None if values is None else listed(values) for name, values in zip(RANGE, both, strict=True)},
                "last": listed([values[row, -1] for values, row in zip(ratios, rows, strict=True)]),
                **{key: [fit[key] for fit in own] for key in ("class", "asymptote")},
            }
        )
    entries = [{"run": str(run.path), "name": run.meta.model.name, "last_step": int(run.steps[-1])} for run in runs]
    return {
        "runs": entries,
        "differences": differences,
        "rank": rank,
        "time": time,
        "grid": grid.tolist(),
        "depths": depths,
    }


def _sampled(
    runs: Sequence[Run], ratios: Sequence[NDArray[np.float64]], time: str | None
) -> tuple[str, NDArray[Any], list[NDArray[np.float64]]]:
    """Whether runs are compared by ``steps`` or ``share``, at which ``[G]``, and the ratios there, ``[L, G]`` each.

    A training is as long as was planned, or measured where no plan is known. Between measurements the ratio is
    interpolated, outside them it is NaN.
    """
    common = reduce(np.intersect1d, [run.steps for run in runs])
    lengths = [planned_end(run, int(run.steps[-1])) or int(run.steps[-1]) or 1 for run in runs]
    if time is None:
        time = "steps" if len(common) > 1 and len(set(lengths)) == 1 else "share"
    pairs = list(zip(runs, ratios, strict=True))
    if time == "steps":
        if not len(common):
            raise ConfigError(
                "comparing by steps needs a step that all runs have measured, and there is none; use share"
            )
        return time, common, [values[:, np.searchsorted(run.steps, common)] for run, values in pairs]
    grid = np.linspace(0, 1, SHARES + 1)
    sampled = [
        np.stack([np.interp(grid * length, run.steps, row, left=np.nan, right=np.nan) for row in values])
        for (run, values), length in zip(pairs, lengths, strict=True)
    ]
    return time, grid, sampled


def _differences(metas: Sequence[RunMeta]) -> dict[str, list[Any]]:
    """What was not the same, or is not known to be, when the runs were measured: name → what it is in each."""
    models = [{key: value for key, value in asdict(meta.model).items() if key != "name" and value} for meta in metas]
    probes = [meta.probe for meta in metas]
    facts: dict[str, list[Any]] = {
        "model": [", ".join(f"{key} {value}" for key, value in model.items()) for model in models],
        "probe": [f"{(one.hash or 'not known')[:12]}, {one.sequences} x {one.length or '?'}" for one in probes],
        **{key: [getattr(meta, key) for meta in metas] for key in ("ratio", "k", "precision")},
    }
    return {
        name: told
        for name, told in facts.items()
        if len(set(told)) > 1 or any(str(one).startswith(("not known", "unknown")) for one in told)
    }


def listed(values: ArrayLike) -> list[Any]:
    """Numbers as JSON has them: nested lists, None where not finite."""
    array = np.asarray(values, dtype=np.float64)
    found = array.astype(object)
    found[~np.isfinite(array)] = None
    return list(found.tolist())


def figures(values: Any) -> list[Any]:
    """Numbers in five significant digits as JSON has them, None where not finite."""
    array = np.asarray(values, dtype=np.float64)
    with np.errstate(all="ignore"):
        unit = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.abs(array))))
        short = np.round(array * unit) / unit
    return listed(np.where(np.isfinite(short), short, np.where(array == 0, 0.0, np.nan)))
