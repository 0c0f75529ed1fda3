"""Compiled, checkpointed, offloaded and autocast training: measured as it is, and compiled as if nobody watched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import save_on_cpu
from transformers import TrainerCallback

from ma_monitor import MassiveActivationCallback, Monitor, MonitorConfig, Probe
from ma_monitor.measure.forward import measure
from tests.training import Rows, the_run, tiny_llama, train

STRICT = MonitorConfig(every=2, strict=True)
STEPS = 5
DUE = [0, 1, 2, 4, 5]
PROBE = Probe.from_ids(Rows(4).ids.numpy())
DYNAMO = ("stats", "frames", "graph_break", "recompiles")
"""What dynamo counts: graphs, calls in them and frames; breaks by reason; recompilations."""


@pytest.fixture(autouse=True)
def nothing_recompiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A recompilation raises, with or without a monitor."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would have all of it formatted
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def slow_unless(fast: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Compiling takes seconds: by default only some run."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def whole_model(**options: Any) -> Callable[[nn.Module], None]:
    return lambda model: model.compile(**options)


def each_layer(**options: Any) -> Callable[[nn.Module], None]:
    def prepare(model: Any) -> None:
        for layer in model.model.layers:
            layer.compile(**options)

    return prepare


def as_it_is(model: nn.Module) -> None:
    """Only the Trainer compiles."""


TRAINER: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"}
REENTRANT: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
CHECKPOINTING = REENTRANT | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
USES: dict[str, tuple[Callable[[nn.Module], None], dict[str, Any]]] = {
    "trainer": (as_it_is, TRAINER | {"torch_compile_backend": "aot_eager"}),
    "model.compile": (whole_model(backend="eager"), {}),
    "full graph": (whole_model(backend="aot_eager", fullgraph=True), {}),
    "each layer": (each_layer(backend="aot_eager", fullgraph=True), {}),
    "dynamic shapes": (whole_model(backend="eager", dynamic=True), {}),
    "trainer, checkpointing": (as_it_is, TRAINER | CHECKPOINTING),
    "trainer, reentrant checkpointing": (as_it_is, TRAINER | REENTRANT),
    "each layer, checkpointing": (each_layer(backend="eager"), CHECKPOINTING),
    "trainer, autocast": (as_it_is, TRAINER | {"bf16": True}),
    "each layer, autocast": (each_layer(backend="eager"), {"bf16": True}),
}


def compiled(use: str, output: Path, callbacks: list[TrainerCallback]) -> tuple[dict[str, Any], list[Any], Any]:
    """Trains; gives what dynamo did, the losses, and the model."""
    prepare, changes = USES[use]
    torch.compiler.reset()
    counters.clear()
    model = tiny_llama(num_hidden_layers=1)
    prepare(model)
    result = train(output, callbacks, model=model, max_steps=STEPS, **changes)
    return {kind: dict(counters[kind]) for kind in DYNAMO}, result.losses, model


@pytest.mark.parametrize("use", slow_unless(["each layer", "trainer, checkpointing"], USES))
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name that older versions know
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at a layer's input
def test_training_compiles_as_if_nobody_watched_and_is_measured_as_it_is(use: str, tmp_path: Path) -> None:
    unwatched, losses, _ = compiled(use, tmp_path / "unwatched", [])
    assert unwatched["stats"]["unique_graphs"] >= 1
    callback = MassiveActivationCallback(STRICT, probe=PROBE)
    watched, watched_losses, model = compiled(use, tmp_path / "watched", [callback])
    assert watched == unwatched
    assert watched_losses == losses
    run = the_run(callback)
    assert run.steps.tolist() == DUE
    plain = tiny_llama(num_hidden_layers=1)
    plain.load_state_dict(model.state_dict())
    # To the bit: the probe runs the same eager kernels in both, whatever compiled code trained the weights.
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in use):
        expected = measure(plain, PROBE, STEPS, k=STRICT.k)
    last = run.measurements()[-1]
    np.testing.assert_array_equal(last.top, expected.top)
    np.testing.assert_array_equal(last.position, expected.position)
    np.testing.assert_array_equal(last.median, expected.median)


@pytest.mark.slow
def test_a_probe_that_compiles_would_be_noticed(tmp_path: Path) -> None:
    class Looks(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                kwargs["model"].eval()(torch.from_numpy(PROBE.ids))
            kwargs["model"].train()

    with torch._dynamo.config.patch(error_on_recompile=False):
        unwatched, *_ = compiled("model.compile", tmp_path / "unwatched", [])
        looked_at, *_ = compiled("model.compile", tmp_path / "looked_at", [Looks()])
    assert looked_at != unwatched


def a_loop(run_dir: Path | None, given: str) -> Any:
    """The losses of a plain loop with activations offloaded, and what dynamo did; a monitor where it has a place."""
    torch.compiler.reset()
    counters.clear()
    model = tiny_llama(num_hidden_layers=1)
    trained: Any = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = run_dir and Monitor(model if given == "inner" else trained, PROBE, STRICT, run_dir=run_dir)
    losses, rows = [], Rows().ids
    for done in range(STEPS):
        with save_on_cpu():
            if monitor:
                monitor.step(done)
            ids = rows[4 * done : 4 * done + 4]
            loss = trained(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if monitor:
        assert monitor.run is not None
        assert monitor.run.steps.tolist() == [0, 1, 2, 4]
        monitor.close()
    return losses, {kind: dict(counters[kind]) for kind in DYNAMO}


@pytest.mark.parametrize("given", slow_unless(["compiled"], ["compiled", "inner"]))
def test_a_plain_loop_with_a_full_graph_and_offloaded_activations(given: str, tmp_path: Path) -> None:
    assert a_loop(tmp_path / "run", given) == a_loop(None, given)


def test_nothing_is_saved_for_a_backward_pass_of_the_probe() -> None:
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    model = tiny_llama()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        measure(model, PROBE, 0, k=1)
        assert saved == []
        model(Rows(4).ids)
    assert saved
