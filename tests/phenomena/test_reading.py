"""The framework in which phenomena are read: alongside the probe, in the run, in sinks and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ma_monitor import MonitorConfig, Probe, Run
from ma_monitor.cli.__main__ import main
from ma_monitor.errors import ConfigError, ModelError
from ma_monitor.measure.forward import measure
from ma_monitor.measure.phenomena import reading
from ma_monitor.measure.phenomena.base import Reader, StreamReader
from ma_monitor.measure.phenomena.reading import measure_with
from ma_monitor.monitor import Monitor
from ma_monitor.phenomena import METRICS, PHENOMENA, Metric, named, of_layers
from ma_monitor.report.page import render
from ma_monitor.sinks.base import MemorySink
from tests.runs.makers import bits
from tests.training import Rows, tiny_llama

SINGLE = 1e-5
"""Relative difference of two float32 forwards of other batches."""


def a_probe() -> Probe:
    return Probe.from_ids(Rows().ids[:6].numpy(), "rows")


def read(
    model: nn.Module, names: tuple[str, ...], **options: Any
) -> tuple[dict[str, np.ndarray], dict[str, Exception]]:
    faults: dict[str, Exception] = {}
    found = measure_with(
        model, a_probe(), 5, k=3, phenomena=names, failed=lambda name, error: faults.update({name: error}), **options
    )
    return dict(found.phenomena), faults


class Sums(StreamReader):
    """Sum of each residual stream."""

    name = "kurtosis"

    def of_stream(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"kurtosis/per_token": hidden.sum(dim=(1, 2))}


class Short(Reader):
    """How many tokens and sequences a forward of its own has, twice a layer."""

    name = "kurtosis"
    tokens = 4
    shapes: ClassVar[list[tuple[int, ...]]] = []

    @property
    def sizes(self) -> dict[str, int]:
        return {"kurtosis/per_token": 2}

    def hidden(self, row: int, hidden: Tensor) -> None:
        self.seen = hidden.shape

    def values(self) -> dict[str, Tensor]:
        self.shapes.append(tuple(self.seen))
        return {"kurtosis/per_token": torch.full((self.rows, self.seen[0], 2), float(self.seen[1]))}


def use(monkeypatch: pytest.MonkeyPatch, kind: type[Reader]) -> None:
    monkeypatch.setitem(reading.READERS, "kurtosis", ("made", "Made"))
    monkeypatch.setattr(reading, "import_module", lambda name: type("Module", (), {"Made": kind}))


@pytest.mark.parametrize("batch_size", [None, 4, 1])
def test_numbers_are_means_over_sequences_however_they_are_batched(
    batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Sums)
    model = tiny_llama().eval()
    found, faults = read(model, ("kurtosis",), batch_size=batch_size)
    with torch.no_grad():
        ids = torch.from_numpy(a_probe().ids)
        streams = [model.model.embed_tokens(ids)]
        for layer in model.model.layers:
            places = torch.arange(ids.shape[1])[None]
            embeddings = model.model.rotary_emb(streams[0], places)
            mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
            output = layer(streams[-1], attention_mask=mask, position_embeddings=embeddings, position_ids=places)
            streams.append(output if isinstance(output, Tensor) else output[0])
    expected = [float(stream.sum(dim=(1, 2)).mean()) for stream in streams]
    np.testing.assert_allclose(found["kurtosis/per_token"], expected, rtol=SINGLE, atol=SINGLE)
    assert not faults


def test_the_measurements_are_those_without_phenomena() -> None:
    model = tiny_llama()
    with_them = measure_with(model, a_probe(), 5, k=3, phenomena=tuple(PHENOMENA), failed=_raise)
    without = measure(model, a_probe(), 5, k=3)
    assert set(with_them.phenomena) >= set(METRICS)
    assert bits(without) == bits(type(without)(**{**vars(with_them), "phenomena": {}}))


def _raise(name: str, error: Exception) -> None:
    raise error


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_reader_may_have_a_short_forward_of_its_own(batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Short)
    Short.shapes.clear()
    found, _ = read(tiny_llama(), ("kurtosis",), batch_size=batch_size)
    assert Short.shapes == ([(6, 4, 16)] if batch_size is None else [(4, 4, 16), (2, 4, 16)])
    np.testing.assert_array_equal(found["kurtosis/per_token"], np.full((3, 2), 4.0))


class Failing(Sums):
    """Fails at the second block."""

    def of_stream(self, hidden: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("no such thing here")


class Refusing(Sums):
    """Cannot be made for this model."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        raise ModelError("no heads here")


class Misshapen(Sums):
    """Gives other numbers than it promised."""

    def of_stream(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"kurtosis/per_token": hidden}


@pytest.mark.parametrize(("kind", "known"), [(Failing, True), (Refusing, False), (Misshapen, True)])
def test_a_reader_that_fails_is_told_and_spoils_nothing_else(
    kind: type[Reader], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, kind)
    found, faults = read(tiny_llama(), ("kurtosis",), batch_size=4)
    assert list(faults) == ["kurtosis"]
    assert ("kurtosis/per_token" in found) is known
    assert not known or np.isnan(found["kurtosis/per_token"]).all()


def test_a_failing_reader_costs_the_monitor_one_fault_and_strict_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, Failing)
    config = MonitorConfig(every=1, phenomena=("kurtosis",))
    monitor = Monitor(tiny_llama(), a_probe(), config, run_dir=tmp_path / "run")
    assert monitor.step(0)
    assert monitor.step(1)
    monitor.close()
    with Run.open(tmp_path / "run") as run:
        assert run.steps.tolist() == [0, 1]
        told = [event.message for event in run.events if event.kind == "fault"]
    assert told == ["reading kurtosis failed and is left out. RuntimeError: no such thing here"]
    assert caplog.text.count("no such thing here") == 1
    strict = Monitor(
        tiny_llama(), a_probe(), MonitorConfig(phenomena=("kurtosis",), strict=True), run_dir=tmp_path / "strict"
    )
    with pytest.raises(RuntimeError, match="no such thing here"):
        strict.step(0)
    strict.close()


def test_everything_reaches_the_run_the_sinks_and_the_report(tmp_path: Path) -> None:
    sink = MemorySink()
    config = MonitorConfig(every=1, phenomena=tuple(PHENOMENA), strict=True)
    monitor = Monitor(tiny_llama(), a_probe(), config, run_dir=tmp_path / "run", sinks=[sink], total_steps=8)
    for step in range(8):
        monitor.step(step)
    monitor.step(8, final=True)
    monitor.close()
    with Run.open(tmp_path / "run") as run:
        assert set(run.phenomena()) >= set(METRICS)
        page = render([run])
        for metric in METRICS.values():
            values = run.phenomena()[metric.key].values
            assert values.shape[:2] == (9, 3)
            if metric.shown is None:
                continue
            assert np.isfinite(values[:, 1:]).any(), metric.key
            expected = of_layers(metric, values[-1])
            assert (
                sink.emissions[-1].scalars.get(f"ma/{metric.key}", sink.emissions[-2].scalars.get(f"ma/{metric.key}"))
                == expected
            )
            assert f">{metric.key}</button>" in page
            assert metric.title in page
        table = next(e.tables["ma/phenomena"] for e in reversed(sink.emissions) if e.tables)
        assert [row[0] for row in table.rows] == [0, 1, 2]


def test_replay_reads_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (0, 3):
        tiny_llama().save_pretrained(tmp_path / f"step{step}")
    np.save(tmp_path / "probe.npy", a_probe().ids)
    arguments = ["replay", str(tmp_path), "--probe-ids", str(tmp_path / "probe.npy"), "--phenomena", "kurtosis"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    live, _ = read(tiny_llama(), ("kurtosis",))
    with Run.open(tmp_path / "run") as run:
        for key, readings in run.phenomena().items():
            np.testing.assert_array_equal(readings.steps, [0, 3])
            np.testing.assert_allclose(readings.values[1], live[key], rtol=SINGLE)


def test_names() -> None:
    assert named("all") == tuple(PHENOMENA)
    assert named("") == ()
    assert named("kurtosis") == ("kurtosis",)
    assert all(metric.key.startswith(f"{name}/") for name, metrics in PHENOMENA.items() for metric in metrics)
    assert set(reading.READERS) == set(PHENOMENA)


@pytest.mark.parametrize("given", ["kurtosis", ("kurtosis", "ghosts")])
def test_unknown_phenomena_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="`phenomena` must be a tuple of"):
        MonitorConfig(phenomena=given)
    with pytest.raises(ConfigError, match="read in the probe's forward"):
        MonitorConfig(phenomena=("kurtosis",), source="train_batch")


def test_the_one_number_of_the_layers() -> None:
    values = np.array([np.nan, 1.0, 3.0, np.inf])
    assert of_layers(Metric("a/b", "c"), values) == 3
    assert of_layers(Metric("a/b", "c", "smallest"), values) == 1
    assert of_layers(Metric("a/b", "c", "mean"), values) == 2
    assert of_layers(Metric("a/b", "c", None), values) is None
    assert of_layers(Metric("a/b", "c"), np.array([np.nan])) is None
