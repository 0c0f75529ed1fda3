"""The massive token along the layers: against plain loops over real models, closed forms, invariances."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, Gemma2Config, Olmo2Config

from ma_monitor import MassiveActivationCallback, Monitor, MonitorConfig, Probe, Run
from ma_monitor.cli.log import emissions
from ma_monitor.measure.layers import find_layers
from ma_monitor.measure.phenomena.emergence import EmergenceReader, entropy, find_feed_forward, gains
from ma_monitor.measure.phenomena.reading import measure_with
from ma_monitor.numerics.places import emergence_layer
from ma_monitor.sinks.base import MemorySink
from tests.phenomena.test_super_weights import FAMILIES, SMALL, planted
from tests.test_neutrality import hooks, same
from tests.training import Rows, the_run, tiny_llama, train

SINGLE = 1e-4
"""Relative difference of float32 norms, and of two forwards of other batches."""
PROBE = Probe.from_ids(Rows().ids[:6].numpy(), "rows")
NAMES = ("norm_jump", "typical_jump", "cosine", "feed_forward", "norm_gain", "entropy")


def read(model: nn.Module, **options: Any) -> dict[str, np.ndarray]:
    def failed(name: str, error: Exception) -> None:
        raise error

    measured = measure_with(model, PROBE, 0, k=1, phenomena=("emergence",), failed=failed, **options)
    return {key.removeprefix("emergence/"): values for key, values in measured.phenomena.items()}


def norm_of(x: list[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in x))


def slow(streams: list[Tensor], added: dict[int, Tensor], gain: dict[int, list[float]]) -> dict[str, np.ndarray]:
    """The metrics of streams ``[b, S, d]`` as loops, given what feed-forwards added and gains ``[d]``."""
    every: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for b in range(len(streams[0])):
        states = [stream[b].tolist() for stream in streams]
        entries = [(abs(x), -s, -c) for one in states for s, own in enumerate(one) for c, x in enumerate(own)]
        token, channel = (-place for place in max(entries)[1:])  # a token twice is equal in h_0: the first one
        rows: dict[str, list[float]] = {name: [math.nan] for name in NAMES}
        rows["entropy"] = []
        for row, state in enumerate(states):
            x, size = state[token], norm_of(state[token])
            rows["entropy"].append(-sum((v / size) ** 2 * math.log((v / size) ** 2) for v in x if v))
            if row == 0:
                continue
            before = states[row - 1]
            jumps = sorted(norm_of(own) / norm_of(old) for own, old in zip(state, before, strict=True))
            rows["norm_jump"].append(size / norm_of(before[token]))
            rows["typical_jump"].append(jumps[(len(jumps) - 1) // 2])
            product = math.fsum(v * w for v, w in zip(x, before[token], strict=True))
            rows["cosine"].append(product / size / norm_of(before[token]))
            rows["feed_forward"].append(norm_of(added[row][b][token].tolist()) / norm_of(before[token]))
            own_gain = [abs(g) for g in gain[row]]
            rows["norm_gain"].append(own_gain[channel] * len(own_gain) / sum(own_gain))
        for name, values in rows.items():
            every[name].append(values)
    return {name: np.mean(values, axis=0) for name, values in every.items()}


PARTS = {
    "llama": ("post_attention_layernorm", "mlp"),
    "gpt_neox": ("post_attention_layernorm", "mlp"),
    "gpt2": ("ln_2", "mlp"),
    "opt": ("final_layer_norm", "fc2"),
    "mixtral": ("post_attention_layernorm", "mlp"),
}


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_equals_loops_over_the_states_of_a_model(family: str, batch_size: int | None) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    norm, end = PARTS[family]
    streams: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}
    gain: dict[int, list[float]] = {}

    def begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams[0] = args[0] if args else kwargs["hidden_states"]

    def gives(kept: dict[int, Tensor], row: int) -> Any:
        return lambda m, args, out: kept.update({row: (out if isinstance(out, Tensor) else out[0]).reshape(6, -1, 16)})

    layers = find_layers(model)
    layers[0].register_forward_pre_hook(begins, with_kwargs=True)
    for row, layer in enumerate(layers, start=1):
        weight: Any = layer.get_submodule(norm).weight
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(row))
        gain[row] = weight.tolist()
        layer.register_forward_hook(gives(streams, row))
        layer.get_submodule(end).register_forward_hook(gives(added, row))
    with torch.no_grad():
        model(torch.from_numpy(Rows().ids[:6].numpy()))
    expected = slow([streams[row] for row in range(3)], added, gain)
    found = read(model, batch_size=batch_size)
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=SINGLE, err_msg=name)


def of_streams(streams: list[Tensor]) -> dict[str, Tensor]:
    """What the reader makes of residual streams alone."""
    model = tiny_llama(num_hidden_layers=len(streams) - 1)
    reader = EmergenceReader(model, model.model.layers)
    for row, stream in enumerate(streams):
        reader.hidden(row, stream)
    return {key.removeprefix("emergence/"): values for key, values in reader.values().items()}


def emerging(layers: int = 6, where: int = 3) -> list[Tensor]:
    """Streams that double in norm in layer 1, in which token 2 gets a massive entry in one layer and keeps it."""
    draws = torch.Generator().manual_seed(0)
    streams = [torch.randn(2, 8, 64, generator=draws)]
    for row in range(1, layers + 1):
        streams.append((2 if row == 1 else 1) * streams[-1] + 0.05 * torch.randn(2, 8, 64, generator=draws))
        if row == where:
            streams[-1][:, 2, 5] = 900
    return streams


def test_a_massive_token_emerges_where_it_was_planted() -> None:
    found = of_streams(emerging())
    jump, typical = (found[name].mean(dim=1).numpy() for name in ("norm_jump", "typical_jump"))
    assert emergence_layer(jump, typical) == 3
    assert typical[1] == pytest.approx(2, rel=0.02), "what all tokens do in layer 1 is no emergence"
    assert jump[3] > 40
    assert (found["cosine"][4:] > 0.999).all(), "the massive token hardly changes afterwards"
    assert (found["cosine"][3] < 0.5).all()
    assert (found["entropy"][3:] < 0.1).all(), "one channel holds nearly everything"
    assert (found["entropy"][:3] > 2.5).all()
    assert torch.isnan(found["feed_forward"]).all(), "no feed-forward ran"
    assert torch.isnan(found["norm_jump"][0]).all()


def test_scale_and_the_order_of_channels_and_tokens_do_not_matter() -> None:
    order = torch.Generator().manual_seed(1)
    tokens, channels = torch.randperm(8, generator=order), torch.randperm(64, generator=order)
    plain = of_streams(emerging())
    for changed in ([-1e3 * x for x in emerging()], [x[:, tokens][..., channels] for x in emerging()]):
        for name, values in of_streams(changed).items():
            torch.testing.assert_close(values, plain[name], rtol=SINGLE, atol=1e-6, equal_nan=True)


def test_entropy_of_known_states() -> None:
    known = torch.zeros(1, 3, 32)
    known[0, 0], known[0, 1, 4], known[0, 2, :8] = -3, 7, 2
    assert entropy(known, known.norm(dim=2))[0].tolist() == pytest.approx([math.log(32), 0, math.log(8)], abs=1e-6)


def test_what_is_not_a_number_stays_in_its_sequence() -> None:
    streams = [x.bfloat16() for x in emerging()]
    streams[4][0, 6, 6] = torch.nan
    found = of_streams(streams)
    assert torch.isnan(found["typical_jump"][4:6, 0]).all()
    for name, values in found.items():
        assert name in ("feed_forward", "norm_gain") or torch.isfinite(values[1:, 1]).all()


def test_nothing_is_kept_from_one_forward_to_the_next() -> None:
    model = planted()
    once, split = read(model), read(model, batch_size=1)
    for name, values in once.items():
        np.testing.assert_allclose(values, split[name], rtol=SINGLE, err_msg=name)


def test_gains_are_found_whatever_a_norm_does_with_its_weight() -> None:
    model = AutoModel.from_config(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=1, intermediate_size=64))
    norm = model.layers[0].pre_feedforward_layernorm
    layer_norm = nn.LayerNorm(16)
    for module in (norm, layer_norm):
        nn.init.normal_(module.weight)
    nn.init.normal_(layer_norm.bias)
    output = torch.zeros(2, 3, 16)
    torch.testing.assert_close(gains(norm, output), 1 + norm.weight.detach(), rtol=SINGLE, atol=1e-6)
    torch.testing.assert_close(gains(layer_norm, output), layer_norm.weight.detach(), rtol=SINGLE, atol=1e-6)
    torch.testing.assert_close(gains(nn.LayerNorm(16, elementwise_affine=False), output[0]), torch.ones(16))


def test_norms_before_and_behind() -> None:
    gemma = AutoModel.from_config(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=1, intermediate_size=64))
    block: Any = gemma.layers[0]
    _, entry, end = find_feed_forward(block, 16)
    assert (entry, end) == (block.mlp, block.post_feedforward_layernorm)
    assert np.isfinite(read(gemma)["norm_gain"][1:]).all()
    olmo = read(AutoModel.from_config(Olmo2Config(**SMALL, intermediate_size=64)))
    assert np.isnan(olmo["norm_gain"]).all(), "OLMo 2 has no norm before its feed-forward"
    assert np.isfinite(olmo["feed_forward"][1:]).all()
    bert = AutoModel.from_config(BertConfig(**SMALL, intermediate_size=64))
    block = find_layers(bert)[0]
    assert find_feed_forward(block, 16)[1:] == (block.intermediate.dense, block.output.dense)
    assert np.isnan(read(bert)["norm_gain"]).all(), "BERT's norms stand behind the sums"
    assert find_feed_forward(nn.Sequential(nn.ReLU()), 16) == ([], None, None)


def test_what_a_live_run_shows_is_what_its_log_shows_later(tmp_path: Path) -> None:
    """Weights move between the measurements, so that each has numbers of its own."""
    model, sink = planted(), MemorySink()
    config = MonitorConfig(every=1, phenomena=("super_weights", "emergence"), strict=True)
    with closing(Monitor(model, PROBE, config, run_dir=tmp_path / "run", sinks=[sink], total_steps=4)) as monitor:
        for step in range(4):
            monitor.step(step)
            nn.init.normal_(model.model.layers[0].mlp.down_proj.weight, std=0.1 * (step + 1))
    later = emissions(Run.open(tmp_path / "run"))
    keys = {key for one in sink.emissions for key in one.scalars if "emergence" in key or "super" in key}
    assert {"ma/emergence/layer", "ma/emergence/norm_jump", "ma/super_weights/output"} <= keys
    for live, logged in zip(sink.emissions, later, strict=True):
        assert {key: live.scalars.get(key) for key in keys} == {key: logged.scalars.get(key) for key in keys}
    assert len({one.scalars["ma/emergence/cosine"] for one in sink.emissions}) == 4


def test_training_is_bit_identical_with_all_of_them(tmp_path: Path) -> None:
    once = train(tmp_path / "once", [])
    config = MonitorConfig(every=4, strict=True, phenomena=("outliers", "super_weights", "emergence"))
    callback = MassiveActivationCallback(config)
    watched = train(tmp_path / "watched", [callback])
    assert same(once, watched)
    assert hooks(once) == hooks(watched)
    jumps = the_run(callback).phenomena()["emergence/norm_jump"]
    assert jumps.steps.tolist() == [0, 1, 2, 4, 8, 12]
    assert np.isfinite(jumps.values[:, 1:]).all()
