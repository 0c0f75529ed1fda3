"""Small facts about files: replace one atomically, read what others wrote in bounds, be the only writer."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import stat
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ma_monitor.errors import StoreError

JSON_LIMIT = 2**24
"""No document of a run comes near this size in bytes; a larger one is not ours."""
FILE_LIMIT = 2**28
"""Bytes of any other text of other people."""
ARRAYS_LIMIT = 2**31
"""Bytes of arrays of other people, unpacked."""


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


def no_link(path: str, flags: int) -> int:
    """An opener for files that are written to: none that is a link, which leads wherever its maker wants."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Writes a file; with ``sync`` waits until it is on the disk, so that it survives a loss of power.

    Raises:
        OSError: If the disk refuses.
    """
    with open(path, "wb", opener=no_link) as file:
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


def read_bounded(path: Path, limit: int = FILE_LIMIT) -> bytes:
    """A plain file of at most so many bytes: a pipe or a device, perhaps behind a link, may never end.

    Raises:
        OSError: If it is none or cannot be read.
    """
    _check_size(path, _plain_size(path), limit)
    return path.read_bytes()


def _plain_size(path: Path) -> int:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return about.st_size


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise OSError(errno.EFBIG, f"{size} bytes, at most {limit} are read", str(path))


def parse_json(text: bytes | str, *, finite: bool = False) -> Any:
    """What a JSON text of other people says.

    Args:
        text: The text.
        finite: Refuse NaN, infinities and numbers that become infinite, which Python would read.

    Raises:
        ValueError: If it is no JSON, or nested too deeply.
    """
    text = text if isinstance(text, str) else text.decode()
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite) if finite else json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _finite(word: str) -> float:
    if not math.isfinite(number := float(word)):
        raise ValueError(f"{word[:20]} is not finite")
    return number


@contextmanager
def opened_arrays(path: Path) -> Iterator[Any]:
    """What ``numpy.load`` gives for a file of other people, nothing of it unpickled.

    Raises:
        OSError: If the file cannot be read, or is larger than ``ARRAYS_LIMIT``, packed or not.
        ValueError: Whatever else is wrong with it, also what is noticed while it is used.
    """
    import numpy as np

    size = _plain_size(path)
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    size = max(size, sum(member.file_size for member in archive.infolist()))
            _check_size(path, size, ARRAYS_LIMIT)
            file.seek(0)
            yield np.load(file, allow_pickle=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # numpy, zipfile and zlib raise anything on what is cut short or hostile
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object written by `write_json`, trusting nothing about it.

    Raises:
        StoreError: If the file cannot be read, is too large, or is not one JSON object of finite numbers.
    """
    try:
        document = parse_json(read_bounded(path, JSON_LIMIT), finite=True)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
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
