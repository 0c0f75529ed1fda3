"""Everything that is asked of one checkpoint, as one JSON document of tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ma_monitor.ablation.changes import SETTINGS, Change, RemoveWeight, SetEntries, Soften, Subject
from ma_monitor.ablation.interventions import Reading, Rule, first
from ma_monitor.ablation.losses import effect_size, estimate, perplexity
from ma_monitor.ablation.quantisation import BITS, ROTATIONS, SCALES, errors, rotations
from ma_monitor.ablation.softening import SOFTENINGS
from ma_monitor.errors import ConfigError
from ma_monitor.measure.forward import reading_layers, undisturbed_forward
from ma_monitor.measure.layers import describe_model
from ma_monitor.numerics.places import emergence_layer
from ma_monitor.numerics.values import none_if_not_finite

Progress = Callable[[int, int], None]
"""Told how many documents are done, and of how many."""
TABLES = ("entries", "layers", "softening", "super_weights")
SEED = 0


def ablate(
    model: nn.Module,
    documents: Sequence[NDArray[np.int64]],
    rule: Rule | None = None,
    *,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """What a model's massive activations do on these documents, as a JSON document of tables.

    The model is as it was afterwards, to the bit.

    Args:
        model: A causal language model with all its weights.
        documents: Token ids of each, ``[S]`` with S ≥ 2, at least two of them.
        rule: Which entries count as massive; the three largest of each layer and document where None.
        progress: Told after each document.

    Raises:
        ConfigError: If there are too few documents, or one is too short.
        ModelError: If the model cannot be measured, or gives no logits.
    """
    if len(documents) < 2 or any(ids.ndim != 1 or len(ids) < 2 for ids in documents):
        sizes = ", ".join(str(ids.size) for ids in documents[:5])
        raise ConfigError(
            f"an interval over documents needs at least two of at least two tokens, got {len(documents)} "
            f"of {sizes or 'no'} tokens"
        )
    rule = rule or Rule()
    subject = Subject(model, [torch.from_numpy(np.asarray(ids, np.int64)) for ids in documents], rule)
    changes, base, quantisation = _changes(subject), Change("base", {}), _Quantisation(subject)
    for document in range(len(documents)):
        base.found["loss"].append(subject.loss(document))
        base.keep(subject.besides(document))
        for change in changes:
            change.run(subject, document)
        quantisation.run(document)
        progress(document + 1, len(documents))
    emergence = _emergence(subject.readings)
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for change in changes:
        tables[change.table].append(_row(change, base))
    _compare_layers(changes, tables["softening"], emergence)
    return {
        "model": describe_model(model).name,
        "documents": len(documents),
        "tokens": sum(len(ids) for ids in documents),
        "rule": str(rule),
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "emergence": emergence,
        "base": _means(base),
        **tables,
        "quantisation": quantisation.rows(),
        "problems": subject.problems,
    }


def _emergence(readings: Sequence[Reading]) -> int | None:
    """The Massive Emergence Layer of these documents: `ma_monitor.numerics.places.emergence_layer` on their means."""
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = [reading.norms[1:] / reading.norms[:-1] for reading in readings]
    jump = np.mean([one[:, reading.token] for one, reading in zip(grown, readings, strict=True)], axis=0)
    typical = np.mean([np.median(one, axis=1) for one in grown], axis=0)
    return emergence_layer(np.r_[np.nan, jump], np.r_[np.nan, typical])


def _changes(subject: Subject) -> list[Change]:
    """Everything that is tried."""
    depth = len(subject.layers)
    numbers = range(1, depth + 1)
    changes: list[Change] = [SetEntries("entries", {"intervention": one, "layer": None}) for one in SETTINGS]
    changes += [SetEntries("layers", {"intervention": "zero", "layer": layer}) for layer in numbers]
    changes += [
        Soften("softening", {"intervention": softening, "layer": layer})
        for softening in SOFTENINGS
        for layer, parts in zip(numbers, subject.parts, strict=False)
        if parts.allow(softening)
    ]
    return changes + [RemoveWeight("super_weights", facts) for facts in _candidates(subject)]


def _candidates(subject: Subject) -> list[dict[str, Any]]:
    """The candidate for a super weight of each block, from the document in which its output's spike is largest."""
    if not any(parts.down for parts in subject.parts):
        return []
    read = [subject.measured(number, "super_weights").phenomena for number in range(len(subject.documents))]
    names = {"row": "output_channel", "column": "input_channel", "spike_in": "input", "spike_out": "output"}
    found = []
    for layer in range(1, len(subject.layers) + 1):
        rows = [{name: one[f"super_weights/{key}"][layer] for name, key in names.items()} for one in read if one]
        known = [row for row in rows if np.isfinite([*row.values()]).all()]
        if known:
            facts = max(known, key=lambda row: row["spike_out"])
            places = {key: int(facts.pop(key)) for key in ("row", "column")}
            found.append({"intervention": "zero", "layer": layer, **places, **{k: float(v) for k, v in facts.items()}})
    return found


def _means(change: Change) -> dict[str, float | None]:
    """Means over documents of what was found, and the perplexity."""
    means = {}
    for key, values in change.found.items():
        known = [value for value in values if np.isfinite(value)]
        means[key] = none_if_not_finite(float(np.mean(known))) if known else None
    return {**means, "perplexity": none_if_not_finite(perplexity(change.found["loss"]))}


def _row(change: Change, base: Change) -> dict[str, Any]:
    """A change's row: what it did to the loss, what its control did, and by how much more that is."""
    before, after, control = (np.array(v) for v in (base.found["loss"], change.found["loss"], change.found["control"]))
    return {
        **change.facts,
        **{key: value for key, value in _means(change).items() if key != "control"},
        **_interval("difference", after - before),
        "effect": none_if_not_finite(effect_size(after - before)),
        **_interval("control", control - before),
        **_interval("beyond", after - control),
    }


def _interval(name: str, differences: NDArray[np.float64]) -> dict[str, float | None]:
    """A mean over documents and its 95 % interval; None where it is not finite."""
    found = estimate(differences)
    values = {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: none_if_not_finite(value) for key, value in values.items()}


def _compare_layers(changes: Sequence[Change], rows: Sequence[dict[str, Any]], emergence: int | None) -> None:
    """Adds to each softening's row by how much more the same softening did at the emergence layer."""
    soft = [change for change in changes if change.table == "softening"]
    there = {
        change.facts["intervention"]: np.array(change.found["loss"])
        for change in soft
        if change.facts["layer"] == emergence
    }
    for change, row in zip(soft, rows, strict=True):
        own = there.get(change.facts["intervention"], np.full(len(change.found["loss"]), np.nan))
        row |= {"emergence": row["layer"] == emergence, **_interval("against", own - np.array(change.found["loss"]))}


class _Quantisation:
    """Errors of simulated quantisation of every block's output, summed over documents."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._found: dict[tuple[int, int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._rotations = rotations(subject.readings[0].means.shape[1], SEED)

    def run(self, document: int) -> None:
        """One forward; what is read is thrown away layer by layer."""
        entries = self._subject.readings[document].entries

        def read(row: int, value: Any) -> None:
            if row == 0:
                return
            hidden, own = first(value)[0], entries.of_layer(row)
            massive = torch.from_numpy(own.position * hidden.shape[1] + own.channel).to(hidden.device)
            for bits in BITS:
                for scale in SCALES:
                    kept = self._found[row, bits, scale]
                    for name in ROTATIONS:
                        rotation = self._rotations[name]
                        turned = None if rotation is None else rotation.to(hidden.device)
                        for key, error in errors(hidden, massive, turned, bits, scale).items():
                            kept[f"{name}_{key}"].append(error)

        with reading_layers(self._subject.layers, read):
            undisturbed_forward(self._subject.model, self._subject.documents[document][None])

    def rows(self) -> list[dict[str, Any]]:
        """A row for each kind of grid and each layer: means over documents."""
        order = sorted(self._found, key=lambda key: (-key[1], key[2], key[0]))
        return [
            {"layer": key[0], "bits": key[1], "scale": key[2]}
            | {name: none_if_not_finite(float(np.mean(values))) for name, values in self._found[key].items()}
            for key in order
        ]
