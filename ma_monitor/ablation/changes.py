"""The changes that are tried on every document, and what stands against each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from ma_monitor.ablation.interventions import Entries, Reading, Rule, entries_set, read_document
from ma_monitor.ablation.losses import document_loss
from ma_monitor.ablation.softening import (
    Parts,
    damped,
    find_parts,
    largest_other,
    softened,
    updates_of,
    weight_removed,
)
from ma_monitor.errors import MaMonitorError, ModelError
from ma_monitor.measure.forward import undisturbed_forward
from ma_monitor.measure.layers import find_layers
from ma_monitor.measure.phenomena.reading import measure_with
from ma_monitor.measure.probe import Probe
from ma_monitor.phenomena import METRICS, of_layers
from ma_monitor.runs.records import Measurements

Setting = Literal["zero", "mean", "half"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
"""What entries are set to: zero; their mean over the other documents (Sun et al. 2024, arXiv:2402.17762); half."""
DRAWS = 3
"""Random sets of entries that stand against the massive ones of a document; their losses are averaged."""
SEED = 0
BESIDES = {"sink_rate": "sinks/rate", "entropy": "compression/entropy"}
"""What is read under each change: the mean of the layers' sink rates, and the lowest matrix entropy of a layer."""


class Subject:
    """A model, its documents, and what undisturbed forwards of them show.

    Attributes:
        readings: Of each document.
        parts: Of each block; empty where they are not found.
        problems: What could not be done, a sentence each.
    """

    def __init__(self, model: nn.Module, documents: Sequence[Tensor], rule: Rule) -> None:
        """Reads every document once.

        Raises:
            ModelError: If the model cannot be measured.
        """
        self.model = model
        self.documents = documents
        self.layers = find_layers(model)
        self.readings: list[Reading] = [
            read_document(model, ids, rule, draws=DRAWS, seed=SEED + number) for number, ids in enumerate(documents)
        ]
        self.problems: list[str] = []
        self.parts: list[Parts] = []
        self._updates: tuple[int, dict[int, Tensor]] = (-1, {})
        try:
            self.parts = find_parts(model)
        except MaMonitorError as error:
            self.problems.append(f"nothing softened or removed: {error}")

    def loss(self, document: int) -> float:
        """Loss of a document in nats a token."""
        return document_loss(self.model, self.documents[document])

    def measured(self, document: int, *phenomena: str) -> Measurements:
        """A document's measurement with what is read besides; what cannot be read is among the problems."""

        def failed(name: str, error: Exception) -> None:
            problem = f"{name} not known: {error}"
            if problem not in self.problems:
                self.problems.append(problem)

        probe = Probe.from_ids(self.documents[document][None].numpy())
        return measure_with(self.model, probe, 0, k=1, phenomena=phenomena, failed=failed)

    def besides(self, document: int) -> dict[str, float]:
        """Largest ratio of a block's output, and ``BESIDES``; NaN where not known."""
        found = self.measured(document, *(key.split("/")[0] for key in BESIDES.values()))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = float((np.abs(found.top[1:, 0, 0]) / found.median[1:, 0]).max())
        shown = {n: of_layers(METRICS[k], found.phenomena[k]) for n, k in BESIDES.items() if k in found.phenomena}
        known = {name: value for name, value in shown.items() if value is not None}
        return {"ratio": ratio, **dict.fromkeys(BESIDES, np.nan), **known}

    def updates(self, document: int) -> dict[int, Tensor]:
        """The undisturbed updates of every block's feed-forward, of the document asked for last."""
        if self._updates[0] != document:
            with updates_of(self.parts) as found:
                undisturbed_forward(self.model, self.documents[document][None])
            self._updates = document, found
        return self._updates[1]

    def held_out(self, document: int, places: Entries, *, massive: bool) -> Entries:
        """The places of a document with what is there on average in the others.

        Of massive entries: the mean of the others' massive entries of the same layer and channel; where there are none,
        and of other entries, that of the channel over all tokens.
        """
        rest = [reading for other, reading in enumerate(self.readings) if other != document]
        even = np.mean([reading.means for reading in rest], axis=0)
        values = even[places.layer - 1, places.channel]
        if massive:
            theirs: dict[tuple[int, int], list[float]] = defaultdict(list)
            for entries in (reading.entries for reading in rest):
                for layer, channel, value in zip(entries.layer, entries.channel, entries.value, strict=True):
                    theirs[int(layer), int(channel)].append(float(value))
            keys = zip(places.layer, places.channel, strict=True)
            own = [theirs.get((int(layer), int(channel))) for layer, channel in keys]
            values = np.array([v if known is None else np.mean(known) for v, known in zip(values, own, strict=True)])
        return places.having(values)


@dataclass
class Change:
    """One change, document by document, and what stands against it.

    Attributes:
        table: Where its row goes.
        facts: What the row says of it.
        found: Name → a number for each document.
    """

    table: str
    facts: dict[str, Any]
    found: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def during(self, subject: Subject, document: int) -> AbstractContextManager[None]:
        """While open, the change is there."""
        raise NotImplementedError

    def controls(self, subject: Subject, document: int) -> Iterator[AbstractContextManager[None]]:
        """What it is compared with, after it has been tried on this document."""
        raise NotImplementedError

    def run(self, subject: Subject, document: int) -> None:
        """Tries it and its controls on a document."""
        with self.during(subject, document):
            self.found["loss"].append(subject.loss(document))
        control = []
        for against in self.controls(subject, document):
            with against:
                control.append(subject.loss(document))
        self.found["control"].append(float(np.mean(control)))
        with self.during(subject, document):
            self.keep(subject.besides(document))

    def keep(self, numbers: dict[str, float]) -> None:
        """Adds a document's numbers."""
        for key, value in numbers.items():
            self.found[key].append(value)


@dataclass
class SetEntries(Change):
    """Massive entries are set to something; against them random ones likewise."""

    def during(self, subject: Subject, document: int) -> AbstractContextManager[None]:
        """With the massive entries set."""
        own = self._own(subject.readings[document].entries)
        if len(self.found["entries"]) == document:
            self.found["entries"].append(float(len(own.layer)))
        return entries_set(subject.layers, self._values(subject, document, own, massive=True))

    def controls(self, subject: Subject, document: int) -> Iterator[AbstractContextManager[None]]:
        """With random ones set, draw by draw."""
        for drawn in subject.readings[document].random:
            values = self._values(subject, document, self._own(drawn), massive=False)
            yield entries_set(subject.layers, values)

    def _own(self, entries: Entries) -> Entries:
        layer = self.facts["layer"]
        return entries if layer is None else entries.of_layer(layer)

    def _values(self, subject: Subject, document: int, places: Entries, *, massive: bool) -> Entries:
        kind = self.facts["intervention"]
        if kind == "mean":
            return subject.held_out(document, places, massive=massive)
        return places.having(0.0 if kind == "zero" else places.value / 2)


@dataclass
class Soften(Change):
    """A block is softened at the massive token; against it all its tokens' updates are damped by as much in all."""

    updates: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def during(self, subject: Subject, document: int) -> Iterator[None]:
        """One of the softenings, and a look at the block's updates."""
        parts, token = subject.parts[self.facts["layer"] - 1], subject.readings[document].token
        with softened(parts, self.facts["intervention"], token), updates_of([parts]) as self.updates:
            yield

    def controls(self, subject: Subject, document: int) -> Iterator[AbstractContextManager[None]]:
        """Even damping of the same block."""
        changed, plain = self.updates[0], subject.updates(document)[self.facts["layer"] - 1]
        removed = float((changed - plain).norm(dim=1).sum() / plain.norm(dim=1).sum())
        self.found["removed"].append(removed)
        yield damped(subject.parts[self.facts["layer"] - 1], max(0.0, 1 - removed))


@dataclass
class RemoveWeight(Change):
    """The candidate for a super weight is zero; against it the largest other weight of its matrix."""

    def during(self, subject: Subject, document: int) -> AbstractContextManager[None]:
        """Without the candidate."""
        return weight_removed(self._down(subject), self.facts["row"], self.facts["column"])

    def controls(self, subject: Subject, document: int) -> Iterator[AbstractContextManager[None]]:
        """Without the other one."""
        down = self._down(subject)
        yield weight_removed(down, *largest_other(down, self.facts["row"], self.facts["column"]))

    def _down(self, subject: Subject) -> nn.Module:
        down: nn.Module | None = subject.parts[self.facts["layer"] - 1].down
        if down is None:
            raise ModelError("a candidate for a super weight is of a down projection, and this block has none")
        return down
