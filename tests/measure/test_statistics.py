"""The statistics against a plain sort, under the design's rules for NaN, infinities and ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.errors import ModelError
from ma_monitor.measure.statistics import activation_statistics

K = 3
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, float("inf"), float("-inf"), float("nan"), 1e-7, 65504.0]


def reference(hidden: torch.Tensor, k: int) -> tuple[list[list[float]], list[list[int]], list[float]]:
    """By Python's sort: signed top-k and index by (largest magnitude, lowest index); lower median of magnitudes."""
    tops, indices, medians = [], [], []
    for sequence in hidden.double().flatten(1).tolist():
        entries = [(abs(v), i, v) for i, v in enumerate(sequence) if v == v]
        entries.sort(key=lambda e: (-e[0], e[1]))
        best = entries[:k] + [(float("nan"), -1, float("nan"))] * (k - len(entries))
        tops.append([e[2] for e in best])
        indices.append([e[1] for e in best])
        magnitudes = sorted(e[0] for e in entries)
        medians.append(magnitudes[(len(magnitudes) - 1) // 2] if magnitudes else float("nan"))
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
