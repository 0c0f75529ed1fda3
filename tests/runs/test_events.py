from __future__ import annotations

import logging
from datetime import datetime, timezone
from pathlib import Path

import pytest

from ma_monitor.runs.events import add_event, read_events


def test_events_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == ()
    begin = datetime.now(timezone.utc)
    add_event(path, "opened", "created")
    add_event(path, "fault", 'two\nlines, a "quote" and 中文')
    events = read_events(path)
    assert [(e.kind, e.message) for e in events] == [("opened", "created"), ("fault", 'two\nlines, a "quote" and 中文')]
    for event in events:
        assert abs((datetime.fromisoformat(event.time) - begin).total_seconds()) < 60
    assert path.read_bytes().count(b"\n") == 2


def test_a_line_that_was_cut_short_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    add_event(path, "opened", "created")
    whole = path.read_bytes()
    for size in range(1, len(whole) - 1):
        path.write_bytes(whole + whole[:size])
        add_event(path, "final", "")
        assert [e.kind for e in read_events(path)] == ["opened", "final"]


@pytest.mark.parametrize("line", [b"[]", b"7", b'{"time": 1}', b"\xff\xfe", b"[" * 100_000, b""])
def test_lines_that_are_not_ours_are_passed_over(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line + b"\n")
    add_event(path, "opened", "created")
    assert [e.kind for e in read_events(path)] == ["opened"]


def test_a_diary_that_cannot_be_written_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ma_monitor"):
        add_event(tmp_path / "gone" / "events.jsonl", "fault", "no room")
    assert "not recorded: fault: no room" in caplog.text
