"""Whole runs in W&B and TensorBoard: which keys there are, every alert once, a resume, and other people's words."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from ma_monitor import MassiveActivationCallback, MonitorConfig, Run
from ma_monitor.cli.log import emissions
from ma_monitor.monitor import Observer
from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.sinks.alerts import LONGEST
from ma_monitor.sinks.base import MemorySink
from ma_monitor.sinks.tensorboard import TensorBoardSink
from ma_monitor.sinks.wandb import WandbSink
from tests.training import make_trainer, train

KEYS = 64
"""Most keys that a dashboard gets of a model of 36 layers."""
SEQUENCES, RANKS = 2, 3
HOSTILE = (
    "<script>alert(1)</script><b>bold</b> \"quotes' `code` *stars* _under_ [link](javascript:alert(1)) a|b &amp; ~~x~~"
    " \x1b[2J\x1b]0;title\x07\x00\x9b31m \u202egnp.exe \u05e9\u05dc\u05d5\u05dd\r\n\t" + "x" * 10_000
)


def made_run(path: Path, ratios: Any, *, name: str = "tiny", step: int = 100) -> Run:
    """A run of these ratios ``[L, T]`` every so many steps, planned to be twice as long; not a number stays so."""
    values = np.asarray(ratios, dtype=np.float64)
    layers, points = values.shape
    meta = RunMeta(
        ModelShape(name, "tiny", layers, 16, 2, 40, 1000),
        ProbeInfo("ab" * 32, SEQUENCES, 12, name),
        RANKS,
        1,
        "ratio_of_means",
        "float32",
    )
    total = 2 * points * step
    run = Run.create(path, meta, Plan(0, total, np.linspace(1e-3, 0, total + 1), 8, "linear"))
    run.__dict__["waiting"] = [measured(i * step, values[:, i]) for i in range(points)]
    return run


def measured(step: int, ratios: Any) -> Measurements:
    """A step's measurements with these ratios ``[L]``; where one is NaN, every entry is."""
    top = np.asarray(ratios)[:, None, None] * np.ones((1, SEQUENCES, RANKS)) * 0.5 ** np.arange(RANKS)
    m = Measurements.from_statistics(step, top, np.ones(top.shape[:2]))
    return replace(m, nan=np.isnan(top[..., 0]) * 7)


def observe(run: Run, sinks: Any, *, first: int = 0, last: int | None = None) -> Observer:
    """Lets an observer see a part of a made run."""
    observer = Observer(run, MonitorConfig(strict=True), sinks=sinks)
    for m in run.__dict__["waiting"][first:last]:
        observer.observe(m)
    return observer


def eventful(points: int = 20) -> Any:
    """Ratios of four layers: one passes 1000, one jumps at the 13th point, one breaks at the 16th, one nears 100."""
    t = np.arange(points)
    rising = 5 * np.exp(0.36 * t)
    jumping = 12 * 1.01**t * np.where(t < 13, 1, 3)
    breaking = np.where(t < 16, 20 + np.sin(t), np.nan)
    nearing = 10 + 37 * np.log1p(t) + 0.1 * np.sin(t)
    return np.stack([rising, jumping, breaking, nearing])


def test_every_kind_of_alert_once_everywhere(
    tmp_path: Path,
    wandb_folder: Path,
    read_wandb: Callable[[Path], Any],
    read_events: Callable[[Path], dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import wandb

    memory = MemorySink()
    with caplog.at_level(logging.INFO, "ma_monitor"), made_run(tmp_path / "run", eventful()) as run:
        sinks = [memory, WandbSink(wandb.init(project="tests")), TensorBoardSink.to_directory(tmp_path / "tb")]
        observe(run, sinks, last=14)
        with closing(observe(run, sinks, first=14)):
            pass
        wandb.finish()
    alerts = [alert for emission in memory.emissions for alert in emission.alerts]
    rules = [alert.rule for alert in alerts]
    assert set(rules) >= {"past_100", "past_1000", "jump", "not_finite"}
    assert any(rule.startswith("forecast_") for rule in rules)
    named = [(alert.rule, layer) for alert in alerts for layer in alert.layers]
    assert len(named) == len(set(named)), "somebody was told twice"
    (jump,) = (alert for alert in alerts if alert.rule == "jump")
    (broken,) = (alert for alert in alerts if alert.rule == "not_finite")
    assert (jump.layers, jump.step, broken.layers, broken.step) == ((2,), 1300, (3,), 1600)
    assert broken.value == 7 * SEQUENCES

    told = [(alert.title, alert.text) for alert in alerts]
    content = read_wandb(wandb_folder)
    assert [(title, text) for title, text, _ in content.alerts] == told
    levels = {"info": "INFO", "warning": "WARN", "error": "ERROR"}
    assert [level for *_, level in content.alerts] == [levels[alert.level] for alert in alerts]
    written = read_events(tmp_path / "tb")["ma_monitor/alerts/text_summary"]
    assert written.steps == [emission.step for emission in memory.emissions if emission.alerts]
    diary = [event.message for event in Run.open(tmp_path / "run").events if event.kind == "alert"]
    assert diary == [f"{alert.key} {alert.title}. {alert.text}" for alert in alerts]
    logged = [record.getMessage() for record in caplog.records]
    assert [line for line in logged if "step" in line] == [f"ma_monitor: {title}. {text}" for title, text in told]

    replayed = [alert for emission in emissions(Run.open(tmp_path / "run")) for alert in emission.alerts]
    assert replayed[: len(alerts)] == alerts


def test_keys_of_a_large_model(
    tmp_path: Path,
    wandb_folder: Path,
    read_wandb: Callable[[Path], Any],
    read_events: Callable[[Path], dict[str, Any]],
) -> None:
    """Every value of 36 layers is found again, under no more keys than a person can look through."""
    import wandb
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    t = np.arange(10)
    ratios = np.stack([5 + (40 + 30 * layer) * np.log1p(t) * np.exp(-0.1 * t) for layer in range(36)])
    ratios[7, 3] = np.inf
    with made_run(tmp_path / "run", ratios) as run:
        sinks = [WandbSink(wandb.init(project="tests")), TensorBoardSink.to_directory(tmp_path / "tb")]
        with closing(observe(run, sinks)) as observer:
            observer.finish()
        wandb.finish()
        measured_ratios, steps = run.ratios(), run.steps.tolist()

    content, tags = read_wandb(wandb_folder), read_events(tmp_path / "tb")
    plain = {re.sub(r"(ma/(?:heatmap|fan|layers))/.*", r"\1", key) for row in content.rows for key in row}
    ours = {key for key in plain | set(content.summary) if key.startswith("ma")}
    ours = {re.sub(r"(ma/(?:heatmap|fan|layers))/.*", r"\1", key) for key in ours}
    assert {"ma/heatmap", "ma/fan", "ma/layers", "ma/max_ratio", "ma_monitor/largest_ratio_step"} <= ours
    assert len(ours) <= KEYS
    assert len(tags) <= KEYS
    for layer, row in enumerate(measured_ratios, start=1):
        key, known = f"ma/ratio/layer_{layer:02d}", np.isfinite(row)
        expected = [(step, value) for step, value in zip(steps, row.tolist(), strict=True) if np.isfinite(value)]
        assert [(r["train/global_step"], r[key]) for r in content.rows if key in r] == expected
        assert tags[key].steps == [step for step, _ in expected]
        np.testing.assert_array_equal(np.ravel(tags[key].values), row[known].astype(np.float32))
    assert content.summary["ma_monitor/largest_ratio"] == measured_ratios[np.isfinite(measured_ratios)].max()
    assert sum(int(words.split()[0]) for words in content.summary["ma_monitor/classes"].split(", ")) == 36
    session = HParamsPluginData.FromString(tags["_hparams_/session_start_info"].content).session_start_info
    assert session.hparams["ma_monitor/layers"].number_value == 36
    assert session.hparams["ma_monitor/model"].string_value == "tiny"
    experiment = HParamsPluginData.FromString(tags["_hparams_/experiment"].content).experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"ma/max_ratio", "ma/forecast/max_end"} <= set(tags)


def test_a_resumed_training_goes_on_in_the_same_runs(
    tmp_path: Path,
    wandb_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_wandb: Callable[[Path], Any],
) -> None:
    """Stopped at step 8 after the checkpoint of step 6: TensorBoard shows every step once, in order."""
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 8

    settings: dict[str, Any] = {"report_to": ["tensorboard", "wandb"], "save_strategy": "steps", "save_steps": 6}
    for name, value in {"WANDB_RUN_ID": "again", "WANDB_RESUME": "allow"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    config = MonitorConfig(every=2, strict=True)
    make_trainer(tmp_path / "out", [MassiveActivationCallback(config), Stop()], **settings).train()
    wandb.finish()
    first = read_wandb(wandb_folder)
    next(wandb_folder.rglob("*.wandb")).unlink()
    make_trainer(tmp_path / "out", [MassiveActivationCallback(config)], **settings).train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6")
    )
    wandb.finish()
    second = read_wandb(wandb_folder)

    due = [0, 1, 2, 4, 6, 8, 10, 12]
    shown = EventAccumulator(str(tmp_path / "tb")).Reload()
    for tag in ("ma/ratio/layer_01", "ma/max_ratio"):
        assert [point.step for point in shown.Scalars(tag)] == due
    assert {point.step for point in shown.Scalars("train/loss")} == set(range(1, 13)), "the Trainer's own are all there"
    run = Run.open(tmp_path / "out" / "ma_monitor")
    assert run.steps.tolist() == due
    np.testing.assert_array_equal(
        [point.value for point in shown.Scalars("ma/max_ratio")], run.ratios().max(axis=0).astype(np.float32)
    )
    assert first.run_id == second.run_id == "again"
    steps = [[row["train/global_step"] for row in life.rows if "ma/max_ratio" in row] for life in (first, second)]
    assert steps == [[0, 1, 2, 4, 6, 8], [8, 10, 12]]


def test_points_that_a_resumed_wandb_run_has_are_not_logged_again(
    tmp_path: Path, wandb_folder: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Any]
) -> None:
    """What the server says of a resumed run is said here by hand: only a server knows it."""
    import wandb

    active = wandb.init(project="tests")
    active.summary["ma_monitor/step"] = 300
    monkeypatch.setattr(type(active), "resumed", True)
    with made_run(tmp_path / "run", np.full((2, 8), 5.0)) as run:
        observe(run, [WandbSink(active)])
    wandb.finish()
    rows = [row["train/global_step"] for row in read_wandb(wandb_folder).rows if "ma/max_ratio" in row]
    assert rows == [400, 500, 600, 700]


@pytest.mark.parametrize("kept", ["diary", "checkpoint"])
def test_alerts_survive_a_resume(kept: str, tmp_path: Path) -> None:
    """Of a run whose directory is there, and of one that comes back with nothing but its checkpoint."""

    class Refuses(TrainerCallback):
        """The first block refuses to be evaluated."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layer = kwargs["model"].model.layers[0]
            forward = layer.forward
            layer.forward = lambda *a, **k: forward(*a, **k) if layer.training else 1 / 0

    def lives(*callbacks: TrainerCallback, **resume: Any) -> Run:
        callback = MassiveActivationCallback(MonitorConfig(every=2))
        make_trainer(tmp_path / "out", [callback, *callbacks], save_strategy="steps", save_steps=6).train(**resume)
        assert callback.monitor is not None
        assert callback.monitor.run is not None
        return callback.monitor.run

    first = lives(Refuses())
    assert [event.kind for event in first.events].count("alert") == 1
    if kept == "checkpoint":
        (first.path / "events.jsonl").unlink()
    again = lives(Refuses(), resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert [event.kind for event in again.events].count("alert") == (1 if kept == "diary" else 0)
    assert [event.kind for event in again.events].count("fault") > 0


def test_training_with_dashboards_and_alerts_is_bit_identical(
    tmp_path: Path, wandb_folder: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Any]
) -> None:
    import wandb

    class Breaks(TrainerCallback):
        """From step 8 on, the first block refuses to be evaluated."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layer = kwargs["model"].model.layers[0]
            if state.global_step == 8:
                forward = layer.forward
                layer.forward = lambda *a, **k: forward(*a, **k) if layer.training else 1 / 0

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    reporters = ["tensorboard", "wandb"]
    once = train(tmp_path / "once", [Breaks()], report_to=reporters)
    wandb.finish()
    next(wandb_folder.rglob("*.wandb")).unlink()
    watched = train(
        tmp_path / "watched", [Breaks(), MassiveActivationCallback(MonitorConfig(every=1))], report_to=reporters
    )
    wandb.finish()
    assert all(torch.equal(value, watched.weights[name]) for name, value in once.weights.items())
    assert once.losses == watched.losses
    assert once.states == watched.states
    assert [title for title, *_ in read_wandb(wandb_folder).alerts] == ["The probe failed, step 9"]


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")  # in TensorBoard's copy of bleach
def test_other_peoples_words_are_shown_as_text(
    tmp_path: Path,
    wandb_folder: Path,
    read_wandb: Callable[[Path], Any],
    read_events: Callable[[Path], dict[str, Any]],
) -> None:
    import wandb
    from tensorboard.plugin_util import markdown_to_safe_html
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    with made_run(tmp_path / "run", np.full((2, 3), 5.0), name=HOSTILE) as run:
        sinks = [WandbSink(wandb.init(project="tests")), TensorBoardSink.to_directory(tmp_path / "tb")]
        observer = observe(run, sinks)
        observer.config = MonitorConfig()
        observer.fault("the probe", RuntimeError(HOSTILE))
        observer._missed(300)
        observer.close()
        wandb.finish()
    content, tags = read_wandb(wandb_folder), read_events(tmp_path / "tb")
    name = content.config["ma_monitor/model"]
    assert name.startswith("<script>alert(1)</script><b>bold</b> \"quotes' `code` *stars*")
    assert "\\x1b[2J" in name
    assert "\u05e9\u05dc\u05d5\u05dd" in name
    ((_, text, _),) = content.alerts
    session = HParamsPluginData.FromString(tags["_hparams_/session_start_info"].content).session_start_info
    assert session.hparams["ma_monitor/model"].string_value == name
    for words in (name, text):
        assert words.isprintable()
        assert len(words) <= 2 * LONGEST
    assert all(re.fullmatch(r"[\w/.]+", tag) for tag in tags)
    for tag in ("ma_monitor/config/text_summary", "ma_monitor/alerts/text_summary"):
        page = markdown_to_safe_html(tags[tag].values[0].item())
        allowed = {"table", "thead", "tbody", "tr", "th", "td", "strong", "p"}
        assert {found.strip("/") for found in re.findall(r"<([/\w]+)", page)} <= allowed
        assert html.escape(name[:140], quote=False) in page, "what is read is not what was written"


def test_pictures_are_drawn_for_those_who_show_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(MemorySink):
        pictures = False

    with made_run(tmp_path / "plain", np.full((2, 8), 5.0)) as run:
        plain = Plain()
        observe(run, [plain])
    with made_run(tmp_path / "both", np.full((2, 8), 5.0)) as run:
        memory = MemorySink()
        observe(run, [plain, memory])
    assert not any(emission.images or emission.tables for emission in plain.emissions[:8])
    assert [e.step for e in memory.emissions if e.images] == [500, 600, 700]
