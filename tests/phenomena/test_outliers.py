"""Outlying channels and tokens' maxima against the rule, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ma_monitor.measure.phenomena.outliers import OutliersReader
from tests.training import tiny_llama

SINGLE = 1e-5
"""Relative error of a root mean square in float32."""


def read(hidden: Tensor) -> dict[str, Tensor]:
    model = tiny_llama()
    return OutliersReader(model, model.model.layers).of_stream(hidden)


def slow(tokens: list[list[float]]) -> tuple[int, float, float]:
    """Channels, mean and largest of the tokens' maxima, of one sequence."""
    units = [math.sqrt(sum(x * x for x in token) / len(token)) for token in tokens]
    large = [[abs(x) >= 6 * unit for x in token] for token, unit in zip(tokens, units, strict=True)]
    channels = sum(sum(own) >= 0.06 * len(tokens) for own in zip(*large, strict=True))
    maxima = [max(map(abs, token)) / unit for token, unit in zip(tokens, units, strict=True)]
    return channels, sum(maxima) / len(maxima), max(maxima)


def made() -> Tensor:
    """Three sequences: nothing, a channel large in 3 of 40 tokens and one in 2, a massive token."""
    hidden = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0))
    hidden[1, :3, 7], hidden[1, 5:7, 9] = -40, 40
    hidden[2, 0, [3, 4]] = 500
    return hidden


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_equals_the_rule_at_any_scale(scale: float) -> None:
    values = read(made() * scale)
    expected = [slow(sequence.tolist()) for sequence in made()]
    assert [one[0] for one in expected] == [0, 1, 0], "a token alone makes no outlying channel"
    assert values["outliers/channels"].tolist() == [one[0] for one in expected]
    assert values["outliers/token_mean"].tolist() == pytest.approx([one[1] for one in expected], rel=SINGLE)
    assert values["outliers/token_largest"].tolist() == pytest.approx([one[2] for one in expected], rel=SINGLE)


def test_the_order_of_channels_and_of_tokens_does_not_matter() -> None:
    order = torch.Generator().manual_seed(1)
    hidden, tokens, channels = made(), torch.randperm(40, generator=order), torch.randperm(96, generator=order)
    for key, values in read(hidden[:, tokens][..., channels]).items():
        torch.testing.assert_close(values, read(hidden)[key], rtol=SINGLE, atol=0)


def test_known_values() -> None:
    constant = read(torch.full((1, 5, 64), -2.0))
    assert [float(values) for values in constant.values()] == [0, 1, 1]
    spike = torch.zeros(1, 10, 100)
    spike[0, :, 3] = 9
    # one entry alone among d is √d times its root mean square
    assert [float(values) for values in read(spike).values()] == [1, 10, 10]
    edge = torch.ones(1, 50, 63) * math.sqrt(26 / 62)
    edge[0, :3, 0] = 6.1  # 3 of 50 tokens are 6 %; 2 are not
    assert float(read(edge)["outliers/channels"]) == 1
    edge[0, 2, 0] = 1
    assert float(read(edge)["outliers/channels"]) == 0


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    hidden = made().bfloat16()
    hidden[0, 3, 3] = torch.nan
    hidden[2, 3, 3] = torch.inf
    for values in read(hidden).values():
        assert torch.isnan(values[[0, 2]]).all()
        assert torch.isfinite(values[1])
