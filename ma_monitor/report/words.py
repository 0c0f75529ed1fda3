"""Numbers, intervals and other people's text in words: what the command line and the page say alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNKNOWN = "-"
"""What a table shows where a number is not known."""
GROUPS = 6
"""At most so many groups of layers are listed."""


def printable(text: object) -> str:
    r"""Text that cannot steer a terminal: control characters, bidirectional marks and the like become ``\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def number(value: float | int | None) -> str:
    """Four significant digits, or thousands with commas; a dash where it is not known."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int) or 1e4 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def count(number: int, thing: str) -> str:
    """``1 step``, ``2 steps``, ``1,234 steps``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def band(value: float | None, low: float | None, high: float | None) -> str:
    """A value and its interval in three digits; an end that is not known is a question mark."""
    if value is None:
        return UNKNOWN
    middle, *ends = ("?" if end is None else _short(end) for end in (value, low, high))
    return f"{middle} [{', '.join(ends)}]"


def _short(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or 100 <= abs(value) < 1e12 else f"{value:.3g}"


def peak_words(peak: dict[str, Any] | None, *, planned: bool = True) -> str:
    """A peak's step, interval and whether it is ahead, in a cell; ``planned``: whether the end of the run is known."""
    if peak is None:
        return "not known"
    if peak["status"] == "none":
        return "none"
    if peak["status"] == "not_within_schedule":
        return "not within the schedule" if planned else "still rises at the last step looked at"
    if not peak["identified"]:
        return "not identified"
    steps = [None if peak[key] is None else round(peak[key]) for key in ("step", "low", "high")]
    return f"{peak['status']}: {band(*steps)}"


def asymptote_words(asymptote: dict[str, Any] | None) -> str:
    """An asymptote and its interval in a cell."""
    if asymptote is None:
        return "not known"
    if not asymptote["identified"]:
        return "not identified"
    return band(asymptote["value"], asymptote["low"], asymptote["high"])


def compare(layers: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every hypothesis over all layers, as the paper's Table 5 compares them; ``curve`` is Eq. 14.

    Args:
        layers: Documents of the layers' fits.

    Returns:
        Hypothesis → ``mean_r2`` over the ``layers`` that have one, and ``best``, the number of layers where its AICc is
        the lowest.
    """
    each = [{"curve": {"r2": layer["r2"], "aicc": layer["aicc"]}, **layer["hypotheses"]} for layer in layers]
    winners = [best_hypothesis(hypotheses) for hypotheses in each]
    compared: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for hypotheses in each for name in hypotheses):
        scores = [hypotheses[name]["r2"] for hypotheses in each if name in hypotheses]
        known = [score for score in scores if score is not None]
        mean = sum(known) / len(known) if known else None
        compared[name] = {"mean_r2": mean, "layers": len(known), "best": winners.count(name)}
    return compared


def best_hypothesis(hypotheses: dict[str, dict[str, Any]]) -> str | None:
    """The hypothesis of the lowest AICc, None where none has one."""
    scored = {name: entry["aicc"] for name, entry in hypotheses.items() if entry["aicc"] is not None}
    return min(scored, key=scored.__getitem__) if scored else None


def layers_words(layers: Sequence[int]) -> str:
    """``layer 3``, ``layers 1–4, 7``: numbers in rising order, neighbours joined, the many left out."""
    groups: list[list[int]] = []
    for layer in layers:
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    told = [f"{group[0]}–{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups]
    left = sum(map(len, groups[GROUPS:]))
    told = told[:GROUPS] + ([f"{left} more"] if left else [])
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(told)}"


def shown(text: object, most: int = 300) -> str:
    """Other people's text as a page shows it: nothing that steers, nothing endless."""
    whole = str(text)
    return printable(whole[:most]) + (f"… ({len(whole):,} characters)" if len(whole) > most else "")


def percent(share: float) -> str:
    """``75 %``."""
    return f"{100 * share:.0f} %"
