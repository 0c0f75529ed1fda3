"""Records to the payloads of a run's log and back.

A payload of the log begins with its kind and its step. Arrays follow little-endian, byte plane by byte plane (all
first bytes, all second bytes, …) and zlib-compressed: planes of like bytes compress several times better, and every
bit of a float64 comes back. No time and no path is in it, so the same measurements give the same bytes.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.runs.files import parse_json
from ma_monitor.runs.records import Measurements, Plan

MEASUREMENTS, REWIND, PLAN, PHENOMENA = 1, 2, 3, 4

FIELDS: dict[str, tuple[str, bool]] = {
    "top": ("<f8", True),
    "position": ("<i4", True),
    "token": ("<i4", True),
    "channel": ("<i4", True),
    "median": ("<f8", False),
    "nan": ("<i8", False),
    "inf": ("<i8", False),
}
"""Array of a measurement → its type, and whether it has the axis of ranks. The order is that of the bytes."""

RECORD_LIMIT = 2**30
"""Bytes of one decoded record at most: a corrupt or hostile file cannot ask for more memory than this."""
LAST_STEP = 2**53
"""No training is longer, and a float still tells each step from the next."""

_HEAD = struct.Struct("<Bq")
_SHAPE = struct.Struct("<III")
_COUNT = struct.Struct("<II")
_COMPRESSION = 1
"""zlib's level; on a real run level 6 takes a third longer and saves 2 %."""


def encode_measurements(m: Measurements) -> bytes:
    """The payload of one step's measurements."""
    planes = [_planes(np.asarray(getattr(m, name)), kind) for name, (kind, _) in FIELDS.items()]
    return _HEAD.pack(MEASUREMENTS, m.step) + _SHAPE.pack(*m.top.shape) + zlib.compress(b"".join(planes), _COMPRESSION)


def encode_phenomena(m: Measurements) -> bytes:
    """The payload of what was read besides one step's measurements, whose payload it follows."""
    text = json.dumps({name: m.phenomena[name].shape for name in sorted(m.phenomena)}).encode()
    values = np.concatenate([m.phenomena[name].ravel() for name in sorted(m.phenomena)])
    packed = zlib.compress(_planes(values, "<f8"), _COMPRESSION)
    return _HEAD.pack(PHENOMENA, m.step) + _COUNT.pack(len(text), len(values)) + text + packed


def encode_rewind(step: int) -> bytes:
    """The payload that supersedes everything after this step."""
    return _HEAD.pack(REWIND, step)


def encode_plan(plan: Plan) -> bytes:
    """The payload of a plan."""
    words = {"total_steps": plan.total_steps, "batch": plan.batch, "schedule": plan.schedule, "lr": plan.lr is not None}
    if plan.held:
        words["held"] = True
    text = json.dumps(words).encode()
    lr = np.empty(0) if plan.lr is None else plan.lr
    rates = zlib.compress(_planes(lr, "<f8"), _COMPRESSION)
    return _HEAD.pack(PLAN, plan.from_step) + _COUNT.pack(len(text), len(lr)) + text + rates


def kind_and_step(payload: bytes) -> tuple[int, int]:
    """Kind and step of a payload.

    Raises:
        ValueError: If it is too short to say, or of no known kind.
    """
    if len(payload) < _HEAD.size:
        raise ValueError("too short")
    kind, step = _HEAD.unpack_from(payload)
    if kind not in (MEASUREMENTS, REWIND, PLAN, PHENOMENA) or not 0 <= step <= LAST_STEP:
        raise ValueError(f"kind {kind} at step {step}")
    return kind, step


def decode_measurements(payload: bytes, shape: tuple[int, int, int]) -> Measurements:
    """The measurements of a payload.

    Args:
        payload: What `encode_measurements` gave.
        shape: ``(R, n, k)`` that the run's metadata promise.

    Raises:
        ValueError: If the payload does not hold measurements of this shape.
    """
    found = _SHAPE.unpack_from(payload, _HEAD.size) if len(payload) >= _HEAD.size + _SHAPE.size else None
    if found != shape:
        raise ValueError(f"shape {found} instead of {shape}")
    raw = _decompress(payload[_HEAD.size + _SHAPE.size :], record_bytes(shape))
    arrays: dict[str, Any] = {}
    start = 0
    for name, (kind, ranked) in FIELDS.items():
        axes = shape if ranked else shape[:2]
        size = math.prod(axes) * np.dtype(kind).itemsize
        arrays[name] = _values(raw[start : start + size], kind).reshape(axes)
        start += size
    return Measurements(_HEAD.unpack_from(payload)[1], **arrays)


def decode_phenomena(payload: bytes, rows: int) -> dict[str, NDArray[np.float64]]:
    """What was read besides the measurements of a step.

    Args:
        payload: What `encode_phenomena` gave.
        rows: Layer rows R that the run's metadata promise.

    Raises:
        ValueError: If the payload does not hold arrays of so many rows.
    """
    start = _HEAD.size + _COUNT.size
    if len(payload) < start:
        raise ValueError("too short")
    characters, count = _COUNT.unpack_from(payload, _HEAD.size)
    shapes = parse_json(payload[start : start + characters])
    if not isinstance(shapes, dict) or not all(_is_shape(shape, rows) for shape in shapes.values()):
        raise ValueError(f"arrays of other than {rows} layers")
    values = _values(_decompress(payload[start + characters :], count * 8), "<f8")
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    if not len(ends) or ends[-1] != count:
        raise ValueError(f"{count} numbers for the shapes {list(shapes.values())[:5]}")
    parts = np.split(values, ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _is_shape(shape: Any, rows: int) -> bool:
    """Whether this is ``[rows]`` or ``[rows, m]``."""
    numbers = isinstance(shape, list) and all(type(size) is int and 0 < size <= RECORD_LIMIT for size in shape)
    return numbers and len(shape) in (1, 2) and shape[0] == rows


def decode_plan(payload: bytes) -> Plan:
    """The plan of a payload.

    Raises:
        ValueError: If the payload does not hold a plan.
    """
    start = _HEAD.size + _COUNT.size
    if len(payload) < start:
        raise ValueError("too short")
    characters, count = _COUNT.unpack_from(payload, _HEAD.size)
    words = parse_json(payload[start : start + characters])
    counts = {name: words[name] for name in ("total_steps", "batch")}
    whole = all(value is None or (type(value) is int and 0 <= value <= LAST_STEP) for value in counts.values())
    if not whole or not isinstance(words["schedule"], str):
        raise ValueError(f"its words are no plan's: {str(words)[:80]}")
    lr = _values(_decompress(payload[start + characters :], count * 8), "<f8")
    if words["lr"] and not (lr.size and np.isfinite(lr).all() and lr.min() >= 0):
        raise ValueError("its rates must be finite and not negative")
    return Plan(
        from_step=_HEAD.unpack_from(payload)[1],
        lr=lr if words["lr"] else None,
        schedule=words["schedule"],
        held=words.get("held") is True,
        **counts,
    )


def record_bytes(shape: tuple[int, int, int]) -> int:
    """Bytes that the arrays of one step take, not compressed."""
    ranked, plain = math.prod(shape), math.prod(shape[:2])
    return sum((ranked if wide else plain) * np.dtype(kind).itemsize for kind, wide in FIELDS.values())


def _planes(values: NDArray[Any], kind: str) -> bytes:
    flat = np.ascontiguousarray(values.astype(kind, casting="same_kind", copy=False)).reshape(-1)
    return flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()


def _values(planes: bytes, kind: str) -> NDArray[Any]:
    width = np.dtype(kind).itemsize
    values = np.frombuffer(planes, np.uint8).reshape(width, -1).T
    return np.ascontiguousarray(values).reshape(-1).view(kind)


def _decompress(data: bytes, size: int) -> bytes:
    """Decompresses to exactly this size.

    Raises:
        ValueError: If the data are not zlib's, or of another size.
    """
    if size > RECORD_LIMIT:
        raise ValueError(f"{size} bytes in one record")
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != size or not stream.eof:
        raise ValueError("content of another size")
    return raw
