"""``ma-monitor import``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.runs.store import Run
from tests.cli.conftest import LAYERS, SEQUENCES, Call


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two models in the published layout, one of their files malformed, and one that has only such."""
    rng = np.random.default_rng(3)
    for name in ("pythia_a", "pythia_b", "pythia_c"):
        stats = tmp_path / "published" / name / "stats"
        stats.mkdir(parents=True)
        for step in (0, 1, 512):
            values = np.sort(rng.uniform(1, 50, (SEQUENCES, 4, LAYERS)), axis=1)[:, ::-1]
            text = "[[1, 2" if name == "pythia_c" else str(values.tolist())
            (stats / f"exp2_{name}_step{step}").write_text(text)
    (tmp_path / "published" / "pythia_a" / "stats" / "exp2_pythia_a_step7").write_text("[[1, 2")
    return tmp_path / "published"


def test_one_model(call: Call, published: Path, tmp_path: Path) -> None:
    result = call("import", published / "pythia_a", "--out", tmp_path / "run", "--json")
    (imported,) = result.document["runs"]
    assert (imported["name"], imported["run"], imported["steps"]) == ("pythia_a", str(tmp_path / "run"), 3)
    assert len(imported["problems"]) == 1
    assert "exp2_pythia_a_step7" in imported["problems"][0]
    assert result.err.count("\n") == 1
    assert "exp2_pythia_a_step7" in result.err
    assert list(Run.open(tmp_path / "run").steps) == [0, 1, 512]
    assert call("fit", tmp_path / "run").code == 0


def test_several_models(call: Call, published: Path, tmp_path: Path) -> None:
    result = call("import", published, "--out", tmp_path / "runs")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == f"{tmp_path}/runs/pythia_a: pythia_a, 3 steps, 1 left out"
    assert lines[1] == f"{tmp_path}/runs/pythia_b: pythia_b, 3 steps"
    assert lines[2] == "no run: pythia_c, 0 steps, 3 left out"
    assert len(Run.open(tmp_path / "runs" / "pythia_b").steps) == 3


def test_npz(call: Call, tmp_path: Path) -> None:
    stats = np.sort(np.random.default_rng(3).uniform(1, 50, (5, SEQUENCES, 4, LAYERS)), axis=2)[:, :, ::-1]
    np.savez(tmp_path / "a.npz", steps=np.arange(5), stats=stats, lr=np.ones(11))
    (imported,) = call("import", tmp_path / "a.npz", "--out", tmp_path / "run", "--json").document["runs"]
    assert (imported["steps"], imported["problems"]) == (5, [])
    run = Run.open(tmp_path / "run")
    np.testing.assert_array_equal(run.ratios(), (stats[:, :, 0].sum(axis=1) / stats[:, :, 3].sum(axis=1)).T)


def test_shared_data(call: Call, shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "published_layout" / "pythia_14m"
    (imported,) = call("import", path, "--out", tmp_path / "run", "--json").document["runs"]
    assert imported["steps"] == 30
    assert len(imported["problems"]) == 1


def test_bad_input(call: Call, refused: Callable[..., str], published: Path, tmp_path: Path) -> None:
    assert "no measurements" in refused("import", tmp_path / "absent", "--out", tmp_path / "run")
    assert "no measurements" in refused("import", published / "pythia_c", "--out", tmp_path / "run")
    (tmp_path / "evil.npz").write_bytes(b"PK\x03\x04 broken")
    assert "no measurements" in refused("import", tmp_path / "evil.npz", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert call("import", published / "pythia_b", "--out", tmp_path / "run").code == 0
    assert "already holds a run" in refused("import", published / "pythia_b", "--out", tmp_path / "run")
