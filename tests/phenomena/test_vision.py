"""Models that see, by token kind, against the library's own hidden states and slow loops."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig

from ma_monitor import MassiveActivationCallback, MonitorConfig
from ma_monitor.errors import ConfigError, ModelError
from ma_monitor.measure.layers import find_layers
from ma_monitor.measure.phenomena.vision import ALL, VisionReading, measure_vision, token_kinds
from tests.training import make_trainer, the_run

WIDTH, LAYERS, IMAGES, K, VOCABULARY, PLACE = 16, 2, 3, 3, 50, 49
SINGLE = 1e-5
"""Relative difference of sums in float32 and in float64."""

SIZES: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = SIZES | {"hidden_size": WIDTH, "image_size": 12, "patch_size": 4}
VIT = IMAGE | {"hidden_dropout_prob": 0.1}
CLIP = IMAGE | {"projection_dim": WIDTH}
TEXT = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
TEXT |= {"attention_dropout": 0.1, "num_key_value_heads": 1}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


class Family(NamedTuple):
    """A tiny model, the module from its last block to the library's last hidden state, tokens of each kind."""

    model: str
    config: str
    changes: dict[str, Any]
    final: str | None
    sizes: dict[str, int]


def llava(width: int = WIDTH) -> dict[str, Any]:
    return {
        "text_config": TEXT | {"model_type": "llama", "hidden_size": width},
        "vision_config": CLIP | {"model_type": "clip_vision_model"},
        "image_token_id": PLACE,
    }


REGISTERS = VIT | {"num_register_tokens": 4}
QWEN = {"depth": 1, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4}
PATCHES = {"cls": 1, "patch": 9}
WORDS = {"image": 9, "first_text": 1, "text": 4}
FAMILIES: dict[str, Family] = {
    "vit": Family("ViTModel", "vit", VIT, "layernorm", PATCHES),
    "dinov2": Family("Dinov2Model", "dinov2", VIT, "layernorm", PATCHES),
    "dinov2, registers": Family(
        "Dinov2WithRegistersModel", "dinov2_with_registers", REGISTERS, "layernorm", PATCHES | {"register": 4}
    ),
    "siglip": Family("SiglipVisionModel", "siglip_vision_model", CLIP, None, {"patch": 9}),
    "llava": Family("LlavaForConditionalGeneration", "llava", llava(), "model.language_model.norm", WORDS),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {
            "text_config": TEXT | MROPE | {"hidden_size": WIDTH},
            "vision_config": QWEN,
            "image_token_id": PLACE,
            "video_token_id": PLACE - 1,
        },
        "model.language_model.norm",
        WORDS,
    ),
}


def build(name: str, **changes: Any) -> Any:
    family = FAMILIES[name]
    torch.manual_seed(0)
    return getattr(transformers, family.model)(AutoConfig.for_model(family.config, **(family.changes | changes))).eval()


tiny = cache(build)


def inputs_for(name: str) -> dict[str, Tensor]:
    """Images of nine tokens, and of a VLM one text token, the image, and four more."""
    draw = torch.Generator().manual_seed(1)
    inputs = {"pixel_values": torch.randn(IMAGES, 3, 12, 12, generator=draw)}
    if "image_token_id" in FAMILIES[name].changes:
        ids = torch.randint(5, 40, (IMAGES, 14), generator=draw)
        ids[:, 0], ids[:, 1:10] = 1, PLACE
        inputs["input_ids"] = ids
    if name == "qwen2_vl":  # its processor cuts the patches; four of them make a token
        inputs["pixel_values"] = torch.randn(IMAGES * 36, 3 * 2 * 4 * 4, generator=draw)
        inputs["image_grid_thw"] = torch.tensor([[1, 6, 6]] * IMAGES)
        inputs["mm_token_type_ids"] = (ids == PLACE).long()
    return inputs


def hidden_states(model: Any, inputs: dict[str, Tensor], final: str | None) -> list[Tensor]:
    """h_0 … h_L by the library, the last one bare of the final norm."""
    model = copy.deepcopy(model)
    if final is not None:
        model.set_submodule(final, nn.Identity())
    with torch.no_grad():
        return [*model(**inputs, output_hidden_states=True).hidden_states]


def slow_entries(stream: NDArray[np.float64], chosen: NDArray[np.bool_]) -> list[tuple[float, int, int, float]]:
    """Negative magnitude, place and signed value of the entries of the chosen tokens, largest first."""
    places = [(token, channel) for token in range(len(stream)) if chosen[token] for channel in range(stream.shape[1])]
    return sorted((-abs(stream[place]), *place, stream[place]) for place in places)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_token_is_read_as_the_library_shows_it(name: str) -> None:
    inputs = inputs_for(name)
    got = measure_vision(tiny(name), inputs, k=K)
    states = hidden_states(tiny(name), inputs, FAMILIES[name].final)
    assert len(states) == LAYERS + 1
    assert {kind: set(mask.sum(axis=1)) for kind, mask in got.kinds.items()} == {
        kind: {size} for kind, size in FAMILIES[name].sizes.items()
    }
    masks = {**got.kinds, ALL: np.ones_like(next(iter(got.kinds.values())))}
    for row, state in enumerate(states):
        for image, stream in enumerate(state.double().numpy()):
            np.testing.assert_allclose(got.norms[row, image], np.sqrt((stream**2).sum(axis=1)), rtol=SINGLE)
            for kind, mask in masks.items():
                entries = slow_entries(stream, mask[image])
                of = got.of[kind]
                found = zip(of.position[row, image], of.channel[row, image], of.top[row, image], strict=True)
                assert [*found] == [entry[1:] for entry in entries[:K]]
                assert of.median[row, image] == -entries[::-1][(len(entries) - 1) // 2][0]


@pytest.mark.parametrize("name", ["dinov2, registers", "llava"])
def test_ratios_have_one_denominator_and_the_largest_is_the_models(name: str) -> None:
    got = measure_vision(tiny(name), {key: value[:1] for key, value in inputs_for(name).items()})
    np.testing.assert_allclose(np.max([got.ratio(kind) for kind in got.kinds], axis=0), got.ratio())
    np.testing.assert_allclose(got.ratio(rank=2), np.abs(got.of[ALL].top[:, 0, 1]) / got.of[ALL].median[:, 0])


def spiked(model: Any, block: int, image: int, places: list[tuple[int, int]], value: float) -> Any:
    """The model with entries (token, channel) of one image set after a block, whatever it had given."""

    def plant(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        for token, channel in places:
            changed[image, token, channel] = value
        return changed

    find_layers(model)[block].register_forward_hook(plant)
    return model


def test_a_spike_in_one_patch_is_found_where_it_is() -> None:
    name, value = "dinov2, registers", -1e3
    got = measure_vision(spiked(build(name), 0, 1, [(8, 5)], value), inputs_for(name))
    patch = got.of["patch"]
    assert (patch.top[1, 1, 0], patch.position[1, 1, 0], patch.channel[1, 1, 0]) == (value, 8, 5)
    assert [*zip(*got.high_norm[1].nonzero(), strict=True)] == [(1, 8)]
    np.testing.assert_allclose(got.high_norm_share[:2], [0, 1 / (9 * IMAGES)])
    assert got.ratio("patch")[1] > 50 * got.ratio("cls")[1]
    assert got.ratio("patch")[1] == pytest.approx(got.ratio()[1])
    assert np.isnan(got.sink_share).all()


@pytest.mark.parametrize(("width", "sink"), [(404, True), (396, False)])
def test_an_image_token_massive_where_the_first_text_token_is_is_a_sink_in_a_model_wide_enough(
    width: int, sink: bool
) -> None:
    """A token that is nothing but one spike has φ = √d."""
    model = spiked(build("llava", **llava(width)), 0, 2, [(0, 7), (4, 7), (5, 9), (12, 7)], 1e4)
    got = measure_vision(model, inputs_for("llava"), k=1)
    assert got.of["first_text"].channel[1, 2, 0] == 7
    assert got.sink_values[1, 2, [0, 4, 12]] == pytest.approx(math.sqrt(width), rel=1e-4)  # the others' 10⁻⁴ of it
    assert got.sink_values[1, 2, 5] < 1
    assert [*zip(*got.sinks[1].nonzero(), strict=True)] == ([(2, 4)] if sink else [])
    assert got.sink_share[1] == pytest.approx(sink / (9 * IMAGES))
    assert [*zip(*got.high_norm[1].nonzero(), strict=True)] == [(2, 4), (2, 5)]


def test_sink_values_against_loops() -> None:
    inputs = inputs_for("llava")
    got = measure_vision(tiny("llava"), inputs, k=2)
    for row, state in enumerate(hidden_states(tiny("llava"), inputs, FAMILIES["llava"].final)):
        for image, stream in enumerate(state.double().numpy()):
            channels = np.argsort(-np.abs(stream[0]))[:2]
            expected = [max(abs(x[d]) / math.sqrt((x**2).mean()) for d in channels) for x in stream]
            np.testing.assert_allclose(got.sink_values[row, image], expected, rtol=SINGLE)


def test_the_rules_at_their_edges() -> None:
    kinds = {"patch": np.array([[True] * 5 + [False]])}
    values = np.array([[[20, 19.99, np.nan, 21, 0, 99]]])
    reading = VisionReading(kinds, {}, norms=np.array([[[1, np.nan, 3, 3.01, 1, 9]]]), sink_values=values)
    assert reading.high_norm[0, 0].nonzero()[0].tolist() == [3]
    assert reading.high_norm_share == [1 / 4]
    assert reading.sinks[0, 0].nonzero()[0].tolist() == [0, 3]
    assert reading.sink_share == [2 / 4]


def test_what_is_not_a_number_is_left_out_and_spoils_nothing_else() -> None:
    model = spiked(build("llava", **llava(404)), 1, 1, [(3, 0)], math.nan)
    got = measure_vision(spiked(model, 1, 1, [(2, 0)], math.inf), inputs_for("llava"), k=1)
    clean = measure_vision(build("llava", **llava(404)), inputs_for("llava"), k=1)
    assert np.isnan(got.norms[2, 1]).nonzero()[0].tolist() == [3]
    assert np.isnan(got.sink_values[2, 1]).nonzero()[0].tolist() == [2, 3]
    assert got.high_norm[2, 1].nonzero()[0].tolist() == [2]
    assert got.high_norm_share[2] == pytest.approx(1 / (9 * IMAGES - 1))
    assert got.sink_share[2] == 0
    assert got.of["image"].top[2, 1, 0] == got.ratio("image")[2] == math.inf
    np.testing.assert_array_equal(got.of["text"].top, clean.of["text"].top)
    np.testing.assert_array_equal(got.norms[:, [0, 2]], clean.norms[:, [0, 2]])


def test_nothing_known_is_nan() -> None:
    model = build("vit")
    find_layers(model)[1].register_forward_hook(lambda _m, _a, output: torch.full_like(output, torch.nan))
    got = measure_vision(model, inputs_for("vit"))
    assert np.isnan(got.of["patch"].top[2]).all()
    assert (got.of["patch"].position[2] == -1).all()
    assert np.isnan(got.ratio("patch")[2])
    assert np.isnan(got.high_norm_share[2])


@given(st.data(), st.integers(1, 3), st.integers(1, 12))
def test_kinds_of_a_prompt_partition_its_tokens(data: st.DataObject, images: int, tokens: int) -> None:
    def drawn(values: st.SearchStrategy[int]) -> Tensor:
        row = st.lists(values, min_size=tokens, max_size=tokens)
        return torch.tensor(data.draw(st.lists(row, min_size=images, max_size=images)))

    ids, mask = drawn(st.sampled_from([1, 7, 8, 9])), drawn(st.integers(0, 1))
    config = SimpleNamespace(image_token_id=9, video_token_id=8)
    kinds = token_kinds(config, {"input_ids": ids, "attention_mask": mask}, tokens)
    assert (torch.stack([*kinds.values()]).sum(0) == 1).all()
    for row in range(images):
        expected, met = [], False
        for token, real in zip(ids[row].tolist(), mask[row].tolist(), strict=True):
            kind = "padding" if not real else "image" if token in (8, 9) else "text" if met else "first_text"
            met |= kind == "first_text"
            expected.append(kind)
        assert [next(kind for kind in kinds if kinds[kind][row, place]) for place in range(tokens)] == expected


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.booleans(), st.booleans())
def test_kinds_of_an_image_partition_its_tokens(high: int, wide: int, registers: int, cls: bool, pair: bool) -> None:
    config = SimpleNamespace(patch_size=(2, 3) if pair else 2, num_register_tokens=registers)
    pixels = torch.zeros(2, 3, 2 * high, (3 if pair else 2) * wide)
    kinds = token_kinds(config, {"pixel_values": pixels}, cls + registers + high * wide)
    assert (torch.stack([*kinds.values()]).sum(0) == 1).all()
    order = ["cls"] * cls + ["register"] * registers + ["patch"] * (high * wide)
    assert [next(kind for kind in kinds if kinds[kind][1, place]) for place in range(len(order))] == order


def test_padding_is_no_part_of_the_model() -> None:
    inputs = inputs_for("llava")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 12:] = 0
    got = measure_vision(spiked(build("llava"), 0, 1, [(13, 2)], 1e3), inputs)
    assert got.kinds["padding"].sum() == 2
    assert got.of["padding"].top[1, 1, 0] == 1e3
    short = {name: value[:, :12] if value.ndim == 2 else value for name, value in inputs.items()}
    alone = measure_vision(build("llava"), short)
    np.testing.assert_allclose(got.of[ALL].top[:2, 1], alone.of[ALL].top[:2, 1], rtol=SINGLE)
    np.testing.assert_allclose(got.of[ALL].median[:2, 1], alone.of[ALL].median[:2, 1], rtol=SINGLE)


def test_kinds_may_be_given() -> None:
    inputs = inputs_for("vit")
    patch = torch.ones(IMAGES, 10, dtype=torch.bool)
    patch[:, 0] = False
    rows = {"first row": patch & (torch.arange(10) < 4), "patch": patch & (torch.arange(10) >= 4), "cls": ~patch}
    got = measure_vision(tiny("vit"), inputs, rows)
    assert set(got.of) == {ALL, *rows}
    assert (got.of["first row"].position <= 3).all()
    for kinds in (rows | {"first row": patch}, {"patch": patch}, rows | {ALL: patch}, {"patch": patch[:, 1:]}, {}):
        with pytest.raises(
            ConfigError, match=r"every token must be of exactly one kind|must be masks of shape \(3, 10\)"
        ):
            measure_vision(tiny("vit"), inputs, kinds)


class Idle(nn.Module):
    """Two blocks, of which one is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.config = SimpleNamespace(patch_size=2)

    def forward(self, pixel_values: Tensor) -> None:
        self.layers[0](pixel_values.reshape(len(pixel_values), -1, 4))


SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 16, "window_size": 2}
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no pixels": (lambda: tiny("vit"), {"input_ids": 1}, ConfigError, r"must hold `pixel_values`.*got \['input_ids'\]"),
    "two tokens besides": (
        lambda: transformers.DeiTModel(transformers.DeiTConfig(**VIT)),
        inputs_for("vit"),
        ModelError,
        "of 11 tokens 9 are patches of 4 and 0 registers. Pass `kinds`",
    ),
    "merged patches": (
        lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN)),
        {"pixel_values": torch.zeros(2, 3, 16, 16)},
        ModelError,
        r"h_1 must have axes \[image, token, channel\] and as many tokens as h_0, got \(2, 4, 16\)",
    ),
    "an idle block": (Idle, {"pixel_values": torch.zeros(2, 1, 4, 4)}, ModelError, "2 of 3 streams seen"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_and_leaves_no_hook(name: str) -> None:
    make, inputs, error, message = REFUSED[name]
    model = make()
    with pytest.raises(error, match=message):
        measure_vision(model, inputs)
    assert not own_hooks(model)


@pytest.mark.parametrize(("config", "tokens"), [({}, 4), ({"image_token_id": 9}, 6)])
def test_a_prompt_without_known_placeholders_is_refused(config: dict[str, int], tokens: int) -> None:
    with pytest.raises(ModelError, match=rf"placeholders in `input_ids`.* in 4 ids for {tokens} tokens. Pass `kinds`"):
        token_kinds(SimpleNamespace(**config), {"input_ids": torch.zeros(2, 4, dtype=torch.long)}, tokens)


def own_hooks(model: nn.Module) -> list[Any]:
    """Hooks of this package; transformers has its own, which it leaves on after the first forward."""
    hooks = [hook for m in model.modules() for hook in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]]
    return [hook for hook in hooks if hook.__module__.startswith("ma_monitor")]


def trained(name: str, watched: bool) -> tuple[Any, ...]:
    """Three updates of a model with a frozen part, from fixed seeds; everything that must not depend on watching."""
    random.seed(0)
    model, inputs = build(name), inputs_for(name)
    model.train()
    find_layers(model)[0].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    for _ in range(3):
        loss = model(**inputs)[0].float().square().mean()
        if watched:
            measure_vision(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not own_hooks(model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    weights = [p.detach().numpy().tobytes() for p in model.parameters()]
    return weights, hooks, [m.training for m in model.modules()], random.getstate(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", ["dinov2, registers", "llava"])
def test_training_is_bit_identical(name: str) -> None:
    assert trained(name, watched=True) == trained(name, watched=False)


def test_bfloat16_and_compiled_models() -> None:
    model = build("dinov2, registers").bfloat16()
    inputs = {"pixel_values": inputs_for("vit")["pixel_values"].bfloat16()}
    got = measure_vision(model, inputs)
    compiled: Any = torch.compile(model, backend="eager")
    np.testing.assert_array_equal(measure_vision(compiled, inputs).of[ALL].top, got.of[ALL].top)
    states = hidden_states(model, inputs, "layernorm")
    assert [*got.of[ALL].top[2, :, 0]] == [slow_entries(x, np.ones(14, bool))[0][3] for x in states[2].double().numpy()]


def test_a_vision_tower_is_read_by_itself() -> None:
    got = measure_vision(tiny("llava").model.vision_tower, {"pixel_values": inputs_for("llava")["pixel_values"]})
    assert {kind: int(mask.sum()) for kind, mask in got.kinds.items()} == {"cls": IMAGES, "patch": 9 * IMAGES}


def test_the_callback_watches_the_text_decoder_of_a_training_vlm(tmp_path: Path) -> None:
    names = ("kurtosis", "sinks", "compression")
    callback = MassiveActivationCallback(MonitorConfig(every=2, phenomena=names, strict=True))
    model = build("llava").train()
    make_trainer(tmp_path, [callback], model=model, max_steps=2).train()
    run = the_run(callback)
    assert run.steps.tolist() == [0, 1, 2]
    assert run.meta.model.name == "llama"
    assert run.meta.model.layers == LAYERS
    read = run.phenomena()
    assert {name.split("/")[0] for name in read} == set(names)
    assert all(np.isfinite(readings.values[:, 1:]).all() for readings in read.values())
