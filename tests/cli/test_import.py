"""``ma-monitor import``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.runs.published import published_files
from ma_monitor.runs.store import Run
from tests.cli.conftest import LAYERS, SEQUENCES, Call
from tests.replay.conftest import hub, hub_server
from tests.replay.loopback import LoopbackHub

__all__ = ["hub", "hub_server"]  # fixtures
DATA = "lab/activations"


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


def test_ratio(call: Call, published: Path, tmp_path: Path) -> None:
    for ratio in ("mean_of_ratios", "ratio_of_means"):
        out = tmp_path / ratio
        assert call("import", published / "pythia_b", "--out", out, "--ratio", ratio).code == 0
        assert Run.open(out).meta.ratio == ratio
    means, ratios = (Run.open(tmp_path / name) for name in ("ratio_of_means", "mean_of_ratios"))
    stack = means.stack()
    np.testing.assert_allclose(ratios.ratios(), (stack.top[..., 0] / stack.median).mean(axis=2).T, rtol=1e-12)
    assert (means.ratios() != ratios.ratios()).all()


def test_from_the_hub(call: Call, hub: LoopbackHub, published: Path, tmp_path: Path) -> None:
    """The real client, a busy server and a connection that breaks; one file is malformed, others are not data."""
    (published / "README.md").write_text("not data")
    (published / "pythia_a" / "figures").mkdir()
    (published / "pythia_a" / "figures" / "large.png").write_bytes(b"no")
    (published / "pythia_a" / "stats" / "notes.txt").write_text("beside the data")
    hub.put(DATA, "main", published)
    hub.faults = {f"/api/datasets/{DATA}": [503], "exp2_pythia_b_step1$": [0]}
    result = call("import", "--hub", DATA, "--out", tmp_path / "runs", "--json")
    a, b, c = result.document["runs"]
    assert [(m["name"], m["steps"], len(m["problems"])) for m in (a, b, c)] == [
        ("pythia_a", 3, 2),
        ("pythia_b", 3, 0),
        ("pythia_c", 0, 3),
    ]
    assert "exp2_pythia_a_step7: not a literal list" in result.err
    assert "Fetching" not in result.err, "progress is shown although stderr is no terminal"
    assert "notes.txt: the name is not exp2_<model>_step<N>" in result.err
    assert not any("README" in request or "large.png" in request for request in hub.requests), "more than was needed"
    assert not any("/resolve/main/" in request for request in hub.requests), "a branch may move between two files"
    local = call("import", published, "--out", tmp_path / "local", "--json").document["runs"]
    for there, here in zip((a, b), local[:2], strict=True):
        np.testing.assert_array_equal(Run.open(there["run"]).ratios(), Run.open(here["run"]).ratios())
    assert Run.open(a["run"]).meta.probe.source == f"{DATA} at {hub.sha(DATA, 'main')}"


def test_shared_data_from_the_hub(call: Call, hub: LoopbackHub, shared_data: Path, tmp_path: Path) -> None:
    hub.put(DATA, "main", shared_data / "published_layout")
    (there,) = call("import", "--hub", DATA, "--out", tmp_path / "there", "--json").document["runs"]
    (here,) = call("import", shared_data / "published_layout", "--out", tmp_path / "here", "--json").document["runs"]
    assert (there["name"], there["steps"]) == ("pythia_14m", 30)
    assert there["problems"] == here["problems"]
    assert "exp2_pythia-14m_step77" in there["problems"][0]
    logs = [Path(one["run"], "measurements.bin").read_bytes() for one in (there, here)]
    assert logs[0] == logs[1]


def test_one_model_of_a_revision_on_the_hub(call: Call, hub: LoopbackHub, published: Path, tmp_path: Path) -> None:
    """One model below another folder: it is the run itself, as when its folder is given."""
    hub.repos[DATA] = {"main": {"README.md": b""}}
    hub.put(DATA, "v2", published / "pythia_b")
    files = hub.repos[DATA]["v2"]
    hub.repos[DATA]["v2"] = {f"deep/pythia_b/{name}": content for name, content in files.items()}
    assert call("import", "--hub", DATA, "--revision", "v2", "--out", tmp_path / "run").code == 0
    run = Run.open(tmp_path / "run")
    assert (run.meta.model.name, len(run.steps)) == ("pythia_b", 3)


def test_what_the_hub_refuses(
    hub: LoopbackHub,
    refused: Callable[..., str],
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    assert "no public data set 'lab/absent'" in refused("import", "--hub", "lab/absent", "--out", out)
    hub.repos[DATA] = {"main": {"README.md": b""}}
    assert f"{DATA} holds no exp2_<model>_step<N> files at main" in refused("import", "--hub", DATA, "--out", out)
    assert "no revision v9" in refused("import", "--hub", DATA, "--revision", "v9", "--out", out)
    hub.put(DATA, "main", published)
    hub.gated = {DATA}
    assert f"{DATA} is gated: accept its terms" in refused("import", "--hub", DATA, "--out", out)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is on; unset HF_HUB_OFFLINE, or give a folder" in refused(
        "import", "--hub", DATA, "--out", out
    )
    assert not out.exists()


def test_path_or_hub(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "give one of them" in refused("import", "--out", tmp_path)
    assert "give one of them" in refused("import", tmp_path, "--hub", DATA, "--out", tmp_path)
    assert "give it with --hub" in refused("import", tmp_path, "--revision", "main", "--out", tmp_path)


@pytest.mark.parametrize(
    ("names", "root", "found"),
    [
        (["a/stats/exp2_a_step0", "b/stats/exp2_b_step5", "README.md"], "", 2),
        (["x/a/stats/exp2_a_step0", "x/b/stats/exp2_b_step5", "x/b/stats/odd", "x/b/plot.png"], "x", 3),
        (["x/a/exp2_a_step0", "x/a/exp2_a_step1"], "x/a", 2),
        (["stats/exp2_a_step0"], "", 1),
        (["README.md", "a/stats/exp2_a_stepX"], "", 0),
        ([], "", 0),
    ],
)
def test_where_in_a_repository_the_measurements_are(names: list[str], root: str, found: int) -> None:
    folder, files = published_files(names)
    assert (folder if folder != "." else "", len(files)) == (root, found)


def test_bad_input(call: Call, refused: Callable[..., str], published: Path, tmp_path: Path) -> None:
    assert "no measurements" in refused("import", tmp_path / "absent", "--out", tmp_path / "run")
    assert "no measurements" in refused("import", published / "pythia_c", "--out", tmp_path / "run")
    (tmp_path / "evil.npz").write_bytes(b"PK\x03\x04 broken")
    assert "no measurements" in refused("import", tmp_path / "evil.npz", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert call("import", published / "pythia_b", "--out", tmp_path / "run").code == 0
    assert "already holds a run" in refused("import", published / "pythia_b", "--out", tmp_path / "run")
