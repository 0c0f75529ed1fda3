"""Launching the kernels: which tensors they can read, and in which order they run."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ma_monitor.measure import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read."""
_SEQUENCES = 12
"""Sequences of one launch: their counters take 3.1 MB."""
_ROOM = kernels.FIELDS.value + kernels.SLOTS.value
_COUNT_WARPS = kernels.THREADS.value // 32

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def supports(hidden: Tensor) -> bool:
    """Whether these kernels can read ``hidden [n, S, d]``: its type, its layout and its size."""
    length = hidden[0].numel() if len(hidden) else 0
    return (
        hidden.dtype in _INFINITY
        and hidden.is_contiguous()
        and hidden.data_ptr() % 4 == 0
        and length % 2 == 0  # half precision is read two entries at a time
        and 0 < length <= 65535 * kernels.CHUNK.value  # programs along an axis
    )


def packed_statistics(hidden: Tensor, k: int) -> Tensor:
    """The statistics of ``hidden [n, S, d]`` as ``statistics.Statistics`` packs them, ``[n, 2k + 3]`` int64."""
    n = len(hidden)
    packed = torch.empty(n, 2 * k + 3, dtype=torch.int64, device=hidden.device)
    with torch.cuda.device_of(hidden):
        for start in range(0, n, _SEQUENCES):
            whole = n <= _SEQUENCES
            some = hidden if whole else hidden[start : start + _SEQUENCES]
            _launch_all(some, packed if whole else packed[start : start + _SEQUENCES], k)
    return packed


def _launch_all(hidden: Tensor, out: Tensor, k: int) -> None:
    n, tokens, width = hidden.shape
    length = tokens * width
    single = hidden.dtype == torch.float32
    inf, bits, chunks, power = _plan(length, hidden.dtype)
    work = torch.empty(n * (_ROOM + chunks), dtype=torch.int32, device=hidden.device)
    _launch(kernels.bracket, (n, 1, 1), 16, (hidden, work, length), (inf, bits))
    _launch(kernels.count_entries, (n, chunks, 1), _COUNT_WARPS, (hidden, work, length), (inf, True))
    if single:
        _launch(kernels.narrow, (n, 1, 1), 16, (work, length), ())
        _launch(kernels.count_entries, (n, chunks, 1), _COUNT_WARPS, (hidden, work, length), (inf, False))
    _launch(kernels.finish, (2, n, 1), 16, (hidden, work, out, length, k, chunks), (inf, not single, power))


@functools.lru_cache
def _plan(length: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Infinity's bits, bits of a magnitude, chunks of a sequence, and those as a power of two."""
    chunks = triton.cdiv(length, kernels.CHUNK.value)
    return _INFINITY[dtype], 31 if dtype == torch.float32 else 15, chunks, triton.next_power_of_2(chunks)


_COMPILED: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, grid: tuple[int, int, int], warps: int, args: tuple[Any, ...], constants: Any) -> None:
    """Launches a kernel, the compiled one directly once there is one.

    Triton's own way looks at every argument and at every global at each launch, which takes the host longer than many a
    block's forward. Nothing here is specialised on an argument's value, so the constants and the type decide.
    """
    key = (kernel.__name__, args[0].dtype, args[0].device, constants)
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*args, *constants, num_warps=warps, enable_fp_fusion=False)
    else:
        compiled[grid](*args, *constants)
