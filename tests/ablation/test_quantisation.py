"""Simulated quantisation: known errors, rotations that are rotations, and what a spike costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_monitor.ablation.quantisation import (
    BITS,
    SCALES,
    Scale,
    errors,
    quantised,
    random_hadamard,
    random_orthogonal,
    rotations,
)

NONE = torch.zeros(0, dtype=torch.long)
ROUNDING = 1e-6
"""float32, relative to the values of order 1."""


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", SCALES)
def test_by_the_book(bits: int, scale: Scale, rng: np.random.Generator) -> None:
    values = rng.standard_normal((5, 8)).astype(np.float32)
    found = quantised(torch.from_numpy(values), bits, scale).numpy()
    levels = 2 ** (bits - 1) - 1
    for row, own in zip(values, found, strict=True):
        step = (np.abs(values if scale == "tensor" else row).max()) / levels
        np.testing.assert_allclose(own, [step * round(float(v / step)) for v in row], atol=ROUNDING)
        assert np.abs(own - row).max() <= step / 2 + ROUNDING


def test_one_spike_takes_the_grid_from_the_rest() -> None:
    """127 steps up to 1000 are 7.87 wide, so entries of 1 become 0: a relative error of 1, alone of them."""
    hidden = torch.ones(4, 8)
    hidden[0, 3] = 1000
    spike = torch.tensor([3])
    found = errors(hidden, spike, None, 8, "tensor")
    assert found["rest"] == pytest.approx(1)
    assert found["error"] == pytest.approx(math.sqrt(31 / (1e6 + 31)))
    assert found["rest_apart"] == pytest.approx(0, abs=ROUNDING)
    assert found["error_apart"] == pytest.approx(0, abs=ROUNDING)
    token = errors(hidden, spike, None, 8, "token")
    assert token["rest"] == pytest.approx(math.sqrt(7 / 31)), "the spike's own token alone"


def test_a_spike_that_fits_costs_half_a_step_at_most() -> None:
    """A spike of 12.7 has steps of 0.1: entries of 1.03 lose .03 each."""
    hidden = torch.full((2, 4), 1.03)
    hidden[1, 2] = 12.7
    found = errors(hidden, torch.tensor([6]), None, 8, "tensor")
    assert found["rest"] == pytest.approx(0.03 / 1.03, rel=1e-4)


@pytest.mark.parametrize("width", [1, 2, 8, 12, 20, 7, 48])
def test_rotations_are_rotations(width: int, rng: np.random.Generator) -> None:
    for make in (random_hadamard, random_orthogonal):
        rotation = make(width, rng).double().numpy()
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=width * ROUNDING)


def test_a_hadamard_spreads_one_entry_evenly(rng: np.random.Generator) -> None:
    for channel in range(16):
        spread = torch.eye(16)[channel] @ random_hadamard(16, rng).T
        np.testing.assert_allclose(spread.abs(), 1 / 4, atol=ROUNDING)
    mixed = random_hadamard(48, rng)  # 16 x 3: at most √2 times as unevenly
    assert float(mixed.abs().max()) <= math.sqrt(2 / 48) + ROUNDING
    assert float(random_orthogonal(48, rng).abs().max()) > 2 / math.sqrt(48), "a Gaussian's largest of 2304"


def test_random_orthogonal_is_even(rng: np.random.Generator) -> None:
    """Under Haar's measure an entry has mean 0 and variance 1/d; 400 of them are known to four standard errors."""
    corner = np.array([float(random_orthogonal(4, rng)[0, 0]) for _ in range(400)])
    assert abs(corner.mean()) < 4 * 0.5 / 20
    assert np.square(corner).mean() == pytest.approx(0.25, abs=4 * 0.25 / 20)


def test_massive_tokens_are_where_the_rotations_differ(rng: np.random.Generator) -> None:
    """DFRot's observation, on one massive token among Gaussian ones: a Hadamard leaves less error, else both alike."""
    hidden = torch.from_numpy(rng.standard_normal((64, 128)).astype(np.float32))
    spiky = hidden.clone()
    spiky[0, 5] = 3000
    turned = rotations(128, 0)
    massive = torch.tensor([5])
    rest = {name: errors(spiky, massive, one, 8, "tensor")["rest"] for name, one in turned.items()}
    plain = {name: errors(hidden, NONE, one, 8, "tensor")["rest"] for name, one in turned.items()}
    assert rest["hadamard"] < rest["orthogonal"]
    assert plain["hadamard"] == pytest.approx(plain["orthogonal"], rel=0.1)
    for name, one in turned.items():
        apart = errors(spiky, massive, one, 8, "tensor")["rest_apart"]
        assert apart == pytest.approx(plain[name], rel=0.1), "without the spike all is as if it were not there"


@settings(max_examples=30)
@given(st.integers(0, 99), st.sampled_from(BITS), st.sampled_from(SCALES))
def test_bounds(seed: int, bits: int, scale: Scale) -> None:
    """Half a step an entry: ‖x̂ − x‖ ≤ √(Sd)·max/(2(2^(b−1) − 1)), rotated or not (a rotation keeps norms)."""
    hidden = torch.from_numpy(np.random.default_rng(seed).standard_cauchy((6, 8)).astype(np.float32))
    for rotation in rotations(8, seed).values():
        turned = hidden if rotation is None else hidden @ rotation.T
        bound = math.sqrt(48) * float(turned.abs().max()) / (2 * (2 ** (bits - 1) - 1)) / float(hidden.norm())
        found = errors(hidden, hidden.abs().flatten().topk(2).indices, rotation, bits, scale)
        assert 0 <= found["error"] <= bound * (1 + 1e-4)
        assert found["error_apart"] <= found["rest_apart"], "the same error over a larger norm"


def test_nothing_but_zeros() -> None:
    assert quantised(torch.zeros(2, 3), 8, "token").tolist() == [[0.0] * 3] * 2
    assert math.isnan(errors(torch.zeros(2, 3), NONE, None, 8, "tensor")["error"])
