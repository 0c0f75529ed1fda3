"""Kurtosis against the formulas, entry by entry."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from ma_monitor.measure.phenomena.kurtosis import KurtosisReader, excess_per_token, per_sequence
from tests.training import tiny_llama

SINGLE = 2e-5
"""Relative error of sums of fourth powers in float32."""


def slow_per_token(tokens: list[list[float]]) -> float:
    each = []
    for x in tokens:
        deviation = statistics.stdev(x)
        each.append(max(0.0, statistics.fmean(v**4 for v in x) / deviation**4 - 3) if deviation else 0.0)
    return statistics.fmean(each)


def slow_per_sequence(tokens: list[list[float]]) -> float:
    x = [v for token in tokens for v in token]
    mean = statistics.fmean(x)
    return statistics.fmean((v - mean) ** 4 for v in x) / (statistics.stdev(x) ** 4 + 1e-6)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_equals_the_formulas(scale: float) -> None:
    hidden = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    hidden[:, 1, 3] = 60
    hidden[:, 2] = 0.5
    hidden *= scale
    for sequence, token, whole in zip(hidden, excess_per_token(hidden), per_sequence(hidden), strict=True):
        assert float(token) == pytest.approx(slow_per_token(sequence.tolist()), rel=SINGLE)
        assert float(whole) == pytest.approx(slow_per_sequence(sequence.tolist()), rel=SINGLE)


def test_known_values() -> None:
    gaussian = torch.randn(1, 400, 800, generator=torch.Generator().manual_seed(1))
    assert float(per_sequence(gaussian)) == pytest.approx(3, abs=5 * math.sqrt(24 / gaussian.numel()))
    spike = torch.zeros(1, 1, 1000)
    spike[0, 0, 7] = 50
    # one spike a among d: mean(x⁴) = a⁴/d and the unbiased variance is a²/d
    assert float(excess_per_token(spike)) == pytest.approx(1000 - 3, rel=SINGLE)
    assert float(excess_per_token(torch.ones(1, 3, 8))) == 0


def test_the_reader_gives_all_three_and_keeps_what_is_not_finite_to_its_sequence() -> None:
    model = tiny_llama()
    reader = KurtosisReader(model, model.model.layers)
    hidden = torch.randn(3, 4, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
    hidden[1, 2, 3] = torch.nan
    for row in range(reader.rows):
        reader.hidden(row, hidden)
    values = reader.values()
    assert set(values) == set(reader.sizes)
    for key, numbers in values.items():
        assert numbers.shape == (reader.rows, 3), key
        assert torch.isnan(numbers[:, 1]).all()
        assert np.isfinite(numbers[:, [0, 2]].numpy()).all()
    assert torch.equal(values["kurtosis/infinity_norm"][0, [0, 2]], hidden[[0, 2]].float().abs().amax(dim=(1, 2)))
