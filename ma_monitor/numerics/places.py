"""Where the largest entries sit, how steady that is, since when, and whether they count as massive.

Everything here needs the stored measurements alone. Axes as in a run's stack: ``T`` steps, ``R`` layers, ``n``
sequences. A negative place is one that is not known (imported data).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEADY = 0.5
"""An entry is at a place, and a layer meets a criterion, where at least this share of the sequences has it so."""
SIZE, TIMES = 100.0, 1000.0
"""Sun et al. (2024, arXiv:2402.17762): an activation is massive that is larger than 100 and at least 1000 times the
median of its hidden state."""
JUMP = 3.0
"""A massive token emerges where its norm grows so many times as much as that of the typical token (own rule)."""
FIRST, DELIMITER, OTHER = range(3)
KINDS = ("first", "delimiter", "other")
"""Kinds of token, by their code."""
DELIMITERS = (".", "\n")
"""Delimiters as Sun et al. have them; spaces around them, and several newlines in one token, count alike (own rule)."""


def most_common(values: NDArray[np.integer]) -> NDArray[np.int64]:
    """The value most common over sequences, the smallest of equals, ``[…, n]`` → ``[…]``."""
    rows = [np.unique(row, return_counts=True) for row in values.reshape(-1, values.shape[-1])]
    usual = [each[counts.argmax()] for each, counts in rows]
    return np.array(usual, dtype=np.int64).reshape(values.shape[:-1])


def share_at(values: NDArray[np.integer], place: NDArray[np.integer] | int) -> Floats:
    """Share of the sequences that have a place, ``[…, n]`` and ``[…]`` → ``[…]``."""
    return np.asarray((values == np.asarray(place)[..., None]).mean(axis=-1))


def since(steps: NDArray[np.int64], holds: NDArray[np.bool_]) -> int | None:
    """The first step from which something has held without a break, ``holds [T]``; None where it does not now."""
    away = np.flatnonzero(~holds)
    start = int(away[-1]) + 1 if away.size else 0
    return int(steps[start]) if start < len(steps) else None


def spread_of(channel: NDArray[np.integer], position: NDArray[np.integer]) -> tuple[float, float] | None:
    """How alike the places of one measurement are over layers and sequences, of ``[R, n]``; None where not known.

    Returns:
        Share of the layers and sequences whose largest entry is in the channel that is most common among them, and
        share of those where it is at the first token.
    """
    known = (channel >= 0) & (position >= 0)
    if not known.any():
        return None
    usual = int(most_common(channel[known]))
    return float((channel[known] == usual).mean()), float((position[known] == 0).mean())


def is_delimiter(text: str) -> bool:
    """Whether a token's text is a delimiter."""
    bare = text.strip(" \t\r▁")
    return bare in DELIMITERS or (bare != "" and set(bare) == {"\n"})


def kinds_of_token(
    position: NDArray[np.integer], token: NDArray[np.integer], delimiters: NDArray[np.integer]
) -> NDArray[np.int64]:
    """The kind of each token by its position and id, all of one shape: `FIRST`, whatever it is, `DELIMITER`, `OTHER`.

    Args:
        position: Token positions.
        token: Token ids.
        delimiters: Ids of the delimiters, ``[m]``.

    Returns:
        Codes of `KINDS`; −1 where the place is not known.
    """
    kinds = np.where(position == 0, FIRST, np.where(np.isin(token, delimiters), DELIMITER, OTHER))
    return np.where((position < 0) | (token < 0), -1, kinds)


def massive_in_sequences(top: Floats, median: Floats) -> NDArray[np.bool_]:
    """Sun et al.'s criterion for each sequence: abs > 100 and ≥ 1000 × median, of ``[…, n]`` and ``[…, n]``.

    The median is that of all entries of the sequence in that layer. What is not a number is not massive.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray((np.abs(top) > SIZE) & (np.abs(top) >= TIMES * median))


def massive_on_average(top: Floats, median: Floats) -> NDArray[np.bool_]:
    """Owen et al.'s form (2025, arXiv:2503.22329): the same of the means over sequences, ``[…, n]`` → ``[…]``.

    Theirs is for a layer; for a single activation their code has > in both parts. A sequence whose numbers are not
    known makes both means unknown, and the layer not massive.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return massive_in_sequences(np.abs(top).mean(axis=-1), median.mean(axis=-1))


def emergence_layer(jump: Floats, typical: Floats) -> int | None:
    """The Massive Emergence Layer: where the massive token's norm jumps and does not fall back (own rule).

    The layer is read from a plot in the source (arXiv:2605.08504), whose code has it as a constant. Here it is the
    first layer ℓ with jump_ℓ ≥ 3·typical_ℓ, since early layers multiply every token's norm, after which the norm
    relative to the typical token's stays at least 3 times what it was before ℓ until it is largest: a single token's
    noise falls back, and what late layers take away again does not count.

    Args:
        jump: ``||x_ℓ||/||x_{ℓ−1}||`` of the massive token, ``[R]``, of layers 0 … L; the first is not known.
        typical: The median of the same over all tokens, ``[R]``.

    Returns:
        The layer; None where there is none, or a number is not known.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        growth = (jump / typical)[1:]
        relative = np.cumprod(np.r_[1.0, growth])
    if not np.isfinite(relative).all():
        return None
    peak = int(relative.argmax())
    for layer in range(1, peak + 1):
        if (relative[layer : peak + 1] >= JUMP * relative[layer - 1]).all():
            return layer
    return None


def candidate_since(steps: NDArray[np.int64], output: Floats, given: Floats) -> int | None:
    """Since when a layer's candidate super weight is the one that it is now: when it formed.

    Args:
        steps: Steps at which it was read, ``[T]``.
        output: Channel of the largest output, ``[T]``, NaN where sequences have none in common.
        given: Channel of the largest input, likewise.

    Returns:
        None where there is none now.
    """
    return since(steps, (output == output[-1]) & (given == given[-1]))
