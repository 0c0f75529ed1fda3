"""What deserves a person's attention: one pure rule set for live training, replay and finished runs alike.

| rule | raised for a layer when | level |
|---|---|---|
| `past_100`, `past_1000` | its ratio is at least that | info, warning |
| `forecast_100`, `forecast_1000` | it will be by the planned end, with at least 80 % | info, warning |
| `jump` | its ratio at least doubled or halved from one measurement to the next, 5 times its usual change | warning |
| `not_finite` | the probe's activations hold NaN or infinities | error |
| `peak_passed` | the forecast identifies its peak, and the peak lies behind | info |
| `probe_failed` | (no layer) a measurement could not be made | error |

Each is raised once: what has been told is kept by key, in the run's diary and in the Trainer's checkpoints. Layers that
come to a rule at one measurement share one alert. A rule that has spoken is silent for 100 steps, or a tenth of the
training so far where that is more; what comes in between is told after that, not lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ma_monitor.report.words import number, printable

Level = Literal["info", "warning", "error"]

_BOUNDS: tuple[tuple[int, Level], ...] = ((100, "info"), (1000, "warning"))
"""Ratios that count. Sun et al. (2024) call an activation massive from about 1000 times the median on."""
BOUNDS = tuple(bound for bound, _ in _BOUNDS)
SURE = 0.8
"""Probability from which a forecast crossing is told: that of the intervals shown everywhere."""
EARLY = 0.1
"""Share of the planned training before which no forecast crossing is told. Of ten real trainings four would have been
told of one without this: three of one that did not come, all of them earlier, and one, later, of one that did."""
JUMP, UNUSUAL, USUAL, QUARTILE = 2.0, 5.0, 10, 0.75
"""A jump: factor of the change, and that many times the upper quartile of the changes between the last measurements.

Ten real trainings without incident have none; their fastest growth, 2.8-fold from one measurement to the next, is 3.1
times that quartile.
"""
PAUSE, SHARE = 100, 10
"""Steps for which a rule is silent after it has spoken; at least one part in so many of the training so far."""
TITLE, LONGEST = 63, 300
"""Characters of a title, as W&B has it; of other people's text that is shown."""
_KEY = re.compile(r"(\w+)@(\d+):((?:\d+,)*\d+)?")


@dataclass(frozen=True)
class Alert:
    """Something to tell a person, once.

    Attributes:
        rule: Its name.
        step: Updates done.
        layers: Whom it is about, the most affected first; empty where it is about no layer.
        value: The number of the first layer: a ratio, a probability, a factor or a count; None where there is none.
        title: At most ``TITLE`` characters.
        text: What happened and what to do.
        level: How bad it is.
    """

    rule: str
    step: int
    layers: tuple[int, ...]
    value: float | None
    title: str
    text: str
    level: Level

    @property
    def key(self) -> str:
        """What it is known by once it has been told, one word such as ``past_1000@2100:7,9``."""
        return f"{self.rule}@{self.step}:{','.join(map(str, self.layers))}"


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Attributes:
        steps: Measured steps so far, ``[T]``.
        ratios: Ratios of layers 1 … L, ``[L, T]``.
        not_finite: Number of NaN and infinite entries of each layer at the last step, ``[L]``.
        forecast: The forecast's documents of layers 1 … L; empty where none was due.
    """

    steps: NDArray[np.int64]
    ratios: NDArray[np.float64]
    not_finite: NDArray[np.int64]
    forecast: Sequence[dict[str, Any]] = ()


def due_alerts(facts: Facts, told: Iterable[str]) -> tuple[Alert, ...]:
    """The alerts of the last measurement, in the order of the table above.

    Args:
        facts: The measurements and, where due, the forecast.
        told: Keys of every alert of the run so far; what is no key is passed over.
    """
    heard, step = _heard(told), int(facts.steps[-1])
    before = int(facts.steps[-2]) if len(facts.steps) > 1 else -1
    alerts = []
    for rule in _RULES:
        last, named = heard.get(rule.name, (-PAUSE, frozenset()))
        speaks_from = last + max(PAUSE, last // SHARE)
        if step < speaks_from:
            continue
        found = rule.find(facts, last if before < speaks_from else before)  # what it has not looked at yet
        layers = tuple(layer for layer in found if rule.name == "jump" or layer not in named)
        if layers:
            first = layers[0]
            subject = f"Layer {first}" if len(layers) == 1 else f"Layer {first} and {len(layers) - 1} more"
            title, text = rule.words(facts, first, found[first])
            others = f" Likewise layer {', '.join(map(str, layers[1:]))}." if layers[1:] else ""
            title, text = f"{subject}: {title}, step {step:,}", f"At step {step:,} {text}{others} {rule.advice}"
            alerts.append(Alert(rule.name, step, layers, float(found[first]), title[:TITLE], text, rule.level))
    return tuple(alerts)


def probe_failed(step: int, reason: str, told: Iterable[str]) -> tuple[Alert, ...]:
    """The alert of a measurement that could not be made, once a run."""
    name = "probe_failed"
    if name in _heard(told):
        return ()
    why = printable(reason)
    text = (
        f"Nothing could be measured at step {step:,}; training goes on. {why[:LONGEST]} "
        "Further failures are only in the run's events.jsonl. Where memory is short, a smaller batch_size in "
        "MonitorConfig helps."
    )
    return (Alert(name, step, (), None, f"The probe failed, step {step:,}", text, "error"),)


def told_in(messages: Iterable[str]) -> list[str]:
    """The keys of alerts in the diary's messages, which begin with them."""
    return [match.group() for match in map(_KEY.match, messages) if match]


def _heard(told: Iterable[str]) -> dict[str, tuple[int, frozenset[int]]]:
    """Rule → the last step at which it spoke, and the layers that it has named."""
    heard: dict[str, tuple[int, frozenset[int]]] = {}
    for match in filter(None, map(_KEY.fullmatch, told)):
        rule, step, layers = match.groups()
        last, named = heard.get(rule, (0, frozenset()))
        heard[rule] = max(last, int(step)), named | frozenset(map(int, (layers or "").split(",") if layers else ()))
    return heard


def _past(bound: float, facts: Facts, since: int) -> dict[int, float]:
    """Layers whose ratio is at least the bound, and the ratio; the largest first."""
    now = facts.ratios[:, -1]
    return _largest_first({i: float(v) for i, v in enumerate(now, start=1) if np.isfinite(v) and v >= bound})


def _past_words(bound: float, facts: Facts, layer: int, value: float) -> tuple[str, str]:
    return (
        f"ratio past {bound:,}",
        f"the largest activation of layer {layer} is {number(value)} times the median, past {bound:,}.",
    )


def _coming(bound: float, facts: Facts, since: int) -> dict[int, float]:
    """Layers that are sure enough to pass the bound and have not yet, and the probability; the surest first."""
    found = {}
    for seen, entry in zip(facts.ratios, facts.forecast, strict=False):
        if entry["end"] and facts.steps[-1] < EARLY * entry["end"]["step"]:
            continue
        crossing = entry["crossings"].get(f"{bound:g}")
        if crossing and crossing["probability"] >= SURE and not (seen >= bound).any():
            found[int(entry["layer"])] = float(crossing["probability"])
    return _largest_first(found)


def _coming_words(bound: float, facts: Facts, layer: int, value: float) -> tuple[str, str]:
    crossing = facts.forecast[layer - 1]["crossings"][f"{bound:g}"]
    when = " to ".join(_step(crossing[end]) for end in ("low", "high"))
    return (
        f"ratio will pass {bound:,}",
        f"the ratio of layer {layer} is {number(float(facts.ratios[layer - 1, -1]))}; it will pass {bound:,} with a "
        f"probability of {value:.0%}, about step {_step(crossing['step'])} (80 %: {when}).",
    )


def _jumped(facts: Facts, since: int) -> dict[int, float]:
    """Layers that jumped after step ``since``, and by what factor; the largest change first."""
    found: dict[int, float] = {}
    begin = max(int(np.searchsorted(facts.steps, since, side="right")), USUAL)
    for at in range(begin, len(facts.steps)):
        for layer, factor in _jumps_at(facts, at).items():
            if abs(np.log(factor)) > abs(np.log(found.get(layer, 1.0))):
                found[layer] = factor
    return dict(sorted(found.items(), key=lambda pair: -abs(np.log(pair[1]))))


def _jumps_at(facts: Facts, at: int) -> dict[int, float]:
    """Layers that jumped to the measurement of this index, and by what factor."""
    recent = facts.ratios[:, at - USUAL : at + 1]
    usable = np.all(np.isfinite(recent) & (recent > 0), axis=1, keepdims=True)
    changes = np.abs(np.diff(np.log(np.where(usable, recent, 1.0)), axis=1))
    usual = np.quantile(changes[:, :-1], QUARTILE, axis=1)
    jumped = (changes[:, -1] >= np.log(JUMP)) & (changes[:, -1] > UNUSUAL * usual)
    return {int(i) + 1: float(recent[i, -1] / recent[i, -2]) for i in np.flatnonzero(jumped)}


def _jump_words(facts: Facts, layer: int, factor: float) -> tuple[str, str]:
    rose = f"rose {number(factor)}-fold" if factor > 1 else f"fell {number(1 / factor)}-fold"
    at = next(at for at in range(len(facts.steps) - 1, 0, -1) if _jumps_at(facts, at).get(layer) == factor)
    before, after = (f"{number(float(facts.ratios[layer - 1, i]))} (step {facts.steps[i]:,})" for i in (at - 1, at))
    return f"ratio {rose}", f"the ratio of layer {layer} has jumped: it {rose}, from {before} to {after}."


def _spoilt(facts: Facts, since: int) -> dict[int, float]:
    """Layers with entries that are no numbers, and how many; the first layer first, as those after it inherit them."""
    return {int(i) + 1: float(facts.not_finite[i]) for i in np.flatnonzero(facts.not_finite)}


def _spoilt_words(facts: Facts, layer: int, value: float) -> tuple[str, str]:
    return "NaN or infinite", f"{value:,.0f} activations of the probe are NaN or infinite in layer {layer}."


def _behind(facts: Facts, since: int) -> dict[int, float]:
    """Layers whose peak is identified and lies behind, and its height; the highest first."""
    known = ((entry["layer"], entry["peak"]) for entry in facts.forecast)
    return _largest_first({i: p["height"] for i, p in known if p and p["identified"] and p["status"] == "past"})


def _behind_words(facts: Facts, layer: int, value: float) -> tuple[str, str]:
    peak = facts.forecast[layer - 1]["peak"]
    when = " to ".join(_step(peak[end]) for end in ("low", "high"))
    now = number(float(facts.ratios[layer - 1, -1]))
    return (
        "peak passed",
        f"the ratio of layer {layer} has passed its peak, {number(value)} about step {_step(peak['step'])} "
        f"(80 %: {when}), and is {now} now.",
    )


def _step(step: float | None) -> str:
    return number(None if step is None else round(step))


def _largest_first(found: dict[int, float]) -> dict[int, float]:
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


class _Rule(NamedTuple):
    """A rule: which layers, with their numbers and after which step; title and text for the first; what to do."""

    name: str
    level: Level
    find: Callable[[Facts, int], dict[int, float]]
    words: Callable[[Facts, int, float], tuple[str, str]]
    advice: str


_PAST = (
    "Before the model is quantised, check what 8-bit activations cost it; ma/layers says where the layer is heading."
)
_COMING = (
    "If the model is to be quantised, now is the time to change the recipe; `ma-monitor forecast RUN --schedule …` "
    "tells what another learning-rate schedule would do."
)
_RULES = (
    *(_Rule(f"past_{b}", level, partial(_past, b), partial(_past_words, b), _PAST) for b, level in _BOUNDS),
    *(_Rule(f"forecast_{b}", level, partial(_coming, b), partial(_coming_words, b), _COMING) for b, level in _BOUNDS),
    _Rule(
        "jump",
        "warning",
        _jumped,
        _jump_words,
        "Look at loss and gradient norm there; if they jumped too, go back to the checkpoint before it.",
    ),
    _Rule(
        "not_finite",
        "error",
        _spoilt,
        _spoilt_words,
        "Weights or arithmetic overflow: stop, go back to the checkpoint before, and lower the learning rate or leave "
        "float16.",
    ),
    _Rule(
        "peak_passed",
        "info",
        _behind,
        _behind_words,
        "Nothing needs to be done: later checkpoints have smaller massive activations in this layer.",
    ),
)
