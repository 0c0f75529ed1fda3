"""All of it on a model whose spike is known, on one that has learned nothing, and on a trained one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ma_monitor.ablation.changes import SETTINGS, Change, SetEntries, Subject
from ma_monitor.ablation.experiment import TABLES, ablate
from ma_monitor.ablation.interventions import Rule, entries_set
from ma_monitor.ablation.losses import document_loss, estimate
from ma_monitor.ablation.quantisation import errors
from ma_monitor.ablation.softening import SOFTENINGS
from ma_monitor.errors import ConfigError, ModelError
from ma_monitor.measure.layers import find_layers
from ma_monitor.replay.models import ModelLoader
from tests.ablation.models import (
    CHANNEL,
    LAYERS,
    documents,
    hooks,
    spiky_documents,
    spiky_llama,
    state,
    streams,
)
from tests.training import VOCABULARY, tiny_llama

Row = dict[str, Any]
EQUAL = 1e-6
"""float32 losses of one forward, computed twice in the same order: equal but for how means are taken."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return spiky_llama()


@pytest.fixture(scope="module")
def document(model: nn.Module) -> dict[str, Any]:
    before = state(model)
    done: list[tuple[int, int]] = []
    found = ablate(model, spiky_documents(3), Rule(1), progress=lambda *now: done.append(now))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert hooks(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def rows(document: dict[str, Any], table: str, **facts: object) -> list[Row]:
    return [row for row in document[table] if all(row[key] == value for key, value in facts.items())]


def losses(model: nn.Module) -> list[float]:
    return [document_loss(model, torch.from_numpy(ids)) for ids in spiky_documents(3)]


def test_it_is_json(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["model"], document["documents"], document["tokens"], document["precision"]) == (
        "llama",
        3,
        12 + 11 + 10,
        "float32",
    )
    assert document["problems"] == []
    assert document["rule"] == "the 1 largest entries of each layer and document"


def test_all_that_is_tried(document: dict[str, Any]) -> None:
    layers = list(range(1, LAYERS + 1))
    assert [row["intervention"] for row in document["entries"]] == list(SETTINGS)
    assert [row["layer"] for row in document["layers"]] == layers
    assert [(row["intervention"], row["layer"]) for row in document["softening"]] == [
        (softening, layer) for softening in SOFTENINGS for layer in layers
    ]
    assert [row["layer"] for row in document["super_weights"]] == layers
    assert len(document["quantisation"]) == 4 * LAYERS


def test_zero_by_hand(model: nn.Module, document: dict[str, Any]) -> None:
    """The largest entry of every layer is set to zero, layer by layer, by weights alone where that can be."""
    before, after = losses(model), []
    for ids in spiky_documents(3):
        handles = []
        for number, layer in enumerate(find_layers(model), start=1):
            place = divmod(int(streams(model, ids)[number].abs().argmax()), 16)

            def zero(_module: nn.Module, _args: Any, output: Any, place: tuple[int, int] = place) -> Any:
                whole = output[0] if isinstance(output, tuple) else output
                whole[0, place[0], place[1]] = 0
                return output

            handles.append((layer, zero))
        removers = [layer.register_forward_hook(hook) for layer, hook in handles]
        after.append(document_loss(model, torch.from_numpy(ids)))
        for remover in removers:
            remover.remove()
    (row,) = rows(document, "entries", intervention="zero")
    difference = np.array(after) - np.array(before)
    assert row["entries"] == LAYERS
    assert row["loss"] == pytest.approx(np.mean(after), rel=EQUAL)
    assert row["perplexity"] == pytest.approx(math.exp(np.mean(after)), rel=EQUAL)
    expected = estimate(difference)
    assert [row["difference"], row["difference_low"], row["difference_high"]] == pytest.approx(
        [expected.mean, expected.low, expected.high], abs=EQUAL
    )
    assert row["effect"] == pytest.approx(difference.mean() / difference.std(ddof=1), rel=1e-3)
    assert row["beyond"] == pytest.approx(row["difference"] - row["control"], abs=EQUAL)
    assert row["ratio"] < 100 < document["base"]["ratio"], "the spike is gone"
    assert document["base"]["loss"] == pytest.approx(np.mean(before), rel=EQUAL)


def test_the_mean_is_of_the_other_documents(model: nn.Module) -> None:
    ids = [torch.from_numpy(each) for each in spiky_documents(3)]
    subject = Subject(model, ids, Rule(1))
    own = subject.readings[0].entries
    found = subject.held_out(0, own, massive=True)
    for index, (layer, channel) in enumerate(zip(own.layer, own.channel, strict=True)):
        theirs = [
            float(value)
            for reading in subject.readings[1:]
            for at, where, value in zip(
                reading.entries.layer, reading.entries.channel, reading.entries.value, strict=True
            )
            if (at, where) == (layer, channel)
        ]
        assert theirs, "every document has its largest entry in the same channels"
        assert found.value[index] == pytest.approx(np.mean(theirs))
    (drawn, *_) = subject.readings[0].random
    others = [
        [float(s[layer].mean(dim=0)[c]) for layer, c in zip(drawn.layer, drawn.channel, strict=True)]
        for s in (streams(model, each.numpy()) for each in ids[1:])
    ]
    even = subject.held_out(0, drawn, massive=False)
    assert even.value == pytest.approx(np.mean(others, axis=0), rel=1e-4, abs=1e-6)
    alone = own.having(1.0)
    alone.channel[:] = 9  # where no document has a massive entry
    np.testing.assert_array_equal(
        subject.held_out(0, alone, massive=True).value, subject.held_out(0, alone, massive=False).value
    )


def test_where_it_comes_from(document: dict[str, Any]) -> None:
    assert document["emergence"] == 2
    (at,) = rows(document, "softening", intervention="cap", layer=2)
    assert at["emergence"]
    assert at["removed"] == pytest.approx(1, abs=0.01), "nearly all of the updates' norm is the spike's"
    assert at["ratio"] < 100
    assert (at["against"], at["against_low"], at["against_high"]) == (0, 0, 0)
    for row in rows(document, "softening", intervention="cap"):
        assert row["emergence"] == (row["layer"] == 2)
        if not row["emergence"]:
            assert (row["removed"], row["difference"], row["effect"]) == (0, 0, None)
            assert row["ratio"] == document["base"]["ratio"]
            assert row["against"] == pytest.approx(at["difference"], abs=EQUAL)
    (candidate,) = rows(document, "super_weights", layer=2)
    assert (candidate["row"], candidate["column"]) == (CHANNEL, 3)
    assert candidate["spike_out"] > 300
    assert candidate["ratio"] < 100
    assert candidate["difference"] == pytest.approx(at["difference"], abs=1e-3), "both take the spike away"
    assert abs(candidate["control"]) < 0.1 * abs(candidate["difference"])


def test_quantisation_by_hand(model: nn.Module, document: dict[str, Any]) -> None:
    (row,) = rows(document, "quantisation", layer=2, bits=8, scale="tensor")
    found = []
    for ids in spiky_documents(3):
        hidden = streams(model, ids)[2]
        found.append(errors(hidden, hidden.abs().argmax().reshape(1), None, 8, "tensor"))
    for key in ("error", "rest", "error_apart", "rest_apart"):
        assert row[f"none_{key}"] == pytest.approx(np.mean([each[key] for each in found]), rel=1e-5)
    assert row["none_rest"] > 30 * row["none_rest_apart"]
    assert row["hadamard_rest"] < row["orthogonal_rest"]


def test_random_entries_of_an_untrained_model_do_nothing() -> None:
    """Of a model that has learned nothing, setting entries moves the loss either way: 0 is in the interval."""
    model = tiny_llama(num_hidden_layers=LAYERS)
    subject = Subject(model, [torch.from_numpy(ids) for ids in documents(4)], Rule(3))
    change, before = SetEntries("entries", {"intervention": "zero", "layer": None}), []
    for number in range(4):
        before.append(subject.loss(number))
        change.run(subject, number)
    control = estimate(np.array(change.found["control"]) - np.array(before))
    assert control.low < 0 < control.high
    assert max(abs(control.low), abs(control.high)) < 0.01 * math.log(VOCABULARY)


def test_a_trained_model(shared_data: Path) -> None:
    """A real training at step 3000: massive entries count, as many random ones do not, and the intervals are apart."""
    folder = shared_data / "checkpoint"
    model = ModelLoader(torch.float32, torch.device("cpu")).load(folder / "neox-14m-step3000")
    ids = torch.from_numpy(np.load(folder / "probe_ids.npy")[:, :80])
    subject = Subject(model, list(ids), Rule(3))
    losses: dict[str, list[float]] = {"plain": [], "massive": [], "random": []}
    for reading, own in zip(subject.readings, ids, strict=True):
        losses["plain"].append(document_loss(model, own))
        for name, places in (("massive", reading.entries), ("random", reading.random[0])):
            with entries_set(subject.layers, places.having(0.0)):
                losses[name].append(document_loss(model, own))
    massive, random = (estimate(np.array(losses[name]) - np.array(losses["plain"])) for name in ("massive", "random"))
    assert massive.low > random.high
    assert massive.mean > 5 * abs(random.mean)


class Bare(nn.Module):
    """A block that holds something and runs none of it."""

    def __init__(self, *held: nn.Module) -> None:
        super().__init__()
        self.held = nn.ModuleList(held)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden * 1.5


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        (
            [],
            "nothing softened or removed: a block must have a feed-forward to be changed there, and block 1 has none",
        ),
        (
            [nn.Linear(16, 16)],
            "nothing softened or removed: every block's feed-forward must run to be changed; of 2 blocks 0 did",
        ),
    ],
)
def test_what_a_model_has_not(held: list[nn.Module], problem: str) -> None:
    model: Any = tiny_llama()
    model.model.layers = nn.ModuleList([Bare(*held), Bare(*held)])
    found = ablate(model, documents(2))
    assert found["softening"] == found["super_weights"] == []
    assert any(one.startswith(problem) for one in found["problems"])
    assert any(one.startswith("sinks not known: ") for one in found["problems"])
    assert found["base"]["sink_rate"] is None
    assert found["entries"][0]["difference"] is not None


def test_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match="at least two of at least two tokens, got 1 of 12 tokens"):
        ablate(model, documents(1))
    with pytest.raises(ConfigError, match="got 2 of 1, 12 tokens"):
        ablate(model, [np.array([1]), *documents(1)])
    with pytest.raises(ModelError, match="a loss needs a causal language model"):
        ablate(model.model, documents(2))
    with pytest.raises(NotImplementedError):
        Change("base", {}).during(Subject(model, [], Rule()), 0)
    assert TABLES == ("entries", "layers", "softening", "super_weights")


def test_a_threshold_that_nothing_reaches(model: nn.Module) -> None:
    subject = Subject(model, [torch.from_numpy(ids) for ids in spiky_documents(2)], Rule(threshold=1e9))
    for setting in SETTINGS:
        change = SetEntries("entries", {"intervention": setting, "layer": None})
        change.run(subject, 0)
        assert change.found["entries"] == [0]
        assert change.found["loss"] == change.found["control"] == [subject.loss(0)]
