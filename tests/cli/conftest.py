"""A small run, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from ma_monitor.cli.__main__ import main
from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run

LAYERS, SEQUENCES, RANKS, TOTAL = 3, 4, 3, 2000
STEPS = np.unique(np.concatenate([[0], 2 ** np.arange(9), np.arange(0, 1501, 50)]))
PLAN = Plan(0, TOTAL, 1e-3 * (0.55 + 0.45 * np.cos(np.pi * np.arange(TOTAL + 1) / TOTAL)), 8, "cosine")


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout, of a command that went well."""

        def refuse(word: str) -> None:
            raise ValueError(f"{word} in JSON")

        assert self.code == 0, self.err
        assert self.out.endswith("}\n")
        document: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        return document


Call = Callable[..., Result]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line and gives its exit code and what it printed."""

    def run(*argv: object) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(call: Call) -> Callable[..., str]:
    """Runs a command line that is bad input: exit code 2, nothing on stdout, one line on stderr, which is returned."""

    def run(*argv: object) -> str:
        result = call(*argv)
        assert (result.code, result.out) == (2, ""), result
        assert result.err.startswith("ma-monitor: ")
        assert result.err.endswith("\n")
        assert result.err.count("\n") == 1
        return result.err

    return run


def make_ratios(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ratios ``[L, T]``: one that peaks and falls, one that rises as a logarithm, one that rises and settles."""
    t = steps / 100.0
    noise = 1 + 0.02 * np.random.default_rng(5).standard_normal((LAYERS, len(steps)))
    peaked = 6 + 60 * np.exp(-0.4 * t) * np.log1p(4 * t)
    return np.asarray(noise * np.stack([peaked, 8 + 90 * np.log1p(t), 30 - 20 * np.exp(-t)]))


def make_meta(name: str = "tiny") -> RunMeta:
    """Facts of the small run."""
    return RunMeta(
        model=ModelShape(name, "tiny", LAYERS, 16, 2, 40, 1000),
        probe=ProbeInfo("ab" * 32, SEQUENCES, 12, "token ids"),
        k=RANKS,
        first_layer=1,
        ratio="ratio_of_means",
        precision="float32",
    )


def make_measurements(steps: NDArray[np.int64] = STEPS) -> list[Measurements]:
    """Measurements that have ``make_ratios`` as ratios of rank 1, halves and quarters of them as ranks 2 and 3."""
    spread = np.linspace(0.9, 1.1, SEQUENCES)
    share = 0.5 ** np.arange(RANKS)
    median = np.broadcast_to(spread, (LAYERS, SEQUENCES))
    return [
        Measurements.from_statistics(int(step), ratio[:, None, None] * median[:, :, None] * share, median)
        for step, ratio in zip(steps, make_ratios(steps).T, strict=True)
    ]


def make_run(path: Path, *, name: str = "tiny", plan: Plan | None = PLAN, steps: NDArray[np.int64] = STEPS) -> Path:
    """Writes the small run."""
    with Run.create(path, make_meta(name), plan) as run:
        for measurements in make_measurements(steps):
            run.append(measurements)
    return path


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, not to be written to."""
    return make_run(tmp_path_factory.mktemp("small") / "run")
