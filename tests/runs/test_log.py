from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.errors import StoreError
from ma_monitor.runs.log import HEADER, MAGIC, MARKER, REVIVED, LogWriter, encode, read_log, scan

PAYLOADS = [b"first", MARKER + b"a payload that holds the marker" + MARKER, b"", b"last one"]


def log_of(payloads: list[bytes]) -> bytes:
    return HEADER + b"".join(encode(payload) for payload in payloads)


def texts(data: bytes) -> list[bytes]:
    return [frame.payload for frame in scan(data, "log").frames]


@given(st.lists(st.binary(max_size=40) | st.sampled_from([MARKER, encode(b"nested"), MARKER * 3]), max_size=6))
def test_round_trip_of_any_payloads(payloads: list[bytes]) -> None:
    found = scan(log_of(payloads), "log")
    assert [frame.payload for frame in found.frames] == payloads
    assert list(found.damage()) == []
    assert found.end == found.size


def test_truncation_at_every_byte_of_the_last_record_loses_only_that_record() -> None:
    whole, before = log_of(PAYLOADS), log_of(PAYLOADS[:-1])
    for size in range(len(before), len(whole)):
        found = scan(whole[:size], "log")
        assert [frame.payload for frame in found.frames] == PAYLOADS[:-1]
        assert found.end == len(before)
        assert found.gaps == ()
        assert [f"the last {size - len(before)} bytes" in text for text in found.damage()] == [True] * (
            size > found.end
        )


def test_truncation_at_every_byte_of_the_header_is_named() -> None:
    for size in range(len(HEADER)):
        with pytest.raises(StoreError, match=f"12 bytes of header, this one ends after {size}"):
            scan(HEADER[:size], "log")


def test_every_flipped_byte_of_a_middle_record_costs_that_record_only() -> None:
    whole = log_of(PAYLOADS)
    start = len(log_of(PAYLOADS[:1]))
    end = len(log_of(PAYLOADS[:2]))
    for index in range(start, end):
        broken = bytearray(whole)
        broken[index] ^= 0x40
        found = scan(bytes(broken), "log")
        assert [frame.payload for frame in found.frames] == [PAYLOADS[0], *PAYLOADS[2:]]
        assert list(found.damage()) == [f"bytes {start} to {end} are unreadable and left out ({REVIVED})"]
        assert found.end == found.size


@given(st.binary(max_size=60))
def test_whatever_follows_the_last_record_is_a_torn_tail(tail: bytes) -> None:
    found = scan(log_of(PAYLOADS) + b"\0" + tail, "log")
    assert [frame.payload for frame in found.frames] == PAYLOADS
    assert found.size - found.end == 1 + len(tail)


@pytest.mark.parametrize("data", [b"PK\x03\x04 a zip file", b"\x89PNG\r\n\x1a\n and so on", b"{}", b"\0" * 100])
def test_foreign_files_are_refused(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"log: not a log of ma_monitor, it begins with"):
        scan(data, "log")


def test_another_schema_version_is_refused() -> None:
    with pytest.raises(StoreError, match=r"log: schema version 2, this ma_monitor reads 1"):
        scan(MAGIC + struct.pack("<I", 2), "log")


def test_read_log_names_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone.bin: cannot be read \(No such file"):
        read_log(tmp_path / "gone.bin")


def test_a_writer_appends_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path, create=True)
    writer.start()
    places = []
    for payload in PAYLOADS:
        places.append(writer.queue(payload))
        writer.flush()
    assert writer.read() == read_log(path) == log_of(PAYLOADS)
    assert [read_log(path)[offset : offset + size] for offset, size in places] == [encode(p) for p in PAYLOADS]
    writer.close()
    writer.close()


def test_what_is_queued_is_read_and_written_with_the_next_flush_or_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path, create=True)
    writer.start()
    writer.queue(b"waits")
    assert texts(writer.read()) == [b"waits"]
    assert texts(read_log(path)) == []
    writer.close()
    assert texts(read_log(path)) == [b"waits"]


def test_a_cut_drops_the_tail(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(log_of(PAYLOADS) + MARKER + b"torn")
    writer = LogWriter(path)
    writer.cut(len(log_of(PAYLOADS)))
    writer.queue(b"next")
    writer.close()
    assert read_log(path) == log_of([*PAYLOADS, b"next"])


def test_a_log_has_one_writer_and_any_number_of_readers(tmp_path: Path) -> None:
    first = LogWriter(tmp_path / "log", create=True)
    first.start()
    with pytest.raises(StoreError, match="one writer at a time"):
        LogWriter(tmp_path / "log")
    assert read_log(tmp_path / "log") == HEADER
    first.close()
    LogWriter(tmp_path / "log").close()


def test_a_log_that_cannot_be_opened_names_the_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"{tmp_path}: cannot be written \(No such file"):
        LogWriter(tmp_path / "log")
