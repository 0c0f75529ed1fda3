"""The statistics of a residual stream on a GPU, in Triton: one read in half precision, two in single.

Magnitudes are compared as integers: with the sign bit cleared, the bits of an IEEE number grow with it, and every NaN
lies above infinity. The median is chosen, not computed:

1. ``bracket`` draws a sample of a sequence and takes two of its order statistics, ``lo`` and ``hi``, around the
   middle one. They lie so far apart that the median of the whole falls between them but for one case in 10⁴.
2. ``count_entries`` reads everything once: how many entries are below ``lo``, up to ``lo`` and up to ``hi``, and a
   histogram of the few strictly between. Ties cost nothing: a value so common that it matters is itself ``lo`` or
   ``hi``. The same read gives the largest magnitude of every chunk, and the number of NaN and of infinite entries.
3. ``finish`` finds the median's bin. In half precision a bin is one value, and that is it; in single precision
   ``narrow`` makes that bin the bracket of a second ``count_entries``. Where the bracket missed, ``finish`` bisects the
   whole sequence: slow and as exact. Meanwhile a second program takes the k largest out of the chunks that hold them.

No copy of the activations is made, and nothing waits for the host.
"""

# What Triton compiles is not Python to a type checker.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

_SAMPLE = tl.constexpr(8192)
"""Entries drawn to bracket the median."""
_MARGIN = tl.constexpr(181)
"""Ranks of the sample between its median and either end of the bracket: four standard deviations, √8192 / 2 each."""
SLOTS = tl.constexpr(65536)
"""Counters of a sequence's histogram."""
_COPIES = tl.constexpr(1024)
"""Most counters of a bin: where bins are few, updates of one would wait for one another."""
_SCAN = tl.constexpr(4096)
"""Counters read at once."""
CHUNK = tl.constexpr(8192)
"""Entries of one program of ``count_entries``, whose largest magnitude is kept."""
_BLOCK = tl.constexpr(1024)
"""Words of 32 bits that such a program reads at once."""
THREADS = tl.constexpr(128)
"""Threads of such a program."""
_WIDE_BLOCK = tl.constexpr(16384)
"""Entries that a program reads at once when it reads a whole sequence."""

FIELDS = tl.constexpr(16)
"""What is kept of a sequence between the kernels, as int32; the names below are places in it."""
_LO = tl.constexpr(0)
_HI = tl.constexpr(1)
_BELOW = tl.constexpr(2)
_UP_TO_LO = tl.constexpr(3)
_UP_TO_HI = tl.constexpr(4)
_NAN = tl.constexpr(5)
_INF = tl.constexpr(6)
_RANK = tl.constexpr(7)
_STATE = tl.constexpr(8)

_OPEN = tl.constexpr(0)
_FOUND = tl.constexpr(1)
_MISSED = tl.constexpr(2)


@triton.jit
def _magnitude(x, place, inside):
    """Magnitudes as integers; what lies outside counts as NaN."""
    values = tl.load(x + place, mask=inside, other=0)
    if x.dtype.element_ty.primitive_bitwidth == 32:
        return tl.where(inside, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FFFFFFF)
    else:
        return tl.where(inside, values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7FFF)


@triton.jit
def _as_single(bits, x):
    """The bits, as float32, of the magnitude whose own bits these are."""
    if x.dtype.element_ty.primitive_bitwidth == 32:
        return bits
    elif x.dtype.element_ty == tl.bfloat16:
        return bits << 16
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _is_negative(values):
    if values.dtype.primitive_bitwidth == 32:
        return values.to(tl.int32, bitcast=True) < 0
    else:
        return values.to(tl.int16, bitcast=True) < 0


@triton.jit
def _layout(lo, hi):
    """How the values strictly between lo and hi are counted: log2 of the values a bin, counters a bin, and in all."""
    values = tl.maximum(hi - lo - 1, 0)
    shift = 0
    while ((values - 1) >> shift) >= SLOTS:
        shift += 1
    bins = tl.where(values > 0, ((values - 1) >> shift) + 1, 0)
    copies = 1
    while (copies < _COPIES) & (bins * copies * 2 <= SLOTS):
        copies *= 2
    return shift, copies, bins * copies


@triton.jit
def _clear(counts, used):
    for start in range(0, used, _SCAN):
        tl.store(counts + start + tl.arange(0, _SCAN), tl.zeros([_SCAN], tl.int32))


@triton.jit(do_not_specialize=["x", "work", "length"])
def bracket(x, work, length, INF: tl.constexpr, BITS: tl.constexpr):
    """Grid (sequences,): the ends of the bracket and the counters set to zero, by a sample of ``x [n, length]``."""
    sequence = tl.program_id(0).to(tl.int64)
    fields = work + sequence * FIELDS
    counts = work + tl.num_programs(0) * FIELDS + sequence * SLOTS
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
    for i in range(BITS):
        bit = 1 << (BITS - 1 - i)
        fewer = tl.sum((bits < lo + bit).to(tl.int32) + ((bits < hi + bit).to(tl.int32) << 16))
        lo = tl.where((fewer & 0xFFFF) <= rank - margin, lo + bit, lo)
        hi = tl.where((fewer >> 16) <= rank + margin, hi + bit, hi)
    lo = tl.where(rank < margin, 0, lo)
    hi = tl.where(rank + margin >= known, INF, hi)

    field = tl.arange(0, FIELDS)
    tl.store(fields + field, tl.where(field == _LO, lo, tl.where(field == _HI, hi, 0)))
    shift, copies, used = _layout(lo, hi)
    _clear(counts, used)


@triton.jit(do_not_specialize=["x", "work", "length"])
def count_entries(x, work, length, INF: tl.constexpr, FIRST: tl.constexpr):
    """Grid (sequences, chunks): counts around and in the bracket; the first time also what is the same for any."""
    # Neighbours work on different sequences, and so on different counters.
    sequence, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequences = tl.num_programs(0)
    fields = work + sequence * FIELDS
    counts = work + sequences * FIELDS + sequence * SLOTS
    largest = work + sequences * (FIELDS + SLOTS) + sequence * tl.num_programs(1)
    x += sequence * length
    if tl.load(fields + _STATE) == _OPEN:
        lo = tl.load(fields + _LO)
        hi = tl.load(fields + _HI)
        shift, copies, used = _layout(lo, hi)
        values = tl.maximum(hi - lo - 1, 0).to(tl.uint32)
        one = tl.minimum(length, 1)  # known only at run time, so that the update becomes one predicated instruction
        # Whole words, in half precision two entries each: what a thread reads at once is then the same in every step.
        half: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
        per_word: tl.constexpr = 2 if half else 1
        words = x.to(tl.pointer_type(tl.int32), bitcast=True) + chunk * (CHUNK // per_word)
        left = (length - chunk * CHUNK) // per_word
        lane = tl.arange(0, _BLOCK)
        copy = (lane + chunk * 32) & (copies - 1)
        tally = tl.zeros([THREADS], tl.int32)
        highest = tl.zeros([THREADS], tl.int32)
        for start in range(0, CHUNK // per_word, _BLOCK):
            if left >= CHUNK // per_word:
                word = tl.load(words + start + lane)
            else:
                word = tl.load(words + start + lane, mask=start + lane < left, other=-1)
            first = word & (0x7FFF if half else 0x7FFFFFFF)
            _histogram(counts, first - lo - 1, values, shift, copies, copy, one)
            marks = _marks(first, lo, hi)
            larger = first
            if half:
                second = (word >> 16) & 0x7FFF
                _histogram(counts, second - lo - 1, values, shift, copies, copy, one)
                marks += _marks(second, lo, hi)
                larger = tl.maximum(first, second)
            if FIRST:
                tally += tl.sum(tl.reshape(marks, [_BLOCK // THREADS, THREADS]), axis=0)
                highest = tl.maximum(highest, tl.max(tl.reshape(larger, [_BLOCK // THREADS, THREADS]), axis=0))
        if FIRST:
            tl.atomic_add(fields + _BELOW, tl.sum(tally & 1023), sem="relaxed")
            tl.atomic_add(fields + _UP_TO_LO, tl.sum((tally >> 10) & 1023), sem="relaxed")
            tl.atomic_add(fields + _UP_TO_HI, tl.sum(tally >> 20), sem="relaxed")
            top = tl.max(highest)
            if top >= INF:
                top = _count_not_finite(x, fields, chunk, length, INF)
            tl.store(largest + chunk, top)


@triton.jit
def _histogram(counts, above, values, shift, copies, copy, one):
    inside = above.to(tl.uint32) < values
    tl.atomic_add(counts + (above >> shift) * copies + copy, one, mask=inside, sem="relaxed")


@triton.jit
def _marks(bits, lo, hi):
    """Three counts in one word, ten bits each: a thread reads 64 entries."""
    return (bits < lo).to(tl.int32) + ((bits <= lo).to(tl.int32) << 10) + ((bits <= hi).to(tl.int32) << 20)


@triton.jit
def _count_not_finite(x, fields, chunk, length, INF: tl.constexpr):
    """Counts NaN and infinite entries of a chunk that has some; gives its largest magnitude, -1 where all are NaN."""
    lane = tl.arange(0, THREADS)
    nan = tl.zeros([THREADS], tl.int32)
    inf = tl.zeros([THREADS], tl.int32)
    highest = tl.full([THREADS], -1, tl.int32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, length), THREADS):
        inside = start + lane < length
        bits = _magnitude(x, start + lane, inside)
        nan += ((bits > INF) & inside).to(tl.int32)
        inf += (bits == INF).to(tl.int32)
        highest = tl.maximum(highest, tl.where(bits > INF, -1, bits))
    tl.atomic_add(fields + _NAN, tl.sum(nan), sem="relaxed")
    tl.atomic_add(fields + _INF, tl.sum(inf), sem="relaxed")
    return tl.max(highest)


@triton.jit
def _locate(fields, counts, length, FIRST: tl.constexpr):
    """Where the median lies after a count: state, its bits where found, else the bin's lo and hi and the rank in it."""
    lo = tl.load(fields + _LO)
    hi = tl.load(fields + _HI)
    rank = tl.load(fields + _RANK)  # among those strictly between lo and hi
    below = 0
    above = 0
    if FIRST:
        up_to_lo = tl.load(fields + _UP_TO_LO)
        rank = (length - tl.load(fields + _NAN) - 1) // 2 - up_to_lo
        below = tl.load(fields + _BELOW) - up_to_lo
        above = tl.load(fields + _UP_TO_HI) - up_to_lo
    shift, copies, used = _layout(lo, hi)
    index = tl.arange(0, _SCAN)
    passed = 0
    before = 0
    bin = 0
    for start in range(0, used, _SCAN):
        count = tl.load(counts + start + index, mask=start + index < used, other=0)
        total = tl.sum(count)
        if (rank >= passed) & (rank < passed + total):
            bin = (start + tl.sum((tl.cumsum(count) + passed <= rank).to(tl.int32))) // copies
            before = passed + tl.sum(tl.where(start + index < bin * copies, count, 0))
        passed += total
    is_lo = (rank >= below) & (rank < 0)
    is_hi = (rank >= passed) & (rank < above)
    between = (rank >= 0) & (rank < passed)
    state = tl.where(between & (shift > 0), _OPEN, tl.where(between | is_lo | is_hi, _FOUND, _MISSED))
    median = tl.where(is_lo, lo, tl.where(is_hi, hi, lo + 1 + bin))
    lower = lo + (bin << shift)
    return state, median, lower, tl.minimum(hi, lower + (1 << shift) + 1), rank - before


@triton.jit(do_not_specialize=["work", "length"])
def narrow(work, length):
    """Grid (sequences,): the median's bin becomes the next bracket; a median already found, its lower end."""
    sequence = tl.program_id(0).to(tl.int64)
    fields = work + sequence * FIELDS
    counts = work + tl.num_programs(0) * FIELDS + sequence * SLOTS
    state, median, lo, hi, rank = _locate(fields, counts, length, True)
    tl.debug_barrier()  # every thread has read before one writes
    tl.store(fields + _STATE, state)
    tl.store(fields + _LO, tl.where(state == _FOUND, median, lo))
    tl.store(fields + _HI, hi)
    tl.store(fields + _RANK, rank)
    if state == _OPEN:
        shift, copies, used = _layout(lo, hi)
        _clear(counts, used)


@triton.jit
def _number_at_most(x, length, bits):
    number = 0
    for start in range(0, length, _WIDE_BLOCK):
        place = start + tl.arange(0, _WIDE_BLOCK)
        number += tl.sum((_magnitude(x, place, place < length) <= bits).to(tl.int32))
    return number


@triton.jit
def _searched(x, fields, length, INF: tl.constexpr):
    """The median's bits by bisection, reading the whole sequence each time."""
    rank = (length - tl.load(fields + _NAN) - 1) // 2
    low = 0
    high = INF
    while low < high:
        middle = low + (high - low) // 2
        enough = _number_at_most(x, length, middle) > rank
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    return low


@triton.jit
def _write_median(x, fields, counts, out, length, k, INF: tl.constexpr, FIRST: tl.constexpr):
    nan = tl.load(fields + _NAN)
    state = tl.load(fields + _STATE)
    median = tl.load(fields + _LO)
    if state == _OPEN:
        state, median, lo, hi, rank = _locate(fields, counts, length, FIRST)
    if (state != _FOUND) & (nan < length):
        median = _searched(x, fields, length, INF)
    tl.store(out + 2 * k, tl.where(nan == length, 0x7FC00000, _as_single(median, x)).to(tl.int64))
    tl.store(out + 2 * k + 1, nan.to(tl.int64))
    tl.store(out + 2 * k + 2, tl.load(fields + _INF).to(tl.int64))


@triton.jit
def _write_largest(x, largest, out, length, k, chunks, INF: tl.constexpr, CHUNKS: tl.constexpr):
    chunk_index = tl.arange(0, CHUNKS)
    lane = tl.arange(0, CHUNK)
    highest = tl.load(largest + chunk_index, mask=chunk_index < chunks, other=-1)
    last_bits = INF + 1
    last_place = -1
    for rank in range(k):
        bits = tl.max(highest)
        chunk = tl.min(tl.where(highest == bits, chunk_index, CHUNKS - 1))
        place = chunk * CHUNK + lane
        own = _magnitude(x, place, place < length)
        own = tl.where(own > INF, -1, own)
        # The order is total (larger first, then lower place), so what came before the last one taken is taken.
        left = (own < last_bits) | ((own == last_bits) & (place > last_place))
        taken = tl.min(tl.where(left & (own == bits), place, 0x7FFFFFFF))
        left = left & ((own < bits) | (place > taken))
        highest = tl.where(chunk_index == chunk, tl.max(tl.where(left, own, -1)), highest)
        there = bits >= 0
        sign = tl.where(_is_negative(tl.load(x + taken, mask=there, other=0)), -2147483648, 0)
        tl.store(out + rank, tl.where(there, _as_single(bits, x) | sign, 0x7FC00000).to(tl.int64))
        tl.store(out + k + rank, tl.where(there, taken, -1).to(tl.int64))
        last_bits = bits
        last_place = taken


@triton.jit(do_not_specialize=["x", "work", "out", "length", "k", "chunks"])
def finish(
    x,
    work,
    out,
    length,
    k,
    chunks,
    INF: tl.constexpr,
    FIRST: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Grid (2, sequences): writes ``out [n, 2k + 3]``: one program of a sequence the median, the other the top."""
    sequence = tl.program_id(1).to(tl.int64)
    sequences = tl.num_programs(1)
    x += sequence * length
    out += sequence * (2 * k + 3)
    if tl.program_id(0) == 0:
        fields = work + sequence * FIELDS
        counts = work + sequences * FIELDS + sequence * SLOTS
        _write_median(x, fields, counts, out, length, k, INF, FIRST)
    else:
        largest = work + sequences * (FIELDS + SLOTS) + sequence * chunks
        _write_largest(x, largest, out, length, k, chunks, INF, CHUNKS)
