from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

from ma_monitor.errors import ConfigError, MissingExtraError, StoreError
from ma_monitor.runs.records import Measurements
from ma_monitor.runs.store import Run
from tests.runs.makers import any_measurements, make_measurements, make_meta

META = make_meta()


def make_run(path: Path, *many: Measurements, first_layer: int = 0) -> Run:
    meta = make_meta(layers=3 - 1 + first_layer, first_layer=first_layer)
    with Run.create(path, meta, None) as run:
        for m in many:
            run.append(m)
    return run


def exact(text: str) -> float:
    """Not every pandas parses a float to its last bit by default; Python does."""
    return float(text or "nan")


def read_back(path: Path) -> pd.DataFrame:
    floats = ("top1", "top2", "top3", "median")
    return (
        pd.read_csv(path, converters=dict.fromkeys(floats, exact)) if path.suffix == ".csv" else pd.read_parquet(path)
    )


@pytest.mark.parametrize("first_layer", [0, 1])
def test_the_table_has_a_row_for_each_step_layer_and_sequence(tmp_path: Path, first_layer: int) -> None:
    many = [make_measurements(step, META) for step in (0, 7)]
    table = make_run(tmp_path / "run", *many, first_layer=first_layer).to_pandas()
    assert list(table.columns) == ["step", "layer", "sequence", "top1", "top2", "top3", "median"]
    rows = [
        [m.step, first_layer + row, sequence, *np.abs(m.top[row, sequence]), m.median[row, sequence]]
        for m in many
        for row in range(3)
        for sequence in range(3)
    ]
    assert table.to_numpy().tolist() == rows


def test_as_many_tops_as_ranks(tmp_path: Path) -> None:
    meta = make_meta(k=1)
    with Run.create(tmp_path / "run", meta, None) as run:
        assert list(run.to_pandas().columns) == ["step", "layer", "sequence", "top1", "median"]
        assert len(run.to_pandas()) == 0


@settings(max_examples=25)
@given(any_measurements((3, 3, 3)))
def test_exports_read_back_equal(tmp_path_factory: pytest.TempPathFactory, m: Measurements) -> None:
    folder = tmp_path_factory.mktemp("export")
    run = make_run(folder / "run", m)
    for name in ("table.csv", "table.parquet"):
        run.export(folder / name)
        pd.testing.assert_frame_equal(read_back(folder / name), run.to_pandas(), check_exact=True)


def test_an_export_replaces_a_file_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_measurements(0, META))
    (tmp_path / "table.csv").write_text("old")
    run.export(str(tmp_path / "table.csv"))
    assert read_back(tmp_path / "table.csv").shape == (9, 7)
    run.export(tmp_path / "TABLE.CSV")
    assert (tmp_path / "TABLE.CSV").read_bytes() == (tmp_path / "table.csv").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["TABLE.CSV", "run", "table.csv"]


@pytest.mark.parametrize("name", ["table.xlsx", "table", "csv"])
def test_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"ends in .csv or .parquet, got '{name}'"):
        run.export(tmp_path / name)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", make_measurements(0, META))
    with pytest.raises(StoreError, match=rf"{name}: cannot be written"):
        run.export(tmp_path / "gone" / name)


def test_pandas_and_pyarrow_are_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", make_measurements(0, META))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pandas is not installed; run: pip install 'ma_monitor\[report\]'"):
        run.to_pandas()
    with pytest.raises(MissingExtraError, match="pandas is not installed"):
        run.export(tmp_path / "table.csv")
    monkeypatch.undo()
    monkeypatch.setattr("ma_monitor.runs.export.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pyarrow is not installed; run: pip install 'ma_monitor\[report\]'"):
        run.export(tmp_path / "table.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
