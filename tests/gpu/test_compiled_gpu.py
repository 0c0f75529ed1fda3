"""Inductor and CUDA graphs: a probe between replays of a recorded step changes nothing and is measured as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from ma_monitor import Monitor, MonitorConfig, Probe
from ma_monitor.measure.forward import measure
from ma_monitor.runs.records import Measurements
from tests.training import Rows, tiny_llama

pytestmark = pytest.mark.gpu

STRICT = MonitorConfig(every=3, strict=True)
STEPS, BATCH = 12, 4
PROBE = Probe.from_ids(Rows(4).ids.numpy())
# Some backward kernels add in no fixed order, so even two unwatched runs may part in the last digits.
ATOMICS = 1e-5
GRAPHS = ("unique_graphs", "calls_captured")


class Trained(NamedTuple):
    """What a training leaves behind."""

    losses: list[float]
    graphs: dict[str, int]
    recorded: int
    model: Any
    last: Measurements | None


@pytest.fixture(autouse=True)
def nothing_recompiles() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def trained(mode: str, run_dir: Path | None, *, given: str = "compiled") -> Trained:
    """Trains in a compiled loop; a monitor measures between the steps where a run has a place.

    Args:
        mode: Of `torch.compile`; ``reduce-overhead`` records CUDA graphs.
        run_dir: Where the run is kept; None for no monitor.
        given: Whether the monitor gets the compiled model or the one inside.
    """
    torch.compiler.reset()
    counters.clear()
    model: Any = tiny_llama(attention_dropout=0.0)
    model.cuda()
    compiled: Any = torch.compile(model, mode=mode, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = compiled if given == "compiled" else model
    monitor = None if run_dir is None else Monitor(watched, PROBE, STRICT, run_dir=run_dir)
    rows, losses, last = Rows().ids.cuda(), [], None
    for step in range(STEPS):
        if monitor is not None:
            monitor.step(step)
        torch.compiler.cudagraph_mark_step_begin()
        ids = rows[BATCH * step : BATCH * (step + 1)].clone()
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # lets go of the gradients, which lie in the recorded graphs' memory
        losses.append(loss.item())
    if monitor is not None and monitor.run is not None:
        monitor.step(STEPS, final=True)
        assert monitor.run.steps.tolist() == [0, 1, 2, 3, 4, 6, 8, 9, 12]
        last = monitor.run.measurements()[-1]
        monitor.close()
    graphs = {name: counters["stats"][name] for name in GRAPHS}
    inductor = counters["inductor"]
    if mode == "reduce-overhead":
        assert inductor["cudagraph_skips"] == 0, "CUDA graphs were not used, so nothing can be said of them"
        assert inductor["cudagraph_recorded_non_static_inputs"] > 0
    return Trained(losses, graphs, inductor["cudagraph_recorded_non_static_inputs"], model, last)


@pytest.mark.filterwarnings("ignore")  # what inductor and the compilers under it say is not what is tested
@pytest.mark.parametrize("given", ["compiled", "inner"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_probe_between_compiled_steps_changes_nothing(mode: str, given: str, tmp_path: Path) -> None:
    alone = trained(mode, None)
    watched = trained(mode, tmp_path / "run", given=given)
    np.testing.assert_allclose(watched.losses, alone.losses, rtol=ATOMICS)
    assert watched.graphs == alone.graphs
    assert watched.graphs["unique_graphs"] == 1
    assert watched.recorded == alone.recorded  # no graph was recorded anew
    plain: Any = tiny_llama(attention_dropout=0.0)
    plain.cuda()
    plain.load_state_dict(watched.model.state_dict())
    expected = measure(plain, PROBE, STEPS, k=STRICT.k)
    assert watched.last is not None
    np.testing.assert_array_equal(watched.last.top, expected.top)
    np.testing.assert_array_equal(watched.last.position, expected.position)
    np.testing.assert_array_equal(watched.last.median, expected.median)
