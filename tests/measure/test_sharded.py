"""Statistics of a stream that is spread over a mesh, by any cut: those of the whole. Threads stand for processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from ma_monitor.errors import ModelError
from ma_monitor.measure import sharded
from ma_monitor.measure.statistics import activation_statistics

VALUES = [0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-140, -(2.0**-140), 3e38, torch.inf, -torch.inf, torch.nan]
"""Few enough that ties are the rule."""


class Held:
    """What ``statistics_of`` uses of a `DTensor`, as the process at one coordinate of a mesh has it."""

    def __init__(self, whole: Tensor, sizes: tuple[int, ...], placements: tuple[Any, ...], at: tuple[int, ...]) -> None:
        self.shape, self.placements = whole.shape, placements
        self.sizes, self.at = sizes, at
        self.device_mesh = self
        for size, placement, index in zip(sizes, placements, at, strict=True):
            if isinstance(placement, Shard):
                chunks = torch.chunk(whole, size, placement.dim)
                whole = chunks[index] if index < len(chunks) else whole.narrow(placement.dim, 0, 0)
        self.local = whole

    def detach(self) -> Held:
        return self

    def to_local(self) -> Tensor:
        return self.local

    def get_coordinate(self) -> list[int]:
        return list(self.at)

    def size(self, axis: int) -> int:
        return self.sizes[axis]

    def get_group(self, axis: int) -> tuple[int, tuple[int, ...]]:
        """The axis, and where on the others this process is: the name of its group."""
        return axis, self.at[:axis] + self.at[axis + 1 :]


class Meeting:
    """``all_reduce`` among threads: each group's members wait for each other, and all leave with the sum."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.lock = threading.Lock()
        self.groups: dict[Any, tuple[threading.Barrier, list[Tensor]]] = {}

    def all_reduce(self, tensor: Tensor, group: Any) -> None:
        with self.lock:
            barrier, brought = self.groups.setdefault(group, (threading.Barrier(self.sizes[group[0]], timeout=20), []))
            brought.append(tensor.clone())
        barrier.wait()
        total = torch.stack(brought).sum(0)
        if barrier.wait() == 0:
            brought.clear()
        barrier.wait()
        tensor.copy_(total)


def by_all(
    whole: Tensor, sizes: tuple[int, ...], placements: tuple[Any, ...], k: int, work: Callable[..., Any] | None = None
) -> list[Any]:
    """What each process of the mesh gets."""
    places = [tuple(int(i) for i in place) for place in torch.ones(sizes).nonzero()]
    held = [Held(whole, sizes, placements, place) for place in places]
    with (
        mock.patch.object(dist, "all_reduce", Meeting(sizes).all_reduce),
        ThreadPoolExecutor(len(held)) as threads,
    ):
        return list(threads.map(lambda one: (work or sharded.statistics_of)(one, k), held))


@given(st.data())
@settings(max_examples=60)
def test_any_cut_gives_the_statistics_of_the_whole(data: st.DataObject) -> None:
    n, tokens, width = (data.draw(st.integers(1, most)) for most in (3, 7, 5))
    entries = st.sampled_from(VALUES) | st.floats(width=32)
    flat = data.draw(st.lists(entries, min_size=n * tokens * width, max_size=n * tokens * width))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    whole = torch.tensor(flat).reshape(n, tokens, width).to(dtype)
    sizes = data.draw(st.sampled_from([(2,), (3,), (2, 2), (3, 2)]))
    kinds = st.sampled_from([Shard(0), Shard(1), Shard(2), Shard(-1), Replicate()])
    placements = tuple(data.draw(kinds) for _ in sizes)
    k = data.draw(st.integers(1, 6))
    expected = activation_statistics(whole, k)
    for got in by_all(whole, sizes, placements, k):
        for name in ("top", "index", "median", "nan", "inf"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


def test_where_one_process_fails_the_others_are_not_left_waiting() -> None:
    """It takes part with zeros, and raises when all is over."""
    whole = torch.ones(1, 4, 2)

    def fails(local: Tensor, k: int) -> Any:
        if threading.current_thread().name == "fails":
            raise MemoryError("none left")
        return activation_statistics(local, k)

    def work(one: Any, k: int) -> Any:
        threading.current_thread().name = "fails" if one.at == (1,) else "works"
        try:
            return sharded.statistics_of(one, k).top.tolist()
        except MemoryError as error:
            return str(error)

    with mock.patch.object(sharded, "activation_statistics", fails):
        assert by_all(whole, (2,), (Shard(1),), 1, work) == [[[1.0]], "none left"]


@pytest.mark.parametrize("shape", [(4, 2), (1, 2, 4, 2)])
def test_a_spread_stream_must_have_three_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"must be a \[sequence, token, channel\] tensor that is replicated"):
        by_all(torch.ones(shape), (2,), (Shard(0),), 1)


def test_parts_that_are_not_chunks_are_refused() -> None:
    def work(one: Any, k: int) -> Any:
        one.local = one.local[:, :1]
        return sharded.statistics_of(one, k)

    with pytest.raises(ModelError, match=r"equal chunks, as torch.chunk does, so \(1, 2, 2\) here, got \(1, 1, 2\)"):
        by_all(torch.ones(1, 4, 2), (2,), (Shard(1),), 1, work)
