"""What a replay knows of its training: the plans of the live run, the schedule of a Trainer's state."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTNeoXForCausalLM

from ma_monitor.config import MonitorConfig
from ma_monitor.measure.probe import Probe
from ma_monitor.monitor import Monitor
from ma_monitor.replay.hub import hub_source
from ma_monitor.replay.runner import replay
from ma_monitor.replay.sources import folder_source
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import Run
from ma_monitor.sinks.base import MemorySink
from tests.replay.loopback import LoopbackHub
from tests.replay.makers import STEPS, save_model


def live_run(root: Path, probe: Probe, resumed_at: int | None) -> tuple[Run, MemorySink]:
    """Trains for eight updates, after a resume on another schedule, and leaves checkpoints as the callback does."""
    save_model(root / "start", seed=1)
    model = GPTNeoXForCausalLM.from_pretrained(root / "start", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, sink = torch.from_numpy(probe.ids), MemorySink()
    config = MonitorConfig(every=1, strict=True)
    live = Monitor(
        model, probe, config, run_dir=root / "live", schedule="cosine:warmup=.25", total_steps=8, batch=3, sinks=[sink]
    )
    for step in range(9):
        live.step(step, final=step == 8)
        if step == resumed_at:
            live.close()
            live = Monitor(
                model,
                probe,
                config,
                run_dir=root / "live",
                schedule="linear",
                total_steps=20,
                batch=6,
                sinks=[sink],
                resume_from=step,
            )
        model.save_pretrained(root / "trained" / f"checkpoint-{step}")
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live.close()
    run = Run.open(root / "live")
    run.copy_to(root / "trained" / "checkpoint-8" / "ma_monitor")
    return run, sink


def test_replay_gives_the_files_and_emissions_of_the_live_run(tmp_path: Path, probe: Probe) -> None:
    live, live_sink = live_run(tmp_path, probe, resumed_at=None)
    sink = MemorySink()

    replay(folder_source(tmp_path / "trained"), probe, MonitorConfig(strict=True), tmp_path / "run", sinks=[sink])

    for file in ("run.json", "measurements.bin", "fits.json", "forecast.json"):
        assert (tmp_path / "run" / file).read_bytes() == (live.path / file).read_bytes()
    assert [(e.step, e.scalars, e.tables, e.config) for e in sink.emissions] == [
        (e.step, e.scalars, e.tables, e.config) for e in live_sink.emissions
    ]


def plans_of(run: Path) -> list[tuple[Any, ...]]:
    plans = Run.open(run).plans
    return [(p.from_step, p.total_steps, None if p.lr is None else p.lr.tolist(), p.batch, p.schedule) for p in plans]


@pytest.mark.parametrize("stopped_after", [None, 3, 5, 6, 8])
def test_a_replay_has_every_plan_of_the_live_run_at_its_own_step(
    tmp_path: Path, probe: Probe, stopped_after: int | None
) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if done == stopped_after:
            raise KeyboardInterrupt

    live, live_sink = live_run(tmp_path, probe, resumed_at=5)
    source, config, sink = folder_source(tmp_path / "trained"), MonitorConfig(strict=True), MemorySink()
    if stopped_after is not None:
        with pytest.raises(KeyboardInterrupt):
            replay(source, probe, config, tmp_path / "run", sinks=[sink], progress=stop)

    replay(source, probe, config, tmp_path / "run", sinks=[sink])

    assert plans_of(tmp_path / "run") == plans_of(live.path)
    assert [plan.from_step for plan in live.plans] == [0, 5]
    for file in ("run.json", "measurements.bin", "fits.json", "forecast.json"):
        assert (tmp_path / "run" / file).read_bytes() == (live.path / file).read_bytes()
    assert [(e.step, e.scalars, e.tables) for e in sink.emissions] == [
        (e.step, e.scalars, e.tables) for e in live_sink.emissions
    ]


def test_plans_of_a_run_that_began_late_or_was_changed_after_the_last_checkpoint_are_kept(
    trained: Path, tmp_path: Path, probe: Probe
) -> None:
    replay(folder_source(trained), probe, None, tmp_path / "other")
    lr = np.linspace(1.0, 0.1, 81)
    planned = [Plan(12, 80, lr, 32, "first"), Plan(30, 80, lr / 2, 32, "second"), Plan(60, 80, lr / 3, 32, "third")]
    with Run.create(tmp_path / "live", Run.open(tmp_path / "other").meta, planned[0]) as live:
        for plan in planned[1:]:
            live.add_plan(plan)
        live.copy_to(trained / "checkpoint-60" / "ma_monitor")

    replay(folder_source(trained), probe, None, tmp_path / "run")

    assert plans_of(tmp_path / "run") == plans_of(tmp_path / "live")
    assert Run.open(tmp_path / "run").plan_at(0) is None
    assert Run.open(tmp_path / "run").read_document("forecast") is not None


@pytest.fixture
def trained(checkpoints: Path) -> Path:
    """Checkpoints of which the last two hold a Trainer's state."""
    for step in STEPS[2:]:
        rows = [{"step": s, "learning_rate": 1e-3 * (1 - (s - 1) / 80)} for s in range(10, step + 1, 10)]
        state = {"log_history": rows, "max_steps": 80, "global_step": step}
        (checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return checkpoints


def test_the_schedule_comes_from_the_last_trainer_state(trained: Path, tmp_path: Path, probe: Probe) -> None:
    replay(folder_source(trained), probe, None, tmp_path / "run")

    (plan,) = Run.open(tmp_path / "run").plans
    assert plan.total_steps == 80
    assert plan.lr is not None
    assert plan.lr.shape == (81,)
    np.testing.assert_allclose(plan.lr[9:60], 1e-3 * (1 - np.arange(9, 60) / 80))
    assert plan.schedule.startswith("from trainer_state.json")


def test_the_plan_of_the_live_run_goes_before(trained: Path, tmp_path: Path, probe: Probe) -> None:
    planned = Plan(0, 80, np.linspace(1.0, 0.1, 81), 32, "a live scheduler")
    replay(folder_source(trained), probe, None, tmp_path / "live")
    meta = Run.open(tmp_path / "live").meta
    with Run.create(tmp_path / "planned", meta, planned) as live:
        live.copy_to(trained / "checkpoint-60" / "ma_monitor")

    replay(folder_source(trained), probe, None, tmp_path / "run")

    (plan,) = Run.open(tmp_path / "run").plans
    assert plan.same_as(planned)
    assert plan.schedule == "a live scheduler"


def test_a_plan_once_recorded_is_kept(trained: Path, tmp_path: Path, probe: Probe) -> None:
    replay(folder_source(trained), probe, None, tmp_path / "whole")
    shutil.move(trained / "checkpoint-25", tmp_path / "later")
    replay(folder_source(trained), probe, None, tmp_path / "run")
    (trained / "checkpoint-60" / "trainer_state.json").unlink()
    shutil.move(tmp_path / "later", trained / "checkpoint-25")

    replay(folder_source(trained), probe, None, tmp_path / "run")

    (plan,), (whole,) = Run.open(tmp_path / "run").plans, Run.open(tmp_path / "whole").plans
    assert plan.same_as(whole)


@pytest.mark.parametrize("text", ["", "{}", '{"log_history": []}'])
def test_a_useless_trainer_state_is_named_and_does_no_harm(
    trained: Path, tmp_path: Path, probe: Probe, text: str
) -> None:
    (trained / "checkpoint-60" / "trainer_state.json").write_text(text, encoding="utf-8")

    result = replay(folder_source(trained), probe, None, tmp_path / "run")

    assert result.measured == STEPS
    (problem,) = result.problems
    assert problem.startswith("the learning-rate schedule is taken as unknown: ")


@pytest.mark.parametrize(
    "repo", ["EleutherAI/pythia-14m", "EleutherAI/pythia-1.4b-deduped", "EleutherAI/pythia-70m-v0"]
)
def test_pythias_known_schedule_is_taken_for_its_hub_ids(
    repo: str, hub: LoopbackHub, checkpoints: Path, tmp_path: Path, probe: Probe
) -> None:
    """Against the formula in its own words; the first versions (v0) were trained otherwise."""
    for step in STEPS:
        hub.put(repo, f"step{step}", checkpoints / f"checkpoint-{step}")

    replay(hub_source(repo, "all"), probe, None, tmp_path / "run")

    (plan,) = Run.open(tmp_path / "run").plans
    if repo.endswith("v0"):
        assert plan.schedule == "unknown"
        return
    assert (plan.from_step, plan.total_steps, plan.batch, plan.held) == (0, 143_000, 1024, False)
    assert plan.schedule == "Pythia's: cosine:warmup=.01,floor=.1"
    assert plan.lr is not None
    for step in (0, 1, 700, 1430, 5000, 143_000 - 1, 143_000):
        fall = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1430) / (143_000 - 1430))) / 2
        assert plan.lr[step] == pytest.approx(step / 1430 if step < 1430 else fall, rel=1e-12)


def test_a_held_rate_is_said_to_be_held(trained: Path, tmp_path: Path, probe: Probe) -> None:
    """The Trainer's last row is of step 60; how its rate goes on until step 80 is not written anywhere."""
    replay(folder_source(trained), probe, None, tmp_path / "run")
    (plan,) = Run.open(tmp_path / "run").plans
    assert plan.held
