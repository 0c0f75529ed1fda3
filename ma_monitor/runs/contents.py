"""What a run's log says once everything superseded is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from ma_monitor.errors import StoreError
from ma_monitor.runs.codec import (
    LAST_STEP,
    MEASUREMENTS,
    PLAN,
    REWIND,
    decode_measurements,
    decode_phenomena,
    decode_plan,
    kind_and_step,
    record_bytes,
)
from ma_monitor.runs.log import HEADER, Frame, scan
from ma_monitor.runs.records import Measurements, Plan, RunMeta

UNPACKED, SPARE = 64, 2**30
"""Records take at most so many times their bytes in memory, a gigabyte aside: real ones take two to four times."""


class Place(NamedTuple):
    """Where a frame of the log lies."""

    offset: int
    size: int


class Contents:
    """Which frames of a log count: the latest of each step, and the plans that were in force.

    Attributes:
        shape: ``(R, n, k)`` of every measurement.
        places: Step → where its measurements lie.
        plans: Plans in the order of their steps, and where they lie.
    """

    def __init__(self, meta: RunMeta) -> None:
        """Starts empty."""
        self.shape = (meta.rows, meta.probe.sequences, meta.k)
        self.places: dict[int, Place] = {}
        self.plans: list[tuple[Plan, Place]] = []

    def rewind(self, step: int) -> int:
        """Forgets measurements and plans after this step, and says how many there were."""
        before = len(self.places) + len(self.plans)
        self.places = {measured: place for measured, place in self.places.items() if measured <= step}
        self.plans = [(plan, place) for plan, place in self.plans if plan.from_step <= step]
        return before - len(self.places) - len(self.plans)

    def add_plan(self, plan: Plan, place: Place) -> None:
        """A plan supersedes those that came into force with it or later."""
        self.plans = [held for held in self.plans if held[0].from_step < plan.from_step] + [(plan, place)]

    def load(self, frames: tuple[Frame, ...]) -> tuple[list[Measurements], list[str]]:
        """Reads the frames of a log in the order of writing.

        Returns:
            The measurements in step order, and in words what is no record of this run.

        Raises:
            StoreError: If the records were made to fill the memory.
        """
        kept, problems = self._in_force(frames)
        room = SPARE + UNPACKED * sum(frame.size for frame in frames)
        latest: dict[int, tuple[Measurements, Place]] = {}
        for kind, step, frame in kept:
            with _noted(frame, problems):
                if kind == MEASUREMENTS:
                    place = Place(frame.offset, frame.size)
                    latest[step] = (decode_measurements(frame.payload, self.shape), place)
                    room -= record_bytes(self.shape)
                else:
                    latest[step] = self._joined(latest.get(step), frame)
                    room -= sum(values.nbytes for values in latest[step][0].phenomena.values())
            if room < 0:
                raise StoreError("a log whose records unpack to so much more than they take is not ma_monitor's")
        self.places = {step: latest[step][1] for step in sorted(latest)}
        return [latest[step][0] for step in self.places], [problems[offset] for offset in sorted(problems)]

    def _in_force(self, frames: tuple[Frame, ...]) -> tuple[list[tuple[int, int, Frame]], dict[int, str]]:
        """Takes the plans that count; gives kind, step and frame of what was measured and not rewound, and problems.

        From the last record to the first, so that each is looked at once however many rewinds and plans there are.
        """
        kept: list[tuple[int, int, Frame]] = []
        problems: dict[int, str] = {}
        least = LAST_STEP
        for frame in reversed(frames):
            with _noted(frame, problems):
                kind, step = kind_and_step(frame.payload)
                if kind == REWIND:
                    least = min(least, step)
                elif kind == PLAN and step <= least and (not self.plans or step < self.plans[-1][0].from_step):
                    self.plans.append((decode_plan(frame.payload), Place(frame.offset, frame.size)))
                elif kind != PLAN and step <= least:
                    kept.append((kind, step, frame))
        self.plans.reverse()
        kept.reverse()
        return kept, problems

    def _joined(self, held: tuple[Measurements, Place] | None, frame: Frame) -> tuple[Measurements, Place]:
        """Measurements with what was read besides them, which lies right behind them."""
        if held is None or held[1].offset + held[1].size != frame.offset:
            raise ValueError("what was read besides measurements without these")
        whole = replace(held[0], phenomena=decode_phenomena(frame.payload, self.shape[0]))
        return whole, Place(held[1].offset, held[1].size + frame.size)


@contextmanager
def _noted(frame: Frame, problems: dict[int, str]) -> Iterator[None]:
    """Notes by its place what is no record of this run."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        problems[frame.offset] = f"the record at byte {frame.offset} is not one of this run ({error}) and left out"


def leftover(data: bytes, name: str) -> bool:
    """Whether a log is empty, or what a process left behind that died while it made a run: it may be begun again.

    Raises:
        StoreError: If it is no log of this version.
    """
    if HEADER.startswith(data):
        return True
    return all(frame.payload[:1] != bytes([MEASUREMENTS]) for frame in scan(data, name).frames)
