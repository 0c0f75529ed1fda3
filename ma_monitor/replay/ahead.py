"""The next checkpoint is fetched while this one is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread

from ma_monitor.replay.sources import Checkpoint

Fetch = Callable[[Checkpoint], Path]


def one_ahead(fetch: Fetch, checkpoints: Sequence[Checkpoint]) -> Iterator[Future[Path]]:
    """Yields checkpoint after checkpoint as soon as it is there; the next one is under way by then, and no other."""
    ahead = [_in_background(fetch, checkpoint) for checkpoint in checkpoints[:1]]
    for number in range(1, len(checkpoints) + 1):
        current = ahead.pop()
        wait([current])
        ahead += [_in_background(fetch, following) for following in checkpoints[number : number + 1]]
        yield current


def _in_background(fetch: Fetch, checkpoint: Checkpoint) -> Future[Path]:
    """Fetches in a thread that dies with the process: who interrupts a replay does not wait for a download."""
    fetched: Future[Path] = Future()

    def work() -> None:
        try:
            fetched.set_result(fetch(checkpoint))
        except BaseException as error:
            fetched.set_exception(error)

    Thread(target=work, daemon=True).start()
    return fetched
