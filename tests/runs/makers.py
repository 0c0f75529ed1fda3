"""Runs, measurements and plans to test with."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta


def make_meta(layers: int = 2, sequences: int = 3, k: int = 3, first_layer: int = 0, **changes: Any) -> RunMeta:
    meta = RunMeta(
        model=ModelShape("tiny", "gpt_neox", layers, 16, 2, 100, 5000),
        probe=ProbeInfo("5e" * 32, sequences, 32, "ten built-in passages"),
        k=k,
        first_layer=first_layer,
        ratio="ratio_of_means",
        precision="float32",
        versions={"torch": "2.13.0"},
    )
    return replace(meta, **changes)


def make_measurements(step: int, meta: RunMeta, seed: int = 0) -> Measurements:
    """Measurements that depend on nothing but step and seed; at odd steps more was read besides."""
    shape = (meta.rows, meta.probe.sequences, meta.k)
    rng = np.random.default_rng([seed, step])
    top = -np.sort(-rng.lognormal(3, 1, shape), axis=2) * rng.choice([-1.0, 1.0], shape)
    position, token, channel = (rng.integers(0, high, shape, dtype=np.int32) for high in (32, 100, 16))
    nan, inf = rng.integers(0, 3, shape[:2]), rng.integers(0, 3, shape[:2])
    median = rng.lognormal(0, 0.3, shape[:2])
    besides = {"kurtosis/per_token": rng.normal(size=meta.rows), "sinks/heads": rng.normal(size=(meta.rows, 2))}
    return Measurements(step, top, position, token, channel, median, nan, inf, besides if step % 2 else {})


def make_plan(from_step: int = 0, total: int = 100, peak: float = 1e-3) -> Plan:
    lr = peak * (1 + np.cos(np.linspace(0, np.pi, total + 1))) / 2
    return Plan(from_step=from_step, total_steps=total, lr=lr, batch=8, schedule="cosine")


def bits(m: Measurements) -> tuple[Any, ...]:
    """All that a measurement says, down to the bits of its floats, to compare."""
    arrays = {field.name: getattr(m, field.name) for field in fields(m) if field.name not in ("step", "phenomena")}
    every = [np.ascontiguousarray(array) for array in (arrays | dict(sorted(m.phenomena.items()))).values()]
    return (m.step, *sorted(m.phenomena), *((array.dtype.str, array.shape, array.tobytes()) for array in every))


def plan_bits(plan: Plan) -> tuple[Any, ...]:
    lr = None if plan.lr is None else (plan.lr.dtype.str, plan.lr.tobytes())
    return (plan.from_step, plan.total_steps, lr, plan.batch, plan.schedule, plan.held)


def any_floats(shape: tuple[int, ...]) -> st.SearchStrategy[NDArray[np.float64]]:
    """Every float64 there is: NaN of any payload, infinities, subnormals, -0.0."""
    return hnp.arrays(np.int64, shape, elements=st.integers(-(2**63), 2**63 - 1)).map(
        lambda words: words.view(np.float64)
    ) | hnp.arrays(np.float64, shape, elements=st.floats())


@st.composite
def any_measurements(draw: st.DrawFn, shape: tuple[int, int, int] | None = None) -> Measurements:
    wide = shape or draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)))
    places = hnp.arrays(np.int32, wide, elements=st.integers(-1, 2**31 - 1))
    counts = hnp.arrays(np.int64, wide[:2], elements=st.integers(0, 2**63 - 1))
    besides = any_floats(wide[:1]) | any_floats((wide[0], 3))
    return Measurements(
        phenomena=draw(st.dictionaries(st.text(max_size=5), besides, max_size=3)),
        step=draw(st.integers(0, 2**53)),
        top=draw(any_floats(wide)),
        position=draw(places),
        token=draw(places),
        channel=draw(places),
        median=draw(any_floats(wide[:2])),
        nan=draw(counts),
        inf=draw(counts),
    )
