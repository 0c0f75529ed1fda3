"""The loss of a document, and what a paired difference over documents is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, LlamaForCausalLM

from ma_monitor.ablation.losses import DRAWS, document_loss, effect_size, estimate, perplexity, scores_head
from ma_monitor.errors import ModelError
from tests.ablation.models import documents, tiny_neox
from tests.training import VOCABULARY, tiny_llama


def test_the_loss_is_that_of_the_library() -> None:
    for model in (tiny_llama(), tiny_neox()):
        model.train()
        ids = torch.from_numpy(documents()[0])
        found = document_loss(model, ids)
        assert model.training
        model.train(False)
        logits = model(ids[None]).logits[0].detach().double()
        surprise = [-float(torch.log_softmax(row, 0)[token]) for row, token in zip(logits[:-1], ids[1:], strict=True)]
        assert found == pytest.approx(np.mean(surprise), rel=1e-5)  # float32 against float64
        assert found == pytest.approx(float(model(ids[None], labels=ids[None]).loss.detach()), rel=1e-6)


def test_a_model_without_logits() -> None:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    bare = tiny_llama().model
    with pytest.raises(ModelError, match="a loss needs a causal language model.*LlamaModel gives none"):
        document_loss(bare, torch.tensor([1, 2, 3]))
    assert not scores_head(BertModel(config), {})


def test_whose_head_it_is() -> None:
    model = tiny_llama()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def scored(model: LlamaForCausalLM, without: str = "") -> bool:
        return scores_head(model, {name: value.clone for name, value in weights.items() if name != without})

    assert scored(model)
    assert not scored(model, without="lm_head.weight")
    assert scored(tiny_llama(tie_word_embeddings=True), without="lm_head.weight")


def test_an_interval_by_a_slow_bootstrap(rng: np.random.Generator) -> None:
    differences = rng.normal(0.3, 1.0, 12)
    means = [float(np.mean([differences[i] for i in rng.integers(0, 12, 12)])) for _ in range(DRAWS)]
    found = estimate(differences)
    spread = differences.std() / math.sqrt(12)
    assert found.mean == pytest.approx(differences.mean())
    # a quantile at 2.5 % of 10,000 draws is uncertain by .027 standard deviations; both are, and four of that
    for value, expected in zip((found.low, found.high), np.quantile(means, (0.025, 0.975)), strict=True):
        assert value == pytest.approx(expected, abs=4 * math.sqrt(2) * 0.027 * spread)
    assert found == estimate(differences), "the same every time"


@settings(max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_bounds(values: list[float]) -> None:
    found = estimate(np.array(values))
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.low - slack <= found.mean + 1e-9 <= max(values) + 2e-9 + slack


def test_equal_differences_leave_no_doubt() -> None:
    found = estimate(np.full(5, 0.25))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)
    assert math.isnan(effect_size(np.full(5, 0.25)))
    assert math.isnan(effect_size(np.array([1.0])))


def test_effect_size_and_perplexity() -> None:
    assert effect_size(np.array([1.0, 3.0])) == pytest.approx(2 / math.sqrt(2))
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    assert perplexity([1e4]) == math.inf
