"""Shards, beginning anew, arithmetic and what a killed replay leaves, on states of one tiny training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ma_monitor.errors import StoreError
from ma_monitor.measure.probe import Probe
from ma_monitor.replay.runner import replay
from ma_monitor.replay.sources import Checkpoint, folder_source
from ma_monitor.runs.merge import merge
from ma_monitor.runs.records import Plan
from ma_monitor.runs.store import Run
from tests.replay.makers import IDS, contents, train

STEPS = (0, 2, 5, 9, 14)
PROBE = Probe.from_ids(IDS)
LOG_AND_META = ("run.json", "measurements.bin")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five states of a training whose last one tells the schedule; not to be changed."""
    root = train(tmp_path_factory.mktemp("saved"), STEPS, "checkpoint-{}")
    rows = [{"step": s, "learning_rate": 1e-2} for s in (1, 14)]
    state = {"log_history": rows, "max_steps": 20, "global_step": 14}
    (root / "checkpoint-14" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def whole(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return replay(folder_source(saved), PROBE, None, tmp_path_factory.mktemp("whole") / "run").run


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_join_to_the_run_of_one_process(saved: Path, whole: Path, tmp_path: Path, count: int) -> None:
    source = folder_source(saved)
    shares = [source.checkpoints[i::count] for i in range(count)]
    results = [replay(source, PROBE, None, tmp_path / str(i), checkpoints=share) for i, share in enumerate(shares)]
    assert [result.measured for result in results] == [STEPS[i::count] for i in range(count)]

    merge([result.run for result in results], tmp_path / "joined")

    for name in LOG_AND_META:
        assert (tmp_path / "joined" / name).read_bytes() == (whole / name).read_bytes()


def test_a_worker_too_many_has_nothing_to_do(saved: Path, tmp_path: Path) -> None:
    result = replay(folder_source(saved), PROBE, None, tmp_path / "run", checkpoints=())
    assert (result.measured, result.skipped, result.problems) == ((), (), ())
    assert not (tmp_path / "run").exists()


def test_force_begins_anew_and_touches_nothing_else(saved: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    replay(folder_source(saved), Probe.from_ids(IDS[:2]), None, run)
    (run / "notes.txt").write_text("mine", encoding="utf-8")

    result = replay(folder_source(saved), PROBE, None, run, force=True)

    assert (result.measured, result.skipped) == (STEPS, ())
    assert contents(run) == contents(whole)
    assert (run / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_force_spares_the_run_if_nothing_can_be_loaded_or_it_is_being_written(saved: Path, tmp_path: Path) -> None:
    run = replay(folder_source(saved), PROBE, None, tmp_path / "run").run
    before = contents(run)
    broken = Path(shutil.copytree(saved, tmp_path / "broken"))
    for step in STEPS:
        (broken / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(Exception, match="no checkpoint of broken could be measured"):
        replay(folder_source(broken), PROBE, None, run, force=True)
    with Run.open(run, writable=True), pytest.raises(StoreError, match="one writer at a time"):
        replay(folder_source(saved), PROBE, None, run, force=True)
    assert contents(run) == before


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_force_killed_while_it_forgets_is_repeated(saved: Path, whole: Path, tmp_path: Path, gone: int) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("run.json", "events.jsonl", "measurements.bin")[:gone]:
        (run / name).unlink()
    result = replay(folder_source(saved), PROBE, None, run, force=True)
    assert result.measured == STEPS
    assert contents(run) == contents(whole)


def test_another_shape_is_refused_before_any_weights_are_loaded(saved: Path, whole: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(saved, tmp_path / "other"))
    file = other / "checkpoint-14" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}), encoding="utf-8")
    for weights in other.glob("*/model.safetensors"):
        weights.write_bytes(b"cut")
    with pytest.raises(StoreError, match="holds another run: model layers was 2, is 3"):
        replay(folder_source(other), PROBE, None, Path(shutil.copytree(whole, tmp_path / "run")))


def test_another_probe_is_refused_before_anything_is_loaded(saved: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    source = folder_source(saved)
    absent = type(source)(source.name, {Checkpoint(99, "checkpoint-99"): tmp_path / "absent"}, ())
    with pytest.raises(StoreError, match="holds another run: probe hash was"):
        replay(absent, Probe.from_ids(IDS[::-1]), None, run)


def test_overflow_in_float16_is_said(saved: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    for step in (0, 2):
        shutil.copytree(saved / f"checkpoint-{step}", huge / f"checkpoint-{step}")
    file = huge / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    weights["gpt_neox.embed_in.weight"] *= 1e5
    save_file(weights, file, metadata={"format": "pt"})

    half = replay(folder_source(huge), PROBE, None, tmp_path / "half", dtype="float16")
    full = replay(folder_source(huge), PROBE, None, tmp_path / "full")

    (problem,) = half.problems
    assert problem.startswith("checkpoint-2 overflows in 3 of 3 layers: float16 ends at 65504; measure it in bfloat16")
    assert half.measured == full.measured == (0, 2)
    assert full.problems == ()


def test_a_plan_recorded_just_before_a_kill_is_gone_on_with(saved: Path, tmp_path: Path) -> None:
    later = [Plan(0, 20, np.full(21, 1e-2), 3, "first"), Plan(4, 30, np.full(31, 1e-2), 3, "second")]
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    meta = Run.open(replay(folder_source(saved), PROBE, None, tmp_path / "other").run).meta
    with Run.create(tmp_path / "live", meta, later[0]) as live:
        live.add_plan(later[1])
        live.copy_to(copy / "checkpoint-14" / "ma_monitor")
    expected = replay(folder_source(copy), PROBE, None, tmp_path / "expected").run
    run = tmp_path / "run"

    def kill(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(folder_source(copy), PROBE, None, run, progress=kill)
    with Run.open(run, writable=True) as left:  # as if it had died between the plan and the checkpoint after it
        left.add_plan(later[1])

    replay(folder_source(copy), PROBE, None, run)

    assert contents(run) == contents(expected)


def test_what_a_kill_left_behind_is_removed_by_the_next(saved: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "incoming" / "step5-abc").mkdir(parents=True)
    (run / ".123-fits.json").write_text("{", encoding="utf-8")
    replay(folder_source(saved), PROBE, None, run)
    assert sorted(path.name for path in run.iterdir()) == sorted([*contents(run), "events.jsonl"])


def test_two_replays_into_one_run_do_not_meet(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def meet(done: int, total: int, name: str) -> None:
        with pytest.raises(StoreError, match="another process replays into this run"):
            replay(folder_source(saved), PROBE, None, run)

    replay(folder_source(saved), PROBE, None, run, progress=meet)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file.incoming: cannot be written"):
        replay(folder_source(saved), PROBE, None, tmp_path / "file")


def test_the_weights_of_each_checkpoint_are_measured_although_the_model_is_one(saved: Path, whole: Path) -> None:
    from transformers import GPTNeoXForCausalLM

    stack = Run.open(whole).stack()
    for index, step in enumerate(STEPS):
        model = GPTNeoXForCausalLM.from_pretrained(saved / f"checkpoint-{step}", dtype=torch.float32)
        with torch.no_grad():
            first = model(torch.from_numpy(IDS), output_hidden_states=True).hidden_states[1]
        np.testing.assert_allclose(np.abs(stack.top[index, 1, :, 0]), first.abs().flatten(1).max(1).values, rtol=1e-6)
