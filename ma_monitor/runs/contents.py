"""What a run's log says once everything superseded is gone."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ma_monitor.runs.codec import (
    MEASUREMENTS,
    PHENOMENA,
    REWIND,
    decode_measurements,
    decode_phenomena,
    decode_plan,
    kind_and_step,
)
from ma_monitor.runs.log import HEADER, Frame, scan
from ma_monitor.runs.records import Measurements, Plan, RunMeta


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
        """
        latest: dict[int, tuple[Measurements, Place]] = {}
        problems = []
        for frame in frames:
            place = Place(frame.offset, frame.size)
            try:
                kind, step = kind_and_step(frame.payload)
                if kind == MEASUREMENTS:
                    latest[step] = (decode_measurements(frame.payload, self.shape), place)
                elif kind == PHENOMENA:
                    latest[step] = self._joined(latest.get(step), frame)
                elif kind == REWIND:
                    latest = {measured: held for measured, held in latest.items() if measured <= step}
                    self.rewind(step)
                else:
                    self.add_plan(decode_plan(frame.payload), place)
            except (ValueError, TypeError, KeyError) as error:
                problems.append(f"the record at byte {frame.offset} is not one of this run ({error}) and left out")
        self.places = {step: latest[step][1] for step in sorted(latest)}
        return [latest[step][0] for step in self.places], problems

    def _joined(self, held: tuple[Measurements, Place] | None, frame: Frame) -> tuple[Measurements, Place]:
        """Measurements with what was read besides them, which lies right behind them."""
        if held is None or held[1].offset + held[1].size != frame.offset:
            raise ValueError("what was read besides measurements without these")
        whole = replace(held[0], phenomena=decode_phenomena(frame.payload, self.shape[0]))
        return whole, Place(held[1].offset, held[1].size + frame.size)


def leftover(data: bytes, name: str) -> bool:
    """Whether a log is empty, or what a process left behind that died while it made a run: it may be begun again.

    Raises:
        StoreError: If it is no log of this version.
    """
    if HEADER.startswith(data):
        return True
    return all(frame.payload[:1] != bytes([MEASUREMENTS]) for frame in scan(data, name).frames)
