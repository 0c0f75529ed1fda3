"""The packed sweep: written and read back, and the packaged one."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.architecture.sweep import DIGITS, PACKAGED, Training, load_sweep, save_sweep
from ma_monitor.errors import SourceError
from ma_monitor.numerics.fit import fit_trajectories

SIZE_LIMIT = 1_500_000
"""Bytes that all packaged data may have together."""


def test_written_and_read(tmp_path: Path, sweep: list[Training]) -> None:
    path = tmp_path / "sweep.npz"
    save_sweep(sweep, path)
    with np.load(path) as data:
        assert len([name for name in data if name.startswith("curve_")]) == 1, "one schedule is kept once"
    for one, other in zip(sweep, load_sweep(path), strict=True):
        for name in ("name", "kind", "shape", "seed", "schedule", "batch"):
            assert getattr(one, name) == getattr(other, name)
        np.testing.assert_array_equal(one.steps, other.steps)
        np.testing.assert_allclose(one.lr, other.lr, rtol=1e-6)  # as float32
        # Both ends of the ratio are rounded to half a unit of DIGITS bits, of fractions from a half up.
        np.testing.assert_allclose(one.ratios, other.ratios, rtol=2.0**-DIGITS * 2.01)


def test_ratios_and_clock(sweep: list[Training]) -> None:
    one = sweep[0]
    assert one.ratios.shape == (one.shape.layers, len(one.steps))
    assert one.ratios[2, 5] == one.means[5, 0, 2] / one.means[5, -1, 2]
    done = np.array([one.lr[:step].sum() for step in one.steps]) / one.lr[:-1].sum()
    np.testing.assert_allclose(one.clock, done, rtol=1e-9)


@pytest.mark.parametrize("content", [None, b"", b"PK not an archive"])
def test_unreadable(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "sweep.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match="a sweep is an .npz that this package wrote"):
        load_sweep(path)


def test_packaged() -> None:
    trainings = load_sweep()
    folder = PACKAGED.parent
    assert sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".py") <= SIZE_LIMIT
    names = [one.name for one in trainings]
    assert len(set(names)) == len(names)
    for one in trainings:
        assert one.means.shape == (len(one.steps), 4, one.shape.layers)
        assert (np.diff(one.means, axis=1) <= 0).all(), "largest first, median last"
        assert one.steps[-1] <= len(one.lr) - 1
    with (folder / "parameters.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["training"], row["layer"]) for row in rows] == [
        (one.name, str(layer)) for one in trainings for layer in range(1, one.shape.layers + 1)
    ]
    first = trainings[0]
    for row, fit in zip(rows, fit_trajectories(first.steps, first.ratios, compare=False), strict=False):
        assert float(row["r2"]) == pytest.approx(fit.r2, rel=1e-3)
        assert row["class"] == fit.trajectory_class.value
        assert math.isfinite(float(row["K"]))
