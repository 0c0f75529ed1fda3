"""Where the largest entries sit: token positions, tokens and channels, how steady that is, and what is massive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import is_fault
from ma_monitor.numerics.places import (
    KINDS,
    STEADY,
    candidate_since,
    emergence_layer,
    is_delimiter,
    kinds_of_token,
    massive_in_sequences,
    massive_on_average,
    most_common,
    share_at,
    since,
    spread_of,
)
from ma_monitor.report.overview import MASSIVE
from ma_monitor.report.words import UNKNOWN as NOT_KNOWN
from ma_monitor.report.words import layers_words, number, percent
from ma_monitor.runs.files import read_bounded
from ma_monitor.runs.records import UNKNOWN
from ma_monitor.runs.store import Run

NAMES = ("channel", "position", "token")


def places(run: Run, tokenizer: Path | None = None) -> dict[str, Any]:
    """Where the largest entry of each sequence sits at the last step, since when, and whether it counts as massive.

    Args:
        run: A run with measurements.
        tokenizer: A ``tokenizer.json``; looked for beside the run where None.

    Returns:
        ``rows``: a row a layer 1 … L, none where places are not known; ``words``: sentences about all
        layers; ``channel`` and ``position``: share of the sequences whose largest entry is at the place most common at
        the last step, ``[L, T]``.
    """
    stack, first = run.stack(), 1 - run.meta.first_layer
    found = {name: getattr(stack, name)[:, first:, :, 0].swapaxes(0, 1) for name in NAMES}
    top, median = (values.swapaxes(0, 1)[first:] for values in (stack.top[..., 0], stack.median))
    criteria, words = _criteria(run.steps, top, median)
    if (found["channel"][:, -1] == UNKNOWN).all():
        nothing = np.full(found["channel"].shape[:2], np.nan)
        return {"rows": [], "words": words, "channel": nothing, "position": nothing}
    usual = {name: most_common(values[:, -1]) for name, values in found.items()}
    shares = {
        name: np.where(usual["channel"][:, None] < 0, np.nan, share_at(values, usual[name][:, None]))
        for name, values in found.items()
    }
    texts = token_texts(run, sorted({int(one) for one in found["token"][:, -1].ravel()}), tokenizer)
    sign = np.sign(top[:, -1]).sum(axis=1)
    rows = [
        {
            "layer": row + 1,
            **{name: int(usual[name][row]) for name in usual},
            **{f"{name}_share": float(shares[name][row, -1]) for name in usual},
            "text": texts.get(int(usual["token"][row])),
            "sign": "+" if sign[row] > 0 else "−" if sign[row] < 0 else NOT_KNOWN,
            "since": since(run.steps, shares["channel"][row] >= STEADY),
            "position_since": since(run.steps, shares["position"][row] >= STEADY),
            "kinds": _kinds(found["position"][row, -1], found["token"][row, -1], texts),
            "massive_since": since(run.steps, run.ratios()[row] >= MASSIVE),
            **criteria[row],
        }
        for row in np.flatnonzero(usual["channel"] >= 0).tolist()
    ]
    words = [*_spread_words(found["channel"][:, -1], found["position"][:, -1]), *words]
    if unknown := [layer for layer, channel in enumerate(usual["channel"], start=1) if channel < 0]:
        words.append(f"Not known at the last step, of most sequences: {layers_words(unknown)}.")
    return {"rows": rows, "words": words, "channel": shares["channel"], "position": shares["position"]}


def _criteria(
    steps: NDArray[np.int64], top: NDArray[np.float64], median: NDArray[np.float64]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What two definitions call massive, of ``top`` and ``median [L, T, n]``: a row a layer, and sentences."""
    each, means = massive_in_sequences(top, median).mean(axis=2), massive_on_average(top, median)
    rows: list[dict[str, Any]] = [
        {"sun": float(share[-1]), "sun_since": since(steps, share >= STEADY), "owen": bool(mean[-1])}
        for share, mean in zip(each, means, strict=True)
    ]
    by_sun = [layer for layer, row in enumerate(rows, start=1) if row["sun"] >= STEADY]
    by_owen = [layer for layer, row in enumerate(rows, start=1) if row["owen"]]
    told = [layers_words(layers) if layers else "no layer" for layers in (by_sun, by_owen)]
    return rows, [
        f"Massive by Sun et al. (larger than 100 and at least 1000 times the median, in most sequences): {told[0]}. "
        f"By Owen et al. (the same of the means over sequences): {told[1]}."
    ]


def _kinds(position: NDArray[np.int32], token: NDArray[np.int32], texts: dict[int, str]) -> str:
    """Shares of the kinds of token among the sequences of a layer, the largest first, in words."""
    delimiters = np.array([one for one, text in texts.items() if is_delimiter(text)], dtype=np.int64)
    kinds = kinds_of_token(position, token, delimiters)
    shares = sorted(((float((kinds == code).mean()), name) for code, name in enumerate(KINDS)), reverse=True)
    told = [f"{name if texts or name == 'first' else 'not first'} {percent(share)}" for share, name in shares if share]
    return ", ".join(told) or NOT_KNOWN


def _spread_words(channel: NDArray[np.int32], position: NDArray[np.int32]) -> list[str]:
    """How alike places are over layers and sequences, ``[L, n]``."""
    spread = spread_of(channel, position)
    if spread is None:
        return []
    return [
        f"Over all layers and sequences, {percent(spread[0])} of the largest entries are in one channel and "
        f"{percent(spread[1])} at the first token."
    ]


def findings(run: Run) -> list[str]:
    """What numbers by layer do not say of what was read besides: where it came about, and since when."""
    told = []
    if found := _read_alike(run, "emergence", ("norm_jump", "typical_jump")):
        told.append(_then(run, found[0]) + _emergence(*found))
    if found := _read_alike(run, "super_weights", ("output_channel", "input_channel", "value", "past_50")):
        told.append(_then(run, found[0]) + _super_weights(*found))
    return told


def _then(run: Run, steps: NDArray[np.int64]) -> str:
    """When something was read last, in words, where that is not at the last measurement."""
    return "" if steps[-1] == run.steps[-1] else f"At step {steps[-1]:,}, where this was read last: "


def _read_alike(run: Run, name: str, metrics: Sequence[str]) -> list[NDArray[Any]]:
    """Steps ``[T]`` and metrics ``[T, R]`` of a phenomenon; empty where they were not read together."""
    read = run.phenomena()
    found = [readings for metric in metrics if (readings := read.get(f"{name}/{metric}")) is not None]
    shapes = {readings.values.shape for readings in found}
    if len(found) < len(metrics) or len(shapes) > 1 or found[0].values.ndim != 2:
        return []
    return [found[0].steps, *(readings.values for readings in found)]


def _emergence(steps: NDArray[np.int64], jump: NDArray[np.float64], typical: NDArray[np.float64]) -> str:
    """In which layer the massive token emerges; arrays ``[T, R]``."""
    if not np.isfinite([jump[-1, 1:], typical[-1, 1:]]).all():
        return "Where the massive token emerges is not known: not every layer's norms could be read as finite numbers."
    layers = np.array([emergence_layer(*each) or 0 for each in zip(jump, typical, strict=True)])
    now = int(layers[-1])
    if not now:
        return "The massive token emerges in no one layer: its norm nowhere grows for good beyond the other tokens'."
    return (
        f"The massive token emerges in layer {now}, as it has since step {since(steps, layers == now):,}: its norm "
        f"grows {number(float(jump[-1, now]))}-fold there, the typical token's {number(float(typical[-1, now]))}-fold."
    )


def _super_weights(steps: NDArray[np.int64], *read: NDArray[np.float64]) -> str:
    """Which weights are candidates, and since when; channels of output and input, weights, and spikes ``[T, R]``."""
    row, column, value, past = (values.T for values in read)
    known = np.isfinite(row[:, -1]) & np.isfinite(column[:, -1]) & np.isfinite(value[:, -1])
    spikes = past[:, -1] >= STEADY
    told = [
        f"layer {layer}: W[{row[layer, -1]:.0f}, {column[layer, -1]:.0f}] = {number(float(value[layer, -1]))}, "
        f"the candidate since step {candidate_since(steps, row[layer], column[layer]):,}, "
        f"past 50 since step {since(steps, past[layer] >= STEADY):,}"
        for layer in np.flatnonzero(known & spikes)
    ]
    if not told and spikes.any():
        there = layers_words([int(layer) for layer in np.flatnonzero(spikes)])
        return f"No one super weight: past 50 in most sequences in {there}, which have no one place in common."
    if np.isnan(past[:, -1]).all():
        return "Whether there is a super weight is not known: no down projection could be read."
    if not told:
        return "No super weight: of no down projection that was read are input and output past 50 in most sequences."
    return f"Candidate super weights, by row and column of the down projection: {'; '.join(told)}."


def token_texts(run: Run, ids: list[int], path: Path | None = None) -> dict[int, str]:
    """Text of token ids, by the tokenizer that a Trainer saves beside the run; empty where there is none."""
    found = path or next(
        (file for folder in (run.path, run.path.parent) if (file := folder / "tokenizer.json").is_file()), None
    )
    if found is None:
        return {}
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(read_bounded(found).decode())
        return {one: tokenizer.decode([one], skip_special_tokens=False) for one in ids if one >= 0}
    except BaseException as error:  # for a file that is no tokenizer the library raises anything: ids are shown then
        if not is_fault(error):
            raise
        return {}
