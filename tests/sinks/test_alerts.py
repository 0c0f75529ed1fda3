"""The rules of alerts, apart from any sink: what raises each, once, and how long it is silent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ma_monitor.sinks.alerts import BOUNDS, PAUSE, Alert, Facts, due_alerts, probe_failed, told_in

LIMIT = 64
"""W&B's limit: titles must be shorter."""
LAYERS = 4
END = 10_000


def facts(
    ratios: Any, *, step: int | None = None, not_finite: dict[int, int] | None = None, forecast: Any = ()
) -> Facts:
    """Facts of ratios ``[L, T]``, or ``[L]`` for a single measurement, every hundred steps up to ``step``."""
    values = np.asarray(ratios, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    steps = 100 * np.arange(values.shape[1])
    counts = np.zeros(len(values), dtype=np.int64)
    for layer, count in (not_finite or {}).items():
        counts[layer - 1] = count
    return Facts(steps + (0 if step is None else step - int(steps[-1])), values, counts, forecast)


def document(layer: int, *, crossing: dict[str, Any] | None = None, peak: dict[str, Any] | None = None) -> Any:
    """A forecast's document of one layer, as far as alerts look at it."""
    return {"layer": layer, "crossings": {"100": None, "1000": crossing}, "peak": peak, "end": {"step": END}}


def steady(level: float = 10.0, points: int = 20) -> NDArray[np.float64]:
    """Ratios of layers that drift by two per cent a measurement."""
    return level * 1.02 ** np.arange(points) * np.ones((LAYERS, 1))


def test_a_threshold_is_told_once_with_layer_step_and_number() -> None:
    (alert,) = due_alerts(facts([5, 123.4, 80, 99.9], step=2100), [])
    assert (alert.rule, alert.step, alert.layers, alert.value, alert.level) == ("past_100", 2100, (2,), 123.4, "info")
    assert alert.title == "Layer 2: ratio past 100, step 2,100"
    assert alert.text.startswith("At step 2,100 the largest activation of layer 2 is 123.4 times the median, past 100.")
    assert "Before the model is quantised" in alert.text
    assert due_alerts(facts([5, 500.0, 80, 99.9], step=9000), [alert.key]) == ()


def test_layers_that_come_together_share_an_alert_the_largest_first() -> None:
    both = due_alerts(facts([2000, 150, 3000, 1], step=400), [])
    assert [(alert.rule, alert.layers, alert.level) for alert in both] == [
        ("past_100", (3, 1, 2), "info"),
        ("past_1000", (3, 1), "warning"),
    ]
    assert both[0].title == "Layer 3 and 2 more: ratio past 100, step 400"
    assert "Likewise layer 1, 2." in both[0].text


def test_a_rule_that_has_spoken_is_silent_and_loses_nothing() -> None:
    told = ["past_100@2000:1"]
    for step in (2001, 2000 + 2 * PAUSE - 1):
        assert due_alerts(facts([500, 500, 1, 1], step=step), told) == ()
    (later,) = due_alerts(facts([500, 500, 300, 1], step=2000 + 2 * PAUSE), told)
    assert later.layers == (2, 3)
    (early,) = due_alerts(facts([500, 500, 1, 1], step=PAUSE + 5), ["past_100@5:1"])
    assert early.layers == (2,)


def test_a_resumed_training_does_not_repeat_what_its_earlier_life_told() -> None:
    jumped = np.concatenate([steady(), 5 * steady()[:, -1:]], axis=1)
    (alert,) = due_alerts(facts(jumped, step=2000), [])
    assert due_alerts(facts(jumped, step=2000), [alert.key]) == ()
    assert due_alerts(facts(jumped[:, :-2], step=1800), [alert.key]) == ()


@pytest.mark.parametrize(("probability", "seen", "told"), [(0.8, 500, True), (0.79, 500, False), (1.0, 1500, False)])
def test_forecast_crossing(probability: float, seen: float, told: bool) -> None:
    crossing = {"probability": probability, "step": 5000.4, "low": 4200.0, "high": None}
    alerts = due_alerts(
        facts([[1, 1], [seen, 500]], step=2000, forecast=[document(1), document(2, crossing=crossing)]),
        ["past_100@0:2", "past_1000@0:2"],
    )
    assert [alert.rule for alert in alerts] == (["forecast_1000"] if told else [])
    if told:
        assert (alerts[0].layers, alerts[0].value, alerts[0].level) == ((2,), 0.8, "warning")
        assert "it will pass 1,000 with a probability of 80%, about step 5,000 (80 %: 4,200 to -)" in alerts[0].text
        assert "--schedule" in alerts[0].text


@pytest.mark.parametrize(("step", "told"), [(999, False), (1000, True)])
def test_forecasts_of_the_first_tenth_are_not_told(step: int, told: bool) -> None:
    crossing = {"probability": 1.0, "step": 5000.0, "low": 4200.0, "high": 6000.0}
    known = document(1, crossing=crossing)
    assert bool(due_alerts(facts([500], step=step, forecast=[known]), ["past_100@0:1"])) == told
    unplanned = known | {"end": None}
    assert due_alerts(facts([500], step=step, forecast=[unplanned]), ["past_100@0:1"])


@pytest.mark.parametrize(("factor", "words"), [(3.0, "rose 3-fold"), (0.25, "fell 4-fold")])
def test_sudden_jump(factor: float, words: str) -> None:
    ratios = steady()
    ratios[2, 15:] *= factor
    (alert,) = due_alerts(facts(ratios[:, :16]), [])
    assert (alert.rule, alert.step, alert.layers, alert.level) == ("jump", 1500, (3,), "warning")
    assert alert.value == pytest.approx(factor * 1.02)
    assert words.split()[0] in alert.title
    assert "(step 1,400) to" in alert.text
    assert "go back to the checkpoint before it" in alert.text


def test_a_jump_in_the_silence_of_another_is_told_after_it() -> None:
    ratios = steady()
    ratios[0, 12:] *= 3
    ratios[1, 13:] *= 4
    (first,) = due_alerts(facts(ratios[:, :13]), [])
    assert (first.layers, first.step) == ((1,), 1200)
    assert due_alerts(facts(ratios[:, :14]), [first.key]) == ()
    (second,) = due_alerts(facts(ratios[:, :15]), [first.key])
    assert (second.layers, second.step) == ((2,), 1400)
    assert "(step 1,200) to" in second.text
    assert "(step 1,300)." in second.text


@pytest.mark.parametrize("name", ["growth", "noise", "broken", "few"])
def test_no_jump(name: str, rng: np.random.Generator) -> None:
    ratios = {
        "growth": 2.5 ** np.arange(20) * np.ones((LAYERS, 1)) / 1e6,
        "noise": 10 * np.exp(rng.normal(0, 0.15, (LAYERS, 60))),
        "broken": np.where(np.arange(20) == 12, np.nan, steady() * np.where(np.arange(20) < 12, 1, 9)),
        "few": steady(points=10) * np.where(np.arange(10) < 8, 1, 9),
    }[name]
    for seen in range(1, ratios.shape[1] + 1):
        assert not [alert for alert in due_alerts(facts(ratios[:, :seen]), []) if alert.rule == "jump"]


def test_not_finite_names_the_first_layer() -> None:
    (alert,) = due_alerts(facts([1, np.inf, np.nan, 3], step=900, not_finite={2: 3, 3: 5120}), [])
    assert (alert.rule, alert.layers, alert.value, alert.level) == ("not_finite", (2, 3), 3.0, "error")
    assert "3 activations of the probe are NaN or infinite in layer 2" in alert.text
    assert "lower the learning rate or leave float16" in alert.text


@pytest.mark.parametrize(("status", "identified", "told"), [("past", 1, 1), ("past", 0, 0), ("ahead", 1, 0)])
def test_peak_passed(status: str, identified: int, told: int) -> None:
    peak = {
        "status": status,
        "identified": bool(identified),
        "step": 1200.0,
        "height": 84.0,
        "low": 900.0,
        "high": 1500.0,
    }
    alerts = due_alerts(facts([60, 1], step=5000, forecast=[document(1, peak=peak), document(2)]), [])
    assert len(alerts) == told
    for alert in alerts:
        assert (alert.rule, alert.layers, alert.value, alert.level) == ("peak_passed", (1,), 84.0, "info")
        assert "its peak, 84 about step 1,200 (80 %: 900 to 1,500), and is 60 now" in alert.text


def test_probe_failure_is_told_once_in_words_that_cannot_harm() -> None:
    (alert,) = probe_failed(300, "RuntimeError: \x1b[2J<b>" + "x" * 10_000, [])
    assert (alert.rule, alert.layers, alert.value, alert.level) == ("probe_failed", (), None, "error")
    assert alert.title == "The probe failed, step 300"
    assert "RuntimeError: \\x1b[2J<b>xxx" in alert.text
    assert alert.text.isprintable()
    assert len(alert.text) < 600
    assert probe_failed(9000, "again", [alert.key]) == ()


@given(
    st.integers(0, 10**9),
    st.lists(st.floats(0, 1e12), min_size=1, max_size=120),
    st.lists(st.text(max_size=20), max_size=5),
)
def test_keys_and_titles(step: int, ratios: list[float], noise: list[str]) -> None:
    """Every key is one word that is found again at the beginning of a message; whatever is no key changes nothing."""
    alerts = due_alerts(facts(ratios, step=step), noise)
    for alert in alerts:
        assert len(alert.title) < LIMIT
        assert told_in([f"{alert.key} {alert.title}", *noise])[0] == alert.key
    assert due_alerts(facts(ratios, step=step), [*noise, *(alert.key for alert in alerts)]) == ()
    expected = [bound for bound in BOUNDS if max(ratios) >= bound]
    assert [alert.rule for alert in alerts] == [f"past_{bound}" for bound in expected]


def test_titles_stay_short_whatever_comes() -> None:
    ratios = np.ones((120, 20)) * 1e-9
    ratios[:, -1] = 1e11
    alerts = due_alerts(facts(ratios, step=10**9, not_finite=dict.fromkeys(range(1, 121), 1)), [])
    assert {alert.rule for alert in alerts} == {"past_100", "past_1000", "jump", "not_finite"}
    assert all(len(alert.title) < LIMIT for alert in alerts)


def slow_reference(ratios: NDArray[np.float64], steps: NDArray[np.int64]) -> list[tuple[int, set[int]]]:
    """When which layers are told to be past 100, by following the words: (step, layers)."""
    named: set[int] = set()
    spoken: list[tuple[int, set[int]]] = []
    for at, step in enumerate(steps):
        silent = spoken and step < spoken[-1][0] + max(100, spoken[-1][0] // 10)
        new = {layer for layer in range(1, len(ratios) + 1) if ratios[layer - 1, at] >= 100} - named
        if new and not silent:
            named |= new
            spoken.append((int(step), new))
    return spoken


def test_many_layers_over_a_training_against_the_slow_reference(rng: np.random.Generator) -> None:
    steps = np.unique(np.geomspace(1, 20_000, 300).astype(np.int64))
    ratios = np.exp(np.cumsum(rng.normal(0.03, 0.1, (36, len(steps))), axis=1))
    told: list[str] = []
    alerts: list[Alert] = []
    for seen in range(1, len(steps) + 1):
        new = due_alerts(Facts(steps[:seen], ratios[:, :seen], np.zeros(36, dtype=np.int64)), told)
        told += [alert.key for alert in new]
        alerts += [alert for alert in new if alert.rule == "past_100"]
    reference = slow_reference(ratios, steps)
    assert [(alert.step, set(alert.layers)) for alert in alerts] == reference
    assert 5 < len(reference) < 36
