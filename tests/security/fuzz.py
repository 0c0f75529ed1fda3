"""Feeds hostile files to every reader for as long as asked: ``python -m tests.security.fuzz --minutes 10``.

Prints a line a target (inputs tried, finds, slowest input) and every find with the input that Hypothesis shrank it to.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from ma_monitor.errors import MaMonitorError, is_fault
from tests.security.slow_targets import slow_targets
from tests.security.targets import Target, targets

SLOW = 30.0
"""Seconds after which an input counts as a find, on a busy machine: a model of 4,096 blocks takes half of that."""
MEMORY = 6 * 2**30
"""Bytes of address space that the process may take; torch and its libraries are mapped into the same."""


class TooSlowError(Exception):
    """An input took longer than it may."""


class Tally:
    """What came of the inputs so far."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.finds: dict[str, str] = {}
        self.slowest: Counter[str] = Counter()


def fed(target: Target, content: bytes) -> None:
    """One input."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        try:
            target.read(Path(folder), content)
        except MaMonitorError:
            pass


def batch(target: Target, tally: Tally, number: int, examples: int, left: float) -> None:
    """A few hundred inputs to one target, other ones each time."""
    ends = time.monotonic() + left

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(target.content)
    def check(content: bytes) -> None:
        if time.monotonic() > ends:
            return
        started = time.monotonic()
        tally.tried[target.name] += 1
        fed(target, content)
        took = time.monotonic() - started
        tally.slowest[target.name] = max(tally.slowest[target.name], took)  # type: ignore[assignment]
        if took > SLOW:
            raise TooSlowError(f"{took:.1f} s")
        last[:] = [content]

    last: list[bytes] = []
    try:
        check()
    except BaseException as error:
        if not is_fault(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{target.name}: {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        if where not in tally.finds:
            tally.finds[where] = "".join(traceback.format_exception(error)[-8:])[-1800:]
            print(f"FIND {where}\n{tally.finds[where]}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.disable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chosen = [target for target in (*targets(), *slow_targets()) if args.only in target.name]
    tally, ends, number = Tally(), time.monotonic() + 60 * args.minutes, args.seed
    while time.monotonic() < ends:
        for target in chosen:
            number += 1
            batch(target, tally, number, 100, ends - time.monotonic())
    for target in chosen:
        finds = sum(where.startswith(f"{target.name}: ") for where in tally.finds)
        tried, slowest = tally.tried[target.name], tally.slowest[target.name]
        print(f"{target.name:24} {tried:9,} inputs {finds:3} finds  slowest {slowest:.2f} s")
    print(f"{'all':24} {sum(tally.tried.values()):9,} inputs {len(tally.finds):3} finds")
    return 1 if tally.finds else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
