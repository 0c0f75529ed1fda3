"""The fit of a run: statuses, classes, peaks and asymptotes, JSON, invariance, and nothing that raises on data."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from ma_monitor.numerics.classes import LARGE, TrajectoryClass
from ma_monitor.numerics.fit import Fit, FitStatus, PeakStatus, fit_trajectories
from ma_monitor.numerics.projection import Floats
from ma_monitor.numerics.values import none_if_not_finite

T = 10_000
STEPS = np.unique(np.concatenate([[0], 2 ** np.arange(9), np.linspace(100, T, 100).round()])).astype(np.int64)
S = STEPS / T
EARLY_PEAK = 6 + 60 * np.exp(-8 * S) * (np.log(S + 0.01) + 4.6)
PEAK_STEP, PEAK_HEIGHT, LIMIT = 562.8, 78.14, 6.0
"""Where EARLY_PEAK is largest, how large, and what it tends to."""
LOG_INCREASE = 6 + 6 * np.log1p(S / 0.01)
DECAY = 5 + 20 * np.exp(-12 * S)
FLAT = np.full(len(S), 7.0)
FIELDS = (
    "A log_abs_A lambda gamma t0 K beta tau0 A1 A2 r2 sse aicc n n_effective at_bound status class peak asymptote "
    "hypotheses"
).split()


def noisy(values: Floats, rng: np.random.Generator, noise: float = 0.02) -> Floats:
    return np.asarray(values * (1 + noise * rng.standard_normal(values.shape)))


def one(values: Floats, steps: ArrayLike | None = None, total_steps: float | None = None) -> Fit:
    return fit_trajectories(STEPS if steps is None else steps, values[None], total_steps=total_steps)[0]


def numbers(document: Any) -> list[float]:
    """Every number in a JSON document."""
    if isinstance(document, dict):
        return [number for value in document.values() for number in numbers(value)]
    return [float(document)] if isinstance(document, (int, float)) else []


class TestEarlyPeak:
    def test_peak_and_asymptote_are_identified(self, rng: np.random.Generator) -> None:
        fit = one(noisy(EARLY_PEAK, rng))
        assert fit.status is FitStatus.FITTED
        assert fit.trajectory_class is TrajectoryClass.EARLY_PEAK
        assert fit.peak.status is PeakStatus.PAST
        assert fit.peak.identified
        assert fit.peak.step == pytest.approx(PEAK_STEP, rel=0.05)
        assert fit.peak.height == pytest.approx(PEAK_HEIGHT, rel=0.02)
        assert fit.asymptote.identified
        assert fit.asymptote.value == pytest.approx(LIMIT, abs=0.5)
        assert not fit.at_bound
        assert fit.r2 is not None
        assert fit.r2 > 0.99
        assert fit.n == len(STEPS)

    def test_intervals_hold_the_estimate(self, rng: np.random.Generator) -> None:
        for fit in fit_trajectories(STEPS, noisy(np.stack([EARLY_PEAK] * 10), rng, 0.05)):
            peak, asymptote = fit.peak, fit.asymptote
            assert peak.low is not None
            assert peak.high is not None
            assert peak.step is not None
            assert peak.low < peak.step < peak.high
            assert peak.height is not None
            assert peak.height_low is not None
            assert peak.height_high is not None
            assert peak.height_low < peak.height < peak.height_high
            assert asymptote.low is not None
            assert asymptote.high is not None
            assert asymptote.value is not None
            assert asymptote.low < asymptote.value < asymptote.high

    def test_it_is_the_curve_that_wins(self, rng: np.random.Generator) -> None:
        fit = one(noisy(EARLY_PEAK, rng))
        assert fit.aicc is not None
        for name, other in fit.hypotheses.items():
            assert other.aicc is not None, name
            assert fit.aicc < other.aicc, name
            assert other.r2 is not None
            assert other.r2 < (fit.r2 or 0), name

    def test_all_hypotheses_are_there(self, rng: np.random.Generator) -> None:
        names = {"constant", "logarithm", "power_law"}
        for name in ("first_order", *(f"second_order_{kind}damped" for kind in ("under", "critically_", "over"))):
            names |= {name, f"{name}_offset"}
        assert set(one(noisy(EARLY_PEAK, rng)).hypotheses) == names


class TestOtherClasses:
    def test_log_increase_promises_neither_peak_nor_asymptote(self, rng: np.random.Generator) -> None:
        fit = one(noisy(LOG_INCREASE, rng))
        assert fit.trajectory_class is TrajectoryClass.LOG_INCREASE
        assert not fit.peak.identified
        assert not fit.asymptote.identified
        assert fit.asymptote.value is None
        assert fit.peak.step is None

    def test_decay_has_no_peak(self, rng: np.random.Generator) -> None:
        fit = one(noisy(DECAY, rng))
        assert fit.trajectory_class is TrajectoryClass.DECAY
        assert not fit.peak.identified
        assert fit.asymptote.identified
        assert fit.asymptote.value == pytest.approx(5, abs=0.3)

    @pytest.mark.parametrize(
        ("level", "expected"),
        [(7.0, TrajectoryClass.FLAT), (LARGE + 1, TrajectoryClass.SETTLED), (900.0, TrajectoryClass.SETTLED)],
    )
    def test_steady_ones_by_their_level(
        self, rng: np.random.Generator, level: float, expected: TrajectoryClass
    ) -> None:
        assert one(noisy(FLAT / 7 * level, rng)).trajectory_class is expected
        assert one(FLAT / 7 * level).trajectory_class is expected

    def test_small_but_significant_change_is_still_flat(self, rng: np.random.Generator) -> None:
        fit = one(noisy(7 * (1 + 0.03 * S), rng, 0.002))
        assert fit.trajectory_class is TrajectoryClass.FLAT
        assert fit.r2 is not None
        assert fit.r2 > 0.8

    def test_plateau_is_no_peak(self, rng: np.random.Generator) -> None:
        assert one(noisy(26 - 20 * np.exp(-8 * S), rng)).trajectory_class is TrajectoryClass.LOG_INCREASE

    def test_few_noisy_points_are_undetermined(self, rng: np.random.Generator) -> None:
        fit = one(noisy(LOG_INCREASE[:10], rng, 0.3), STEPS[:10])
        assert fit.trajectory_class is TrajectoryClass.UNDETERMINED

    def test_with_more_points_the_same_layer_is_determined(self, rng: np.random.Generator) -> None:
        values = noisy(EARLY_PEAK, rng, 0.05)
        seen = [one(values[:n], STEPS[:n]).trajectory_class for n in (12, len(values))]
        assert seen[0] is not TrajectoryClass.EARLY_PEAK
        assert seen[1] is TrajectoryClass.EARLY_PEAK


class TestPeakStatus:
    def test_ahead_and_beyond_the_schedule(self) -> None:
        """A peak of which the rise alone is seen, all but without noise."""
        seen = STEPS <= 500
        values = EARLY_PEAK[seen] * (1 + 1e-5 * np.cos(np.arange(seen.sum()) * 2.0))
        assert one(values, STEPS[seen]).peak.status is PeakStatus.AHEAD
        assert one(values, STEPS[seen], total_steps=T).peak.status is PeakStatus.AHEAD
        assert one(values, STEPS[seen], total_steps=520).peak.status is PeakStatus.NOT_WITHIN_SCHEDULE

    def test_trough_is_never_a_peak(self, rng: np.random.Generator) -> None:
        fit = one(noisy(20 - EARLY_PEAK / 8, rng))
        assert fit.peak.status is PeakStatus.NONE
        assert fit.peak.step is None


class TestStatus:
    @pytest.mark.parametrize("points", [0, 1, 5])
    def test_too_few_points(self, points: int) -> None:
        fit = one(np.arange(float(points)), np.arange(points))
        assert fit.status is FitStatus.TOO_FEW
        assert fit.curve is None
        assert fit.n == points
        assert fit.trajectory_class is TrajectoryClass.UNDETERMINED

    def test_many_points_at_few_steps_are_too_few(self) -> None:
        assert one(np.arange(40.0), np.arange(40) % 5).status is FitStatus.TOO_FEW

    def test_six_points_are_enough(self, rng: np.random.Generator) -> None:
        assert one(rng.uniform(5, 9, 6), np.arange(6)).status is FitStatus.FITTED

    def test_constant(self) -> None:
        fit = one(FLAT)
        assert fit.status is FitStatus.CONSTANT
        assert fit.r2 is None
        assert fit.asymptote.value == 7
        assert fit.to_dict()["K"] == 7

    def test_a_small_layer_beside_a_huge_one_is_not_constant(self) -> None:
        rise = np.log1p(np.arange(30.0))
        small, huge = fit_trajectories(np.arange(30.0), np.stack([2 + rise, 1e18 * (2 + rise)]))
        assert small.status == huge.status
        assert small.curve is not None
        assert small.curve.A1 > 0

    def test_negative(self, rng: np.random.Generator) -> None:
        fit = one(noisy(EARLY_PEAK, rng) - 50)
        assert fit.status is FitStatus.NEGATIVE
        assert fit.r2 is not None

    @pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf, 1e101])
    def test_holes_are_left_out(self, rng: np.random.Generator, hole: float) -> None:
        values = noisy(EARLY_PEAK, rng)
        holed = values.copy()
        holed[[4, 50]] = hole
        fit = one(holed)
        assert fit.status is FitStatus.PARTLY
        without = one(np.delete(values, [4, 50]), np.delete(STEPS, [4, 50]))
        assert fit.n == without.n
        assert fit.r2 == pytest.approx(without.r2)
        assert fit.trajectory_class is without.trajectory_class

    def test_nothing_finite(self) -> None:
        fits = fit_trajectories(STEPS, np.full((2, len(STEPS)), np.nan))
        assert [fit.status for fit in fits] == [FitStatus.TOO_FEW] * 2

    def test_layers_keep_their_order_whatever_they_lack(self, rng: np.random.Generator) -> None:
        values = noisy(np.stack([EARLY_PEAK, LOG_INCREASE, FLAT, DECAY]), rng)
        values[2] = 7
        values[1, 3] = np.nan
        found = [fit.status for fit in fit_trajectories(STEPS, values)]
        assert found == [FitStatus.FITTED, FitStatus.PARTLY, FitStatus.CONSTANT, FitStatus.FITTED]

    @pytest.mark.parametrize(
        ("steps", "values", "message"),
        [
            (np.zeros((2, 2)), np.zeros((1, 2)), "steps must be"),
            (np.zeros(2), np.zeros((1, 3)), "got shapes"),
            (np.array([0, -1]), np.zeros((1, 2)), "not negative"),
            (np.array([0, np.inf]), np.zeros((1, 2)), "finite"),
        ],
    )
    def test_wrong_arguments_say_so(self, steps: Floats, values: Floats, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit_trajectories(steps, values)


class TestJson:
    def test_has_the_documented_fields(self, rng: np.random.Generator) -> None:
        document = one(noisy(EARLY_PEAK, rng)).to_dict()
        assert set(document) == set(FIELDS)
        assert {"step", "height", "low", "high", "identified", "status"} <= set(document["peak"])
        assert set(document["asymptote"]) == {"value", "low", "high", "identified"}
        assert document["class"] == "early_peak"
        assert document["peak"]["status"] == "past"
        assert {"r2", "aicc", "amplitude", "tau"} <= set(document["hypotheses"]["first_order"])

    def test_parameters_of_both_forms_are_one_curve(self, rng: np.random.Generator) -> None:
        fit = one(noisy(EARLY_PEAK, rng))
        assert fit.curve is not None
        document = fit.to_dict()
        x = document["gamma"] * STEPS + document["t0"]
        values = document["A"] * np.exp(-document["lambda"] * x) * np.log(x) + document["K"]
        np.testing.assert_allclose(values, fit.curve.evaluate(STEPS), rtol=1e-6)

    @pytest.mark.parametrize("values", [FLAT, EARLY_PEAK, np.full(len(S), np.nan)], ids=["constant", "exact", "empty"])
    def test_is_json_whatever_came(self, values: Floats) -> None:
        json.dumps(one(values).to_dict(), allow_nan=False)

    @pytest.mark.parametrize("value", [math.nan, math.inf, None])
    def test_what_is_not_finite_is_null(self, value: float | None) -> None:
        assert none_if_not_finite(value) is None

    def test_numbers_are_python_floats(self) -> None:
        assert type(none_if_not_finite(np.float64(1.5))) is float


steps_lists = st.one_of(
    st.integers(0, 2000).map(np.arange),
    st.lists(st.integers(0, 10**9), max_size=40).map(np.array),
    st.integers(0, 30).map(lambda n: 10**9 + np.arange(n)),
    st.integers(0, 30).map(np.zeros),
)


class TestWhateverComes:
    @settings(max_examples=80)
    @given(steps_lists, st.data())
    def test_nothing_raises_and_nothing_is_nan(self, steps: Floats, data: st.DataObject) -> None:
        n = len(steps)
        scale = 10.0 ** data.draw(st.integers(-320, 100))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        kind = data.draw(st.sampled_from(["noise", "spikes", "walk", "steps", "extremes", "almost constant"]))
        values = {
            "noise": scale * rng.uniform(-1, 1, (2, n)),
            "spikes": np.where(rng.random((2, n)) < 0.1, scale, 1.0),
            "walk": scale * np.cumsum(rng.uniform(-1, 1, (2, n)), axis=1) / (n + 1),
            "steps": scale * rng.integers(0, 3, (2, n)),
            "extremes": rng.choice([1e100, -1e100, 0.0, 1.0, 5e-324], (2, n)),
            "almost constant": 1 + 2.3e-16 * rng.integers(0, 4, (2, n)),
        }[kind]
        for fit in fit_trajectories(steps, values, total_steps=10**6):
            document = fit.to_dict()
            json.dumps(document, allow_nan=False)
            assert all(math.isfinite(number) for number in numbers(document))

    @settings(max_examples=30)
    @given(st.lists(st.floats(-1e100, 1e100), min_size=6, max_size=30))
    def test_any_finite_values(self, values: list[float]) -> None:
        fit = one(np.array(values), np.arange(len(values)))
        json.dumps(fit.to_dict(), allow_nan=False)
        assert fit.r2 is None or fit.r2 <= 1


class TestInvariance:
    """Of the whole result, on curves that determine it: what changes with the units, and that nothing else does."""

    @staticmethod
    def check(
        plain: Fit, other: Fit, *, time: float = 1.0, ratio: float = 1.0, constant: float = 0.0, copies: int = 1
    ) -> None:
        assert other.r2 == pytest.approx(plain.r2, rel=1e-6)
        assert plain.sse is not None
        assert other.sse == pytest.approx(plain.sse * copies * ratio**2, rel=1e-4)
        assert other.peak.status is plain.peak.status
        assert other.peak.identified == plain.peak.identified
        for name in ("step", "low", "high"):
            before = getattr(plain.peak, name)
            assert getattr(other.peak, name) == (None if before is None else pytest.approx(time * before, rel=2e-3))
        for name in ("value", "low", "high"):
            before = getattr(plain.asymptote, name)
            wanted = None if before is None else pytest.approx(ratio * before + constant, rel=2e-3)
            assert getattr(other.asymptote, name) == wanted

    @settings(max_examples=8)
    @given(st.integers(0, 10**6), st.floats(-20, 20))
    def test_scaling_the_ratio(self, seed: int, power: float) -> None:
        values = noisy(EARLY_PEAK, np.random.default_rng(seed))
        self.check(one(values), one(10.0**power * values), ratio=10.0**power)

    @settings(max_examples=8)
    @given(st.integers(0, 10**6), st.floats(-2, 5))
    def test_scaling_time(self, seed: int, power: float) -> None:
        values = noisy(EARLY_PEAK, np.random.default_rng(seed))
        plain, scaled = one(values), one(values, STEPS * 10.0**power)
        self.check(plain, scaled, time=10.0**power)
        assert scaled.trajectory_class is plain.trajectory_class

    @settings(max_examples=8)
    @given(st.integers(0, 10**6))
    def test_reordering(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        values, order = noisy(EARLY_PEAK, rng), rng.permutation(len(STEPS))
        assert one(values[order], STEPS[order]) == one(values)

    @settings(max_examples=8)
    @given(st.integers(0, 10**6), st.integers(2, 3))
    def test_duplicating(self, seed: int, copies: int) -> None:
        """Copies of a point say nothing new: neither the curve nor an interval changes."""
        values = noisy(EARLY_PEAK, np.random.default_rng(seed))
        plain, repeated = one(values), one(np.repeat(values, copies), np.repeat(STEPS, copies))
        self.check(plain, repeated, copies=copies)
        assert repeated.n_effective == pytest.approx(plain.n_effective)

    @settings(max_examples=8)
    @given(st.integers(0, 10**6), st.floats(0, 50))
    def test_adding_a_constant_moves_the_curve(self, seed: int, constant: float) -> None:
        """The curve only: how noise grows with the level, and a share of the level, are another matter then."""
        values = noisy(EARLY_PEAK, np.random.default_rng(seed))
        plain, moved = one(values), one(values + constant)
        assert moved.r2 == pytest.approx(plain.r2, rel=1e-6)
        assert plain.curve is not None
        assert moved.curve is not None
        np.testing.assert_allclose(moved.curve.evaluate(STEPS), plain.curve.evaluate(STEPS) + constant, rtol=1e-4)


class TestRealRuns:
    @pytest.mark.parametrize(("run", "least"), [("neox-14m", 0.92), ("neox-70m", 0.98)])
    def test_the_curve_explains_them(self, shared_data: Path, run: str, least: float) -> None:
        with np.load(shared_data / "runs" / f"{run}.npz") as data:
            means = data["stats"].mean(axis=1)
            fits = fit_trajectories(data["steps"], (means[:, 0] / means[:, 3]).T, total_steps=data["steps"][-1])
        r2 = [fit.r2 for fit in fits if fit.r2 is not None]
        assert len(r2) == 6
        assert np.mean(r2) >= least

    def test_residuals_of_real_runs_are_autocorrelated(self, shared_data: Path) -> None:
        with np.load(shared_data / "runs" / "neox-70m.npz") as data:
            means = data["stats"].mean(axis=1)
            fits = fit_trajectories(data["steps"], (means[:, 0] / means[:, 3]).T)
        shares = [(fit.n_effective or 0) / fit.n for fit in fits]
        assert np.median(shares) < 0.6


@pytest.mark.slow
class TestCoverage:
    """On one curve whose truth is known, with noise as in real runs; over many curves it is 75-85 %: see benchmarks."""

    @pytest.mark.parametrize("rho", [0.0, 0.6])
    def test_intervals_hold_the_truth_as_often_as_they_say(self, rng: np.random.Generator, rho: float) -> None:
        noise = rng.standard_normal((400, len(STEPS)))
        for i in range(1, len(STEPS)):
            noise[:, i] = rho * noise[:, i - 1] + math.sqrt(1 - rho**2) * noise[:, i]
        fits = fit_trajectories(STEPS, EARLY_PEAK * (1 + 0.04 * noise))
        hits: dict[str, list[bool]] = {"asymptote": [], "step": [], "height": []}
        for fit in fits:
            if fit.asymptote.identified:
                hits["asymptote"].append((fit.asymptote.low or 0) <= LIMIT <= (fit.asymptote.high or 0))
            if fit.peak.identified:
                hits["step"].append((fit.peak.low or 0) <= PEAK_STEP <= (fit.peak.high or 0))
                hits["height"].append((fit.peak.height_low or 0) <= PEAK_HEIGHT <= (fit.peak.height_high or 0))
        for name, hit in hits.items():
            assert len(hit) > 200, name
            assert 0.7 <= np.mean(hit) <= 0.95, name


def test_results_are_values() -> None:
    fit = one(EARLY_PEAK)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        fit.n = 3  # type: ignore[misc]
