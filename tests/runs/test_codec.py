from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ma_monitor.runs.codec import (
    MEASUREMENTS,
    PHENOMENA,
    PLAN,
    REWIND,
    decode_measurements,
    decode_phenomena,
    decode_plan,
    encode_measurements,
    encode_phenomena,
    encode_plan,
    encode_rewind,
    kind_and_step,
    record_bytes,
)
from ma_monitor.runs.records import Measurements, Plan
from tests.runs.makers import any_measurements, bits, make_measurements, make_meta, make_plan, plan_bits

SHAPE = (3, 3, 3)


@given(any_measurements())
def test_every_bit_of_a_measurement_comes_back(m: Measurements) -> None:
    payload = encode_measurements(m)
    assert kind_and_step(payload) == (MEASUREMENTS, m.step)
    besides = {}
    if m.phenomena:
        more = encode_phenomena(m)
        assert kind_and_step(more) == (PHENOMENA, m.step)
        besides = decode_phenomena(more, len(m.top))
    assert bits(replace(decode_measurements(payload, m.top.shape), phenomena=besides)) == bits(m)


@pytest.mark.parametrize(
    ("text", "numbers", "message"),
    [
        ('{"a": [3]}', 2, "2 numbers for the shapes"),
        ('{"a": [2]}', 2, "arrays of other than 3 layers"),
        ('{"a": [3, 0]}', 0, "arrays of other than 3 layers"),
        ('{"a": [3, true]}', 3, "arrays of other than 3 layers"),
        ('{"a": 3}', 3, "arrays of other than 3 layers"),
        ("[[3]]", 3, "arrays of other than 3 layers"),
        ("{}", 0, "0 numbers for the shapes"),
        ("{", 3, "Expecting"),
    ],
)
def test_phenomena_of_other_content_are_refused(text: str, numbers: int, message: str) -> None:
    packed = zlib.compress(b"\0" * 8 * numbers)
    payload = struct.pack("<BqII", PHENOMENA, 1, len(text), numbers) + text.encode() + packed
    with pytest.raises(ValueError, match=message):
        decode_phenomena(payload, 3)
    with pytest.raises(ValueError, match="too short"):
        decode_phenomena(payload[:10], 3)


@given(
    step=st.integers(0, 2**53),
    total=st.none() | st.integers(0, 2**53),
    lr=st.none() | hnp.arrays(np.float64, st.integers(1, 9), elements=st.floats(0, allow_infinity=False)),
    batch=st.none() | st.integers(1, 2**40),
    words=st.text(),
    held=st.booleans(),
)
def test_every_bit_of_a_plan_comes_back(
    step: int, total: int | None, lr: np.ndarray | None, batch: int | None, words: str, held: bool
) -> None:
    plan = Plan(step, total, lr, batch, words, held)
    payload = encode_plan(plan)
    assert kind_and_step(payload) == (PLAN, step)
    assert plan_bits(decode_plan(payload)) == plan_bits(plan)


def test_a_rewind_says_its_step() -> None:
    assert kind_and_step(encode_rewind(7)) == (REWIND, 7)


def test_other_float_types_become_float64_without_loss() -> None:
    meta = make_meta()
    m = make_measurements(1, meta)
    narrow = Measurements(1, m.top.astype(np.float32), m.position, m.token, m.channel, m.median, m.nan, m.inf)
    back = decode_measurements(encode_measurements(narrow), SHAPE)
    np.testing.assert_array_equal(back.top, m.top.astype(np.float32))
    assert back.top.dtype == np.float64


def test_a_real_sized_record_is_compressed() -> None:
    meta = make_meta(layers=35, sequences=10)
    m = make_measurements(5, meta)
    assert len(encode_measurements(m)) < record_bytes((36, 10, 3)) == 36 * 10 * (3 * (8 + 4 + 4 + 4) + 8 + 8 + 8)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "too short"),
        (b"\1\0\0", "too short"),
        (struct.pack("<Bq", 9, 0), "kind 9"),
        (encode_rewind(-1), "step -1"),
    ],
)
def test_a_payload_without_kind_or_step_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind_and_step(payload)


def test_measurements_of_another_shape_are_refused() -> None:
    payload = encode_measurements(make_measurements(1, make_meta()))
    with pytest.raises(ValueError, match=r"shape \(3, 3, 3\) instead of \(4, 3, 3\)"):
        decode_measurements(payload, (4, 3, 3))
    with pytest.raises(ValueError, match="shape None instead of"):
        decode_measurements(payload[:12], SHAPE)


@pytest.mark.parametrize("content", [b"", b"not zlib", zlib.compress(b"short"), zlib.compress(bytes(10**7))])
def test_measurements_with_other_content_are_refused(content: bytes) -> None:
    head = encode_measurements(make_measurements(1, make_meta()))[:21]
    with pytest.raises(ValueError, match="content of another size|incorrect header check"):
        decode_measurements(head + content, SHAPE)


def test_a_record_that_asks_for_too_much_memory_is_refused() -> None:
    head = struct.pack("<BqIII", MEASUREMENTS, 1, 10**4, 10**4, 10**4)
    with pytest.raises(ValueError, match=r"\d{12,} bytes in one record"):
        decode_measurements(head + zlib.compress(b""), (10**4, 10**4, 10**4))


def test_every_truncated_plan_is_refused() -> None:
    payload = encode_plan(make_plan(total=5))
    for size in range(9, len(payload)):
        with pytest.raises(ValueError, match=r"\w"):
            decode_plan(payload[:size])
