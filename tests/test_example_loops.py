"""The example loops, as a newcomer starts them: a plain one, and accelerate's on one process and on two."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ma_monitor import Run

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OUTCOME = re.compile(r"^layer [123]: forecast \d[\d.]* \[\d[\d.]*, \d[\d.]*\], came \d+\.\d$", re.MULTILINE)


def options(output: Path, steps: int) -> list[str]:
    return ["--run-dir", str(output), "--max-steps", str(steps), "--corpus-mb", "0.05"]


def check(shown: str, output: Path, family: str, batch: int, due: list[int]) -> None:
    assert f"run: {output}, loss " in shown
    assert len(OUTCOME.findall(shown)) == 3
    with Run.open(output) as run:
        assert run.steps.tolist() == due
        assert run.meta.model.family == family
        plan = run.plan_at(due[-1])
    assert plan is not None
    assert (plan.total_steps, plan.batch) == (due[-1], batch)
    assert plan.lr is not None
    # A cosine to zero, one value an update, however often accelerate steps the schedule.
    assert plan.lr.max() == pytest.approx(3e-3)
    assert plan.lr[due[-1] // 2] == pytest.approx(1.5e-3, rel=0.1)
    assert plan.lr[-1] == pytest.approx(0, abs=1e-9)


def test_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    try:
        importlib.import_module("plain_loop").main(options(tmp_path / "run", 20))
    finally:
        torch.set_num_threads(threads)
    check(capsys.readouterr().out, tmp_path / "run", "llama", batch=8, due=[*range(21)])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_accelerates_loop(processes: int, tmp_path: Path) -> None:
    """In processes of its own: accelerate keeps a state that no other test should meet."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    command = [sys.executable, *launcher, str(EXAMPLES / "accelerate_loop.py"), *options(tmp_path / "run", 64)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    check(done.stdout, tmp_path / "run", "gpt_neox", batch=8 * processes, due=[0, 1, 2, 4, 8, 16, 32, 64])
