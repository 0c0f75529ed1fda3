"""``ma-monitor compare``: several runs at equal relative depth."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.report.comparison import compare_runs
from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run
from tests.cli.conftest import LAYERS, STEPS, TOTAL, Call, make_measurements, make_meta, make_run

RNG = np.random.default_rng(11)


def make(path: Path, ratios: NDArray[np.float64], steps: NDArray[np.int64], **changes: Any) -> Path:
    """A run with these ratios ``[L, T]``; changes go into its metadata or its planned length (``total``)."""
    total = changes.pop("total", None)
    shape = ModelShape("made", "x", len(ratios), 8, 2, 10, 100)
    meta = RunMeta(shape, ProbeInfo("ab" * 32, 1, 5, "made"), 1, 1, "ratio_of_means", "float32")
    plan = None if total is None else Plan(0, total, None, None, "made")
    with Run.create(path, replace(meta, **changes), plan) as run:
        for step, column in zip(steps.tolist(), ratios.T, strict=True):
            run.append(Measurements.from_statistics(step, column[:, None, None], np.ones((len(ratios), 1))))
    return path


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Three runs of one shape, the second and third higher by a factor; one lacks some steps."""
    paths = []
    for seed, factor in enumerate((1.0, 3.0, 1.5)):
        paths.append(tmp_path / f"seed-{seed}")
        with Run.create(paths[-1], make_meta(), Plan(0, TOTAL, None, None, "made")) as run:
            for m in make_measurements()[:: 2 if seed == 1 else 1]:
                run.append(replace(m, top=m.top * factor))
    return paths


def test_seeds(call: Call, seeds: list[Path]) -> None:
    result = call("compare", *seeds, "--json")
    document = result.document
    assert result.err == ""
    assert (document["time"], document["rank"], document["differences"]) == ("steps", 1, {})
    assert document["grid"] == STEPS[::2].tolist()
    assert [one["run"] for one in document["runs"]] == [str(path) for path in seeds]
    first = Run.open(seeds[0]).ratios()
    assert len(document["depths"]) == LAYERS
    for layer, entry in enumerate(document["depths"], start=1):
        assert (entry["depth"], entry["layers"]) == (pytest.approx(layer / LAYERS), [layer] * 3)
        own = first[layer - 1, ::2]
        for key, factor in (("median", 1.5), ("low", 1.0), ("high", 3.0)):
            np.testing.assert_allclose(entry[key], factor * own, rtol=1e-12)
        np.testing.assert_allclose(entry["ratios"], np.outer((1, 3, 1.5), own), rtol=1e-12)
        last = first[layer - 1, [-1, 2 * len(own) - 2, -1]]
        np.testing.assert_allclose(entry["last"], last * np.array([1, 3, 1.5]), rtol=1e-12)
        assert len(entry["class"]) == len(entry["asymptote"]) == 3
    fit = call("fit", seeds[2], "--json").document["layers"][0]
    assert document["depths"][0]["class"][2] == fit["class"]
    assert document["depths"][0]["asymptote"][2] == fit["asymptote"]


def test_table(call: Call, seeds: list[Path]) -> None:
    result = call("compare", *seeds)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "3 runs at 3 relative depths, by steps that all have measured"
    assert lines[2].split()[:5] == ["depth", "run", "layer", "step", "0"]
    assert lines[3].split()[:3] == ["0.333", "seed-0", "1"]
    assert lines[6].split()[:2] == ["median", "[range]"]
    ratio = Run.open(seeds[1]).ratios()[0, 0]
    assert lines[4].split()[3] == f"{ratio:.4g}"


def test_sizes_by_depth(tmp_path: Path) -> None:
    """A layer is the nearest at a relative depth, and lengths that differ are compared by share of the training."""
    steps = np.arange(0, 1001, 100)
    level = np.arange(1.0, 7.0)[:, None]
    small = make(tmp_path / "small", level[:2] + steps / 1000, steps)
    large = make(tmp_path / "large", level + steps / 1000, 3 * steps, total=6000)
    document = compare_runs([Run.open(small), Run.open(large)])
    assert document["time"] == "share"
    assert [entry["layers"] for entry in document["depths"]] == [[1, 3], [2, 6]]
    assert all(entry["median"] is None for entry in document["depths"]), "models of two shapes have no common median"
    shallow = document["depths"][0]["ratios"]
    share = np.array(document["grid"])
    np.testing.assert_allclose(shallow[0], 1 + share, rtol=1e-12)
    known = share <= 0.5
    np.testing.assert_allclose(np.array(shallow[1])[known].astype(float), 3 + 2 * share[known], rtol=1e-12)
    assert set(np.array(shallow[1])[~known]) == {None}, "nothing is known beyond the last measurement"
    assert document["depths"][0]["last"] == [2.0, 4.0]


@pytest.mark.parametrize(("shallow", "deep"), [(1, 1), (1, 80), (5, 7), (6, 36), (24, 32), (12, 12)])
def test_depths_hold_for_any_two_sizes(shallow: int, deep: int, tmp_path: Path) -> None:
    steps = np.arange(3)
    paths = [make(tmp_path / f"{i}", np.ones((n, 3)), steps) for i, n in enumerate((shallow, deep))]
    pairs = [entry["layers"] for entry in compare_runs([Run.open(path) for path in paths])["depths"]]
    assert [one for one, _ in pairs] == list(range(1, shallow + 1))
    assert len({other for _, other in pairs}) == shallow, "a layer is compared twice"
    assert pairs[-1] == [shallow, deep]
    for one, other in pairs:
        assert abs(other - one * deep / shallow) <= 0.5


def test_differences_are_named(call: Call, tmp_path: Path) -> None:
    steps = np.arange(0, 700, 100)
    values = RNG.uniform(5, 9, (2, 7))
    a = make(tmp_path / "a", values, steps)
    b = make(tmp_path / "b", values, steps, probe=ProbeInfo("cd" * 32, 1, 5, "made"), ratio="mean_of_ratios")
    c = make(tmp_path / "c", values, steps, probe=ProbeInfo(None, 1, None, "published"), precision="unknown")
    result = call("compare", a, b, "--json")
    assert set(result.document["differences"]) == {"probe", "ratio"}
    assert "in ratio (a: ratio_of_means; b: mean_of_ratios)" in result.err
    assert result.document["depths"][0]["median"] is not None
    result = call("compare", a, b, "--ratio", "mean_of_ratios", "--json")
    assert set(result.document["differences"]) == {"probe"}
    result = call("compare", a, c, "--json")
    assert result.document["differences"]["probe"] == ["abababababab, 1 x 5", "not known, 1 x ?"]
    assert result.document["differences"]["precision"] == ["float32", "unknown"]
    twice = call("compare", c, c, "--json")
    assert set(twice.document["differences"]) == {"probe", "precision"}, "what is not known is not known to agree"
    assert twice.err.count("\n") == 2


def test_imported_models_of_unknown_shape(tmp_path: Path) -> None:
    """Nothing but the number of layers is known of published data: only runs of one name count as one model."""
    unknown = ModelShape("pythia_14m", None, 2, None, None, None, None)
    steps, values = np.arange(3), np.ones((2, 3))
    runs = [
        Run.open(make(tmp_path / name, values, steps, model=replace(unknown, name=model)))
        for name, model in (("a", "pythia_14m"), ("b", "pythia_14m"), ("c", "pythia_70m"))
    ]
    assert compare_runs(runs[:2])["depths"][0]["median"] == [1, 1, 1]
    assert compare_runs(runs)["depths"][0]["median"] is None


def test_what_is_not_finite_is_null(call: Call, tmp_path: Path) -> None:
    values = np.full((1, 8), 5.0)
    values[0, 3], values[0, 7] = np.nan, np.inf
    paths = [make(tmp_path / name, values, np.arange(8)) for name in "ab"]
    (entry,) = call("compare", *paths, "--json").document["depths"]
    assert [entry["median"][i] for i in (2, 3, 7)] == [5, None, None]
    assert entry["last"] == [None, None]
    assert call("compare", *paths).code == 0


def test_files(call: Call, seeds: list[Path], tmp_path: Path) -> None:
    document = call("compare", *seeds, "--out", tmp_path / "a.csv", "--json").document
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * LAYERS * len(document["grid"])
    want = {
        (one["run"], layer, step): ratio
        for entry in document["depths"]
        for one, layer, ratios in zip(document["runs"], entry["layers"], entry["ratios"], strict=True)
        for step, ratio in zip(document["grid"], ratios, strict=True)
    }
    assert {(r["run"], int(r["layer"]), int(r["step"])): float(r["ratio"]) for r in rows} == want
    for name, begin in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")):
        assert call("compare", *seeds, "--out", tmp_path / name).code == 0
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a.PDF", "a.csv", "a.png", "a.svg"]


def test_runs_of_one_folder_name(call: Call, tmp_path: Path) -> None:
    paths = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    text = call("compare", *paths).out
    assert all(str(path) in text for path in paths)


def test_bad_input(refused: Callable[..., str], seeds: list[Path], tmp_path: Path) -> None:
    other = make(tmp_path / "other", np.ones((2, 2)), np.array([7, 9]))
    assert "at least two runs, got 1" in refused("compare", seeds[0])
    assert "there is none; use share" in refused("compare", seeds[0], other, "--time", "steps")
    assert ".svg or .csv, got 'x.gif'" in refused("compare", *seeds, "--out", "x.gif")
    assert "`rank` must be one of this run's" in refused("compare", seeds[0], other, "--rank", 2)
    assert "cannot be written" in refused("compare", *seeds, "--out", tmp_path / "absent" / "x.csv")
    assert "not a run" in refused("compare", seeds[0], tmp_path)
