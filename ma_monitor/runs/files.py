"""Small facts about files: replace one atomically, read bounded JSON, be the only writer."""

from __future__ import annotations

import errno
import functools
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ma_monitor.errors import StoreError

JSON_LIMIT = 64 * 2**20
"""No document of a run comes near this size in bytes; a larger one is not ours."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the disk's refusal to write here into a `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file so that a reader, or a crash, sees the old content or the new, never half of one.

    Args:
        path: File to make or replace.
        write: Writes the new content to the path that it is given: a temporary file in the same folder.

    Raises:
        OSError: If the folder cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Writes a file; with ``sync`` waits until it is on the disk, so that it survives a loss of power.

    Raises:
        OSError: If the disk refuses.
    """
    with path.open("wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Makes a folder, or replaces it, so that it is whole or not there: it is written beside and renamed.

    Args:
        folder: What to make or replace.
        write: Fills the empty folder that it is given.

    Raises:
        OSError: If the parent folder cannot be written; what was there stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        new = Path(beside) / "new"
        new.mkdir()
        write(new)
        old = Path(beside) / "old"
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def write_json(path: Path, document: dict[str, Any], *, sync: bool = False) -> None:
    """Replaces a JSON file atomically.

    Raises:
        ValueError: If the document holds NaN, an infinity or a cycle.
        TypeError: If it holds what JSON has no word for.
        OSError: If the folder cannot be written.
    """
    data = json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"
    replace_file(path, lambda temporary: write_bytes(temporary, data, sync=sync))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object written by `write_json`, trusting nothing about it.

    Raises:
        StoreError: If the file cannot be read, is too large, or is not one JSON object.
    """
    try:
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise StoreError(f"{path}: a run's JSON file has at most {JSON_LIMIT} bytes, this one has {size}")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not a JSON file that ma_monitor wrote ({error})") from error
    if not isinstance(document, dict):
        raise StoreError(f"{path}: must hold a JSON object, holds a {type(document).__name__}")
    return document


_locked: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def lock(file: BinaryIO) -> bool:
    """Makes this open file the only writer, without waiting.

    The lock goes when the file is closed and when the process dies, so a killed run leaves none behind. A forked child
    (a data loader's worker) would share it and outlive a killed parent; children therefore close their copy.

    Returns:
        Whether the file is locked; False where the system or the file system knows no locks.

    Raises:
        BlockingIOError: If another open file holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return False
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from error
        return False
    _close_in_children()
    _locked.add(file)
    return True


@functools.cache
def _close_in_children() -> None:
    """Has every child forked from now on close its copies of locked files; once a process."""

    def close() -> None:
        for file in list(_locked):
            file.close()

    os.register_at_fork(after_in_child=close)
