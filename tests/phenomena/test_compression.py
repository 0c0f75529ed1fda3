"""Matrix entropy and its relatives against a singular value decomposition, their closed forms and their bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ma_monitor.measure.phenomena.compression import TOKENS, CompressionReader, compression
from ma_monitor.phenomena import PHENOMENA
from tests.training import tiny_llama

DOUBLE = 1e-9
"""Relative error that squaring the singular values costs in float64, with room."""
EXACT = 1e-12
"""Absolute error of shares and entropies in float64."""
KEYS = [metric.key for metric in PHENOMENA["compression"]]


def slow(x: np.ndarray) -> dict[str, float]:
    """The formulas of one sequence ``[T, d]``, token by token."""
    sigma = np.linalg.svd(x, compute_uv=False)
    p = [float(s**2 / (x**2).sum()) for s in sigma]
    entropy = -math.fsum(q * math.log(q) for q in p if q > 0)
    m, r = float(x[0] @ x[0]), math.fsum(float(row @ row) for row in x[1:])
    cosines = [float(row @ x[0]) / math.sqrt(m * float(row @ row)) for row in x[1:]]
    alpha = math.fsum(float(row @ row) * cosine**2 for row, cosine in zip(x[1:], cosines, strict=True)) / r
    others = math.fsum(math.sqrt(float(row @ row)) for row in x[1:]) / (len(x) - 1)
    return {
        "compression/entropy": entropy / math.log(min(x.shape)),
        "compression/effective_rank": math.exp(entropy),
        "compression/anisotropy": p[0],
        "compression/first_token_bound": (m / r + alpha) / (m / r + 1),
        "compression/first_token_norm": math.sqrt(m) / others,
    }


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("massive", [1.0, 1e4, 1e5])
@pytest.mark.parametrize("shape", [(2, 24, 60), (2, 60, 24), (1, 200, 700)])
def test_equals_the_singular_values_also_where_two_tokens_are_massive_in_one_channel(
    shape: tuple[int, int, int], massive: float
) -> None:
    hidden = gaussian(*shape)
    hidden[:, [0, 7], 3] = massive
    for number, x in enumerate(hidden.double().numpy()):
        expected = slow(x)
        for key, values in compression(hidden).items():
            assert float(values[number]) == pytest.approx(expected[key], rel=DOUBLE), key


def test_known_values() -> None:
    turned = torch.linalg.qr(gaussian(40, 40, seed=1).double()).Q
    one = compression(gaussian(1, 12, 1) * turned[0])
    rows = compression(turned[None, :12])
    columns = compression(turned[None, :, :12])
    assert {key: float(values[0]) for key, values in one.items() if key != "compression/first_token_norm"} == {
        "compression/entropy": pytest.approx(0, abs=EXACT),
        "compression/effective_rank": pytest.approx(1),
        "compression/anisotropy": pytest.approx(1),
        "compression/first_token_bound": pytest.approx(1),
    }
    assert {key: float(values[0]) for key, values in rows.items()} == {
        "compression/entropy": pytest.approx(1),
        "compression/effective_rank": pytest.approx(12),
        "compression/anisotropy": pytest.approx(1 / 12),
        "compression/first_token_bound": pytest.approx(1 / 12),
        "compression/first_token_norm": pytest.approx(1),
    }
    assert float(columns["compression/entropy"][0]) == pytest.approx(1)
    assert float(columns["compression/effective_rank"][0]) == pytest.approx(12)


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(2, 20),
    width=st.integers(2, 20),
    first=st.floats(-6, 6),
    spread=st.floats(0, 3),
)
def test_bounds_hold_for_any_stream(seed: int, tokens: int, width: int, first: float, spread: float) -> None:
    hidden = gaussian(2, tokens, width, seed=seed).double()
    hidden = hidden * torch.exp(spread * gaussian(2, 1, width, seed=seed + 1))
    hidden[:, 0] *= 10**first
    found = compression(hidden)
    entropy, rank, share, bound = (found[key].numpy() for key in KEYS[:4])
    assert (share >= bound - EXACT).all()
    assert (bound > 0).all()
    assert (share <= 1 + EXACT).all()
    assert (entropy >= -EXACT).all()
    assert (entropy <= 1 + EXACT).all()
    assert (rank >= 1 - EXACT).all()
    assert (rank * share >= 1 - EXACT).all()  # no share is larger than the first
    assert (rank <= min(tokens, width) + DOUBLE).all()


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1e18])
def test_scale_and_rotation_of_channels_change_nothing(scale: float) -> None:
    hidden = gaussian(3, 20, 30)
    hidden[:, 0] *= 100
    turned = torch.linalg.qr(gaussian(30, 30, seed=2).double()).Q
    expected = compression(hidden)
    for changed in (compression(hidden.double() * scale), compression(hidden.double() @ turned)):
        for key in KEYS:
            np.testing.assert_allclose(changed[key], expected[key], rtol=DOUBLE, err_msg=key)


def test_order_of_the_other_tokens_changes_nothing_and_the_first_one_matters() -> None:
    hidden = gaussian(1, 10, 30)
    hidden[:, 0] *= 50
    expected, other = compression(hidden), compression(hidden[:, [0, *range(9, 0, -1)]])
    swapped = compression(hidden.flip(1))
    for key in KEYS:
        np.testing.assert_allclose(other[key], expected[key], rtol=DOUBLE, err_msg=key)
    assert float(swapped["compression/anisotropy"][0]) == pytest.approx(float(expected["compression/anisotropy"][0]))
    assert float(swapped["compression/first_token_bound"][0]) < 0.2
    assert float(expected["compression/first_token_bound"][0]) > 0.99


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("token", [0, 3])
def test_what_is_not_finite_stays_in_its_sequence(value: float, token: int) -> None:
    hidden = gaussian(4, 6, 9)
    hidden[1, token, 2] = value
    hidden[3] = 0
    known = [0, 2]
    for key, values in compression(hidden).items():
        assert torch.isnan(values[[1, 3]]).all(), key
        assert torch.equal(values[known], compression(hidden[known])[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reader_takes_the_first_tokens_of_any_type(dtype: torch.dtype) -> None:
    model = tiny_llama()
    reader = CompressionReader(model, model.model.layers)
    hidden = gaussian(2, TOKENS + 20, 6).to(dtype)
    for row in range(reader.rows):
        reader.hidden(row, hidden * (row + 1))
    values = reader.values()
    assert set(values) == set(reader.sizes) == set(KEYS)
    expected = compression(hidden[:, :TOKENS].float())
    for key, numbers in values.items():
        assert numbers.shape == (reader.rows, 2)
        assert torch.equal(numbers[0], expected[key])
