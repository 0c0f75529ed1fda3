from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ma_monitor.numerics.clock import learning_rate_clock
from ma_monitor.numerics.curve import evaluate
from ma_monitor.numerics.events import find_peak, smoothed
from ma_monitor.numerics.forecast import KEYS, Forecast, forecast
from ma_monitor.numerics.members import log_trend, member_names
from ma_monitor.numerics.mixture import make_mixture

Floats = NDArray[np.float64]
TOTAL = 1000
LR = np.minimum(np.arange(TOTAL + 1) / 10, 0.55 + 0.45 * np.cos(np.pi * np.arange(TOTAL + 1) / TOTAL))
STEPS = np.unique(np.concatenate([2 ** np.arange(5), np.arange(0, TOTAL + 1, 20)]))
SAME = 1e-7
"""Relative: the same sums in another order or unit; the curve's residuals lose half of a float's digits."""


def _curve(beta: float, tau0: float, a1: float, a2: float, k: float, *, noise: float = 0.01, seed: int = 0) -> Floats:
    """A real-looking trajectory: Eq. 14 in the learning-rate clock with proportional noise, ``[T]``."""
    time = learning_rate_clock(LR).time(STEPS)
    clean = evaluate(time, beta, tau0, a1, a2, k)
    return clean * np.exp(noise * np.random.default_rng(seed).standard_normal(STEPS.size))


RISING = _curve(0.0001, 200.0, 20.0, -100.0, 0.0)
PEAKED = _curve(0.008, 50.0, 60.0, -200.0, 12.0, seed=1)
FALLING = _curve(0.01, 5.0, 0.0, 20.0, 5.0, seed=2)
LAYERS = np.stack([RISING, PEAKED, FALLING])


def _json(result: Forecast) -> str:
    return json.dumps(result.to_dict(), allow_nan=False)


def _quantiles(result: Forecast) -> Floats:
    """``[L, 7, G]``."""
    return np.stack([layer.quantiles for layer in result.layers])


# ------------------------------------------------------------------------------------------------- strictly causal


@given(
    at=st.integers(0, TOTAL),
    later=st.lists(st.floats(width=32), min_size=1, max_size=5),
    planned=st.booleans(),
)
def test_nothing_measured_later_matters(at: int, later: list[float], planned: bool) -> None:
    changed = LAYERS.copy()
    after = at < STEPS
    changed[:, after] = np.resize(later, (3, int(after.sum())))
    options: dict[str, Any] = {"lr": LR} if planned else {"total_steps": TOTAL}
    cut = forecast(STEPS[~after], LAYERS[:, ~after], **options)
    assert _json(forecast(STEPS, changed, at=at, **options)) == _json(cut)


def test_the_same_points_give_the_same_forecast_bit_for_bit() -> None:
    first = forecast(STEPS, LAYERS, at=500, lr=LR)
    np.random.default_rng().random(3)
    np.random.seed(5)
    again = forecast(STEPS.astype(float), LAYERS.tolist(), at=500, lr=LR.tolist())
    assert _json(first) == _json(again)


def test_the_grid_does_not_change_what_is_said_of_a_step() -> None:
    whole = forecast(STEPS, LAYERS, at=500, lr=LR, grid=np.arange(501, 1001))
    some = forecast(STEPS, LAYERS, at=500, lr=LR, grid=[1000, 600, 100])
    assert some.layers[0].steps.tolist() == [600, 1000]  # in order, and only what is ahead
    np.testing.assert_allclose(_quantiles(some), _quantiles(whole)[:, :, [99, 499]], rtol=SAME)
    for ours, theirs in zip(some.layers, whole.layers, strict=True):
        assert ours.peak == theirs.peak
        assert ours.crossings == theirs.crossings
        assert ours.end is not None
        np.testing.assert_allclose(ours.end, ours.quantiles[:, -1], rtol=1e-12)


# ------------------------------------------------------------------------------------------------- what comes out


@given(
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
    spread=st.sampled_from([0.0, 1e-9, 0.1, 3.0]),
    points=st.integers(6, 60),
    planned=st.booleans(),
    seed=st.integers(0, 10),
)
def test_bands_are_positive_finite_ordered_and_never_collapse(
    scale: float, spread: float, points: int, planned: bool, seed: int
) -> None:
    steps = STEPS[:points]
    walk = np.cumsum(spread * np.random.default_rng(seed).standard_normal((2, steps.size)), axis=1)
    values = scale * (1 + 1e-6 * steps) * np.exp(walk)
    result = forecast(steps, values, lr=LR if planned else None, until=5 * TOTAL)
    bands = _quantiles(result)
    assert np.isfinite(bands).all()
    assert (bands > 0).all()
    assert (np.diff(bands, axis=1) >= 0).all()
    assert (bands[:, -1] > bands[:, 0] * (1 + 1e-3)).all()
    _json(result)


def test_the_unit_of_the_ratio_does_not_matter() -> None:
    ours = forecast(STEPS, 7.5 * LAYERS, at=600, lr=LR)
    theirs = forecast(STEPS, LAYERS, at=600, lr=LR)
    np.testing.assert_allclose(_quantiles(ours), 7.5 * _quantiles(theirs), rtol=SAME)


def test_a_curve_seen_half_way_is_followed() -> None:
    """Median within 15 % and truth within the 95 % band, for a rise, a peak and a decay."""
    at = 500
    result = forecast(STEPS, LAYERS, at=at, lr=LR, grid=STEPS)
    truth = LAYERS[:, at < STEPS]
    bands = _quantiles(result)
    assert np.abs(np.log(bands[:, 3] / truth)).mean() < 0.15
    assert ((bands[:, 0] <= truth) & (truth <= bands[:, 6])).mean() > 0.9


def test_bands_hold_what_they_promise() -> None:
    """Random curves of all kinds, autocorrelated noise: pooled 80 % bands hold 60 to 97 % of what came."""
    rng = np.random.default_rng(11)
    time = learning_rate_clock(LR).time(STEPS)
    held = []
    for _ in range(12):
        rows = []
        for _ in range(4):
            noise = rng.standard_normal(STEPS.size) * 0.03
            for i in range(1, STEPS.size):
                noise[i] = 0.5 * noise[i - 1] + 0.85 * noise[i]
            clean = evaluate(time, 10 ** rng.uniform(-4, -1.5), 3.0, rng.uniform(0, 10), rng.uniform(-5, 20), 10.0)
            rows.append(clean * np.exp(noise))
        values = np.stack(rows)
        for at in (200, 400, 700):
            bands = _quantiles(forecast(STEPS, values, at=at, lr=LR, grid=STEPS))
            truth = values[:, at < STEPS]
            held.append(((bands[:, 1] <= truth) & (truth <= bands[:, 5])).mean())
    assert 0.6 < np.mean(held) < 0.97


def test_the_document_has_the_pinned_shape() -> None:
    document = forecast(STEPS, LAYERS, at=500, lr=LR).to_dict()
    assert list(document) == ["at", "clock", "past_runs", "rests_on", "layers"]
    assert document["at"] == 500
    assert document["clock"] == "learning_rate"
    assert [layer["layer"] for layer in document["layers"]] == [1, 2, 3]
    for layer in document["layers"]:
        assert {"steps", *KEYS, "end", "peak", "asymptote", "crossings", "led_by"} < set(layer)
        assert all(len(layer[key]) == len(layer["steps"]) == 50 for key in KEYS)
        assert layer["steps"][-1] == layer["end"]["step"] == TOTAL
        assert set(layer["peak"]) == {"step", "height", "low", "high", "identified", "probability", "status"}
        assert set(layer["asymptote"]) == {"value", "low", "high", "identified"}
        assert set(layer["crossings"]) == {"100", "1000"}
        assert layer["led_by"] in member_names(learning_rate_clock(LR))


# ------------------------------------------------------------------------------------- peak, asymptote, crossings


def test_a_past_peak_and_a_rise() -> None:
    rising, peaked, falling = forecast(STEPS, LAYERS, at=600, lr=LR).layers
    assert peaked.peak is not None
    assert peaked.peak.status == "past"
    true = STEPS[PEAKED.argmax()]
    assert peaked.peak.step == pytest.approx(true, abs=60)  # three measurements, the reach of the smoothing
    assert peaked.peak.height == pytest.approx(PEAKED.max(), rel=0.1)  # the mean of seven points is lower
    assert not peaked.peak.identified  # at step 60 of measurements every 20
    assert rising.peak is not None
    assert rising.peak.status == "not_within_schedule"
    assert (rising.peak.step, rising.peak.height, rising.peak.high) == (None, None, None)
    assert not rising.peak.identified
    assert falling.peak is not None
    assert falling.peak.status == "none"


def test_a_peak_among_many_measurements_is_identified() -> None:
    steps = np.arange(0, 601, 4)
    clean = evaluate(learning_rate_clock(LR).time(steps), 0.008, 50.0, 60.0, -200.0, 12.0)
    values = clean * np.exp(0.005 * np.random.default_rng(1).standard_normal(steps.size))
    peak = forecast(steps, values[None], lr=LR).layers[0].peak
    assert peak is not None
    assert (peak.status, peak.identified) == ("past", True)
    assert peak.low is not None
    assert peak.high is not None
    assert peak.low <= steps[clean.argmax()] <= peak.high


def _correlated(rng: np.random.Generator, curves: int, points: int, rho: float) -> Floats:
    """Noise of variance 1 whose neighbours correlate by ``rho``, ``[curves, points]``."""
    noise = rng.standard_normal((curves, points))
    for i in range(1, points):
        noise[:, i] = rho * noise[:, i - 1] + math.sqrt(1 - rho**2) * noise[:, i]
    return noise


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.74])
def test_identified_peaks_are_honest_under_autocorrelated_noise(rho: float) -> None:
    """Lag-1 correlations as in real runs: hardly a peak where there is none, and 80 % intervals that hold 75 % or more.

    Curves of Eq. 14 in the learning-rate clock that peak early, and such that only rise until the end.
    """
    total, curves = 10_000, 120
    lr = 0.55 + 0.45 * np.cos(np.pi * np.arange(total + 1) / total)
    clock = learning_rate_clock(lr)
    rng = np.random.default_rng(1)
    ranges = ((-3.4, -2.6), (1, 3), (5, 15), (10, 30))
    beta, tau0, a1, k = (rng.uniform(low, high, (curves, 1)) for low, high in ranges)
    beta, tau0 = 10**beta, 10**tau0

    def peaked(time: Floats) -> Floats:
        return np.asarray(np.exp(-beta * time) * a1 * np.log1p(time / tau0) + k)

    def rising(time: Floats) -> Floats:
        return np.asarray(2 * k - (2 * k - 5) * np.exp(-0.5 * beta * time))

    every = np.arange(total + 1)
    true = peaked(clock.time(every)).argmax(axis=1)
    held, wrong = [], 0
    for gap, noise in ((25, 0.02), (25, 0.05), (66, 0.02), (66, 0.05)):
        steps = np.unique(np.concatenate([2 ** np.arange(10), np.arange(0, total, gap)]))
        errors = np.exp(noise * _correlated(rng, curves, steps.size, rho))
        for layer in forecast(steps, peaked(clock.time(steps)) * errors, lr=lr, at=9000).layers:
            peak = layer.peak
            assert peak is not None
            if peak.identified and peak.status == "past":
                assert peak.low is not None
                assert peak.high is not None
                held.append(peak.low <= true[layer.layer - 1] <= peak.high)
        found = forecast(steps, rising(clock.time(steps)) * errors, lr=lr, at=9000).layers
        wrong += sum(layer.peak is not None and layer.peak.identified for layer in found)
    assert wrong <= 0.03 * 4 * curves
    assert len(held) > 10, "never identified is not honest either"
    assert np.mean(held) >= 0.75


@pytest.mark.parametrize("rho", [0.0, 0.74])
def test_autocorrelation_does_not_hide_the_noise(rho: float) -> None:
    """The noise around a curve that bends: three quarters to one and a half of the true one, in the middle of many."""
    time = learning_rate_clock(LR).time(np.arange(0, TOTAL, 5))
    noise = 0.03 * _correlated(np.random.default_rng(7), 40, time.size, rho)
    values = evaluate(time, 0.008, 50.0, 60.0, -200.0, 12.0) * np.exp(noise)
    mixture = make_mixture(learning_rate_clock(LR), np.arange(0.0, TOTAL, 5), values, TOTAL)
    assert 0.75 < np.median(mixture.noise) / 0.03 < 1.5


def test_bands_widen_where_earlier_forecasts_were_wrong() -> None:
    """Two levels now: one that was always there, and one that came by a jump of 1 in ln ratio that nothing foresaw."""
    steps = np.arange(0, 501, 5)
    calm = 3 + 0.01 * np.log1p(steps)
    for layer, least, most in ((calm, 0.1, 0.4), (calm + (steps > 220), 1.0, 2.0)):
        band = np.log(_quantiles(forecast(steps, np.exp(layer)[None], grid=[900], total_steps=TOTAL)))[0, :, 0]
        assert least < band[5] - band[1] < most  # .6 e-folds ahead


def test_a_settled_curve_has_an_asymptote_and_a_rising_one_has_none() -> None:
    rising, peaked, _ = forecast(STEPS, LAYERS, at=900, lr=LR).layers
    assert peaked.asymptote is not None
    assert peaked.asymptote.low is not None
    assert peaked.asymptote.high is not None
    assert peaked.asymptote.low < 12 < peaked.asymptote.high  # K
    assert peaked.asymptote.identified
    assert rising.asymptote is not None
    assert not rising.asymptote.identified


def test_crossings() -> None:
    reached = float(RISING[STEPS <= 500].max())
    asked = (reached * 0.5, reached * 1.05, reached * 100)
    rising = forecast(STEPS, RISING[None], at=500, lr=LR, thresholds=asked).layers[0].crossings
    past, near, far = (rising[t] for t in asked)
    assert past is not None
    assert past.step == past.low == past.high == STEPS[(asked[0] <= RISING).argmax()]
    assert past.probability == 1
    assert near is not None
    assert 0.3 < near.probability <= 1
    assert near.step is not None
    assert near.low is not None
    assert near.high is not None
    assert 500 < near.low <= near.step <= near.high <= TOTAL
    assert far is not None
    assert (far.probability, far.step) == (0, None)


def test_the_peak_is_that_of_whole_paths() -> None:
    """Three hand-made futures: one beyond the past's maximum, one below it, one still rising at the end."""
    steps, nodes = np.array([0.0, 10.0, 20.0]), np.array([30.0, 40.0, 50.0])
    past = np.array([0.0, 1.0, 0.5])
    inside, below, rising = [0.0, 3.0, 0.0], [0.9, 0.0, 0.0], [0.0, 1.0, 2.0]
    peak = find_peak(steps, past, 0.1, nodes, np.array([inside] * 17 + [below] * 2 + [rising]).T)
    assert (peak.step, peak.low, peak.high, peak.status) == (40, 40, 40, "ahead")
    assert peak.height == pytest.approx(math.exp(3))
    assert peak.probability == pytest.approx(0.95)
    assert peak.identified
    peak = find_peak(steps, past, 0.1, nodes, np.array([below] * 6 + [rising] * 4).T)
    assert (peak.step, peak.high, peak.status, peak.identified) == (10, None, "past", False)
    peak = find_peak(steps, past, 0.1, nodes, np.array([below] * 4 + [rising] * 6).T)
    assert (peak.step, peak.low, peak.status) == (None, 5, "not_within_schedule")  # nearer to 10 than to 0


def test_the_place_of_a_past_peak_is_as_uncertain_as_the_noise_makes_it() -> None:
    """A broad top: the more noise, the wider the interval; without noise the highest point is the peak."""
    steps = np.arange(0.0, 1000, 10)
    past = -(((steps - 500) / 500) ** 2)
    nodes, lower = np.array([1010.0, 1020.0]), np.full((2, 256), -9.0)
    widths = []
    for noise in (1e-9, 0.02, 0.1):
        peak = find_peak(steps, past, noise, nodes, lower)
        assert peak.step is not None
        assert peak.low is not None
        assert peak.high is not None
        assert peak.low <= 500 <= peak.high
        assert peak.status == "past"
        widths.append(peak.high - peak.low)
    assert widths[0] == 10 < widths[1] < widths[2]  # half way to both neighbours


def test_a_peak_within_the_noise_is_none_and_a_flat_top_is_not_identified() -> None:
    steps, nodes = np.array([9.0, 10.0, 12.0]), np.array([30.0, 40.0, 50.0])
    lower = np.full((3, 20), -1.0)
    cases = [
        ([0.0, 1.0, 0.75], "past", True),
        ([0.0, 1.0, 0.9], "past", False),
        ([0.9, 1.0, 0.0], "past", False),
        ([0.0, 0.05, -1.0], "past", False),
        ([0.0, 0.04, -1.0], "none", False),
    ]
    for past, status, identified in cases:  # with a noise of .01, 3 standard errors are .042 and 12 are .17
        peak = find_peak(steps, np.array(past), 0.01, nodes, lower)
        assert (peak.status, peak.identified) == (status, identified)


def test_the_past_is_smoothed_over_seven_points() -> None:
    values = np.random.default_rng(4).standard_normal((2, 20))
    slow = [
        [values[r, i - w : i + w + 1].mean() for i in range(20) for w in [min(3, i, 19 - i)]]
        for r in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(smoothed(values), slow, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full(STEPS.size, 7.0), "all values are equal"),
        (np.full(STEPS.size, math.nan), "fewer than 6 measurements"),
        (-RISING, "fewer than 6 measurements"),
        (np.zeros(STEPS.size), "fewer than 6 measurements"),
        (np.full(STEPS.size, math.inf), "fewer than 6 measurements"),
        (np.full(STEPS.size, 1e300), "fewer than 6 measurements"),
        (np.where(np.arange(STEPS.size) < 5, RISING, math.nan), "fewer than 6 measurements"),
        (np.where(np.arange(STEPS.size) % 3 == 0, RISING, -1.0), "more than half"),
        (np.where(STEPS < 500, RISING, math.nan), "the last measurement"),
    ],
)
def test_a_layer_that_is_not_known_is_null_and_leaves_the_others_alone(values: Floats, reason: str) -> None:
    result = forecast(STEPS, np.stack([values, RISING]), lr=LR, at=500)
    lost, other = result.to_dict()["layers"]
    assert lost["status"].startswith(f"not forecast: {reason}")
    assert other["status"] == "forecast"
    assert all(v is None for key in KEYS for v in lost[key])
    assert (lost["end"], lost["peak"], lost["asymptote"], lost["led_by"]) == (None, None, None, None)
    assert lost["crossings"] == {"100": None, "1000": None}
    assert other == {**forecast(STEPS, RISING[None], lr=LR, at=500).to_dict()["layers"][0], "layer": 2}
    _json(result)


@pytest.mark.parametrize("points", range(6))
def test_fewer_than_six_points_are_not_known(points: int) -> None:
    result = forecast(STEPS[:points], LAYERS[:, :points], lr=LR)
    assert result.at == (STEPS[points - 1] if points else 0)
    assert np.isnan(_quantiles(result)).all()
    _json(result)


def test_a_gap_is_bridged() -> None:
    gap = RISING.copy()
    gap[[3, 20]] = math.nan, math.inf
    ours = forecast(STEPS, gap[None], lr=LR, at=600)
    theirs = forecast(STEPS, RISING[None], lr=LR, at=600)
    np.testing.assert_allclose(_quantiles(ours), _quantiles(theirs), rtol=0.1)


def test_no_layers_and_an_unknown_end() -> None:
    assert forecast(STEPS, np.empty((0, STEPS.size))).layers == ()
    layer = forecast(STEPS, LAYERS, at=500).layers[0]
    assert layer.end is None
    assert layer.steps[-1] == 1000  # twice as far as seen
    assert layer.to_dict()["end"] is None


def test_the_scheduled_end_is_reached_or_passed() -> None:
    done = forecast(STEPS, LAYERS, lr=LR)
    for layer, values in zip(done.layers, LAYERS, strict=True):
        assert layer.steps.size == 0
        assert layer.end is not None
        assert layer.end[3] == pytest.approx(values[-1], rel=0.05)  # noise is 1 %
    assert done.layers[1].peak is not None
    assert done.layers[1].peak.status == "past"
    beyond = forecast(STEPS, LAYERS, total_steps=500)
    assert beyond.layers[0].end is None
    assert beyond.layers[0].steps[-1] == 2 * TOTAL


def test_a_clock_that_has_not_moved_gives_way_to_steps() -> None:
    late = np.where(np.arange(TOTAL + 1) < 900, 0.0, 1.0)
    result = forecast(STEPS, LAYERS, at=500, lr=late)
    assert result.clock == "step"
    assert result.to_dict()["layers"] == forecast(STEPS, LAYERS, at=500, total_steps=TOTAL).to_dict()["layers"]


@pytest.mark.parametrize(
    ("steps", "values", "options", "rule"),
    [
        ([0, 1], [[1.0]], {}, r"steps must be \[T\] and values \[L, T\]"),
        ([0, 1], [1.0, 2.0], {}, r"steps must be \[T\] and values \[L, T\]"),
        ([1, 0], [[1.0, 2.0]], {}, "steps must be finite, not negative and ascending"),
        ([-1, 0], [[1.0, 2.0]], {}, "steps must be finite, not negative and ascending"),
        ([0, 1], [[1.0, 2.0]], {"thresholds": (0.0,)}, "a threshold is a ratio and must be above 0"),
        ([0, 1], [[1.0, 2.0]], {"lr": [0.0, 0.0]}, "rates must be one finite list"),
    ],
)
def test_bad_arguments(steps: list[int], values: list[Any], options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        forecast(steps, values, **options)


# ------------------------------------------------------------------------------------------------------- real runs


def _shared_run(path: Path) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Steps ``[T]``, ratios ``[L, T]``, rates."""
    data = np.load(path)
    stats = data["stats"].astype(np.float64)
    return data["steps"], (stats[:, :, 0].mean(axis=1) / stats[:, :, -1].mean(axis=1)).T, data["lr"].astype(np.float64)


def test_two_real_runs_are_forecast_no_worse_than_by_simple_rules(shared_data: Path) -> None:
    """Mean abs log error over the rest of the run, against last value and log trend: better on average."""
    relative, covered = [], []
    for share in (0.1, 0.2, 0.4, 0.6, 0.8):
        errors = np.zeros(3)
        for name in ("neox-14m", "neox-70m"):
            steps, ratios, lr = _shared_run(shared_data / "runs" / f"{name}.npz")
            at = int(share * steps[-1])
            seen = steps <= at
            bands = _quantiles(forecast(steps, ratios, at=at, lr=lr, grid=steps))
            truth = ratios[:, ~seen]
            last = np.broadcast_to(ratios[:, seen][:, -1:], truth.shape)
            trend = np.exp(log_trend(steps[seen].astype(float), np.log(ratios[:, seen]), steps[~seen].astype(float)))
            errors += [np.abs(np.log(guess / truth)).mean() for guess in (bands[:, 3], last, trend)]
            covered.append([((bands[:, i] <= truth) & (truth <= bands[:, 6 - i])).mean() for i in (2, 1, 0)])
        relative.append(errors[0] / errors[1:].min())
    assert max(relative) < 1.25
    assert np.mean(relative) < 1
    half, four_fifths, nearly_all = np.mean(covered, axis=0)
    assert 0.35 < half < 0.75
    assert 0.65 < four_fifths < 0.95
    assert nearly_all > 0.87
