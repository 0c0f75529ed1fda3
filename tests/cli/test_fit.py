"""``ma-monitor fit``: the pinned document, the table and the CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_monitor.report.words import asymptote_words, compare, peak_words
from ma_monitor.runs.store import Run
from tests.cli.conftest import LAYERS, PLAN, Call, make_measurements, make_meta, make_ratios, make_run

LAYER_KEYS = {
    *("layer", "A", "log_abs_A", "lambda", "gamma", "t0", "K", "beta", "tau0", "A1", "A2", "r2", "aicc", "at_bound"),
    *("class", "peak", "asymptote", "hypotheses"),
}
PEAK_KEYS = {"step", "height", "low", "high", "identified", "status"}
ASYMPTOTE_KEYS = {"value", "low", "high", "identified"}


@pytest.fixture(scope="module")
def curve_check() -> Callable[[dict[str, Any], np.ndarray[Any, np.dtype[np.float64]]], Any]:
    """Eq. 14 from the printed parameters, written out anew."""

    def evaluate(layer: dict[str, Any], t: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
        decay = np.exp(-layer["beta"] * t)
        return decay * (layer["A1"] * np.log(t + layer["tau0"]) + layer["A2"]) + layer["K"]

    return evaluate


def test_document(call: Call, run_dir: Path, curve_check: Callable[..., Any]) -> None:
    result = call("fit", run_dir, "--json")
    document = result.document
    assert result.err == ""
    assert (document["run"], document["at"], document["rank"]) == (str(run_dir), 1500, 1)
    assert document["ratio"] == "ratio_of_means"
    assert [layer["layer"] for layer in document["layers"]] == [1, 2, 3]
    run = Run.open(run_dir)
    for layer, ratio in zip(document["layers"], run.ratios(), strict=True):
        assert set(layer) >= LAYER_KEYS
        assert set(layer["peak"]) >= PEAK_KEYS
        assert set(layer["asymptote"]) >= ASYMPTOTE_KEYS
        residual = ratio - curve_check(layer, run.steps.astype(float))
        r2 = 1 - (residual**2).sum() / ((ratio - ratio.mean()) ** 2).sum()
        assert layer["r2"] == pytest.approx(r2, abs=1e-6), "R2 is not that of the printed curve"
    assert document["layers"][0]["class"] == "early_peak"
    assert document["layers"][0]["peak"]["status"] == "past"
    assert document["layers"][1]["class"] == "log_increase"


def test_comparison_is_over_all_layers(call: Call, run_dir: Path) -> None:
    document = call("fit", run_dir, "--json").document
    compared = document["comparison"]
    for name, entry in compared.items():
        if name == "curve":
            scores = [layer["r2"] for layer in document["layers"]]
        else:
            scores = [layer["hypotheses"][name]["r2"] for layer in document["layers"]]
        assert entry["mean_r2"] == pytest.approx(np.mean(scores), rel=1e-12)
    assert set(compared) == {"curve", *document["layers"][0]["hypotheses"]}
    assert sum(entry["best"] for entry in compared.values()) == LAYERS


def test_comparison_without_numbers() -> None:
    one = {"r2": 0.9, "aicc": 3.0, "hypotheses": {"constant": {"r2": None, "aicc": 5.0}}}
    none = {"r2": None, "aicc": None, "hypotheses": {"constant": {"r2": None, "aicc": None}}}
    assert compare([one, none]) == {
        "curve": {"mean_r2": 0.9, "layers": 1, "best": 1},
        "constant": {"mean_r2": None, "layers": 0, "best": 0},
    }


def test_table(call: Call, run_dir: Path) -> None:
    document = call("fit", run_dir, "--json").document
    result = call("fit", run_dir)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{run_dir}: tiny, {len(Run.open(run_dir).steps)} measurements up to step 1,500"
    columns = re.split(r"\s{2,}", lines[2])
    assert columns[:9] == ["layer", "class", "A", "lambda", "gamma", "t0", "K", "R2", "AICc"]
    for line, layer in zip(lines[3 : 3 + LAYERS], document["layers"], strict=True):
        cells = dict(zip(columns, re.split(r"\s{2,}", line), strict=True))
        assert (cells["layer"], cells["class"]) == (str(layer["layer"]), layer["class"])
        assert float(cells["R2"]) == pytest.approx(layer["r2"], abs=1e-4)
        assert float(cells["K"].strip("()").replace(",", "")) == pytest.approx(layer["K"], rel=1e-3)
        assert cells["K"].startswith("(") != layer["asymptote"]["identified"]
        assert ("not identified" in cells["asymptote [80 %]"]) != layer["asymptote"]["identified"]
    assert lines[3 + LAYERS].startswith("(K): a parameter of the best curve")
    spread = document["variability"]
    assert lines[5 + LAYERS] == (
        "over the probe's 4 sequences, mean of all layers and steps: CV {cv_percent:.4g} %, "
        "standard error {sem_percent:.4g} %, 95 % interval ±{ci95_percent:.4g} %".format(**spread)
    )
    second = {line.split("  ")[0]: line for line in lines[4 + LAYERS + 4 :]}
    assert set(second) == set(document["comparison"])
    assert len({len(line) for line in lines[2 : 3 + LAYERS]}) == 1, "the columns are not aligned"


def test_csv(call: Call, run_dir: Path) -> None:
    document = call("fit", run_dir, "--json").document
    result = call("fit", run_dir, "--csv")
    assert (result.code, result.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(result.out)))
    assert len(rows) == LAYERS
    for row, spread in zip(rows, document["variability"]["layers"], strict=True):
        assert row["variability_sem_percent"] == str(spread["sem_percent"])
    for row, layer in zip(rows, document["layers"], strict=True):
        for key in ("layer", "A", "lambda", "K", "r2"):
            assert row[key] == ("" if layer[key] is None else str(layer[key]))
        for key in ASYMPTOTE_KEYS:
            value = layer["asymptote"][key]
            assert row[f"asymptote_{key}"] == ("" if value is None else str(value))
        assert row["peak_status"] == layer["peak"]["status"]


def test_variability_over_sequences(call: Call, tmp_path: Path) -> None:
    """One layer's sequences differ by a known spread at every step, the others' not at all."""
    spread = np.array([0.8, 1.0, 1.0, 1.2])
    cv = 100 * spread.std(ddof=1) / spread.mean()
    with Run.create(tmp_path / "run", make_meta(), PLAN) as run:
        for m in make_measurements():
            top = m.top.copy()
            top[1] *= spread[:, None]
            run.append(replace(m, top=top))
    document = call("fit", tmp_path / "run", "--json").document
    first, second, third = document["variability"]["layers"]
    assert second["cv_percent"] == pytest.approx(cv, rel=1e-12)
    assert second["sem_percent"] == pytest.approx(cv / 2, rel=1e-12)
    assert second["ci95_percent"] == pytest.approx(cv / 2 * 3.182446305, rel=1e-9), "Student's t of 3 degrees"
    assert first["cv_percent"] == pytest.approx(0, abs=1e-12)
    whole = document["variability"]
    assert whole["cv_percent"] == pytest.approx(cv / LAYERS, rel=1e-9)
    assert whole["measurements"] == sum(one["measurements"] for one in (first, second, third))
    one_step = call("fit", tmp_path / "run", "--at", 0, "--rank", 2, "--json").document["variability"]["layers"][1]
    assert one_step == {**second, "measurements": 1} | {
        k: pytest.approx(second[k], rel=1e-9) for k in list(second)[1:4]
    }


def test_one_sequence_has_no_variability(call: Call, tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", replace(make_meta(), probe=replace(make_meta().probe, sequences=1)), PLAN) as run:
        for m in make_measurements():
            one = {name: getattr(m, name)[:, :1] for name in ("top", "position", "token", "channel")}
            run.append(replace(m, **one, **{name: getattr(m, name)[:, :1] for name in ("median", "nan", "inf")}))
    document = call("fit", tmp_path / "run", "--json").document
    assert document["variability"]["cv_percent"] is None
    assert "between sequences is not known" in call("fit", tmp_path / "run").out


def test_only_what_was_seen(call: Call, run_dir: Path) -> None:
    document = call("fit", run_dir, "--at", 640, "--json").document
    assert document["at"] == 600
    assert document == call("fit", run_dir, "--at", 600, "--json").document
    assert document["layers"][0]["r2"] != call("fit", run_dir, "--json").document["layers"][0]["r2"]


def test_rank_and_ratio(call: Call, refused: Callable[..., str], run_dir: Path) -> None:
    first = call("fit", run_dir, "--json").document["layers"]
    third = call("fit", run_dir, "--rank", 3, "--json").document["layers"]
    means = call("fit", run_dir, "--ratio", "mean_of_ratios", "--json").document
    assert means["ratio"] == "mean_of_ratios"
    for layer, other, mean in zip(first, third, means["layers"], strict=True):
        assert other["K"] == pytest.approx(layer["K"] / 4, rel=1e-6)
        assert mean["r2"] == pytest.approx(layer["r2"], rel=1e-6), "both ratios are equal in this run"
    assert "`rank` must be one of this run's, 1 to 3, got 4" in refused("fit", run_dir, "--rank", 4)


def test_bad_input(refused: Callable[..., str], run_dir: Path, tmp_path: Path) -> None:
    assert "--csv and --json both ask for stdout" in refused("fit", run_dir, "--csv", "--json")
    late = make_run(tmp_path / "late", steps=np.arange(100, 1000, 50))
    assert "at or before step 99" in refused("fit", late, "--at", 99)


def test_too_few_points_are_a_result(call: Call, tmp_path: Path) -> None:
    path = make_run(tmp_path / "short", steps=np.array([0, 1, 2]))
    document = call("fit", path, "--json").document
    assert [layer["class"] for layer in document["layers"]] == ["undetermined"] * LAYERS
    assert all(layer["r2"] is None for layer in document["layers"])
    text = call("fit", path).out
    assert text.count("undetermined") == LAYERS
    assert text.count("not known") == 2 * LAYERS
    assert f"layer 1, 2, 3: {document['layers'][0]['status']}\n" in text
    assert "not fitted: fewer than" in text
    assert call("fit", path, "--csv").out.count("undetermined") == LAYERS


def test_a_layer_that_is_not_plainly_fitted_says_so(call: Call, tmp_path: Path) -> None:
    with Run.create(tmp_path / "odd", make_meta(), PLAN) as run:
        for m in make_measurements():
            top = m.top.copy()
            top[0] = 7 * m.median[0][:, None]
            if m.step == 100:
                top[1] = np.inf
            run.append(replace(m, top=top))
    text = call("fit", tmp_path / "odd").out
    assert "\nlayer 1: all values are equal: there is nothing to fit\n" in text
    assert "\nlayer 2: fitted to the finite points only\n" in text
    assert "layer 3:" not in text


def test_words() -> None:
    peak = {"step": 1234.4, "low": 900.0, "high": 2000.6, "height": 5.0, "identified": True, "status": "ahead"}
    assert peak_words(peak) == "ahead: 1,234 [900, 2,001]"
    assert peak_words({**peak, "high": None}) == "ahead: 1,234 [900, ?]"
    assert peak_words({**peak, "identified": False}) == "not identified"
    assert peak_words({**peak, "status": "none"}) == "none"
    assert peak_words({**peak, "status": "not_within_schedule"}) == "not within the schedule"
    assert peak_words({**peak, "status": "not_within_schedule"}, planned=False).startswith("still rises")
    assert peak_words(None) == "not known"
    asymptote = {"value": 12.3456, "low": 1.0, "high": 20000.0, "identified": True}
    assert asymptote_words(asymptote) == "12.3 [1, 20,000]"
    assert asymptote_words({**asymptote, "identified": False}) == "not identified"
    assert asymptote_words(None) == "not known"


def test_the_small_run_is_what_it_says(run_dir: Path) -> None:
    run = Run.open(run_dir)
    np.testing.assert_allclose(run.ratios(), make_ratios(run.steps), rtol=1e-12)
