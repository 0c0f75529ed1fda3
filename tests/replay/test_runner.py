"""Replay of tiny random GPT-NeoX checkpoints, with statistics taken again by a plain forward and a sort."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import ConfigError, SourceError, StoreError
from ma_monitor.measure.probe import Probe
from ma_monitor.monitor import Monitor
from ma_monitor.replay.hub import hub_source
from ma_monitor.replay.runner import ReplayResult, replay
from ma_monitor.replay.sources import folder_source
from ma_monitor.runs.log import LogWriter
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import Run
from ma_monitor.sinks.base import MemorySink
from tests.replay.loopback import LoopbackHub

STEPS = (0, 10, 25, 60)
SAME_ARITHMETIC = 1e-6
"""Relative: the same forward in float32, its statistics reduced in another order."""
BFLOAT16_CHECKPOINT = 1e-4
"""Relative: another machine's float32 forward of the same weights."""


def save_model(folder: Path, seed: int, width: int = 16) -> None:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints; not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    for step in STEPS:
        save_model(root / f"checkpoint-{step}", seed=step)
    return root


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints to be changed at will."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe.from_ids(np.random.default_rng(7).integers(0, 50, size=(3, 12)))


def plain_statistics(folder: Path, probe: Probe) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Top three of abs(h) ``[R, n, 3]`` and lower median ``[R, n]`` of h_0 … h_2, by a sort of everything."""
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    layers = model.gpt_neox.layers
    layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(torch.from_numpy(probe.ids))
    flat = np.sort(np.abs([h.double().numpy().reshape(len(h), -1) for h in seen]), axis=-1)
    return flat[..., :-4:-1], flat[..., (flat.shape[-1] - 1) // 2]


def log_of(run: Path) -> bytes:
    return (run / "measurements.bin").read_bytes()


def test_measurements_are_those_of_a_plain_forward(saved: Path, tmp_path: Path, probe: Probe) -> None:
    result = replay(folder_source(saved), probe, None, tmp_path / "run")

    assert result == ReplayResult(tmp_path / "run", STEPS, (), ())
    run = Run.open(tmp_path / "run")
    assert run.steps.tolist() == list(STEPS)
    assert run.meta.precision == "float32"
    for index, step in enumerate(STEPS):
        top, median = plain_statistics(saved / f"checkpoint-{step}", probe)
        np.testing.assert_allclose(np.abs(run.stack().top[index]), top, rtol=SAME_ARITHMETIC)
        np.testing.assert_allclose(run.stack().median[index], median, rtol=SAME_ARITHMETIC)
    assert not (tmp_path / "run" / "incoming").exists()


def test_the_shared_checkpoint_gives_the_expected_statistics(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "checkpoint"
    ids = np.load(folder / "probe_ids.npy")
    expected = np.load(folder / "expected_step3000.npy")

    result = replay(folder_source(folder), Probe.from_ids(ids), None, tmp_path / "run")

    assert result.measured == (3000,)
    stack = Run.open(result.run).stack()
    measured = np.concatenate([np.abs(stack.top[0, 1:]), stack.median[0, 1:, :, None]], axis=-1)
    np.testing.assert_allclose(measured.transpose(1, 2, 0), expected, rtol=BFLOAT16_CHECKPOINT)


def test_every_checkpoint_is_shown_once_and_progress_is_told(saved: Path, tmp_path: Path, probe: Probe) -> None:
    sink, told = MemorySink(), list[tuple[int, int, str]]()

    replay(
        folder_source(saved),
        probe,
        MonitorConfig(every=1000),
        tmp_path / "run",
        sinks=[sink],
        progress=lambda done, total, name: told.append((done, total, name)),
    )

    assert [emission.step for emission in sink.emissions] == list(STEPS)
    names = [f"checkpoint-{step}" for step in STEPS]
    assert told == [(number, 4, name) for number, name in enumerate([*names, ""])]


def test_a_second_replay_measures_nothing(saved: Path, tmp_path: Path, probe: Probe) -> None:
    replay(folder_source(saved), probe, None, tmp_path / "run")
    before = log_of(tmp_path / "run")
    forecast = Run.open(tmp_path / "run").read_document("forecast")
    (tmp_path / "run" / "forecast.json").unlink()

    result = replay(folder_source(saved), probe, None, tmp_path / "run")

    assert result == ReplayResult(tmp_path / "run", (), STEPS, ())
    assert log_of(tmp_path / "run") == before
    assert Run.open(tmp_path / "run").read_document("forecast") == forecast


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_replay_goes_on_to_the_same_bytes(saved: Path, tmp_path: Path, probe: Probe, after: int) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        if done == after:
            raise KeyboardInterrupt

    replay(folder_source(saved), probe, None, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        replay(folder_source(saved), probe, None, tmp_path / "run", progress=interrupt)
    assert (tmp_path / "run").exists() == (after > 0)

    result = replay(folder_source(saved), probe, None, tmp_path / "run")

    assert (result.skipped, result.measured) == (STEPS[:after], STEPS[after:])
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_a_hole_in_the_run_is_filled(checkpoints: Path, tmp_path: Path, probe: Probe) -> None:
    weights = checkpoints / "checkpoint-10" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    first = replay(folder_source(checkpoints), probe, None, tmp_path / "run")
    weights.write_bytes(whole)

    second = replay(folder_source(checkpoints), probe, None, tmp_path / "run")

    assert first.measured == (0, 25, 60)
    assert first.problems == (
        "checkpoint-10 left out: half written, there is no model.safetensors or pytorch_model.bin",
    )
    assert (second.measured, second.skipped, second.problems) == ((10,), (0, 25, 60), ())
    run = Run.open(tmp_path / "run")
    assert run.steps.tolist() == list(STEPS)
    np.testing.assert_allclose(
        np.abs(run.stack().top[1]), plain_statistics(checkpoints / "checkpoint-10", probe)[0], rtol=SAME_ARITHMETIC
    )


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_checkpoints_that_cannot_be_used_are_named_and_the_others_go_on(
    checkpoints: Path, tmp_path: Path, probe: Probe
) -> None:
    (checkpoints / "checkpoint-0" / "model.safetensors").unlink()
    torch.save({"weight": Malicious(tmp_path / "executed")}, checkpoints / "checkpoint-0" / "pytorch_model.bin")
    shutil.rmtree(checkpoints / "checkpoint-25")
    save_model(checkpoints / "checkpoint-25", seed=25, width=32)
    (checkpoints / "checkpoint-60" / "model.safetensors").write_bytes(b"cut")

    result = replay(folder_source(checkpoints), probe, None, tmp_path / "run")

    assert result.measured == (10,)
    malicious, shape, cut = result.problems
    assert malicious.startswith("checkpoint-0 left out: its weights cannot be read (UnpicklingError")
    assert shape == "checkpoint-25 left out: its model is of another shape than the one before"
    assert cut.startswith("checkpoint-60 left out: its weights cannot be read (SafetensorError")
    assert not (tmp_path / "executed").exists()
    assert Run.open(tmp_path / "run").read_document("fits") is not None


def test_a_source_of_which_nothing_can_be_measured_is_refused(checkpoints: Path, tmp_path: Path, probe: Probe) -> None:
    for step in STEPS:
        (checkpoints / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(SourceError, match="no checkpoint of checkpoints could be measured: checkpoint-0 left out"):
        replay(folder_source(checkpoints), probe, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_probe_that_fails_is_named(
    saved: Path, tmp_path: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ma_monitor.measure.forward as forward

    measure = forward.measure

    def failing(*args: Any, **kwargs: Any) -> Any:
        if args[2] == 10:
            raise RuntimeError("out of memory")
        return measure(*args, **kwargs)

    monkeypatch.setattr(forward, "measure", failing)

    result = replay(folder_source(saved), probe, None, tmp_path / "run")

    assert result.measured == (0, 25, 60)
    assert result.problems == ("checkpoint-10 left out: its probe failed, the run's events say why",)
    (fault,) = [event.message for event in Run.open(tmp_path / "run").events if event.kind == "fault"]
    assert "out of memory" in fault


def test_a_disk_that_refuses_is_not_passed_over(
    saved: Path, tmp_path: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(writer: LogWriter) -> None:
        raise StoreError("no space left")

    def fill_up(done: int, total: int, name: str) -> None:
        if done == 2:
            monkeypatch.setattr(LogWriter, "flush", refuse)

    with pytest.raises(StoreError, match="no space left"):
        replay(folder_source(saved), probe, None, tmp_path / "run", progress=fill_up)
    monkeypatch.undo()

    result = replay(folder_source(saved), probe, None, tmp_path / "run")

    assert (result.skipped, result.measured) == (STEPS[:2], STEPS[2:])


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


@pytest.mark.parametrize("remaining", [STEPS, STEPS[:2]], ids=["nothing pending", "two pending"])
def test_a_run_of_another_probe_model_or_precision_is_not_gone_on_with(
    saved: Path, checkpoints: Path, tmp_path: Path, probe: Probe, remaining: tuple[int, ...]
) -> None:
    for step in set(STEPS) - set(remaining):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    replay(folder_source(checkpoints), probe, None, tmp_path / "run")
    before = log_of(tmp_path / "run")
    wide = tmp_path / "wide"
    for step in STEPS:
        save_model(wide / f"checkpoint-{step}", seed=step, width=32)

    with pytest.raises(StoreError, match="probe hash was"):
        replay(folder_source(saved), Probe.from_ids(probe.ids[:, ::-1]), None, tmp_path / "run")
    with pytest.raises(StoreError, match="model width was 16, is 32"):
        replay(folder_source(wide), probe, None, tmp_path / "run")
    with pytest.raises(StoreError, match="precision was float32, is bfloat16"):
        replay(folder_source(saved), probe, None, tmp_path / "run", dtype="bfloat16")
    with pytest.raises(StoreError, match="ratio was ratio_of_means, is mean_of_ratios"):
        replay(folder_source(saved), probe, MonitorConfig(ratio="mean_of_ratios"), tmp_path / "run")

    assert log_of(tmp_path / "run") == before


def test_bad_arguments_are_refused_before_anything_is_loaded(saved: Path, tmp_path: Path, probe: Probe) -> None:
    source = folder_source(saved)
    with pytest.raises(ConfigError, match="`dtype` must be"):
        replay(source, probe, None, tmp_path / "run", dtype="int8")
    with pytest.raises(ConfigError, match="`device` must be"):
        replay(source, probe, None, tmp_path / "run", device="nowhere")
    assert not (tmp_path / "run").exists()


def test_a_probe_beyond_the_vocabulary_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="below the model's vocabulary of 50, got 50"):
        replay(folder_source(saved), Probe.from_ids([[1, 50]]), None, tmp_path / "run")


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


def test_revisions_of_the_hub_give_what_the_folder_gives(
    hub: LoopbackHub, saved: Path, tmp_path: Path, probe: Probe
) -> None:
    for step in STEPS:
        hub.put("lab/tiny", f"step{step}", saved / f"checkpoint-{step}")
    hub.faults = {"/refs$": [429], "model.safetensors": [503], "/revision/": [503]}

    result = replay(hub_source("lab/tiny", "step0,step10,step25,step26,step60"), probe, None, tmp_path / "hub")

    assert result.measured == STEPS
    assert [problem.split(" (")[0] for problem in result.problems] == ["step26 left out: no such revision"]
    replay(folder_source(saved), probe, None, tmp_path / "folder")
    assert log_of(tmp_path / "hub") == log_of(tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "folder"}
    assert not [path for path in (tmp_path / "hub").iterdir() if path.is_dir()]


def test_a_gated_model_is_refused_as_such(hub: LoopbackHub, saved: Path, tmp_path: Path, probe: Probe) -> None:
    hub.put("lab/tiny", "step10", saved / "checkpoint-10")
    hub.gated.add("lab/tiny")
    with pytest.raises(SourceError, match="lab/tiny is gated: accept its terms"):
        replay(hub_source("lab/tiny", "all"), probe, None, tmp_path / "run")
