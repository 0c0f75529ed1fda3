from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ma_monitor.errors import ConfigError
from ma_monitor.schedule import planned_rates

TOTAL = 40


def _rates(schedule: object, total: int | None = TOTAL) -> NDArray[np.float64]:
    lr = planned_rates(schedule, total).lr
    assert lr is not None
    return lr


def _reference(name: str, s: int, total: int, warmup: float, floor: float, decay: float) -> float:
    """One rate of a named schedule, written out."""
    warm = math.ceil(warmup * total)
    if s < warm:
        return s / warm
    if name == "constant":
        return 1.0
    start = total - math.floor(decay * total) if name == "wsd" else warm
    if s < start:
        return 1.0
    done = (s - start) / max(1, total - start)
    return 1 - (1 - floor) * ((1 - math.cos(math.pi * done)) / 2 if name == "cosine" else done)


@given(
    name=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    total=st.integers(1, 300),
    warmup=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    floor=st.sampled_from([0.0, 0.1, 1.0]),
    decay=st.sampled_from([0.0, 0.2, 0.5]),
)
def test_named_schedules(name: str, total: int, warmup: float, floor: float, decay: float) -> None:
    options = f"warmup={warmup}"
    options += f",floor={floor}" if name != "constant" else ""
    options += f",decay={decay}" if name == "wsd" else ""
    lr = _rates(f"{name}:{options}", total)
    floor = 1.0 if name == "constant" else floor
    wanted = [_reference(name, s, total, warmup, floor, decay) for s in range(total + 1)]
    np.testing.assert_allclose(lr, wanted, rtol=0, atol=1e-12)  # rates are of size 1, and few operations round


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("cosin", "a schedule is one of constant, linear, cosine, wsd or a file"),
        ("", "a schedule is one of"),
        ("linear:decay=.1", "the schedule 'linear' takes warmup, floor, got 'decay=.1'"),
        ("linear:warmup", "must be a fraction from 0 to 1, got 'warmup'"),
        ("cosine:warmup=100", "must be a fraction from 0 to 1, got 'warmup=100'"),
        ("cosine:floor=nan", "must be a fraction from 0 to 1, got 'floor=nan'"),
        ("wsd:warmup=.6,decay=.5", "warm-up and decay must fit into the planned length"),
    ],
)
def test_bad_names(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        planned_rates(text, TOTAL)


@pytest.mark.parametrize("total", [0, -3, True])
def test_a_plan_has_a_length(total: int) -> None:
    with pytest.raises(ConfigError, match="the planned length must be at least 1 update"):
        planned_rates("linear", total)


@pytest.mark.parametrize("suffix", ["npy", "npz", "json", "csv", "object.json", "header.csv"])
@pytest.mark.parametrize("extra", [0, 1])
def test_files(tmp_path: Path, suffix: str, extra: int) -> None:
    lr = np.linspace(1.0, 0.1, TOTAL + extra)
    path = tmp_path / f"rates.{suffix}"
    if suffix == "npy":
        np.save(path, lr)
    elif suffix == "npz":
        np.savez(path, lr=lr)
    elif suffix == "json":
        path.write_text(json.dumps(lr.tolist()))
    elif suffix == "object.json":
        path.write_text(json.dumps({"lr": lr.tolist()}))
    else:
        path.write_text("lr\n" * suffix.startswith("header") + "\n".join(map(repr, lr.tolist())))
    for source in (path, str(path)):
        rates = planned_rates(source, TOTAL)
        assert rates.lr is not None
        np.testing.assert_array_equal(rates.lr, np.append(lr, lr[-1])[: TOTAL + 1])
        assert rates.schedule == f"from {path.name}"
    np.testing.assert_array_equal(_rates(path, None), lr)


def test_a_csv_of_some_steps_is_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    path.write_text("step,loss,lr\n0,3.1,1.0\n10,3.0,0.5\n20,2.9,0.5\n")
    rates = planned_rates(path, 30)
    assert rates.lr is not None
    np.testing.assert_allclose(rates.lr[[0, 5, 10, 15, 30]], [1.0, 0.75, 0.5, 0.5, 0.5], rtol=1e-15)
    assert rates.schedule == "from rates.csv, interpolated"
    assert _rates(path, None).shape == (21,)


def test_the_shared_runs_hold_their_rates(shared_data: Path) -> None:
    assert _rates(shared_data / "runs" / "neox-70m.npz", 10_000).shape == (10_001,)


def test_given_rates_are_taken() -> None:
    np.testing.assert_array_equal(_rates([1.0, 0.5], 2), [1.0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ([1.0, "a"], "rates must be numbers"),
        ([[1.0, 2.0]], "rates must be one list"),
        ([], "rates must be one list"),
        ([1.0, -1.0], "finite, not negative and not all 0"),
        ([1.0, math.nan], "finite, not negative and not all 0"),
        ([0.0, 0.0], "finite, not negative and not all 0"),
        ([1.0, 1.0, 1.0, 1.0], "a plan of 2 updates needs 2 rates"),
    ],
)
def test_bad_rates(values: list[Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        planned_rates(values, 2)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("gone.npy", None, "must be readable as .npy"),
        ("bad.npz", "not a zip", "must be readable as .npz"),
        ("bad.json", "{", "must be readable as .json"),
        ("other.json", '{"rates": [1]}', "must be readable as .json"),
        ("bad.csv", "lr\nfast\n", "must be readable as .csv"),
        ("empty.csv", "", "rates must be one list"),
        ("empty.json", '{"log_history": [], "max_steps": 5}', "needs at least one learning rate"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | None, rule: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rule):
        planned_rates(tmp_path / name, TOTAL)


def test_a_file_without_lr_or_of_another_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", rates=np.ones(3))
    with pytest.raises(ConfigError, match=r"must be readable as \.npz"):
        planned_rates(tmp_path / "other.npz", 3)
    with pytest.raises(ConfigError, match="a file of rates must be one of"):
        planned_rates(tmp_path / "rates.txt", 3)


def test_a_trainers_state(tmp_path: Path) -> None:
    """The Trainer's row of step S holds the rate of the update from S - 1 to S."""
    history = [{"step": s, "learning_rate": 1.0 - (s - 1) / TOTAL, "loss": 1.0} for s in range(5, 21, 5)]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [*history, {"step": 20, "eval_loss": 1.0}], "max_steps": TOTAL}))
    rates = planned_rates(path, None)
    assert rates.lr is not None
    assert rates.lr.shape == (TOTAL + 1,)
    np.testing.assert_allclose(rates.lr[4:20], 1 - np.arange(4, 20) / TOTAL, rtol=1e-12)  # linear between rows
    assert set(rates.lr[20:]) == {rates.lr[19]}
    assert rates.schedule == "from trainer_state.json, interpolated; held after step 20"
