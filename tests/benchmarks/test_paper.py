"""The paper's tables and figures, remade from data in the published layout."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import paper
from ma_monitor.cli.__main__ import main as command
from ma_monitor.numerics.fit import fit_trajectories

RUNS = Path(__file__).resolve().parents[2] / "benchmarks" / "runs"
MADE = {
    "pythia_160m": "gpu-neox-8x512-short",
    "pythia_1.4b": "cpu-neox-09",
    "pythia-1b": "cpu-llama-01",
    "other": "cpu-neox-04",
}
"""Folder in the published layout → the run whose measurements it gets. They only stand in for Pythia's."""
FIGURES = (
    "figure_2",
    "figure_3",
    "figure_4",
    "figure_5a",
    "figure_5b",
    "figure_6",
    "figure_7a",
    "figure_7b",
    "figure_8",
)


def read(name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Some 30 steps ``[T]`` of a recorded run and their statistics ``[T, n, 4, L]``."""
    with np.load(RUNS / f"{name}.npz") as data:
        chosen = np.unique(np.linspace(0, len(data["steps"]) - 1, 30).round().astype(int))
        return data["steps"][chosen], data["stats"][chosen].astype(np.float64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of models, with one malformed step."""
    root = tmp_path_factory.mktemp("published")
    for folder, name in MADE.items():
        stats = root / folder / "stats"
        stats.mkdir(parents=True)
        for step, values in zip(*read(name), strict=True):
            (stats / f"exp2_{folder}_step{step}").write_text(str(values.tolist()))
    (root / "pythia-1b" / "stats" / "exp2_pythia-1b_step77").write_text("[[1, 2], [3]]")
    return root


@pytest.fixture(scope="module")
def page(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paper.main([str(data), "--out", str(tmp_path_factory.mktemp("page") / "deep")])


def section(page: Path, title: str) -> str:
    """The text under a heading, up to the next one."""
    found = re.search(rf"^## {title}.*?\n(.*?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def rows(page: Path, title: str) -> dict[str, list[str]]:
    """First cell of each line of a section's tables → its other cells."""
    lines = [line.strip("| ").split(" | ") for line in section(page, title).splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def r2_of(name: str, *, mean_of_ratios: bool) -> float:
    """Mean R² over layers by numpy and the fit alone."""
    steps, stats = read(name)
    top, median = stats[:, :, 0], stats[:, :, 3]
    ratios = (top / median).mean(axis=1) if mean_of_ratios else top.mean(axis=1) / median.mean(axis=1)
    return float(np.mean([fit.r2 for fit in fit_trajectories(steps, ratios.T, compare=False) if fit.r2 is not None]))


def test_the_data(page: Path) -> None:
    found = rows(page, "The data")
    assert list(found)[2:] == ["160M", "1B", "1.4B", "other"], "not in the order of size"
    assert found["160M"][:2] == ["8", "30"]
    assert "exp2_pythia-1b_step77: the lists are ragged" in found["1B"][-1]
    assert "**Printed but not in these data: 14M, 70M, 410M, 2.8B, 6.9B, 12B.**" in section(page, "The data")


def test_table_1(page: Path) -> None:
    found = rows(page, "Table 1")
    for model, name in (("160M", "gpu-neox-8x512-short"), ("1.4B", "cpu-neox-09"), ("other", "cpu-neox-04")):
        own, printed, difference, of_ratios, *_ = found[model]
        assert float(own) == pytest.approx(r2_of(name, mean_of_ratios=False), abs=5e-5)
        assert float(of_ratios) == pytest.approx(r2_of(name, mean_of_ratios=True), abs=5e-5)
        if model in paper.TABLE_1:
            assert float(printed) == paper.TABLE_1[model]
            assert float(difference) == pytest.approx(float(own) - float(printed), abs=1.01e-4), "rounded twice"
        else:
            assert (printed, difference) == ("–", "–")
    assert found["160M"][4] == "0.9307", "the better of the two fits of Table 5"
    own_gaps = [
        sum(abs(float(found[size][0]) - table[size]) for size in ("160M", "1B", "1.4B"))
        for table in (paper.TABLE_1, paper.BEST_5)
    ]
    nearer = "Table 1's" if own_gaps[0] < own_gaps[1] else "Table 5's"
    assert f"nearer to {nearer} labels" in section(page, "Table 1")


def test_table_2(page: Path) -> None:
    _, stats = read("cpu-llama-01")
    each = stats[:, :, 0] / stats[:, :, 3]
    cv = 100 * float((each.std(axis=1, ddof=1) / each.mean(axis=1)).mean())
    own, printed, difference, sem, _, _, half, *_ = rows(page, "Table 2")["1B"]
    assert float(own) == pytest.approx(cv, abs=5e-3)
    assert printed == "6.57"
    assert float(difference) == pytest.approx(cv - 6.57, abs=5e-3)
    assert float(sem) == pytest.approx(cv / math.sqrt(10), abs=5e-3)
    assert float(half) == pytest.approx(2.262157 * cv / math.sqrt(10), abs=5e-3)


def test_table_5(page: Path) -> None:
    found = rows(page, "Table 5")["160M"]
    steps, stats = read("gpu-neox-8x512-short")
    fits = fit_trajectories(steps, (stats[:, :, 0].mean(axis=1) / stats[:, :, 3].mean(axis=1)).T)
    first = np.mean([fit.hypotheses["first_order"].r2 for fit in fits])
    kinds = ("under", "critically_", "over")
    second = [max(fit.hypotheses[f"second_order_{kind}damped"].r2 or -9 for kind in kinds) for fit in fits]
    assert float(found[3]) == pytest.approx(first, abs=5e-5)
    assert found[4] == "-0.6833"
    assert float(found[6]) == pytest.approx(np.mean(second), abs=5e-5)
    assert float(found[0]) >= float(found[6]), "the curve explains less than a step response"


def test_aic_is_that_of_all_points() -> None:
    """Against the residual sums themselves, on curves whose best hypothesis differs."""
    steps, stats = read("cpu-neox-09")
    ratios = (stats[:, :, 0].mean(axis=1) / stats[:, :, 3].mean(axis=1)).T
    for fit, values in zip(fit_trajectories(steps, ratios), ratios, strict=True):
        assert fit.sse is not None
        total = ((values - values.mean()) ** 2).sum()
        own = len(steps) * math.log(fit.sse) + 2 * 5
        for name, other in fit.hypotheses.items():
            assert other.r2 is not None
            theirs = len(steps) * math.log((1 - other.r2) * total) + 2 * len(other.parameters)
            assert paper.beaten(fit, name.__eq__) == (own < theirs)


def test_figures(page: Path) -> None:
    text = section(page, "Figures")
    for name in FIGURES:
        assert f"({name}.png)" in text
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in page.parent.iterdir()) == sorted([*(f"{n}.png" for n in FIGURES), "paper.md"])
    _, stats = read("cpu-neox-09")
    end = float((stats[-1, :, 0].mean(axis=0) / stats[-1, :, 3].mean(axis=0)).max())
    assert f"1.4B: {end:.0f} / 2350 / {end - 2350:+.0f}" in text


def test_what_was_typed_in_holds_together() -> None:
    """The print's own sums: .984 of Table 1 by layers, and Table 2's three columns."""
    layers = dict(zip(paper.SIZES, (6, 6, 12, 24, 16, 24, 32, 32, 36), strict=True))
    assert sum(layers.values()) == paper.LAYERS
    by_layers = [
        sum(table[size] * layers[size] for size in layers) / paper.LAYERS for table in (paper.TABLE_1, paper.BEST_5)
    ]
    assert [round(value, 3) for value in by_layers] == [paper.MEAN_R2, 0.98]
    cv, sem, half = paper.TABLE_2.values()
    for size in paper.SIZES:
        assert sem[size] == pytest.approx(cv[size] / math.sqrt(10), abs=0.01)
        assert half[size] == pytest.approx(2.262157 * cv[size] / math.sqrt(10), abs=0.011)
    slips = paper.slips()
    assert "14M ↔ 160M" in slips
    assert "2.8B ↔ 1.4B" in slips, "a label is used twice"


def test_runs_give_the_same_page(data: Path, page: Path, tmp_path: Path) -> None:
    """Data that were imported before, with the other ratio, are read as Eq. 8 too."""
    chosen = tmp_path / "data"
    shutil.copytree(data / "pythia_1.4b", chosen / "pythia_1.4b")
    (chosen / "pythia_1.4b" / "stats" / "exp2_odd_step3").write_text("[]")
    shutil.copytree(data / "other", chosen / "other")
    assert command(["import", str(chosen), "--out", str(tmp_path / "runs"), "--ratio", "mean_of_ratios"]) == 0
    (small, _) = paper.load(tmp_path / "runs", tmp_path)
    assert small.name == "1.4B"
    assert len(small.left_out) == 1
    assert small.left_out[0].startswith("exp2_odd_step3: ")
    (alone,) = paper.load(tmp_path / "runs" / "pythia_1.4b", tmp_path)
    np.testing.assert_array_equal(alone.r2, small.r2)
    assert float(rows(page, "Table 1")["1.4B"][0]) == pytest.approx(float(np.mean(small.r2)), abs=5e-5)


@pytest.mark.parametrize(
    ("folder", "size"),
    [
        ("pythia_14m", "14M"),
        ("pythia-1.4b", "1.4B"),
        ("EleutherAI/pythia-6.9b-deduped", "6.9B"),
        ("pythia_2_8b", "2.8B"),
        ("neox", "neox"),
    ],
)
def test_sizes(folder: str, size: str) -> None:
    assert paper.size_of(folder) == size


def test_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper.main([str(tmp_path), "--out", str(tmp_path / "page")])
    assert "no measurements; expected pythia_<size>/stats" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_shared_data(shared_data: Path, tmp_path: Path) -> None:
    """One model only: the shared one."""
    page = paper.main([str(shared_data / "published_layout"), "--out", str(tmp_path)])
    assert rows(page, "The data")["14M"][:2] == ["6", "30"]
    assert rows(page, "Table 1")["14M"][1] == "0.9307"
    assert "14M: 17 / 83 / -66" in section(page, "Figures")
