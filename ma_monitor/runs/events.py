"""The diary of a run: ``events.jsonl``, one JSON object a line, the only file of a run that knows the time."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from ma_monitor.errors import redacted
from ma_monitor.runs.files import no_link, parse_json
from ma_monitor.runs.log import SCHEMA_VERSION

LOGGER = logging.getLogger("ma_monitor")
LIMIT = 2**26
"""Bytes of a diary that are read, the last ones."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a run: when (ISO 8601, UTC), of what kind, in words."""

    time: str
    kind: str
    message: str


def add_event(path: Path, kind: str, message: str) -> None:
    """Appends a line.

    Never raises: events tell of faults, and a full disk must not turn the telling into another one. What cannot be
    written is warned about instead.
    """
    message = redacted(message)
    line = line_of(Event(datetime.now(timezone.utc).isoformat(timespec="milliseconds"), kind, message))
    try:
        with open(path, "ab+", opener=no_link) as file:
            if file.tell():
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"
                line = "\n" + line if torn else line
            file.write(line.encode())
    except OSError as error:
        LOGGER.warning("%s: cannot be written (%s); not recorded: %s: %s", path, error.strerror or error, kind, message)


def line_of(event: Event) -> str:
    """The line of the diary that holds an event."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(event)}) + "\n"


def read_events(path: Path) -> tuple[Event, ...]:
    """Every event of the last ``LIMIT`` bytes in order; a line that was cut short is left out."""
    if not path.is_file():
        return ()
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LIMIT))
        lines = file.read().split(b"\n")
    events = []
    for line in filter(None, lines):
        try:
            words = parse_json(line.decode(errors="replace"))
            events.append(Event(str(words["time"]), str(words["kind"]), str(words["message"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return tuple(events)
