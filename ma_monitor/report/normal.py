"""Is this normal? A run beside past runs, in words."""

from __future__ import annotations

from ma_monitor.analysis import planned_end
from ma_monitor.learned.reference import LEVELS, PAPER, Standing, standing
from ma_monitor.numerics.values import none_if_not_finite
from ma_monitor.report.words import number, percent
from ma_monitor.runs.store import Run


def among_past_runs(run: Run, at: int) -> Standing | None:
    """Where the layers of a run stand among those of past runs at measured step ``at``.

    None where the planned length is not known, too early, and after the planned end.
    """
    end = planned_end(run, at)
    if end is None:
        return None
    now = run.ratios(ratio="ratio_of_means")[:, run.steps.searchsorted(at)]
    return standing(now, at / end, run.meta.model.parameters)


def normal_words(found: Standing) -> str:
    """The same: how few and small the past runs are, then layers by where they stand, the highest first."""
    past, levels = found.past, [f"{100 * level:.0f}" for level in LEVELS]
    names = {0.0: f"below {levels[0]} % of them", LEVELS[-1]: f"above {levels[-1]} % of them", None: "not known"}
    parts = zip(LEVELS[:-1], levels[:-1], levels[1:], strict=True)
    names |= {level: f"between {low} and {high} % of them" for level, low, high in parts}
    groups: dict[float | None, list[str]] = {}
    for layer, (ratio, above) in enumerate(zip(found.ratios, found.above, strict=True), start=1):
        groups.setdefault(above, []).append(f"layer {layer}: {number(none_if_not_finite(ratio))}")
    order = sorted(groups, key=lambda above: -1.0 if above is None else above, reverse=True)
    larger = found.times_larger
    far = f" This model is {number(larger)} times as large as the largest of them." if larger and larger > 1 else ""
    paper = ", ".join(f"{name} {value:,}" for name, value in PAPER.items())
    return "\n".join(
        [
            f"Is this normal? Beside the layers at the same depth and share of the training ({percent(found.share)})",
            f"in {past.runs} past {past.kind} runs ({_range(past.parameters)} parameters, "
            f"{_range(past.steps)} updates, ratios of at most {past.largest:g}):",
            *(f"  {names[above]}: {', '.join(groups[above])}" for above in order),
            f"Those runs are few and small.{far} The paper's largest ratios at the end: {paper} (its Figure 3).",
        ]
    )


def _range(ends: tuple[int, int]) -> str:
    """Two counts in words."""
    return " to ".join(f"{end / 1e6:.3g}M" if end >= 1e6 else f"{end:,}" for end in ends)
