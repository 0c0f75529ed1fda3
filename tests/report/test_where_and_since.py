"""What page and dashboards say of places, of what is massive, and of what was read besides: against plain loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ma_monitor.report.page import render
from ma_monitor.report.places import findings, places
from ma_monitor.runs.store import Run
from ma_monitor.sinks.metrics import emission
from tests.cli.conftest import make_run
from tests.report.pages import STEPS, make_page_run, ratios

VALUES = 10 * ratios(3, STEPS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_page_run(tmp_path_factory.mktemp("where") / "run", values=VALUES)


def first_for_good(holds: list[bool]) -> int | None:
    return next((int(step) for k, step in enumerate(STEPS) if all(holds[k:])), None)


def test_since_when_and_how_massive(run: Run) -> None:
    stack = run.stack()
    massive = []
    for row in places(run)["rows"]:
        layer = row["layer"] - 1
        each, means = [], []
        for top, median in zip(abs(stack.top[:, layer, :, 0]), stack.median[:, layer], strict=True):
            each.append(sum(t > 100 and t >= 1000 * m for t, m in zip(top, median, strict=True)) / 4)
            means.append(bool(top.sum() > 400 and top.sum() >= 1000 * median.sum()))
        assert (row["sun"], row["owen"]) == (each[-1], means[-1])
        assert row["sun_since"] == first_for_good([share >= 0.5 for share in each])
        assert row["massive_since"] == first_for_good((VALUES[layer] >= 100).tolist())
        places_now = [(p == row["position"]).mean() >= 0.5 for p in stack.position[:, layer, :, 0]]
        assert row["position_since"] == first_for_good(places_now)
        massive += [row["layer"]] if row["owen"] else []
    assert massive == [2, 3]
    assert places(run)["words"] == [
        "Over all layers and sequences, 100 % of the largest entries are in one channel and 100 % at the first token.",
        "Massive by Sun et al. (larger than 100 and at least 1000 times the median, in most sequences): layers 2–3. "
        "By Owen et al. (the same of the means over sequences): layers 2–3.",
    ]


def test_kinds_of_token_need_the_tokenizer(tmp_path: Path) -> None:
    """Two sequences at the first token, one at a full stop, one at a word."""
    run = make_page_run(tmp_path / "run", layers=1, steps=np.array([100]), values=np.full((1, 1), 7.0))
    last = run.stack().at(0)
    position, token = np.array([0, 0, 3, 4]), np.array([1, 2, 1, 2])
    wide = [np.broadcast_to(one[None, :, None], last.top.shape).astype(np.int32) for one in (position, token)]
    with Run.open(run.path, writable=True) as writer:
        writer.append(replace(last, step=200, position=wide[0], token=wide[1]))
    assert places(Run.open(run.path))["rows"][0]["kinds"] == "not first 50 %, first 50 %"
    model = {"type": "WordLevel", "vocab": {"the": 0, ".": 1, "of": 2}, "unk_token": "the"}
    keys = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    document: dict[str, Any] = {"version": "1.0", "added_tokens": [], **dict.fromkeys(keys), "model": model}
    (run.path / "tokenizer.json").write_text(json.dumps(document))
    (row,) = places(Run.open(run.path))["rows"]
    assert row["kinds"] == "first 50 %, other 25 %, delimiter 25 %"


def test_imported_data_still_have_the_criterion(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "run"))
    (words,) = places(run)["words"]
    assert words.endswith("the means over sequences): no layer.")
    scalars = emission(run, 3, None, with_config=False).scalars
    assert {key for key in scalars if "where" in key or "criterion" in key} == {
        "ma/criterion/layers_sun",
        "ma/criterion/layers_owen",
    }


@pytest.mark.parametrize("seen", [1, 12, len(STEPS)])
def test_dashboards_get_the_same(run: Run, seen: int) -> None:
    stack, scalars = run.stack(), emission(run, seen, None, with_config=False).scalars
    channels, positions = (getattr(stack, name)[seen - 1, :, :, 0].ravel().tolist() for name in ("channel", "position"))
    most = max(channels.count(one) for one in channels)
    assert scalars["ma/where/channel_share"] == most / len(channels)
    assert scalars["ma/where/first_token_share"] == positions.count(0) / len(positions)
    top, median = abs(stack.top[seen - 1, :, :, 0]), stack.median[seen - 1]
    sun = [sum((t > 100) & (t >= 1000 * m)) >= 2 for t, m in zip(top, median, strict=True)]
    assert scalars["ma/criterion/layers_sun"] == sum(sun) == scalars["ma/criterion/layers_owen"]


def test_a_layer_without_numbers_has_no_place(tmp_path: Path) -> None:
    run = make_page_run(tmp_path / "run", steps=np.array([100, 200]), values=np.full((3, 2), 9.0))
    last = run.stack().at(1)
    changed = {name: getattr(last, name).copy() for name in ("top", "channel", "position", "token")}
    for name, values in changed.items():
        values[2] = np.nan if name == "top" else -1
    with Run.open(run.path, writable=True) as writer:
        writer.append(replace(last, step=300, **changed))
    found = places(Run.open(run.path))
    lost = 2 if run.meta.first_layer == 0 else 3
    assert lost not in [row["layer"] for row in found["rows"]]
    assert len(found["rows"]) == len(run.layers) - 1
    assert found["words"][-1] == f"Not known at the last step, of most sequences: layer {lost}."
    assert np.isnan(found["channel"][lost - 1]).all()


def with_readings(path: Path, **readings: list[list[float]]) -> Run:
    """A run of three steps with readings ``[T, R]`` of h_0 and on, keys with two underscores for the slash."""
    run = make_page_run(path, steps=np.array([100, 200, 300]), values=np.full((3, 3), 9.0))
    with Run.open(path, writable=True) as writer:
        for number, last in enumerate(map(run.stack().at, range(3))):
            read = {key.replace("__", "/"): np.array(values[number]) for key, values in readings.items()}
            writer.append(replace(last, phenomena=read))
    return Run.open(path)


def test_a_super_weight_is_told_with_the_step_at_which_it_formed(tmp_path: Path) -> None:
    nan = float("nan")
    columns: dict[str, list[list[float]]] = {
        "output_channel": [[nan, 1], [5, 1], [5, 1]],
        "input_channel": [[7, 2], [8, 2], [8, 2]],
        "value": [[nan, 0.5], [1.5, 0.5], [1.5, 0.5]],
        "past_50": [[0, 0], [0, 0], [1, 0.25]],
    }
    readings = {f"super_weights__{name}": [[nan, *row] for row in values] for name, values in columns.items()}
    run = with_readings(tmp_path / "run", **readings)
    (words,) = findings(run)
    assert words == (
        "Candidate super weights, by row and column of the down projection: layer 1: W[5, 8] = 1.5, the candidate "
        "since step 200, past 50 since step 300."
    )
    assert words in render([run])
    readings["super_weights__past_50"][-1] = [0.25, 0.25, 0.25]
    (words,) = findings(with_readings(tmp_path / "none", **readings))
    assert words.startswith("No super weight: ")
    readings["super_weights__past_50"][-1] = [nan, 1, 0]
    readings["super_weights__value"][-1] = [nan, nan, 1]
    (words,) = findings(with_readings(tmp_path / "apart", **readings))
    assert words.startswith("No one super weight: past 50 in most sequences in layer 1, which have")
    readings["super_weights__past_50"][-1] = [nan, nan, nan]
    (words,) = findings(with_readings(tmp_path / "unread", **readings))
    assert words == "Whether there is a super weight is not known: no down projection could be read."


def test_what_is_not_known_or_was_read_long_ago_is_told_so(tmp_path: Path) -> None:
    nan = float("nan")
    readings = {
        "emergence__norm_jump": [[nan, 9, 1]] * 2 + [[nan, nan, 1]],
        "emergence__typical_jump": [[nan, 1, 1]] * 3,
    }
    run = with_readings(tmp_path / "run", **readings)
    assert findings(run)[0].startswith("Where the massive token emerges is not known")
    with Run.open(run.path, writable=True) as writer:
        last = run.stack().at(2)
        writer.append(replace(run.stack().at(1), step=201, phenomena=run.phenomena_at(200)))
        writer.append(replace(last, step=300, phenomena={}))
    (words,) = findings(Run.open(run.path))
    assert words.startswith("At step 201, where this was read last: The massive token emerges in layer 1, as it has")


def test_the_emergence_layer_is_told_with_the_step_since_which_it_is_there(tmp_path: Path) -> None:
    nan = float("nan")
    typical = [[nan, 2, 1]] * 3
    run = with_readings(
        tmp_path / "run",
        emergence__norm_jump=[[nan, 2, 1], [nan, 2, 40], [nan, 2, 50]],
        emergence__typical_jump=typical,
    )
    (words,) = findings(run)
    assert words == (
        "The massive token emerges in layer 2, as it has since step 200: its norm grows 50-fold there, the typical "
        "token's 1-fold."
    )
    assert emission(run, 3, None, with_config=False).scalars["ma/emergence/layer"] == 2
    assert "ma/emergence/layer" not in emission(run, 1, None, with_config=False).scalars
    quiet = with_readings(tmp_path / "quiet", emergence__norm_jump=typical, emergence__typical_jump=typical)
    assert findings(quiet)[0].startswith("The massive token emerges in no one layer")


def test_nothing_read_nothing_told(run: Run, tmp_path: Path) -> None:
    assert findings(run) == []
    half = with_readings(tmp_path / "half", emergence__norm_jump=[[1, 2, 3]] * 3)
    assert findings(half) == []
    assert "ma/emergence/layer" not in emission(half, 3, None, with_config=False).scalars
