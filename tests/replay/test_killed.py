"""A replay from the Hub that is killed again and again, and checkpoints measured live by the callback."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ma_monitor import MassiveActivationCallback, MonitorConfig
from ma_monitor.measure.probe import Probe
from ma_monitor.replay.runner import replay
from ma_monitor.replay.sources import folder_source
from ma_monitor.runs.store import Run
from tests.replay.loopback import LoopbackHub
from tests.replay.makers import FILES, IDS, contents
from tests.replay.makers import train as make_checkpoints
from tests.training import VOCABULARY, the_run, train

KILLS = 20
STEPS = tuple(range(30))
DIFFERENT = 5
"""Numbers of steps that the run held at the kills, at least."""
PATIENCE = 85.0
"""Seconds that the killed replay may take in all."""
SLOW = 0.05
"""Seconds that a revision's download takes at least, longer than from a record to the kill after it."""
SAME = 1e-6
"""Relative: the same float32 arithmetic on weights that went through a file."""

KILLED = (
    "import os, random, signal, sys, time\n"
    "import numpy as np, scipy.optimize\n"
    "import transformers.models.gpt_neox.modeling_gpt_neox\n"  # each life is a fork, which has loaded all this
    "from ma_monitor.measure.probe import Probe\n"
    "from ma_monitor.replay import hub, runner\n"
    "from ma_monitor.runs.store import Run\n"
    "out, ids, kills = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])\n"
    "def live():\n"
    "    child = os.fork()\n"
    "    if child: return child\n"
    "    runner.replay(hub.hub_source('lab/tiny', 'all'), Probe.from_ids(ids), None, out)\n"
    "    os._exit(0)\n"
    "def log_size(): return os.path.getsize(out + '/measurements.bin') if os.path.exists(out + '/run.json') else 0\n"
    "random.seed(7)\n"
    "held = []\n"
    "for _ in range(kills):\n"
    "    child = live()\n"
    "    size, early = log_size(), random.choice((True, False, False))\n"  # while it starts, or after a record
    "    stop = time.monotonic() + (random.uniform(0, 0.3) if early else 30)\n"
    "    while log_size() == size and time.monotonic() < stop: time.sleep(0.002)\n"
    "    time.sleep(random.uniform(0, 0.03))\n"
    "    os.kill(child, signal.SIGKILL)\n"
    "    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9:\n"
    "        held.append(len(Run.open(out).steps) if os.path.exists(out + '/run.json') else 0)\n"
    "print(os.waitstatus_to_exitcode(os.waitpid(live(), 0)[1]), *held)\n"
)


@pytest.mark.slow
def test_a_replay_killed_at_twenty_moments_is_the_one_that_was_not(hub_server: LoopbackHub, tmp_path: Path) -> None:
    trained = make_checkpoints(tmp_path / "trained", STEPS)
    for step in STEPS:
        hub_server.put("lab/tiny", f"step{step}", trained / f"step{step}")
    hub_server.rate = (trained / "step0" / "model.safetensors").stat().st_size / SLOW
    np.save(tmp_path / "ids.npy", IDS)
    environment = {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "run"), str(tmp_path / "ids.npy"), str(KILLS)],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    code, *held = map(int, done.stdout.split())
    assert (code, len(held)) == (0, KILLS), done.stderr[-2000:]
    print("steps held at the kills:", held)
    assert len(set(held)) >= DIFFERENT, f"the kills came at too few stages: {held}"

    of_the_same_name = replace(folder_source(trained), name="lab/tiny")
    replay(of_the_same_name, Probe.from_ids(IDS), None, tmp_path / "whole")

    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([*FILES, "events.jsonl"])


def test_checkpoints_measured_live_are_those_of_the_replay(tmp_path: Path) -> None:
    probe = Probe.from_ids(np.random.default_rng(1).integers(0, VOCABULARY, (4, 12)))
    callback = MassiveActivationCallback(MonitorConfig(every=4, strict=True), probe=probe)
    train(tmp_path, [callback], save_strategy="steps", save_steps=4)
    live = the_run(callback)

    result = replay(folder_source(tmp_path), probe, None, tmp_path / "replayed")

    assert result.measured == (4, 8, 12)
    assert result.problems == ()
    replayed = Run.open(result.run)
    assert [plan.same_as(live.plans[0]) for plan in replayed.plans] == [True]
    at = np.isin(live.steps, result.measured)
    for name in ("top", "median"):
        values, again = getattr(live.stack(), name)[at], getattr(replayed.stack(), name)
        np.testing.assert_allclose(again, values, rtol=SAME)
    for name in ("position", "token", "channel"):
        np.testing.assert_array_equal(getattr(replayed.stack(), name), getattr(live.stack(), name)[at])
