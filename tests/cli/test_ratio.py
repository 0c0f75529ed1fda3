"""``--ratio``: every command that reduces a probe's sequences heeds it, and no run is changed by being read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.analysis import fit_run, forecast_run, sequence_ratios
from ma_monitor.cli.common import open_run
from ma_monitor.cli.log import emissions
from ma_monitor.runs.store import Run
from tests.cli.conftest import PLAN, Call, make_measurements, make_meta
from tests.runs import makers

OTHER = "mean_of_ratios"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sequences differ, so that the two ways of reducing them do."""
    path = tmp_path_factory.mktemp("uneven") / "run"
    with Run.create(path, make_meta(), PLAN) as run:
        for m in make_measurements()[::4]:
            run.append(replace(m, top=m.top * np.array([0.2, 1.0, 1.0, 4.0])[:, None]))
    return path


def test_the_two_differ(uneven: Path) -> None:
    ratios = open_run(str(uneven)).ratios()
    other = open_run(str(uneven), "mean_of_ratios").ratios()
    stack = Run.open(uneven).stack()
    np.testing.assert_allclose(other, (np.abs(stack.top[..., 0]) / stack.median).mean(axis=2).T, rtol=1e-12)
    assert (np.abs(other / ratios - 1) > 0.01).all()


def test_layer_0_is_no_layer_of_the_fit(tmp_path: Path) -> None:
    meta = makers.make_meta(layers=3, first_layer=0)
    with Run.create(tmp_path / "run", meta, None) as run:
        for step in range(4):
            run.append(makers.make_measurements(step, meta))
        stack, each = run.stack(), sequence_ratios(run, at=2, rank=2)
    assert each.shape == (3, 3, meta.probe.sequences)
    for layer in (1, 2, 3):
        want = np.abs(stack.top[:3, layer, :, 1]) / stack.median[:3, layer]
        np.testing.assert_array_equal(each[layer - 1], want)


def test_commands(call: Call, uneven: Path) -> None:
    before = {path.name: path.read_bytes() for path in uneven.iterdir()}
    source = open_run(str(uneven), "mean_of_ratios")
    for command, own in (
        ("fit", [fit.to_dict()["K"] for fit in fit_run(source, compare=False)]),
        ("forecast", [layer["end"] for layer in forecast_run(source).to_dict()["layers"]]),
    ):
        made, other = (call(command, uneven, "--json", *more).document for more in ((), ("--ratio", OTHER)))
        assert (made["ratio"], other["ratio"]) == ("ratio_of_means", OTHER)
        assert [layer["K" if command == "fit" else "end"] for layer in other["layers"]] == own
        assert made["layers"] != other["layers"]
    compared = call("compare", uneven, uneven, "--ratio", OTHER, "--json").document
    np.testing.assert_allclose([entry["ratios"][0] for entry in compared["depths"]], source.ratios(), rtol=1e-12)
    assert {path.name: path.read_bytes() for path in uneven.iterdir()} == before
    for shown, ratios in zip(emissions(source), source.ratios().T, strict=True):
        assert shown.scalars["ma/ratio/layer_01"] == ratios[0]
        assert shown.config.get("ma_monitor/ratio", OTHER) == OTHER


def test_log(call: Call, uneven: Path, tmp_path: Path) -> None:
    from tests.cli.test_log import read_events

    assert call("log", uneven, "--to", "tensorboard", "--dir", tmp_path / "tb", "--ratio", OTHER).code == 0
    logged = [float(value) for _, value in read_events(tmp_path / "tb")["ma/ratio/layer_03"]]
    np.testing.assert_allclose(logged, open_run(str(uneven), "mean_of_ratios").ratios()[2], rtol=1e-6)
