"""The next checkpoint is fetched while this one is measured."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Thread

from ma_monitor.replay.sources import Checkpoint

Lend = Callable[[Checkpoint], AbstractContextManager[Path]]
"""Gives a checkpoint's folder for as long as it is needed, as `Source.open` does."""
Fetched = Future[tuple[ExitStack, Path]]
"""What gives a checkpoint's folder back, and the folder; or why it could not be had."""


def one_ahead(lend: Lend, checkpoints: Sequence[Checkpoint]) -> Generator[Fetched, None, None]:
    """Yields checkpoint after checkpoint as soon as it is there; the next one is under way by then.

    Two folders at most are lent at a time, if whoever iterates gives each back before asking for the next. Those still
    lent when the iteration ends, however it ends, are given back too. A download that is under way then is not waited
    for: its thread dies with the process.
    """
    lent: list[Fetched] = []
    try:
        for number, checkpoint in enumerate(checkpoints):
            current = lent.pop() if lent else _fetch(lend, checkpoint)
            lent = [current]
            wait(lent)
            lent += [_fetch(lend, following) for following in checkpoints[number + 1 : number + 2]]
            yield current
    finally:
        for fetched in lent:
            fetched.add_done_callback(_give_back)


def _fetch(lend: Lend, checkpoint: Checkpoint) -> Fetched:
    """Opens a checkpoint in the background."""
    fetched: Fetched = Future()

    def work() -> None:
        lent = ExitStack()
        try:
            fetched.set_result((lent, lent.enter_context(lend(checkpoint))))
        except BaseException as error:
            fetched.set_exception(error)

    Thread(target=work, daemon=True, name=f"fetch {checkpoint.name}").start()
    return fetched


def _give_back(fetched: Fetched) -> None:
    if fetched.exception() is None:
        fetched.result()[0].close()
