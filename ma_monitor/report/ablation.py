"""What `ma-monitor ablate` found, ready to be shown: in a terminal, on the page and in dashboards alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ma_monitor.errors import StoreError
from ma_monitor.report.words import band, number, shown
from ma_monitor.runs.documents import read_document

Cell = str | int | float | bool | None
MOST = 10_000
"""Rows of a table; a model of 1,000 layers has fewer."""
_LOSS = {
    "difference": "loss change",
    "effect": "effect size",
    "control": "control",
    "beyond": "beyond control",
    "perplexity": "perplexity",
    "ratio": "largest ratio",
    "sink_rate": "sink rate",
    "entropy": "lowest entropy",
}
_ERRORS = {
    f"{rotation}_{kind}": f"{rotation}{words}"
    for rotation in ("none", "hadamard", "orthogonal")
    for kind, words in (("rest", ""), ("rest_apart", ", kept apart"))
}
_BANDS = ("difference", "control", "beyond", "against")
"""Numbers with an interval: their keys with ``_low`` and ``_high`` are there too."""


@dataclass(frozen=True)
class _Form:
    """How a table is shown: its title, what to know to read it, and key → heading."""

    title: str
    note: str
    columns: Mapping[str, str]


_FORMS = {
    "entries": _Form(
        "Massive entries set to something else, in all layers at once",
        "Zero; the mean of massive entries of the same layer and channel in the other documents; half of what each is. "
        "Control: as many random entries of the same layers, likewise.",
        {"intervention": "set to", "entries": "entries", **_LOSS},
    ),
    "layers": _Form(
        "Massive entries of one layer set to zero",
        "Control: as many random entries of that layer.",
        {"layer": "layer", "entries": "entries", **_LOSS},
    ),
    "softening": _Form(
        "Feed-forward of one layer softened at the massive token",
        "Cap: update at most twice the median token's; gain: the norm's gain halfway to its mean; product: input of "
        "the down projection no larger than the median token's. Control: the layer's updates of all tokens damped "
        "alike, by as much norm in all. Emergence layer beyond: what this softening did there, less what it did here.",
        {
            "intervention": "softening",
            "layer": "layer",
            "emergence": "emergence layer",
            "removed": "share of updates removed",
            **_LOSS,
            "against": "emergence layer beyond",
        },
    ),
    "super_weights": _Form(
        "Candidate for a super weight set to zero",
        "Row and column in the down projection, where its largest output and input are. Control: the largest other "
        "weight of the matrix.",
        {
            "layer": "layer",
            "row": "row",
            "column": "column",
            "spike_in": "largest input",
            "spike_out": "largest output",
            **_LOSS,
        },
    ),
    "quantisation": _Form(
        "Relative error of the other entries when a layer's output is quantised",
        "Symmetric absmax, one grid for a whole document (tensor) or for each token; rotated by nothing, a random "
        "Hadamard or a random orthogonal matrix first; kept apart: massive entries outside the grid, not rounded.",
        {"bits": "bits", "scale": "grid", "layer": "layer", **_ERRORS},
    ),
}


@dataclass(frozen=True)
class Shown:
    """One table.

    Attributes:
        key: Its name in the document.
        title: What it is about.
        note: What to know to read it.
        columns: Headings.
        cells: Value and words of each cell of each row; the words of a value with an interval have that too.
        plain: Headings and cells as plain values, the ends of an interval in columns of their own.
    """

    key: str
    title: str
    note: str
    columns: tuple[str, ...]
    cells: tuple[tuple[tuple[Cell, str], ...], ...]
    plain: tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]


@dataclass(frozen=True)
class Ablation:
    """What a run's directory holds of an ablation.

    Attributes:
        lines: What was ablated and how the model does without any change, in sentences.
        tables: The tables that have rows.
    """

    lines: list[str]
    tables: list[Shown]


def read_ablation(folder: Path) -> Ablation | None:
    """What a run's directory holds of an ablation; None where it holds none.

    Raises:
        StoreError: If the file is not a document of this kind.
    """
    document = read_document(folder, "ablation")
    if document is None:
        return None
    try:
        return Ablation(lines(document), tables(document))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(f"{folder / 'ablation.json'}: not what `ma-monitor ablate` writes ({error!r})") from error


def lines(document: Mapping[str, Any]) -> list[str]:
    """What was ablated, on what text, and how the model does without any change, in sentences.

    Raises:
        KeyError: If something is missing; like TypeError and ValueError, of a document that is no ablation.
    """
    base = {key: _checked(value) for key, value in document["base"].items()}
    said = [
        f"{shown(document['checkpoint'], 120)}: {int(document['documents']):,} documents of "
        f"{int(document['tokens']):,} tokens in all, from {shown(document['text'], 120)}; "
        f"{shown(document['precision'], 20)}.",
        f"Massive are {shown(document['rule'], 120)}.",
        f"Unchanged: loss {_word(base['loss'])}, perplexity {_word(base['perplexity'])}, largest ratio "
        f"{_word(base['ratio'])}, sink rate {_word(base['sink_rate'])}, lowest entropy of a layer "
        f"{_word(base['entropy'])}.",
        "Emergence layer: "
        + ("none that the rule finds." if document["emergence"] is None else f"{int(document['emergence'])}."),
    ]
    return said + [f"{shown(problem)}" for problem in document["problems"][:5]]


def tables(document: Mapping[str, Any]) -> list[Shown]:
    """The tables of a document that have rows.

    Raises:
        KeyError: As `lines`.
    """
    return [_shown(key, form, document[key]) for key, form in _FORMS.items() if document[key]]


def _shown(key: str, form: _Form, rows: Any) -> Shown:
    if not isinstance(rows, list) or len(rows) > MOST:
        raise ValueError(f"`{key}` must be a list of at most {MOST} rows")
    whole = [dict(_cells(row, form)) for row in rows]
    plain = tuple(end for name, heading in form.columns.items() for end in _ends(name, heading))
    return Shown(
        key,
        form.title,
        form.note,
        tuple(form.columns.values()),
        tuple(tuple((row[name], _words(name, row)) for name in form.columns) for row in whole),
        (plain, tuple(tuple(row.values()) for row in whole)),
    )


def _cells(row: Any, form: _Form) -> Iterator[tuple[str, Cell]]:
    """A row's cells in order, the ends of an interval behind its value."""
    for name in form.columns:
        for key in _ends(name, name):
            yield key, _checked(row[key.replace(" from", "_low").replace(" to", "_high")])


def _ends(name: str, heading: str) -> tuple[str, ...]:
    return (heading, f"{heading} from", f"{heading} to") if name in _BANDS else (heading,)


def _checked(value: Any) -> Cell:
    if value is not None and not isinstance(value, (str, int, float)):
        raise TypeError(f"a cell must be text, a number or null, got {type(value).__name__}")
    return shown(value, 60) if isinstance(value, str) else value


def _words(name: str, row: Mapping[str, Cell]) -> str:
    if name in _BANDS:
        value, low, high = (_number(row[key]) for key in _ends(name, name))
        return band(value, low, high)
    return _word(row[name])


def _number(value: Cell) -> float | None:
    if isinstance(value, str):
        raise TypeError(f"a number is text: {value[:20]!r}")
    return value


def _word(value: Cell) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value)
