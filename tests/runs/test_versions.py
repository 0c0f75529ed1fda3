"""Runs written by released versions are read by this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ma_monitor import Run
from ma_monitor.errors import StoreError
from ma_monitor.learned import combiner, correction
from ma_monitor.runs.documents import COMBINER
from ma_monitor.runs.log import HEADER, SCHEMA_VERSION
from tests.runs.makers import make_measurements

FIRST = Path(__file__).parents[1] / "data" / "run-v1"
"""Written by 0.1.0: a run that was rewound to step 12 and went on."""
STEPS = [0, 1, 2, 4, 8, 10, 12, 15, 18, 21, 24, 30]


def made(steps: list[int]) -> np.ndarray:
    """The ratios that it was made of."""
    return np.array([6 + 8 * np.log1p(steps), 5 + 4 * np.log1p(steps)])


def test_a_run_of_the_first_version_is_read(tmp_path: Path) -> None:
    with Run.open(FIRST) as run:
        assert run.damage is None
        assert run.steps.tolist() == STEPS
        np.testing.assert_allclose(run.ratios(), made(STEPS), rtol=1e-12)
        np.testing.assert_allclose(run.ratios(rank=2), 0.75 * made(STEPS), rtol=1e-12)
        besides = run.phenomena()
        assert besides["kurtosis/per_token"].steps.tolist() == [1, 15, 21]
        np.testing.assert_allclose(besides["kurtosis/per_token"].values[:, 1:].T, made([1, 15, 21]) / 10, rtol=1e-12)
        assert besides["sinks/heads"].values.shape == (3, 3, 2)
        plan = run.plan_at(30)
        assert plan is not None
        assert (plan.total_steps, plan.schedule) == (40, "linear")
        assert [event.kind for event in run.events] == ["opened", "rewound"]
        for name in ("fits", "forecast"):
            document = run.read_document(name)
            assert document is not None
            assert [layer["layer"] for layer in document["layers"]] == [1, 2]


def test_a_run_of_the_first_version_goes_on(tmp_path: Path) -> None:
    shutil.copytree(FIRST, tmp_path / "run")
    with Run.open(tmp_path / "run", writable=True) as run:
        run.append(make_measurements(31, run.meta))
    with Run.open(tmp_path / "run") as run:
        assert run.steps.tolist() == [*STEPS, 31]


def test_every_file_says_its_version(tmp_path: Path) -> None:
    for file in FIRST.iterdir():
        if file.suffix == ".bin":
            assert file.read_bytes().startswith(HEADER)
        else:
            lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            assert all(json.loads(line)["schema_version"] == SCHEMA_VERSION for line in lines), file.name
    assert json.loads(correction.packaged_path().read_text())["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize("name", ["run.json", "measurements.bin"])
def test_a_run_of_a_later_version_is_refused(tmp_path: Path, name: str) -> None:
    shutil.copytree(FIRST, tmp_path / "run")
    file = tmp_path / "run" / name
    if name == "run.json":
        file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    else:
        data = bytearray(file.read_bytes())
        data[len(HEADER) - 4] = 2
        file.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"version 2, this ma_monitor reads 1"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize("name", [COMBINER, "prior.json"])
def test_what_forecasts_rest_on_says_its_version_too(tmp_path: Path, name: str) -> None:
    packaged = json.loads(correction.packaged_path().read_text())
    (tmp_path / name).write_text(json.dumps(packaged | {"schema_version": 2}))
    if name == COMBINER:
        with pytest.raises(ValueError, match="schema version 2, this ma_monitor reads 1"):
            combiner.from_dict(json.loads((tmp_path / name).read_text()))
    else:
        with pytest.raises(ValueError, match="schema version 2, this ma_monitor reads 1"):
            correction._prior(tmp_path / name, 0)
