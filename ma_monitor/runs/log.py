"""The append-only framed file of a run.

A header (magic and schema version), then frames: a marker, the payload's length, a CRC-32 of length and payload, the
payload. Whatever interrupts a write, what was whole before stays whole: a torn tail is known by its missing or wrong
CRC, and after damage in the middle the marker leads to the next good frame.

Nothing is synced to the disk at each append: one ``write`` survives the death of the process, and a sync (a quarter of
a millisecond on a local disk, without bound on a busy network file system) would slow the training that is watched.
Loss of power can therefore cost what the system had not yet written, which the next open repairs as a torn tail.
Closing syncs once.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ma_monitor.errors import StoreError
from ma_monitor.runs.files import lock, no_link, read_bounded, writing

SCHEMA_VERSION = 1
MAGIC = b"\x89MArun\r\n"
HEADER = MAGIC + struct.pack("<I", SCHEMA_VERSION)
MARKER = b"\xf5MA\n"
_SIZES = struct.Struct("<II")
OVERHEAD = len(MARKER) + _SIZES.size
LOG_LIMIT = 2**32
"""Bytes of a log that is read: it is read into memory."""
VAIN = 64
"""How often the size of a log may be checksummed for frames that are none: a hostile one could ask for days."""
REVIVED = "if a rewind was there, the steps that it superseded count again"


@dataclass(frozen=True)
class Frame:
    """A whole frame: where it starts, how many bytes it takes, and what it says."""

    offset: int
    size: int
    payload: bytes


@dataclass(frozen=True)
class Scan:
    """What a log holds.

    Attributes:
        frames: Every whole frame, in the order of writing.
        gaps: Unreadable stretches ``(start, end)`` that a good frame follows.
        end: Offset after the last whole frame; what lies beyond is a torn tail.
        size: Bytes in the file.
    """

    frames: tuple[Frame, ...]
    gaps: tuple[tuple[int, int], ...]
    end: int
    size: int

    def damage(self) -> Iterator[str]:
        """Every damage in words; nobody can tell what was there, a rewind included."""
        for start, end in self.gaps:
            yield f"bytes {start} to {end} are unreadable and left out ({REVIVED})"
        if self.size > self.end:
            yield f"the last {self.size - self.end} bytes (from byte {self.end}) are not a whole record ({REVIVED})"


def encode(payload: bytes) -> bytes:
    """The frame that holds this payload."""
    length = struct.pack("<I", len(payload))
    return MARKER + length + struct.pack("<I", zlib.crc32(payload, zlib.crc32(length))) + payload


def read_log(path: Path) -> bytes:
    """The whole file, as it is now.

    Raises:
        StoreError: If it cannot be read.
    """
    try:
        return read_bounded(path, LOG_LIMIT)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error


def scan(data: bytes, name: str) -> Scan:
    """Finds every whole frame.

    Args:
        data: The whole file.
        name: What to call it in messages.

    Raises:
        StoreError: If the header is cut short, foreign, or of a later version, or the file was made to be slow to read.
    """
    _check_header(data, name)
    frames: list[Frame] = []
    gaps: list[tuple[int, int]] = []
    end = len(HEADER)
    for frame in _frames(data, end, name):
        if frame.offset > end:
            gaps.append((end, frame.offset))
        frames.append(frame)
        end = frame.offset + frame.size
    return Scan(tuple(frames), tuple(gaps), end, len(data))


def _check_header(data: bytes, name: str) -> None:
    if len(data) < len(HEADER) and (HEADER.startswith(data) or data.startswith(MAGIC)):
        raise StoreError(
            f"{name}: a log begins with {len(HEADER)} bytes of header, this one ends after {len(data)}; "
            "it holds no measurement: remove the run and begin again"
        )
    if not data.startswith(MAGIC):
        raise StoreError(
            f"{name}: not a log of ma_monitor, it begins with {data[: len(MAGIC)]!r}; use another directory"
        )
    (version,) = struct.unpack_from("<I", data, len(MAGIC))
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{name}: schema version {version}, this ma_monitor reads {SCHEMA_VERSION}; install a later one"
        )


def _frames(data: bytes, start: int, name: str) -> Iterator[Frame]:
    """Whole frames at or after ``start``."""
    offset, patience = start, VAIN * len(data)
    while (offset := data.find(MARKER, offset)) >= 0:
        body = offset + OVERHEAD
        length, crc = _SIZES.unpack_from(data, offset + len(MARKER)) if body <= len(data) else (len(data), 0)
        size = OVERHEAD + length
        if offset + size <= len(data):
            payload = data[body : body + length]
            if zlib.crc32(payload, zlib.crc32(struct.pack("<I", length))) == crc:
                yield Frame(offset, size, payload)
                offset += size
                continue
            patience -= size
            if patience < 0:
                raise StoreError(f"{name}: too damaged to be read, or made to be slow to read; the run cannot be used")
        offset += 1


class LogWriter:
    """The only writer of a log.

    Attributes:
        path: The file.
        locked: Whether a lock keeps other writers off (False where the file system has none).
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Opens and locks the file; nothing in it is changed.

        Args:
            path: The file.
            create: Make an empty one where there is none.

        Raises:
            StoreError: If the file cannot be opened for writing, or has a writer.
        """
        self.path = path
        with writing(path.parent):
            if create:
                open(path, "ab", opener=no_link).close()
            self._file = open(path, "rb+", buffering=0, opener=no_link)
        try:
            self.locked = lock(self._file)
        except BlockingIOError as error:
            self._file.close()
            raise StoreError(
                f"{path.parent}: a run has one writer at a time and another process is writing this one; "
                "use another directory, or open it without writable=True"
            ) from error
        self._end = 0
        self._queue = b""

    @property
    def deleted(self) -> bool:
        """Whether the file was deleted under way: it is there until it is closed."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def read(self) -> bytes:
        """The log up to its end, what is queued included."""
        self._file.seek(0)
        return self._file.read(self._end) + self._queue

    def start(self) -> None:
        """Empties the file and writes the header.

        Raises:
            StoreError: If the disk refuses; the header stays queued.
        """
        self._file.truncate(0)
        self._queue = HEADER
        self.flush()

    def cut(self, end: int) -> None:
        """Makes ``end`` the end of the file: everything beyond is dropped, the next frame goes there."""
        self._end = end
        self._file.truncate(end)

    def queue(self, payload: bytes) -> tuple[int, int]:
        """Adds a frame to what `flush` writes.

        Returns:
            Offset and size of the frame.
        """
        frame = encode(payload)
        offset = self._end + len(self._queue)
        self._queue += frame
        return offset, len(frame)

    def flush(self) -> None:
        """Writes what is queued.

        Raises:
            StoreError: If the disk refuses; nothing of it is in the file then, and the next flush tries again.
        """
        try:
            self._file.seek(self._end)
            rest = memoryview(self._queue)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # a leftover is overwritten: the next flush writes these bytes again
                self._file.truncate(self._end)
            raise StoreError(
                f"{self.path}: cannot be written ({error.strerror or error}); {len(self._queue)} bytes of the run "
                "are not on the disk: make room or make it writable"
            ) from error
        self._end += len(self._queue)
        self._queue = b""

    def close(self) -> None:
        """Writes what is still queued, syncs the file to the disk and gives the lock up.

        Raises:
            StoreError: If the disk refuses what was queued, which is lost then.
        """
        if self._file.closed:
            return
        try:
            self.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be synced to the disk ({error.strerror or error})") from error
        finally:
            self._file.close()
