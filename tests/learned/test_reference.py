"""What past runs showed, and where a run stands among them."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from benchmarks.make_reference import pooled, read
from ma_monitor.learned.reference import LEVELS, SHARES, reference, standing, thirds


def test_the_packaged_reference_is_small_and_ordered() -> None:
    text = resources.files("ma_monitor.learned").joinpath("data/reference.json").read_text(encoding="utf-8")
    assert len(text) < 30_000
    assert (json.loads(text)["levels"], json.loads(text)["shares"]) == (list(LEVELS), list(SHARES))
    assert [past.kind for past in reference()] == ["GPU", "CPU"]
    docs = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(str(past.runs) in docs and f"{past.largest:.0f}" in docs for past in reference()), "docs/cli.md is stale"
    for past in reference():
        assert past.runs >= 40
        assert past.quantiles.shape == (3, len(LEVELS), len(SHARES))
        assert (np.diff(past.quantiles, axis=1) >= 0).all()
        assert 1 < past.quantiles.min() < past.quantiles.max() <= past.largest


def test_a_ratio_is_placed_by_every_quantile_of_its_depth_and_time() -> None:
    """Shares on the grid: the very numbers of the reference; one between: the mean of two in logarithms."""
    gpu = reference()[0]
    for number in (0, 5, 11):
        found = standing(np.full(7, 30.0), SHARES[number], 10**8)
        assert found is not None
        for layer in range(7):
            row = gpu.quantiles[int(3 * (layer + 0.5) / 7), :, number]
            np.testing.assert_allclose(found.quantiles[layer], row, rtol=1e-12)
            assert found.above[layer] == max([0.0, *(level for level, q in zip(LEVELS, row, strict=True) if 30 > q)])
    between = standing(np.full(3, 30.0), math.sqrt(SHARES[4] * SHARES[5]), 10**8)
    assert between is not None
    np.testing.assert_allclose(between.quantiles, np.sqrt(gpu.quantiles[:, :, 4] * gpu.quantiles[:, :, 5]), rtol=1e-9)


def test_ratios_beyond_all_and_none() -> None:
    found = standing(np.array([np.inf, 0.5, np.nan]), 0.5, None)
    assert found is not None
    assert found.above == (0.9, 0.0, None)
    document = found.to_dict()
    assert [layer["ratio"] for layer in document["layers"]] == [None, 0.5, None]
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("parameters", "kind", "larger"),
    [(10**4, "CPU", False), (10**6, "CPU", False), (10**8, "GPU", False), (10**10, "GPU", True), (None, "GPU", None)],
)
def test_the_nearest_size_is_taken(parameters: int | None, kind: str, larger: bool | None) -> None:
    found = standing(np.ones(4), 0.5, parameters)
    assert found is not None
    assert found.past.kind == kind
    assert (None if found.times_larger is None else found.times_larger > 1) is larger


@pytest.mark.parametrize("share", [0.0, 0.001, 1.001])
def test_nothing_is_said_of_first_moments_and_beyond_the_end(share: float) -> None:
    assert standing(np.ones(4), share, None) is None


def test_thirds() -> None:
    assert [thirds(n).tolist() for n in (1, 2, 3, 4, 6)] == [[1], [0, 2], [0, 1, 2], [0, 1, 1, 2], [0, 0, 1, 1, 2, 2]]


def test_pooling_counts_every_run_alike() -> None:
    """Three layers of one run at 1, one of another at 9: half of the weight each, not three quarters."""
    one, other = np.ones((9, 2)), np.full((3, 2), 9.0)
    rows = np.array(pooled([one, other], 0))
    np.testing.assert_array_equal(rows[:, 0], [1, 1, 1, 9, 9])


def test_a_past_run_is_read(tmp_path: Path) -> None:
    steps = np.array([0, 10, 100, 1000])
    config = {"family": "llama", "layers": 2, "width": 8, "mlp": 4.0, "vocabulary": 50, "steps": 1000, "kind": "cpu"}
    stats = np.ones((4, 3, 4, 2)) * np.array([2.0, 1.0, 1.0, 0.5])[:, None] * (1 + steps[:, None, None, None])
    stats[:, :, -1] = 0.5
    np.savez(tmp_path / "run.npz", steps=steps, stats=stats, config=json.dumps(config))
    kind, parameters, total, ratios, largest = read(tmp_path / "run.npz")
    assert (kind, parameters, total, largest) == ("CPU", 2 * 50 * 8 + 2 * (4 * 64 + 3 * 32 * 8), 1000, 4 * 1001)
    np.testing.assert_allclose(ratios[:, -1], 4 * 1001)
    at = np.interp(math.log(100.0), np.log(np.array(SHARES) * 1000), np.log(ratios[0]))
    assert math.exp(at) == pytest.approx(4 * 101, rel=0.2), "between points of the grid"
    np.savez(tmp_path / "short.npz", steps=steps[:-1], stats=stats[:-1], config=json.dumps(config))
    with pytest.raises(ValueError, match="must have come to its end, step 1000, got 100; leave it out"):
        read(tmp_path / "short.npz")
