from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ma_monitor.errors import SourceError
from ma_monitor.replay.ahead import one_ahead
from ma_monitor.replay.sources import Checkpoint

CHECKPOINTS = tuple(Checkpoint(step, f"step{step}") for step in range(5))
WAIT = 10.0
"""Seconds after which a thread that should have come is taken for lost."""


def test_the_next_is_fetched_meanwhile_and_no_other() -> None:
    begun = {checkpoint: threading.Event() for checkpoint in CHECKPOINTS}

    def fetch(checkpoint: Checkpoint) -> Path:
        begun[checkpoint].set()
        if checkpoint.step == 3:
            raise SourceError("step3 is broken")
        return Path(checkpoint.name)

    told = []
    for checkpoint, fetched in zip(CHECKPOINTS, one_ahead(fetch, CHECKPOINTS), strict=True):
        for following in CHECKPOINTS[checkpoint.step + 1 : checkpoint.step + 2]:
            assert begun[following].wait(WAIT), "the next must come without being asked for"
        assert sum(event.is_set() for event in begun.values()) <= checkpoint.step + 2
        assert fetched.done()
        told.append(str(fetched.exception() or fetched.result()))
    assert told == ["step0", "step1", "step2", "step3 is broken", "step4"]


def test_of_nothing_nothing_comes() -> None:
    with pytest.raises(StopIteration):
        next(one_ahead(lambda checkpoint: Path(), ()))
