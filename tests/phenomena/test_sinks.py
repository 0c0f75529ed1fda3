"""Attention sinks against the formulas, and against the weights that the library itself shows."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ma_monitor import MassiveActivationCallback, MonitorConfig, Probe, Run
from ma_monitor.cli.__main__ import main
from ma_monitor.errors import ModelError
from ma_monitor.measure.phenomena.reading import measure_with
from ma_monitor.measure.phenomena.sinks import SinksReader, attention_to, eager_attention, sinks
from tests.measure.test_families import FAMILIES, LAYERS, NO_HEADS, VOCABULARY, tiny
from tests.test_neutrality import hooks, same
from tests.training import Rows, the_run, tiny_llama, train

SINGLE = 1e-6
"""Relative error of sums of 64 float32 weights."""
BOTH = ("sinks", "compression")


def slow(weights: list[list[float]]) -> list[float]:
    """α_k of one head."""
    tokens = len(weights)
    return [math.fsum(weights[i][k] for i in range(k, tokens)) / (tokens - k) for k in range(tokens)]


PROBE = Probe.from_ids(np.random.default_rng(0).integers(5, VOCABULARY - 5, (4, 12)))
"""Long enough that uniform attention is no sink."""


def read(model: nn.Module, probe: Probe = PROBE, **options: Any) -> dict[str, np.ndarray]:
    found = measure_with(model, probe, 0, k=1, phenomena=("sinks",), failed=_raise, **options)
    return dict(found.phenomena)


def _raise(name: str, error: Exception) -> None:
    raise error


def test_equals_the_formulas() -> None:
    scores = 4 * torch.randn(3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = scores.where(torch.ones(16, 16).tril() > 0, -torch.inf).softmax(dim=-1)
    alpha = [[slow(head.tolist()) for head in sequence] for sequence in weights]
    np.testing.assert_allclose(attention_to(weights), alpha, rtol=SINGLE)
    found = sinks(attention_to(weights))
    for number, heads in enumerate(alpha):
        assert float(found["sinks/rate"][number]) == pytest.approx(np.mean([head[0] > 0.3 for head in heads]))
        assert float(found["sinks/score"][number]) == pytest.approx(np.mean([head[0] for head in heads]))
        elsewhere = [any(head[k] > 0.3 for k in range(1, 9)) for head in heads]
        assert float(found["sinks/elsewhere"][number]) == pytest.approx(np.mean(elsewhere))
    assert 0 < float(found["sinks/rate"].mean()) < 1
    assert 0 < float(found["sinks/elsewhere"].mean()) < 1
    assert torch.equal(found["sinks/heads"], attention_to(weights)[..., 0])


def test_known_values() -> None:
    tokens = 64
    uniform = torch.ones(tokens, tokens).tril() / torch.arange(1, tokens + 1)[:, None]
    first, itself = torch.zeros(tokens, tokens), torch.eye(tokens)
    first[:, 0] = 1
    fifth = itself.clone()
    fifth[5:] = itself[5]
    found = sinks(attention_to(torch.stack([uniform, first, itself, fifth])[:, None]))
    harmonic = sum(1 / i for i in range(1, tokens + 1))
    np.testing.assert_allclose(found["sinks/score"], [harmonic / tokens, 1, 1 / tokens, 1 / tokens], rtol=SINGLE)
    assert found["sinks/rate"].tolist() == [0, 1, 0, 0]
    assert found["sinks/elsewhere"].tolist() == [0, 0, 0, 1]
    at_the_threshold = torch.zeros(1, 1, 10, 10)
    at_the_threshold[..., 0, 0] = 3  # of ten queries
    assert sinks(attention_to(at_the_threshold))["sinks/rate"].tolist() == [0]


@pytest.mark.parametrize("tokens", [2, 9, 10])
def test_uniform_attention_is_never_called_a_sink(tokens: int) -> None:
    uniform = torch.ones(tokens, tokens).tril() / torch.arange(1, tokens + 1)[:, None]
    found = sinks(attention_to(uniform[None, None]))
    assert found["sinks/score"].isfinite().all()
    expected = [0.0] if tokens == 10 else [math.nan]
    np.testing.assert_array_equal(found["sinks/rate"], expected)
    np.testing.assert_array_equal(found["sinks/elsewhere"], expected)


def test_attention_that_is_not_finite_stays_in_its_sequence() -> None:
    weights = torch.full((2, 3, 10, 10), 0.1)
    weights[1, 2, 3, 1] = torch.nan
    for values in sinks(attention_to(weights)).values():
        assert torch.isfinite(values[0]).all()
        assert torch.isnan(values[1]).all()


def shown(model: Any) -> tuple[Tensor, ...]:
    """The attention weights that the library itself gives."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = "eager"
    ids = torch.from_numpy(PROBE.ids)
    of_decoder = model.config.is_encoder_decoder
    arguments: dict[str, Any] = {"decoder_input_ids": ids} if of_decoder else {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    with torch.no_grad():
        out = model(ids, output_attentions=True, **arguments)
    weights: tuple[Tensor, ...] = out["decoder_attentions" if of_decoder else "attentions"]
    return weights


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NO_HEADS))
def test_reads_the_weights_that_the_library_shows(name: str) -> None:
    model = tiny(name)
    found = read(model, batch_size=3)
    weights = shown(model)
    assert len(weights) == LAYERS
    for row, layer in enumerate(weights, start=1):
        alpha = np.array([[slow(head.tolist()) for head in sequence] for sequence in layer])[..., 0]
        np.testing.assert_allclose(found["sinks/heads"][row], alpha.mean(axis=0), rtol=SINGLE)
        assert found["sinks/score"][row] == pytest.approx(alpha.mean(), rel=SINGLE)
        assert found["sinks/rate"][row] == pytest.approx((alpha > 0.3).mean())
    assert all(np.isnan(values[0]).all() for values in found.values())


@pytest.mark.parametrize("name", sorted(NO_HEADS))
def test_a_model_without_attention_is_refused(name: str) -> None:
    model = tiny(name)
    with pytest.raises(ModelError, match=r"how many attention heads .* Leave sinks out"):
        SinksReader(model, model.backbone.layers)
    faults: dict[str, Exception] = {}
    found = measure_with(model, PROBE, 0, k=1, phenomena=BOTH, failed=lambda n, e: faults.update({n: e}))
    assert list(faults) == ["sinks"]
    assert {key.split("/")[0] for key in found.phenomena} == {"compression"}


def a_llama(**changes: Any) -> Any:
    return tiny_llama(vocab_size=VOCABULARY, **changes).eval()


def without_queries(model: Any) -> Any:
    """The model with all attention uniform."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("window", [None, 4])
def test_uniform_attention_of_a_real_model(window: int | None) -> None:
    probe = Probe.from_ids(np.random.default_rng(0).integers(5, 45, (3, 30)))
    model = without_queries(copy.deepcopy(tiny("mistral")))
    model.config.sliding_window = window
    expected = sum(1 / i for i in range(1, (window or 30) + 1)) / 30
    np.testing.assert_allclose(read(model, probe)["sinks/score"][1:], expected, rtol=SINGLE)


def test_at_most_64_tokens_are_read() -> None:
    probe = Probe.from_ids(np.random.default_rng(0).integers(5, 40, (2, 100)))
    model = without_queries(a_llama(max_position_embeddings=100))
    np.testing.assert_allclose(
        read(model, probe)["sinks/score"][1:], sum(1 / i for i in range(1, 65)) / 64, rtol=SINGLE
    )


class Silent(nn.Module):
    """Attention that is no part of the model and gives no weights, as a kernel of its own would."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = [attention]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.attention[0](*args, **kwargs)[0], None


def test_a_block_that_gives_no_weights_is_unknown_and_the_others_are_read() -> None:
    model: Any = a_llama()
    whole = read(model)
    model.model.layers[0].self_attn = Silent(model.model.layers[0].self_attn)
    for key, values in read(model).items():
        assert np.isnan(values[:2]).all()
        np.testing.assert_array_equal(values[2], whole[key][2])
    model.model.layers[1].self_attn = Silent(model.model.layers[1].self_attn)
    with pytest.raises(ModelError, match=r"weights \[sequence, 2, token, token\] .* none of 2 did"):
        read(model)


class Turning(nn.Module):
    """Attention that has a module turn its queries and keys, here ``[b, 2, 8, 8]`` as weights of 8 tokens are."""

    class Both(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            queries = hidden.unflatten(2, (2, 8)).transpose(1, 2)
            return queries, queries

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.turn, self.attention = self.Both(), attention

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        self.turn(hidden_states)
        return self.attention(hidden_states, **kwargs)


def test_queries_and_keys_are_not_taken_for_weights() -> None:
    model: Any = a_llama()
    probe = Probe.from_ids(PROBE.ids[:, :8])
    whole = read(model, probe)
    for layer in model.model.layers:
        layer.self_attn = Turning(layer.self_attn)
    for key, values in read(model, probe).items():
        np.testing.assert_array_equal(values, whole[key])


def test_every_part_gets_back_the_attention_it_had() -> None:
    model = copy.deepcopy(tiny("llava"))
    model.config.text_config._attn_implementation = "flex_attention"
    model.config.vision_config._attn_implementation = "eager"

    def now() -> list[tuple[str, Any, dict[str, Any]]]:
        named = [(name, m.config) for name, m in model.named_modules() if hasattr(m, "config")]
        return [(name, config, dict(vars(config))) for name, config in named]

    def kinds() -> set[str]:
        return {config._attn_implementation for _, config, _ in now()}

    before = now()
    assert kinds() == {"sdpa", "flex_attention", "eager"}
    with eager_attention(model):
        assert kinds() == {"eager"}
    assert now() == before
    with pytest.raises(KeyboardInterrupt), eager_attention(model):
        raise KeyboardInterrupt
    assert now() == before


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name that older versions know
def test_training_is_bit_identical_and_replay_reads_what_it_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    probe = Probe.from_ids(Rows().ids[:6].numpy(), "rows")
    callback = MassiveActivationCallback(MonitorConfig(every=3, strict=True, phenomena=BOTH), probe=probe)
    once = train(tmp_path / "once", [], **changes)
    watched = train(tmp_path / "watched", [callback], save_strategy="steps", save_steps=6, **changes)
    assert same(once, watched)
    assert hooks(watched) == hooks(once)
    model: Any = watched.trainer.model
    assert model.config._attn_implementation == "sdpa"
    live = the_run(callback).phenomena()
    assert {key.split("/")[0] for key in live} == set(BOTH)

    np.save(tmp_path / "probe.npy", probe.ids)
    arguments = ["replay", str(tmp_path / "watched"), "--probe-ids", str(tmp_path / "probe.npy")]
    assert main([*arguments, "--phenomena", ",".join(BOTH), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    with Run.open(tmp_path / "run") as run:
        for key, readings in run.phenomena().items():
            assert readings.steps.tolist() == [6, 12]
            expected = live[key].values[np.isin(live[key].steps, readings.steps)]
            assert np.isfinite(expected[:, 1:]).all()
            np.testing.assert_array_equal(readings.values, expected, err_msg=key)


@pytest.mark.slow
def test_a_compiled_training_is_compiled_as_often_as_without(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    changes = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    graphs: list[dict[str, int]] = []
    results = []
    for callbacks in ([], [MassiveActivationCallback(MonitorConfig(every=1, strict=True, phenomena=BOTH))]):
        torch.compiler.reset()
        counters.clear()
        results.append(train(tmp_path / str(len(graphs)), [*callbacks], **changes))
        graphs.append(dict(counters["stats"]) | dict(counters["frames"]))
    torch.compiler.reset()
    assert graphs[0]["unique_graphs"] > 0
    assert graphs[0] == graphs[1]
    assert same(*results)
