"""Monitor and Observer: one path, whoever drives it, and nothing that reaches the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor import Monitor, MonitorConfig, Probe, Run
from ma_monitor.analysis import GROWTH, analyse, refit_due
from ma_monitor.errors import ConfigError, ModelError, StoreError
from ma_monitor.monitor import Observer
from ma_monitor.runs.documents import copy_given
from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.sinks.base import Emission, MemorySink
from tests.training import VOCABULARY, tiny_llama

PROBE = Probe.from_ids(np.random.default_rng(0).integers(0, VOCABULARY, (3, 8)))
STRICT = MonitorConfig(every=2, strict=True)
LAYERS, SEQUENCES, RANKS = 3, 4, 3
META = RunMeta(
    ModelShape("made-up", None, LAYERS, 8, 2, 50, None), ProbeInfo("0" * 64, SEQUENCES, 8, "test"), RANKS, 0,
    "ratio_of_means", "float32",
)  # fmt: skip
PLAN = Plan(0, 60, np.linspace(1, 0, 61), 8, "linear")


def made_up(step: int) -> Measurements:
    """Measurements that rise with the step, with a little noise that is the same every time."""
    noise = np.random.default_rng(step).uniform(0.98, 1.02, (LAYERS + 1, SEQUENCES, RANKS))
    rise = 5 + np.arange(LAYERS + 1)[:, None, None] * np.log1p(step)
    return Measurements.from_statistics(step, -np.sort(-rise * noise, axis=2), np.ones((LAYERS + 1, SEQUENCES)))


def observed(folder: Path, steps: list[int], **options: Any) -> tuple[Run, MemorySink]:
    sink = MemorySink()
    run = Run.create(folder, META, PLAN)
    observer = Observer(run, STRICT, sinks=[sink], **options)
    for step in steps:
        observer.observe(made_up(step), final=step == steps[-1])
    observer.close()
    return run, sink


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its diary, which has time stamps."""
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "events.jsonl"}


def assert_same_emissions(one: MemorySink, other: MemorySink) -> None:
    assert len(one.emissions) == len(other.emissions)
    for a, b in zip(one.emissions, other.emissions, strict=True):
        assert (a.step, a.scalars, a.tables, a.config) == (b.step, b.scalars, b.tables, b.config)
        assert a.images.keys() == b.images.keys()
        assert all(np.array_equal(a.images[key], b.images[key]) for key in a.images)


def test_the_same_measurements_give_the_same_files_and_logged_values(tmp_path: Path) -> None:
    """Whoever drives it: a live loop, or the measurements of that loop fed in again."""
    live_sink, fed_sink = MemorySink(), MemorySink()
    model = tiny_llama(attention_dropout=0.0)
    live = Monitor(
        model, PROBE, STRICT, run_dir=tmp_path / "live", schedule="linear", total_steps=20, batch=4, sinks=[live_sink]
    )
    for step in range(21):
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 3] *= 1.1
        live.step(step, final=step == 20)
    assert live.run is not None
    run = Run.create(tmp_path / "fed", live.run.meta, live.run.plan_at(0))
    copy_given(live.run.path, run.path)
    fed = Observer(run, STRICT, sinks=[fed_sink])
    measured = live.run.measurements()
    for measurements in measured:
        fed.observe(measurements, final=measurements is measured[-1])
    live.close()
    fed.close()
    assert files(tmp_path / "live") == files(tmp_path / "fed")
    assert_same_emissions(live_sink, fed_sink)
    assert [e.step for e in live_sink.emissions] == [0, 1, *range(2, 21, 2)]
    assert live_sink.emissions[0].config["ma_monitor/model"] == "llama"
    assert "ma/heatmap" in live_sink.emissions[-1].images


def test_a_forecast_logged_live_is_the_one_made_later(tmp_path: Path) -> None:
    steps = list(range(0, 40, 2))
    run, sink = observed(tmp_path / "run", steps)
    for count, emission in enumerate(sink.emissions, start=1):
        if count == len(steps) or refit_due(count):
            later = analyse(Run.open(tmp_path / "run"), at=emission.step).forecast.to_dict()
            ends = [layer["end"]["median"] for layer in later["layers"] if layer["end"]]
            assert emission.scalars.get("ma/forecast/max_end") == (max(ends) if ends else None)
    assert run.read_document("forecast") == json.loads(
        json.dumps(analyse(Run.open(tmp_path / "run")).forecast.to_dict())
    )


def test_an_interrupted_observer_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    steps = list(range(0, 60, 2))
    whole, sink = observed(tmp_path / "whole", steps)
    observed(tmp_path / "parts", steps[:20])
    run = Run.continue_(tmp_path / "parts", META, PLAN, from_step=steps[14])
    rest = MemorySink()
    observer = Observer(run, STRICT, sinks=[rest])
    for step in steps[15:]:
        observer.observe(made_up(step), final=step == steps[-1])
    observer.close()
    again = Run.open(tmp_path / "parts")
    assert again.steps.tolist() == whole.steps.tolist()
    assert again.read_document("forecast") == whole.read_document("forecast")
    assert [e.scalars for e in rest.emissions] == [e.scalars for e in sink.emissions[15:]]


@given(st.integers(1, 3000))
def test_refits_are_due_at_a_growth_of_five_percent(points: int) -> None:
    due = [n for n in range(1, points + 1) if refit_due(n)]
    assert due == [] if points < 6 else due[0] == 6
    for before, after in zip(due, due[1:], strict=False):
        assert after == max(before + 1, int(np.ceil(GROWTH * before)))


class Raises:
    """A sink that cannot."""

    name = "broken"

    def emit(self, emission: Emission) -> None:
        raise OSError("the network is down")

    def close(self) -> None:
        raise OSError("still down")


def test_a_sink_that_raises_is_named_once_and_the_others_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = MemorySink()
    run = Run.create(tmp_path, META, PLAN)
    observer = Observer(run, MonitorConfig(), sinks=[Raises(), good])
    for step in range(4):
        observer.observe(made_up(step))
    observer.close()
    assert len(good.emissions) == 4
    faults = [event.message for event in Run.open(tmp_path).events if event.kind == "fault"]
    assert len(faults) == 2
    assert faults[0].startswith("the broken sink failed")
    assert faults[1].startswith("closing broken failed")
    assert caplog.text.count("the network is down") == 1


@pytest.mark.parametrize(("method", "message"), [("emit", "network is down"), ("close", "still down")])
def test_strict_raises_what_would_be_warned_about(method: str, message: str, tmp_path: Path) -> None:
    observer = Observer(Run.create(tmp_path, META, PLAN), MonitorConfig(strict=True), sinks=[Raises()])
    with pytest.raises(OSError, match=message):
        observer.observe(made_up(0)) if method == "emit" else observer.close()
    observer.sinks = ()
    observer.close()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf], ids=["constant", "negative", "nan", "inf"])
def test_odd_series_never_stop_it_and_never_log_what_is_not_a_number(value: float, tmp_path: Path) -> None:
    sink = MemorySink()
    observer = Observer(Run.create(tmp_path, META, PLAN), STRICT, sinks=[sink])
    for step in range(12):
        top = np.full((LAYERS + 1, SEQUENCES, RANKS), value)
        observer.observe(Measurements.from_statistics(step, top, np.ones(top.shape[:2])), final=step == 11)
    observer.close()
    scalars = [value for emission in sink.emissions for value in emission.scalars.values()]
    assert np.isfinite(scalars).all()
    assert "NaN" not in (tmp_path / "forecast.json").read_text()


def test_a_run_that_diverges_shows(tmp_path: Path) -> None:
    sink = MemorySink()
    observer = Observer(Run.create(tmp_path, META, PLAN), STRICT, sinks=[sink])
    for step in range(10):
        measured = made_up(step)
        if step >= 8:
            measured.top[2] = np.inf
        if step == 9:
            measured.top[1:] = np.nan
        observer.observe(measured)
    observer.close()
    good, infinite, lost = (sink.emissions[step].scalars for step in (7, 8, 9))
    assert "ma/layers_not_finite" not in good
    assert (infinite["ma/layers_not_finite"], infinite["ma/layers_past_1000"]) == (1, 1)
    assert infinite["ma/max_ratio_layer"] == 3
    assert lost["ma/layers_not_finite"] == LAYERS
    assert not {"ma/max_ratio", "ma/layers_past_100"} & lost.keys()


def test_a_trained_model_that_holds_its_activations_is_settled(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META, PLAN)
    observer = Observer(run, STRICT)
    rng = np.random.default_rng(0)
    for step in range(0, 60, 2):
        top = 300 * rng.uniform(0.99, 1.01, (LAYERS + 1, SEQUENCES, RANKS))
        observer.observe(Measurements.from_statistics(step, top, np.ones(top.shape[:2])), final=step == 58)
    observer.close()
    assert observer.latest is not None
    assert {fit.trajectory_class.value for fit in observer.latest.fits} == {"settled"}


def test_fewer_than_six_points_give_no_numbers(tmp_path: Path) -> None:
    run, sink = observed(tmp_path, [0, 1, 2])
    assert all("ma/forecast/max_end" not in emission.scalars for emission in sink.emissions)
    document = run.read_document("fits")
    assert document is not None
    for layer in document["layers"]:
        assert layer["class"] == "undetermined"
        assert layer["K"] is None


def test_layers_of_the_table_are_those_of_the_model(tmp_path: Path) -> None:
    _, sink = observed(tmp_path, list(range(8)))
    table = sink.emissions[-1].tables["ma/layers"]
    assert [row[0] for row in table.rows] == [1, 2, 3]
    assert len(table.columns) == len(table.rows[0])
    assert {k for k in sink.emissions[-1].scalars if "layer_" in k} == {f"ma/ratio/layer_0{i}" for i in (1, 2, 3)}


def test_a_callback_that_only_takes_part_records_nothing(tmp_path: Path) -> None:
    monitor = Monitor(tiny_llama(), PROBE, STRICT, run_dir=None)
    assert monitor.step(0)
    assert monitor.forecast() is None
    monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_is_measured_once(tmp_path: Path) -> None:
    with_steps = Monitor(tiny_llama(), PROBE, STRICT, run_dir=tmp_path / "run", total_steps=3)
    assert [with_steps.step(s) for s in (0, 0, 2, 2, 3)] == [True, False, True, False, False]
    assert with_steps.step(3, final=True)
    assert not with_steps.step(3, final=True)
    assert with_steps.step(5, force=True)
    assert with_steps.run is not None
    assert with_steps.run.steps.tolist() == [0, 2, 3, 5]
    with_steps.close()
    with_steps.close()


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    far = Probe.from_ids([[1, VOCABULARY]])
    with pytest.raises(ConfigError, match=f"vocabulary of {VOCABULARY}, got {VOCABULARY}"):
        Monitor(tiny_llama(), far, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="context of 32 tokens, got 33"):
        Monitor(tiny_llama(), Probe.from_ids(np.ones((1, 33), dtype=int)), run_dir=tmp_path / "run")
    with pytest.raises(ModelError, match="exactly one list"):
        Monitor(torch.nn.Linear(2, 2), PROBE, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="cosin"):
        Monitor(tiny_llama(), PROBE, run_dir=tmp_path / "run", schedule="cosin", total_steps=5)
    assert not (tmp_path / "run").exists()


def test_a_directory_with_a_run_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    Monitor(tiny_llama(), PROBE, run_dir=tmp_path).close()
    with pytest.raises(StoreError, match="already"):
        Monitor(tiny_llama(), PROBE, run_dir=tmp_path)


@pytest.mark.parametrize("name", ["every", "k", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_counts_must_be_whole_and_positive(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` must be a whole number of at least 1, got {value!r}"):
        MonitorConfig(**{name: value})


def test_the_ratio_must_be_known() -> None:
    with pytest.raises(ConfigError, match="one of ratio_of_means, mean_of_ratios, got 'max'"):
        MonitorConfig(ratio="max")  # type: ignore[arg-type]


def test_pythias_early_steps_are_due() -> None:
    due = [step for step in range(1200) if MonitorConfig(every=500).due(step)]
    assert due == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 500, 512, 1000]


def test_a_rate_that_nobody_can_foresee_is_planned_anew_when_it_moves(tmp_path: Path) -> None:
    """A training whose plateau halves the rate at every third update, and wavers by less than a tenth between."""
    model = tiny_llama(attention_dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    monitor = Monitor(
        model, PROBE, MonitorConfig(every=1, strict=True), run_dir=tmp_path, schedule=plateau, total_steps=9
    )
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.8 * 0.5 ** (step // 3) * (1 + 0.02 * (step % 3))
        monitor.step(step, final=step == 9)
    assert monitor.run is not None
    plans = monitor.run.plans
    assert [(plan.from_step, plan.held) for plan in plans] == [(0, True), (3, True), (6, True), (9, True)]
    assert [set(plan.lr) for plan in plans if plan.lr is not None] == [{0.8}, {0.4}, {0.2}, {0.1}]
    assert len([event for event in monitor.run.events if event.kind == "plan changed"]) == 3
    monitor.close()
    assert monitor.schedule is None
