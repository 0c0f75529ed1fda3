"""The statistics against a plain sort, under the design's rules for NaN, infinities and ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.errors import ModelError
from ma_monitor.measure.statistics import Backend, activation_statistics, pack
from tests.measure.activations import SEQUENCES, misleading

K = 3
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, float("inf"), float("-inf"), float("nan"), 1e-7, 65504.0]


def reference(hidden: torch.Tensor, k: int) -> tuple[list[list[float]], list[list[int]], list[float]]:
    """By sorting: signed top-k and index by (largest magnitude, lowest index); lower median of magnitudes."""
    tops, indices, medians = [], [], []
    for sequence in hidden.double().flatten(1).numpy():
        known = np.flatnonzero(~np.isnan(sequence))
        magnitude = np.abs(sequence[known])
        best = known[np.lexsort((known, -magnitude))[:k]].tolist()
        tops.append([float(sequence[i]) for i in best] + [float("nan")] * (k - len(best)))
        indices.append(best + [-1] * (k - len(best)))
        medians.append(float(np.sort(magnitude)[(len(magnitude) - 1) // 2]) if len(known) else float("nan"))
    return tops, indices, medians


def check(hidden: torch.Tensor, k: int = K) -> None:
    got = activation_statistics(hidden, k)
    top, index, median = reference(hidden, k)
    # Exact: a maximum, a median and their places are chosen, not computed.
    np.testing.assert_array_equal(got.top.double().numpy(), np.array(top))
    np.testing.assert_array_equal(got.index.numpy(), np.array(index))
    np.testing.assert_array_equal(got.median.double().numpy(), np.array(median))
    np.testing.assert_array_equal(got.nan.numpy(), hidden.isnan().flatten(1).sum(1).numpy())
    np.testing.assert_array_equal(got.inf.numpy(), hidden.isinf().flatten(1).sum(1).numpy())


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    k=st.integers(1, 4),
    data=st.data(),
)
def test_equals_a_sort_on_ties_zeros_infinities_and_nan(
    shape: tuple[int, int, int], dtype: torch.dtype, k: int, data: st.DataObject
) -> None:
    size = shape[0] * shape[1] * shape[2]
    entry = st.one_of(st.sampled_from(SPECIAL), st.floats(-60000, 60000, width=16))
    values = data.draw(st.lists(entry, min_size=size, max_size=size))
    check(torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 63])
def test_equals_a_sort_on_ordinary_activations(dtype: torch.dtype, tokens: int) -> None:
    hidden = torch.randn(4, tokens, 33, generator=torch.Generator().manual_seed(0))
    hidden[1, 5, 7] = -3000
    check(hidden.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", sorted(SEQUENCES))
def test_equals_a_sort_where_the_median_is_bracketed_by_a_sample(kind: str, dtype: torch.dtype) -> None:
    check(SEQUENCES[kind](2, 40, 300).to(dtype))


def test_equals_a_sort_where_the_sample_misleads() -> None:
    check(misleading(2, 40, 300))


def test_reads_a_tensor_in_any_layout_piece_by_piece() -> None:
    hidden = SEQUENCES["ordinary"](700, 2, 450).transpose(0, 1)  # more than one piece, and not contiguous
    assert not hidden.is_contiguous()
    check(hidden)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, "triton"), (torch.float64, None), (torch.float32, None)]
)
def test_the_back_end_that_can_read_a_tensor_is_taken(dtype: torch.dtype, backend: Backend | None) -> None:
    hidden = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = activation_statistics(hidden, 2, backend=backend)
    assert torch.equal(got.packed, activation_statistics(hidden, 2, backend="torch").packed)


def test_packing_and_its_parts_are_inverse() -> None:
    got = activation_statistics(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3)), 2)
    assert torch.equal(pack(got.top, got.index, got.median, got.nan, got.inf).packed, got.packed)


def test_the_median_of_an_even_count_is_the_lower_one() -> None:
    got = activation_statistics(torch.tensor([[[1.0, -2.0, 3.0, -4.0]]]), 1)
    assert got.median.item() == 2.0
    assert got.top.item() == -4.0
    assert got.index.item() == 3


def test_all_nan_gives_unknown() -> None:
    got = activation_statistics(torch.full((1, 2, 2), torch.nan), 2)
    assert got.top.isnan().all()
    assert got.median.isnan().all()
    assert got.index.tolist() == [[-1, -1]]
    assert got.nan.tolist() == [4]


def test_the_input_is_not_changed() -> None:
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    before = hidden.clone()
    activation_statistics(hidden, 2)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("hidden", [torch.zeros(2, 3), torch.zeros(2, 3, 4, dtype=torch.int64)])
def test_refuses_what_is_no_residual_stream(hidden: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"floating tensor \[sequence, token, channel\], got"):
        activation_statistics(hidden, 1)
