from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ma_monitor.errors import SourceError
from ma_monitor.replay.ahead import one_ahead
from ma_monitor.replay.sources import Checkpoint

CHECKPOINTS = tuple(Checkpoint(step, f"step{step}") for step in range(5))
WAIT = 10.0
"""Seconds after which a thread that should have come is taken for lost."""


class Lending:
    """Lends folders and keeps a record of it; step 3 fails, step 4 waits for leave."""

    def __init__(self) -> None:
        self.lent: list[str] = []
        self.most = 0
        self.opened = {checkpoint.step: threading.Event() for checkpoint in CHECKPOINTS}
        self.may_open = threading.Event()

    @contextmanager
    def open(self, checkpoint: Checkpoint) -> Iterator[Path]:
        if checkpoint.step == 3:
            raise SourceError("step3 is broken")
        if checkpoint.step == 4:
            assert self.may_open.wait(WAIT)
        self.lent.append(checkpoint.name)
        self.most = max(self.most, len(self.lent))
        self.opened[checkpoint.step].set()
        try:
            yield Path(checkpoint.name)
        finally:
            self.lent.remove(checkpoint.name)


def test_the_next_is_fetched_meanwhile_and_two_are_lent_at_most() -> None:
    source = Lending()
    source.may_open.set()
    told = []
    for checkpoint, fetched in zip(CHECKPOINTS, one_ahead(source.open, CHECKPOINTS), strict=True):
        if checkpoint.step < 2:
            assert source.opened[checkpoint.step + 1].wait(WAIT), "the next must come without being asked for"
        try:
            lent, folder = fetched.result()
            with lent:
                told.append(folder.name)
        except SourceError as error:
            told.append(str(error))
    assert told == ["step0", "step1", "step2", "step3 is broken", "step4"]
    assert source.most == 2
    assert source.lent == []


def test_nothing_stays_lent_when_the_iteration_is_given_up() -> None:
    source = Lending()
    coming = one_ahead(source.open, CHECKPOINTS)
    next(coming)
    assert source.opened[1].wait(WAIT)
    coming.close()
    assert source.lent == []


def test_what_comes_too_late_is_given_back_when_it_comes() -> None:
    source = Lending()
    coming = one_ahead(source.open, CHECKPOINTS[3:])
    assert isinstance(next(coming).exception(), SourceError)
    coming.close()
    (waiting,) = [thread for thread in threading.enumerate() if thread.name == "fetch step4"]
    source.may_open.set()
    waiting.join(WAIT)
    assert source.opened[4].is_set()
    assert source.lent == []


def test_of_nothing_nothing_comes() -> None:
    with pytest.raises(StopIteration):
        next(one_ahead(Lending().open, ()))
