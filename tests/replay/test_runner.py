"""Replay of tiny random GPT-NeoX checkpoints, with statistics taken again by a plain forward and a sort."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPTNeoXForCausalLM

from ma_monitor.config import MonitorConfig
from ma_monitor.errors import ConfigError, SourceError, StoreError
from ma_monitor.measure.probe import Probe
from ma_monitor.replay.hub import hub_source
from ma_monitor.replay.runner import ReplayResult, replay
from ma_monitor.replay.sources import folder_source
from ma_monitor.runs.log import LogWriter
from ma_monitor.runs.merge import merge
from ma_monitor.runs.store import Run
from ma_monitor.sinks.base import MemorySink
from tests.replay.loopback import LoopbackHub
from tests.replay.makers import STEPS, save_model

SAME_ARITHMETIC = 1e-6
"""Relative: the same forward in float32, its statistics reduced in another order."""
BFLOAT16_CHECKPOINT = 1e-4
"""Relative: another machine's float32 forward of the same weights."""


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
    from ma_monitor.measure.forward import measure
    from ma_monitor.measure.phenomena import reading

    def failing(*args: Any, **kwargs: Any) -> Any:
        if args[2] == 10:
            raise RuntimeError("out of memory")
        return measure(*args, **kwargs)

    monkeypatch.setattr(reading, "measure", failing)

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


@pytest.mark.parametrize("pending", [0, 1])
def test_a_model_of_the_hub_is_told_from_another_of_its_shape(
    pending: int, saved: Path, tmp_path: Path, probe: Probe
) -> None:
    one, other = (replace(folder_source(saved), name=name) for name in ("lab/one", "lab/other"))
    replay(one, probe, None, tmp_path / "run", checkpoints=one.checkpoints[pending:])
    with pytest.raises(StoreError, match="holds another run: model name was lab/one, is lab/other"):
        replay(other, probe, None, tmp_path / "run")
    replay(other, probe, None, tmp_path / "apart", checkpoints=other.checkpoints[:1])
    with pytest.raises(StoreError, match="model name was lab/one, is lab/other"):
        merge([tmp_path / "run", tmp_path / "apart"], tmp_path / "joined")
    result = replay(folder_source(saved), probe, None, tmp_path / "run")  # a copy on the disk has any name
    assert result.skipped == tuple(c.step for c in one.checkpoints[pending:])


def test_a_model_of_a_folder_is_told_from_another_of_its_shape(
    saved: Path, checkpoints: Path, tmp_path: Path, probe: Probe
) -> None:
    replay(folder_source(saved), probe, None, tmp_path / "run", checkpoints=folder_source(saved).checkpoints[1:2])
    assert replay(folder_source(checkpoints), probe, None, tmp_path / "run").skipped == (10,), "a copy is the same"
    before = log_of(tmp_path / "run")
    first, second = (checkpoints / f"checkpoint-{step}" / "model.safetensors" for step in (0, 10))
    second.write_bytes((saved / "checkpoint-60" / "model.safetensors").read_bytes())
    replay(folder_source(checkpoints), probe, None, tmp_path / "run")  # as a training that went on from checkpoint-0
    first.write_bytes(second.read_bytes())
    with pytest.raises(StoreError, match="checkpoint-0 has other weights than those that were measured as step 0"):
        replay(folder_source(checkpoints), probe, None, tmp_path / "run")
    assert replay(folder_source(checkpoints), probe, None, tmp_path / "anew", force=True).measured == STEPS
    first.write_bytes(b"cut")
    replay(folder_source(checkpoints), probe, None, tmp_path / "run")  # nothing can be told then
    shutil.rmtree(checkpoints / "checkpoint-0")
    with pytest.raises(StoreError, match="checkpoint-10 has other weights"):
        replay(folder_source(checkpoints), probe, None, tmp_path / "run")
    assert log_of(tmp_path / "run") == before


def test_a_run_of_another_probe_model_or_precision_is_not_gone_on_with(
    saved: Path, tmp_path: Path, probe: Probe
) -> None:
    source = folder_source(saved)
    replay(source, probe, None, tmp_path / "run", checkpoints=source.checkpoints[:2])
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
