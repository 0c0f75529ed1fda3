"""Hostile variants of files that are in order: what the fuzzers feed to the readers."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import numpy as np
from hypothesis import strategies as st

TEXTS = (
    "",
    "\x1b]0;owned\x07\x1b[2J",
    "</script><script>alert(1)</script>",
    "[bold]rich[/nothing]",
    "\ud800",
    "\0",
    "../../../etc/passwd",
    "/dev/zero",
    "9" * 5000,
    "from step " + "9" * 5000,
    "2024-01-01T00:00:00+99:99",
    "9999-12-31T23:59:59.999-23:59",
    "x" * 70_000,
)
NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))

hostile_values = st.one_of(
    st.sampled_from([None, True, False, [], {}, *NUMBERS, *NOT_FINITE, *TEXTS]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.sampled_from([None, 0, 1.5, "x", [], {}, 10**30]), max_size=4),
    st.dictionaries(st.sampled_from(["layer", "layers", "step", "status", ""]), st.integers(), max_size=3),
    st.integers(1, 900).map(lambda depth: json.loads("[" * depth + "]" * depth)),
)
deep_texts = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b"(" * 100_000])


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document; of long lists the first three and the last."""
    found = [path]
    if isinstance(document, dict):
        for key in document:
            found += _places(document[key], (*path, key))
    elif isinstance(document, list):
        for index in sorted({*range(min(3, len(document))), *([len(document) - 1] if document else [])}):
            found += _places(document[index], (*path, index))
    return found


def _changed(document: Any, path: tuple[Any, ...], value: Any, *, remove: bool) -> Any:
    if not path:
        return value
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


@st.composite
def json_mutants(draw: st.DrawFn, document: Any) -> Any:
    """A document with one to three values replaced or taken out."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        path = draw(st.sampled_from(places))
        remove = bool(path) and draw(st.integers(0, 3)) == 0
        document = _changed(document, path, copy.deepcopy(draw(hostile_values)), remove=remove)
    return document


def json_bytes(document: Any) -> st.SearchStrategy[bytes]:
    """Mutants as JSON (with NaN and infinities as Python writes them), now and then damaged as bytes."""
    texts = json_mutants(document).map(lambda value: json.dumps(value).encode())
    whole = json.dumps(document).encode()
    return st.one_of(texts, texts, texts, byte_mutants(whole), deep_texts)


@st.composite
def byte_mutants(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes changed, put in, taken out, doubled or cut at a few places."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            changed[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == 1:
            changed[at:at] = draw(st.binary(max_size=8))
        elif kind == 2:
            del changed[at : at + draw(st.integers(1, 64))]
        elif kind == 3:
            changed[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"]))
        elif kind == 4:
            changed[at:at] = changed[: draw(st.integers(0, 200))]
        else:
            del changed[at:]
    return bytes(changed)


def npz_bytes(**arrays: Any) -> bytes:
    """An archive as numpy writes it."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy_bytes(array: Any) -> bytes:
    """An array as numpy writes it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """An array of a kind, shape and content that nobody asked for."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    kind = draw(st.sampled_from(["<f8", ">f4", "<i8", "u8", "?", "c16", "U3", "S2", "M8[s]", "<f2"]))
    raw = draw(st.binary(min_size=64, max_size=64))
    size = int(np.prod(shape))
    whole = np.frombuffer((raw * 64)[: np.dtype(kind).itemsize * max(size, 1)], "u1")
    if kind == "U3":
        return np.full(shape, "nan")
    return whole.view(kind)[:size].reshape(shape)
