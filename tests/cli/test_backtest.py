"""``ma-monitor backtest``: its document and table, run directories and files alike, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.analysis import forecast_run
from ma_monitor.cli.backtest import configuration
from ma_monitor.numerics.backtest import METHODS, SCORED, run_trials, score_trials
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import Run
from tests.cli.conftest import PLAN, STEPS, TOTAL, Call, make_measurements, make_run

LAST = int(STEPS[-1])


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A run of the same shape and another plan."""
    return make_run(tmp_path / "other", plan=Plan(0, TOTAL, np.ones(TOTAL + 1), 8, "constant"))


def save(path: Path) -> Path:
    """The small run as a file of measurements."""
    made = make_measurements()
    stats = np.stack([np.concatenate([m.top, m.median[..., None]], axis=2) for m in made])  # [T, L, n, k + 1]
    np.savez(path, steps=STEPS, stats=stats.transpose(0, 2, 3, 1), lr=np.asarray(PLAN.lr))
    return path


def test_document(call: Call, run_dir: Path, other: Path) -> None:
    result = call("backtest", run_dir, other, "--json")
    document = result.document
    assert result.err == ""
    assert set(document) == {"runs", "cutoffs", "mean_ratio"}
    assert [one["run"] for one in document["runs"]] == [str(run_dir), str(other)]
    assert [row["percent"] for row in document["cutoffs"]] == [10, 20, 40, 60, 80]
    for row in document["cutoffs"]:
        assert row["runs"] == 2
        assert set(row["methods"]) == set(METHODS)
        assert all(set(scores) == set(SCORED) and None not in scores.values() for scores in row["methods"].values())
        best = min(row["methods"][method]["error"] for method in METHODS[1:])
        assert row["ratio"]["error"] == pytest.approx(row["methods"]["forecast"]["error"] / best)
    source = Run.open(run_dir)
    trials = run_trials(
        source.steps, source.ratios(), lambda at, grid: forecast_run(source, at=at, grid=grid.tolist()), run="a"
    )
    want = [s.error for s in score_trials(trials)]
    assert [row["error"] for row in document["runs"][0]["scores"]] == want


def test_one_configuration_alone_has_no_bands_for_rules(call: Call, run_dir: Path, tmp_path: Path) -> None:
    twin = make_run(tmp_path / "twin", name="other name")
    assert configuration(Run.open(run_dir)) == configuration(Run.open(twin)), "a name makes no configuration"
    for runs in ([run_dir], [run_dir, run_dir], [run_dir, twin]):
        document = call("backtest", *runs, "--json").document
        assert len(document["runs"]) == len(set(runs)), "a run named twice counts once"
        assert document["mean_ratio"]["crps"] is None
        assert document["mean_ratio"]["error"] > 0
    text = call("backtest", run_dir).out
    assert text.startswith("1 run;")
    assert len(text.splitlines()) == 2 + 6
    assert " - " in text


def test_at(call: Call, refused: Callable[..., str], run_dir: Path) -> None:
    document = call("backtest", run_dir, "--at", "50,25,50", "--json").document
    assert [row["percent"] for row in document["cutoffs"]] == [25, 50]
    assert "25 %" in call("backtest", run_dir, "--at", "25").out
    for bad in ("0", "100", "ten", "10,", "5.5"):
        assert "whole percents from 1 to 99" in refused("backtest", run_dir, "--at", bad)


def test_a_file_scores_as_the_run_it_is(call: Call, run_dir: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "small.npz")
    imported = tmp_path / "imported"
    assert call("import", file, "--out", imported).code == 0
    direct, through = (call("backtest", path, "--json").document for path in (file, imported))
    assert direct["runs"][0].pop("run") == str(file)
    assert through["runs"][0].pop("run") == str(imported)
    assert direct == through
    folder = tmp_path / "several"
    folder.mkdir()
    for name in "ab":
        save(folder / f"{name}.npz")
    several = call("backtest", folder, "--json").document
    assert [one["run"] for one in several["runs"]] == [f"{folder}/a", f"{folder}/b"]
    assert several["runs"][0]["scores"] == direct["runs"][0]["scores"]


def test_ratio(call: Call, run_dir: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "small.npz")
    with np.load(file) as data:
        stats = data["stats"].copy()
        stats[:, 0, 3] /= 2  # one sequence's ratio is twice as high, and the two ways to reduce differ
        np.savez(file, steps=data["steps"], stats=stats, lr=data["lr"])
    ways = ("ratio_of_means", "mean_of_ratios")
    default, means, ratios = (
        call("backtest", file, *option, "--json").document["cutoffs"]
        for option in ([], *(["--ratio", way] for way in ways))
    )
    assert default == means
    assert means != ratios


def test_what_cannot_be_scored(call: Call, refused: Callable[..., str], run_dir: Path, tmp_path: Path) -> None:
    short = make_run(tmp_path / "short", steps=STEPS[:4])
    result = call("backtest", run_dir, short, "--json")
    assert [one["run"] for one in result.document["runs"]] == [str(run_dir)]
    assert "short: nothing to score" in result.err
    assert call("backtest", short).code == 2
    file = save(tmp_path / "small.npz")
    with np.load(file) as data:
        np.savez(file, steps=data["steps"], stats=data["stats"], lr=data["lr"][:5])
    assert "left out: small.npz: lr" in call("backtest", file, "--json").err
    assert "not a run" in refused("backtest", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no measurements" in refused("backtest", tmp_path / "empty")
