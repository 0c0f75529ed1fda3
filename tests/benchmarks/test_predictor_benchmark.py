"""The predictor's benchmark on a made sweep whose noise is known, and on the packaged one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import predictor as benchmark
from ma_monitor.architecture import parameters
from ma_monitor.architecture.predictor import make_table
from ma_monitor.architecture.sweep import Training, load_sweep
from ma_monitor.numerics.mixture import Correction
from ma_monitor.runs.published import import_run
from tests.architecture.made import make_shape, make_sweep, make_training


@pytest.fixture(scope="module")
def sweep() -> list[Training]:
    return make_sweep(7)


def test_mean_at_depth_by_hand(sweep: list[Training]) -> None:
    """A shape's two seeds count as one shape; between layers it goes straight."""
    table = make_table(sweep)
    rows = np.flatnonzero(table.training == 3)
    others = [sweep[0], sweep[-1], sweep[1]]  # the first two are seeds of one shape
    found = benchmark.mean_at_depth(others, table, rows)
    layers = sweep[3].shape.layers

    def at(one: Training, depth: float) -> float:
        own = np.log(one.ratios[:, -3:])
        last = own @ [1, 1, 3] / 5  # the moving average's last point, its end repeated
        return float(np.interp(depth, np.arange(1, one.shape.layers + 1) / one.shape.layers, last))

    for row in range(layers):
        depth = (row + 1) / layers
        expected = ((at(sweep[0], depth) + at(sweep[-1], depth)) / 2 + at(sweep[1], depth)) / 2
        assert found[row, -1] == pytest.approx(expected)


def test_seed_noise_is_what_was_put_in() -> None:
    shape = make_shape(8, 128, 4)
    made = [make_training(shape, seed, noise=0.1) for seed in range(40)]
    found = benchmark.seed_noise([*made, make_training(make_shape(3, 64, 2), 0)])
    assert (found["shapes"], found["trainings"]) == (1, 40)
    # Two deviations of 0.1 each, of the training and of the layer, and 0.02 of the measurement.
    assert found["standard deviation"] == pytest.approx(math.hypot(0.1, 0.1, 0.02), rel=0.2)
    assert found["median abs deviation from the shape's mean"] == pytest.approx(0.6745 * 0.143, rel=0.3)
    assert found["median abs difference of two seeds"] == pytest.approx(0.6745 * 0.143 * math.sqrt(2), rel=0.3)
    assert benchmark.seed_noise(made[:1]) == {"shapes": 0}


def test_bootstrap_draws_whole_shapes() -> None:
    group = np.repeat(np.arange(20), 50)
    values = np.repeat(np.random.default_rng(0).normal(size=20), 50)
    low, high = benchmark.bootstrap(group, lambda rows: float(values[rows].mean()))
    # The standard error of a mean of 20, not of 1000; 1.28 of them on either side hold 80 %.
    assert (high - low) / 2 == pytest.approx(1.28 * values.std() / math.sqrt(20), rel=0.1)


def test_early_forecasts(sweep: list[Training]) -> None:
    from ma_monitor.architecture.prediction import prior
    from ma_monitor.architecture.predictor import fit_predictor

    one = sweep[0]
    expected = prior(one.shape, len(one.lr) - 1, one.lr, fit_predictor(sweep[1:-2]))
    scores = benchmark.early(one, expected, 0.1, lambda mixture, end: Correction.none("nothing was learned"))
    assert len(scores) == 6
    for error, inside in scores.values():
        assert error.shape == inside.shape == (one.shape.layers,)
        assert ((inside >= 0) & (inside <= 1)).all()
    for name in ("in-run forecast", "learned forecast"):
        assert scores[f"{name} with the prior"][0].mean() < scores[name][0].mean(), "of a known rule much is expected"


def published(folder: Path, size: str, seed: int) -> None:
    """A run of a Pythia size, imported from measurements in the published layout's numbers."""
    one = make_training(benchmark.pythia(size), seed)
    np.savez(folder / f"pythia_{size}.npz", steps=one.steps[::4], stats=one.means[::4, None])
    import_run(folder / f"pythia_{size}.npz", folder / f"pythia_{size}")


def test_published_runs_are_pythias(tmp_path: Path) -> None:
    published(tmp_path, "14m", 0)
    names, [(shape, fits)] = benchmark.models_of(tmp_path)
    assert names == ["pythia_14m"]
    assert (shape.layers, shape.width, shape.heads, shape.mlp) == (6, 128, 4, 512)
    assert len(fits) == 6
    (tmp_path / "pythia_14m").rename(tmp_path / "pythia_160m")
    with pytest.raises(SystemExit, match="pythia_160m must have Pythia's 12 layers, and its run has 6"):
        benchmark.models_of(tmp_path)
    (tmp_path / "pythia_160m").rename(tmp_path / "other")
    with pytest.raises(SystemExit, match="runs must be of Pythia's sizes"):
        benchmark.models_of(tmp_path)


@pytest.mark.slow
def test_table_3_of_published_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "REGRESSORS", {"Ridge": parameters.REGRESSORS["Ridge"]})
    for seed, size in enumerate(("14m", "70m", "160m", "410m", "1b", "1.4b")):
        published(tmp_path, size, seed)
    result = benchmark.table3(tmp_path)
    assert (result["models"], result["rows"]) == (6, 6 + 6 + 12 + 24 + 16 + 24)
    assert set(result["scores"]) == set(parameters.PARAMETERS)
    for both in result["scores"].values():
        assert both["Ridge"]["models"]["worst"].startswith("pythia_")
        assert both["Ridge"]["rows"]["rows"] <= result["rows"]
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_explanations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: list[Training]) -> None:
    monkeypatch.setattr(benchmark, "load_sweep", lambda: sweep)
    readings = benchmark.explanations(None, tmp_path)
    assert set(readings) == {"K", "lambda", "ln final ratio"}
    assert len(list(tmp_path.glob("*.png"))) == 9


def gpu() -> Sequence[Training]:
    return [one for one in load_sweep() if one.kind == "gpu"]


@pytest.mark.slow
def test_packaged_sweep_is_what_was_asked_for() -> None:
    own = gpu()
    assert len({one.shape for one in own}) >= 24
    assert all(len(one.lr) - 1 >= 3000 and len(one.steps) >= 80 for one in own)
    assert sum((one.ratios[:, -1] >= 5 * one.ratios[:, 0]).any() for one in own) >= len(own) / 2


@pytest.mark.slow
def test_table_3_and_held_out_shapes_on_the_packaged_sweep() -> None:
    """Layers of known models are easier than new models: the gap that a random split hides."""
    samples = parameters.make_samples(benchmark.models_of(None)[1])
    r2 = {
        split: parameters.score(samples, "K", parameters.predict_held_out(samples, "K", "XGBoost", split)).r2
        for split in ("rows", "models")
    }
    assert r2["rows"] > r2["models"] + 0.1
    recorded = json.loads((benchmark.RESULTS / "predictor-trajectories.json").read_text(encoding="utf-8"))["gpu"]
    assert recorded["trainings"] == len(gpu()), "the recorded figures are of another sweep: run it again"
