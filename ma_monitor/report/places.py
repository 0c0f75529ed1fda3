"""Where the largest entries sit: token positions, tokens and channels, and how steady that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import is_fault
from ma_monitor.report.words import UNKNOWN as NOT_KNOWN
from ma_monitor.runs.files import read_bounded
from ma_monitor.runs.records import UNKNOWN
from ma_monitor.runs.store import Run

STEADY = 0.5
"""An entry is at its place of today as long as it is in at least this share of the sequences."""


def places(run: Run, tokenizer: Path | None = None) -> dict[str, Any]:
    """Where the largest entry of each sequence sits at the last step, and since when.

    Args:
        run: A run with measurements.
        tokenizer: A ``tokenizer.json``; looked for beside the run where None.

    Returns:
        ``rows``: a row a layer 1 … L, empty where places are not known (imported data); ``channel`` and ``position``:
        share of the sequences whose largest entry is at the place most common at the last step, ``[L, T]``.
    """
    stack, first = run.stack(), 1 - run.meta.first_layer
    channel, position, token = (
        getattr(stack, name)[:, first:, :, 0].swapaxes(0, 1) for name in ("channel", "position", "token")
    )
    if (channel[:, -1] == UNKNOWN).all():
        nothing = np.full(channel.shape[:2], np.nan)
        return {"rows": [], "channel": nothing, "position": nothing}
    usual = {name: _usual(values) for name, values in (("channel", channel), ("position", position), ("token", token))}
    shares = {
        name: (values == usual[name][:, None, None]).mean(axis=2)
        for name, values in (("channel", channel), ("position", position), ("token", token))
    }
    texts = token_texts(run, sorted({int(one) for one in usual["token"]}), tokenizer)
    sign = np.sign(stack.top[-1, first:, :, 0]).sum(axis=1)
    rows = [
        {
            "layer": row + 1,
            **{name: int(usual[name][row]) for name in usual},
            **{f"{name}_share": float(shares[name][row, -1]) for name in usual},
            "text": texts.get(int(usual["token"][row])),
            "sign": "+" if sign[row] > 0 else "−" if sign[row] < 0 else NOT_KNOWN,
            "since": _since(run.steps, shares["channel"][row]),
        }
        for row in range(len(channel))
    ]
    return {"rows": rows, "channel": shares["channel"], "position": shares["position"]}


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


def _usual(values: NDArray[np.int32]) -> NDArray[np.int64]:
    """The most common value over sequences at the last step, ``[L]``, of ``[L, T, n]``; the smallest of equals."""
    return np.array([np.bincount(row - UNKNOWN).argmax() + UNKNOWN for row in values[:, -1]], dtype=np.int64)


def _since(steps: NDArray[np.int64], shares: NDArray[np.float64]) -> int | None:
    """First step from which the entry has stayed where it is, ``shares [T]``; None where it is nowhere steadily."""
    away = np.flatnonzero(shares < STEADY)
    start = int(away[-1]) + 1 if away.size else 0
    return int(steps[start]) if start < len(steps) else None
