"""The statistics of a residual stream on a GPU, in Triton: one read in half precision, two in single.

Magnitudes are compared as integers: with the sign bit cleared, the bits of an IEEE number grow with it, and every NaN
lies above infinity. The median is chosen, not computed:

1. ``_bracket`` draws a sample of a sequence and takes two of its order statistics, ``lo`` and ``hi``, around the
   middle one. They lie so far apart that the median of the whole falls between them but for one case in 10⁴.
2. ``_count`` reads everything once: how many entries are below ``lo``, at ``lo``, at ``hi``, and, for the few strictly
   between, a histogram. Ties cost nothing: a value so common that it matters is itself ``lo`` or ``hi``. The same read
   gives the largest magnitude of every chunk, and the number of NaN and of infinite entries.
3. ``_finish`` finds the median's bin. In half precision a bin is one value, and that is it; in single precision
   ``_narrow`` makes that bin the bracket of a second ``_count``. Where a bracket missed, ``_finish`` bisects the whole
   sequence: slow and as exact. Meanwhile a second program takes the k largest out of the chunks that hold them.

No copy of the activations is made, and nothing waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SAMPLE = tl.constexpr(16384)
"""Entries drawn to bracket the median."""
_MARGIN = tl.constexpr(256)
"""Ranks of the sample between its median and either end of the bracket: four standard deviations, √16384 / 2 each."""
_SLOTS = tl.constexpr(65536)
"""Counters of a sequence's histogram; bins fewer than that get several each, so that few updates meet."""
_SCAN = tl.constexpr(4096)
"""Counters read at once; the most that one bin gets."""
_BLOCK = tl.constexpr(4096)
"""Entries read at once."""
_CHUNK = tl.constexpr(16384)
"""Entries of one program, whose largest magnitude is kept."""
_UNRESOLVED = tl.constexpr(12)
"""Last bits of single precision that the bracket leaves open: 2⁻¹¹ relative, finer than the bracket is wide."""

_FIELDS = tl.constexpr(16)
"""What is kept of a sequence between the kernels, as int32; the names below are places in it."""
_LO = tl.constexpr(0)
_HI = tl.constexpr(1)
_BELOW = tl.constexpr(2)
_AT_LO = tl.constexpr(3)
_AT_HI = tl.constexpr(4)
_NAN = tl.constexpr(5)
_INF = tl.constexpr(6)
_RANK = tl.constexpr(7)
_STATE = tl.constexpr(8)
_MEDIAN = tl.constexpr(9)

_OPEN = tl.constexpr(0)
_FOUND = tl.constexpr(1)
_MISSED = tl.constexpr(2)

_SEQUENCES = 12
"""Sequences of one launch: their counters take 3.1 MB."""


@triton.jit
def _own_bits(values):  # type: ignore[no-untyped-def]
    if values.dtype.primitive_bitwidth == 32:
        return values.to(tl.int32, bitcast=True)
    return values.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _magnitude(x, place, inside):  # type: ignore[no-untyped-def]
    """Magnitudes as integers; what lies outside counts as NaN."""
    bits = _own_bits(tl.load(x + place, mask=inside, other=0))
    every: tl.constexpr = 0x7FFFFFFF if x.dtype.element_ty.primitive_bitwidth == 32 else 0x7FFF
    return tl.where(inside, bits & every, every)


@triton.jit
def _as_single(bits, x):  # type: ignore[no-untyped-def]
    """The bits, as float32, of the number whose own bits these are."""
    if x.dtype.element_ty.primitive_bitwidth == 32:
        return bits
    if x.dtype.element_ty == tl.bfloat16:
        return bits << 16
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _layout(lo, hi):  # type: ignore[no-untyped-def]
    """How the values strictly between lo and hi are counted: log2 of values a bin and of counters a bin, counters."""
    values = tl.maximum(hi - lo - 1, 0)
    shift = 0
    while ((values - 1) >> shift) >= _SLOTS:
        shift += 1
    bins = tl.where(values > 0, ((values - 1) >> shift) + 1, 0)
    copies = 0
    while (copies < 8) & ((bins << (copies + 1)) <= _SLOTS):
        copies += 1
    return shift, copies, bins << copies


@triton.jit
def _clear(counts, used):  # type: ignore[no-untyped-def]
    for start in range(0, used, _SCAN):
        tl.store(counts + start + tl.arange(0, _SCAN), tl.zeros([_SCAN], tl.int32))


@triton.jit
def _bracket(x, work, length, INF: tl.constexpr, BITS: tl.constexpr, OPEN_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    sequence = tl.program_id(0).to(tl.int64)
    fields = work + sequence * _FIELDS
    counts = work + tl.num_programs(0) * _FIELDS + sequence * _SLOTS
    x += sequence * length

    draw = tl.arange(0, _SAMPLE)
    whole = length <= _SAMPLE
    # One entry at a random place of each of as many stretches: an even step would fall on few channels.
    noise = tl.umulhi(draw.to(tl.uint32) * 2654435761, (length // _SAMPLE).to(tl.uint32)).to(tl.int64)
    place = tl.where(whole, draw.to(tl.int64), draw.to(tl.int64) * length // _SAMPLE + noise)
    bits = _magnitude(x, place, place < length)
    known = tl.sum((bits <= INF).to(tl.int32))
    rank = (known - 1) // 2
    margin = tl.where(whole, 0, _MARGIN)

    lo = 0
    hi = 0
    for i in range(BITS - OPEN_BITS):
        bit = 1 << (BITS - 1 - i)
        fewer = tl.sum((bits < lo + bit).to(tl.int32) + ((bits < hi + bit).to(tl.int32) << 16))
        lo = tl.where((fewer & 0xFFFF) <= rank - margin, lo + bit, lo)
        hi = tl.where((fewer >> 16) <= rank + margin, hi + bit, hi)
    lo = tl.where(rank < margin, 0, lo)
    hi = tl.where(rank + margin >= known, INF, tl.minimum(hi + (1 << OPEN_BITS) - 1, INF))

    field = tl.arange(0, _FIELDS)
    tl.store(fields + field, tl.where(field == _LO, lo, tl.where(field == _HI, hi, 0)))
    shift, copies, used = _layout(lo, hi)
    _clear(counts, used)


@triton.jit
def _count(x, work, length, INF: tl.constexpr, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    chunk, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequences = tl.num_programs(1)
    fields = work + sequence * _FIELDS
    counts = work + sequences * _FIELDS + sequence * _SLOTS
    largest = work + sequences * (_FIELDS + _SLOTS) + sequence * tl.num_programs(0)
    x += sequence * length
    if FIRST or tl.load(fields + _STATE) == _OPEN:
        lo = tl.load(fields + _LO)
        hi = tl.load(fields + _HI)
        shift, copies, used = _layout(lo, hi)
        lane = tl.arange(0, _BLOCK)
        copy = (lane + chunk * 37) & ((1 << copies) - 1)
        tally = tl.zeros([_BLOCK // 8], tl.int32)
        top = tl.zeros([_BLOCK // 8], tl.int32)
        for start in range(0, _CHUNK, _BLOCK):
            place = chunk * _CHUNK + start + lane
            bits = _magnitude(x, place, place < length)
            slot = (((bits - lo - 1) >> shift) << copies) + copy
            tl.atomic_add(counts + slot, 1, mask=(bits > lo) & (bits < hi), sem="relaxed")
            if FIRST:
                # Three counts in one word, ten bits each: at most 8 × 4 are added up before they are taken apart.
                marks = (bits < lo).to(tl.int32) + ((bits == lo).to(tl.int32) << 10) + ((bits == hi).to(tl.int32) << 20)
                tally += tl.sum(tl.reshape(marks, [_BLOCK // 8, 8]), axis=1)
                top = tl.maximum(top, tl.max(tl.reshape(bits, [_BLOCK // 8, 8]), axis=1))
        if FIRST:
            tl.atomic_add(fields + _BELOW, tl.sum(tally & 1023), sem="relaxed")
            tl.atomic_add(fields + _AT_LO, tl.sum((tally >> 10) & 1023), sem="relaxed")
            tl.atomic_add(fields + _AT_HI, tl.sum(tally >> 20), sem="relaxed")
            highest = tl.max(top)
            if highest >= INF:
                highest = _count_not_finite(x, fields, chunk, length, INF)
            tl.store(largest + chunk, highest)


@triton.jit
def _count_not_finite(x, fields, chunk, length, INF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Counts NaN and infinite entries of a chunk that has some; gives its largest magnitude, -1 where all are NaN."""
    highest = -1
    for start in range(0, _CHUNK, _BLOCK):
        place = chunk * _CHUNK + start + tl.arange(0, _BLOCK)
        bits = _magnitude(x, place, place < length)
        tl.atomic_add(fields + _NAN, tl.sum(((bits > INF) & (place < length)).to(tl.int32)), sem="relaxed")
        tl.atomic_add(fields + _INF, tl.sum((bits == INF).to(tl.int32)), sem="relaxed")
        highest = tl.maximum(highest, tl.max(tl.where(bits > INF, -1, bits)))
    return highest


@triton.jit
def _locate(fields, counts, length, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the median lies after a count: state, its bits where found, else the bin's lo and hi and the rank in it."""
    lo = tl.load(fields + _LO)
    hi = tl.load(fields + _HI)
    rank = tl.load(fields + _RANK)
    at_hi = 0
    at_lo = 0
    known = 1
    if FIRST:
        known = length - tl.load(fields + _NAN)
        at_lo = tl.load(fields + _AT_LO)
        at_hi = tl.load(fields + _AT_HI)
        rank = (known - 1) // 2 - tl.load(fields + _BELOW) - at_lo  # among those strictly between lo and hi
    shift, copies, used = _layout(lo, hi)
    index = tl.arange(0, _SCAN)
    passed = 0
    before = 0
    bin = 0
    for start in range(0, used, _SCAN):
        count = tl.load(counts + start + index, mask=start + index < used, other=0)
        total = tl.sum(count)
        if (rank >= passed) & (rank < passed + total):
            bin = (start + tl.sum((tl.cumsum(count) + passed <= rank).to(tl.int32))) >> copies
            before = passed + tl.sum(tl.where(start + index < (bin << copies), count, 0))
        passed += total
    is_lo = (rank < 0) & (rank >= -at_lo)
    is_hi = (rank >= passed) & (rank < passed + at_hi)
    between = (rank >= 0) & (rank < passed)
    found = is_lo | is_hi | (between & (shift == 0)) | (known == 0)
    median = tl.where(is_lo, lo, tl.where(is_hi, hi, lo + 1 + bin))
    state = tl.where(found, _FOUND, tl.where(between, _OPEN, _MISSED))
    lower = lo + (bin << shift)
    return state, tl.where(known == 0, -1, median), lower, tl.minimum(hi, lower + (1 << shift) + 1), rank - before


@triton.jit
def _narrow(work, length):  # type: ignore[no-untyped-def]
    """Makes the median's bin the bracket of the next count."""
    sequence = tl.program_id(0).to(tl.int64)
    fields = work + sequence * _FIELDS
    counts = work + tl.num_programs(0) * _FIELDS + sequence * _SLOTS
    state, median, lo, hi, rank = _locate(fields, counts, length, True)
    tl.debug_barrier()  # every thread has read before one writes
    tl.store(fields + _STATE, state)
    tl.store(fields + _MEDIAN, median)
    tl.store(fields + _LO, lo)
    tl.store(fields + _HI, hi)
    tl.store(fields + _RANK, rank)
    shift, copies, used = _layout(lo, hi)
    _clear(counts, used)


@triton.jit
def _bisected(x, fields, length, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The median's bits by counting the whole sequence once a bit."""
    rank = (length - tl.load(fields + _NAN) - 1) // 2
    median = 0
    for i in range(BITS):
        bit = 1 << (BITS - 1 - i)
        fewer = 0
        for start in range(0, length, _BLOCK):
            place = start + tl.arange(0, _BLOCK)
            fewer += tl.sum((_magnitude(x, place, place < length) < median + bit).to(tl.int32))
        median = tl.where(fewer <= rank, median + bit, median)
    return median


@triton.jit
def _write_median(x, fields, counts, out, length, k, BITS: tl.constexpr, TWO_COUNTS: tl.constexpr):  # type: ignore[no-untyped-def]
    state = tl.load(fields + _STATE)
    median = tl.load(fields + _MEDIAN)
    if state == _OPEN:
        state, median, lo, hi, rank = _locate(fields, counts, length, not TWO_COUNTS)
    if state != _FOUND:
        median = _bisected(x, fields, length, BITS)
    median = tl.where(median < 0, 0x7FC00000, _as_single(median, x))
    tl.store(out + 2 * k, median.to(tl.int64))
    tl.store(out + 2 * k + 1, tl.load(fields + _NAN).to(tl.int64))
    tl.store(out + 2 * k + 2, tl.load(fields + _INF).to(tl.int64))


@triton.jit
def _write_largest(x, largest, out, length, k, chunks, INF: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    chunk_index = tl.arange(0, CHUNKS)
    lane = tl.arange(0, _CHUNK)
    highest = tl.load(largest + chunk_index, mask=chunk_index < chunks, other=-1)
    last_bits = INF + 1
    last_place = -1
    for rank in range(k):
        bits = tl.max(highest)
        chunk = tl.min(tl.where(highest == bits, chunk_index, CHUNKS - 1))
        place = chunk * _CHUNK + lane
        own = _magnitude(x, place, place < length)
        own = tl.where(own > INF, -1, own)
        # The order is total (larger first, then lower place), so what came before the last one taken is taken.
        left = (own < last_bits) | ((own == last_bits) & (place > last_place))
        taken = tl.min(tl.where(left & (own == bits), place, 0x7FFFFFFF))
        left = left & ((own < bits) | (place > taken))
        highest = tl.where(chunk_index == chunk, tl.max(tl.where(left, own, -1)), highest)
        there = bits >= 0
        value = _own_bits(tl.load(x + taken, mask=there, other=0))
        tl.store(out + rank, tl.where(there, _as_single(value, x), 0x7FC00000).to(tl.int64))
        tl.store(out + k + rank, tl.where(there, taken, -1).to(tl.int64))
        last_bits = bits
        last_place = taken


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    x,
    work,
    out,
    length,
    k,
    chunks,
    INF: tl.constexpr,
    BITS: tl.constexpr,
    TWO_COUNTS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    sequences = tl.num_programs(1)
    x += sequence * length
    out += sequence * (2 * k + 3)
    if tl.program_id(0) == 0:
        fields = work + sequence * _FIELDS
        counts = work + sequences * _FIELDS + sequence * _SLOTS
        _write_median(x, fields, counts, out, length, k, BITS, TWO_COUNTS)
    else:
        largest = work + sequences * (_FIELDS + _SLOTS) + sequence * chunks
        _write_largest(x, largest, out, length, k, chunks, INF, CHUNKS)


_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def supports(hidden: Tensor) -> bool:
    """Whether these kernels can read ``hidden [n, S, d]``: its type, its layout, and its size (int32 places)."""
    return hidden.dtype in _INFINITY and hidden.is_contiguous() and 0 < hidden[0].numel() < 2**31 - _CHUNK.value


def packed_statistics(hidden: Tensor, k: int) -> Tensor:
    """The statistics of ``hidden [n, S, d]`` as ``statistics.Statistics`` packs them, ``[n, 2k + 3]`` int64."""
    packed = torch.empty(len(hidden), 2 * k + 3, dtype=torch.int64, device=hidden.device)
    for start in range(0, len(hidden), _SEQUENCES):
        _launch(hidden[start : start + _SEQUENCES], packed[start : start + _SEQUENCES], k)
    return packed


def _launch(hidden: Tensor, out: Tensor, k: int) -> None:
    n, length = len(hidden), hidden[0].numel()
    chunks = triton.cdiv(length, _CHUNK.value)
    single = hidden.dtype == torch.float32
    inf, bits = _INFINITY[hidden.dtype], 31 if single else 15
    work = torch.empty(n * (_FIELDS.value + _SLOTS.value + chunks), dtype=torch.int32, device=hidden.device)
    launch: Any = _bracket
    launch[(n,)](hidden, work, length, inf, bits, _UNRESOLVED.value if single else 0, num_warps=16)
    launch = _count
    launch[(chunks, n)](hidden, work, length, inf, True, num_warps=4)
    if single:
        launch = _narrow
        launch[(n,)](work, length, num_warps=16)
        launch = _count
        launch[(chunks, n)](hidden, work, length, inf, False, num_warps=4)
    launch = _finish
    power = triton.next_power_of_2(chunks)
    launch[(2, n)](hidden, work, out, length, k, chunks, inf, bits, single, power, num_warps=16)
