"""``fit_curves``: never worse than slow global references, invariant, and finite whatever comes in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, differential_evolution, minimize

from ma_monitor.numerics.batch import Loss, fit_curves
from ma_monitor.numerics.curve import Curve, evaluate
from ma_monitor.numerics.projection import C_MAX, C_MIN, Floats
from ma_monitor.numerics.values import LARGEST

WORSE = 1e-6
"""Relative room of the residual sum against a reference optimum."""
FLOOR = 1e-12
"""The same as a share of the total sum of squares: what is left of it after rounding is noise."""
SAME = 1e-7
"""Relative to the largest value: one curve, computed in another order of operations."""

CLEAN = 1e-9
"""Relative, of two curves through noiseless points: what both leave is rounding, which the losses weigh differently."""
OFF = 0.02
"""Mean relative distance from the truth at 3 % of noise with an outlier: what Gaussian noise leaves is .01."""
SETTLED = 1e-4
"""Room of Huber's loss against a direct minimum: the fits stop before the last digit."""


def projected(place: Floats, t: Floats, y: Floats) -> float:
    """Residual sum of Eq. 14 at (log10 βT, log10 (τ₀ + t_min)/T), with its linear parameters from ``lstsq``."""
    b, c = 10.0**place
    s = (t - t[0]) / t[-1]
    design = np.stack([np.ones_like(s), np.expm1(-b * s), np.exp(-b * s) * np.log(s + c)], axis=1)
    design /= np.linalg.norm(design, axis=0)
    coefficients = np.linalg.lstsq(design, y, rcond=1e-12)[0]
    return float(((y - design @ coefficients) ** 2).sum())


def reference(t: Floats, y: Floats) -> float:
    """Residual sum that differential evolution reaches in the same box."""
    box = Bounds([-9.0, np.log10(C_MIN)], [3.0, np.log10(C_MAX)])
    result = differential_evolution(projected, box, args=(t, y - y.mean()), seed=0, tol=1e-10, maxiter=150)
    return float(result.fun)


def times(kind: str, points: int) -> Floats:
    return np.linspace(0, 1e4, points) if kind == "linear" else np.concatenate([[0], np.geomspace(1, 1e4, points - 1)])


def shape(kind: str, s: Floats) -> Floats:
    values = {
        "early peak": 6 + 90 * np.exp(-8 * s) * (np.log(s + 0.01) + 4.6),
        "log increase": 6 + 5 * np.log(s / 0.01 + 1),
        "decay": 5 + 20 * np.exp(-12 * s),
        "dip": 9 - 30 * np.exp(-15 * s) * (np.log(s + 0.02) + 4),
        "line": 3 + 4 * s,
        "constant": np.full_like(s, 30.0),
        "step": np.where(s < 0.3, 5.0, 9.0),
    }
    return np.asarray(values[kind], dtype=np.float64)


class TestOptimum:
    @pytest.mark.parametrize("kind", ["early peak", "log increase", "decay", "dip", "line", "constant", "step"])
    @pytest.mark.parametrize(("spacing", "points", "noise"), [("linear", 40, 0.05), ("logarithmic", 12, 0.02)])
    def test_is_never_worse_than_differential_evolution(
        self, rng: np.random.Generator, kind: str, spacing: str, points: int, noise: float
    ) -> None:
        t = times(spacing, points)
        y = shape(kind, t / t[-1]) * (1 + noise * rng.standard_normal(points))
        total = ((y - y.mean()) ** 2).sum()
        assert fit_curves(t, y[None]).sse[0] <= reference(t, y) * (1 + WORSE) + FLOOR * total

    @pytest.mark.parametrize("spacing", ["linear", "logarithmic"])
    @pytest.mark.parametrize("kind", ["early peak", "log increase", "decay", "dip", "line"])
    def test_without_noise_it_finds_the_curve(self, kind: str, spacing: str) -> None:
        t = times(spacing, 60)
        y = shape(kind, t / t[-1])
        fits = fit_curves(t, y[None])
        assert fits.sse[0] <= FLOOR * ((y - y.mean()) ** 2).sum()
        np.testing.assert_allclose(fits.evaluate(t)[0], y, atol=1e-5 * np.abs(y).max())

    def test_many_points_are_fitted_as_well_as_few(self, rng: np.random.Generator) -> None:
        """Beyond the number of points that the search itself works on."""
        t = times("linear", 1500)
        y = shape("early peak", t / t[-1]) * (1 + 0.03 * rng.standard_normal(1500))
        fit = fit_curves(t, y[None])
        assert fit.sse[0] <= reference(t, y) * (1 + WORSE)

    def test_all_series_at_once_are_each_on_their_own(self, rng: np.random.Generator) -> None:
        t = times("linear", 50)
        y = np.stack([shape(kind, t / t[-1]) for kind in ("early peak", "log increase", "decay", "dip")])
        y *= 1 + 0.02 * rng.standard_normal(y.shape)
        together = fit_curves(t, y)
        for row in range(len(y)):
            alone = fit_curves(t, y[row : row + 1])
            np.testing.assert_allclose(together.evaluate(t)[row], alone.evaluate(t)[0], rtol=SAME)

    def test_same_input_gives_the_same_bits(self, rng: np.random.Generator) -> None:
        t, y = times("linear", 50), rng.standard_normal((3, 50))
        first, second = fit_curves(t, y), fit_curves(t, y)
        assert (first.beta.tobytes(), first.K.tobytes()) == (second.beta.tobytes(), second.K.tobytes())

    def test_sse_is_that_of_the_curve_as_it_evaluates(self, rng: np.random.Generator) -> None:
        t, y = times("linear", 50), rng.standard_normal((3, 50))
        fits = fit_curves(t, y)
        for row in range(3):
            curve = Curve(fits.beta[row], fits.tau0[row], fits.A1[row], fits.A2[row], fits.K[row])
            assert fits.sse[row] == pytest.approx(((y[row] - curve.evaluate(t)) ** 2).sum(), rel=1e-12)

    def test_edge_of_the_box_is_flagged(self) -> None:
        t = times("linear", 40)
        fits = fit_curves(t, np.stack([shape("early peak", t / t[-1]), shape("line", t / t[-1])]))
        assert fits.at_bound.tolist() == [False, True]

    def test_stays_in_the_box(self, rng: np.random.Generator) -> None:
        t = np.linspace(300.0, 1000.0, 30)
        fits = fit_curves(t, rng.standard_normal((20, 30)))
        assert (fits.beta * t[-1] <= 1e3 * (1 + 1e-9)).all()
        assert (fits.beta >= 0).all()
        offset = (fits.tau0 + t[0]) / t[-1]
        assert ((offset >= C_MIN * (1 - 1e-6)) & (offset <= C_MAX * (1 + 1e-6))).all()


class TestWeights:
    def test_weight_of_two_is_the_point_twice(self, rng: np.random.Generator) -> None:
        t, y = times("linear", 30), shape("decay", np.linspace(0, 1, 30)) + rng.standard_normal((2, 30))
        weights = rng.integers(1, 4, 30)
        weighted = fit_curves(t, y, weights=weights)
        repeated = fit_curves(np.repeat(t, weights), np.repeat(y, weights, axis=1))
        np.testing.assert_allclose(weighted.sse, repeated.sse, rtol=1e-9)
        np.testing.assert_allclose(weighted.evaluate(t), repeated.evaluate(t), rtol=1e-4)

    def test_weight_of_nothing_leaves_the_point_out(self, rng: np.random.Generator) -> None:
        t, y = times("linear", 30), shape("decay", np.linspace(0, 1, 30)) + 0.1 * rng.standard_normal((2, 30))
        weights = np.ones((2, 30))
        weights[0, 7] = 0
        spoilt = y.copy()
        spoilt[0, 7] = 1e6
        expected = fit_curves(np.delete(t, 7), np.delete(y, 7, axis=1))
        fits = fit_curves(t, spoilt, weights=weights)
        np.testing.assert_allclose(fits.evaluate(t)[0], expected.evaluate(t)[0], rtol=1e-9)
        np.testing.assert_allclose(fits.evaluate(t)[1], fit_curves(t, y).evaluate(t)[1], rtol=SAME)


def huber(residual: Floats, deviation: float) -> float:
    """Huber's loss of residuals in units of their deviation, point by point."""
    bend, total = 1.345, 0.0
    for size in np.abs(residual) / deviation:
        total += size**2 / 2 if size <= bend else bend * (size - bend / 2)
    return float(total)


def peaked(rng: np.random.Generator, noise: float, kind: str = "linear") -> tuple[Floats, Floats, Floats]:
    """Times ``[60]``, a curve ``[60]`` with an early peak, and that curve with proportional noise ``[1, 60]``."""
    t = times(kind, 60)
    clean = shape("early peak", t / t[-1])
    return t, clean, (clean * (1 + noise * rng.standard_normal(60)))[None]


class TestHuber:
    @pytest.mark.parametrize(
        ("kind", "spacing"),
        [
            ("early peak", "linear"),
            ("log increase", "logarithmic"),
            ("decay", "linear"),
            ("dip", "logarithmic"),
            ("line", "linear"),
            ("constant", "logarithmic"),
        ],
    )
    def test_equals_squares_without_noise(self, kind: str, spacing: str) -> None:
        t = times(spacing, 60)
        y = shape(kind, t / t[-1])[None]
        expected = fit_curves(t, y).evaluate(t)
        np.testing.assert_allclose(fit_curves(t, y, loss="huber").evaluate(t), expected, atol=CLEAN * np.abs(y).max())

    def test_is_near_squares_on_gaussian_noise(self, rng: np.random.Generator) -> None:
        t, _, y = peaked(rng, 0.03)
        change = fit_curves(t, y, loss="huber").evaluate(t) / fit_curves(t, y).evaluate(t) - 1
        assert 0 < np.abs(change).mean() < OFF

    @pytest.mark.parametrize("spacing", ["linear", "logarithmic"])
    @pytest.mark.parametrize("place", [15, 30, 58])
    def test_an_outlier_moves_squares_but_hardly_huber(
        self, rng: np.random.Generator, place: int, spacing: str
    ) -> None:
        t, clean, y = peaked(rng, 0.03, spacing)
        y[0, place] *= 10
        by_squares, by_huber = (fit_curves(t, y, loss=loss).evaluate(t)[0] for loss in ("squares", "huber"))
        assert np.abs(by_huber / clean - 1).mean() < OFF
        assert np.abs(by_squares / clean - 1).mean() > 4 * OFF

    def test_its_loss_is_as_low_as_a_direct_minimum_from_there(self, rng: np.random.Generator) -> None:
        t, _, y = peaked(rng, 0.03)
        y[0, [20, 45]] *= 2
        fits = fit_curves(t, y, loss="huber")
        residual = y[0] - fits.evaluate(t)[0]
        deviation = 1.4826 * float(np.median(np.abs(residual)))
        start = np.array([fits.beta[0], fits.tau0[0], fits.A1[0], fits.A2[0], fits.K[0]])

        def loss(factors: Floats) -> float:
            return huber(y[0] - evaluate(t, *(start * factors)), deviation)

        direct = minimize(
            loss, np.ones(5), method="Nelder-Mead", options={"maxiter": 2000, "xatol": 1e-9, "fatol": 1e-9}
        )
        assert loss(np.ones(5)) <= direct.fun * (1 + SETTLED)
        assert loss(np.ones(5)) < huber(y[0] - fit_curves(t, y).evaluate(t)[0], deviation)

    def test_weights_multiply(self, rng: np.random.Generator) -> None:
        """A weight of three is the point three times, in the loss and in the median residual."""
        t, _, y = peaked(rng, 0.03)
        y[0, 20] *= 5
        weights = rng.integers(1, 4, 60)
        weighted = fit_curves(t, y, weights=weights, loss="huber")
        repeated = fit_curves(np.repeat(t, weights), np.repeat(y, weights, axis=1), loss="huber")
        np.testing.assert_allclose(weighted.evaluate(t), repeated.evaluate(t), rtol=1e-4)
        assert weighted.sse[0] == pytest.approx(repeated.sse[0], rel=1e-4)

    def test_weight_of_nothing_leaves_the_point_out(self, rng: np.random.Generator) -> None:
        t, _, y = peaked(rng, 0.03)
        expected = fit_curves(np.delete(t, 7), np.delete(y, 7, axis=1), loss="huber")
        y[0, 7] = 1e6
        fits = fit_curves(t, y, weights=np.arange(60) != 7, loss="huber")
        np.testing.assert_allclose(fits.evaluate(t), expected.evaluate(t), rtol=1e-9)

    def test_sse_is_of_the_weights_given(self, rng: np.random.Generator) -> None:
        t, _, y = peaked(rng, 0.03)
        y[0, 20] *= 5
        weights = rng.uniform(1, 3, 60)
        fits = fit_curves(t, y, weights=weights, loss="huber")
        assert fits.sse[0] == pytest.approx((weights * (y[0] - fits.evaluate(t)[0]) ** 2).sum(), rel=1e-12)

    def test_all_series_at_once_are_each_on_their_own(self, rng: np.random.Generator) -> None:
        t, _, y = peaked(rng, 0.03)
        both = np.concatenate([y, y])
        both[1, 20] *= 10
        together = fit_curves(t, both, loss="huber").evaluate(t)
        for row in range(2):
            alone = fit_curves(t, both[row : row + 1], loss="huber").evaluate(t)
            np.testing.assert_allclose(together[row], alone[0], rtol=SAME)

    def test_same_input_gives_the_same_bits(self, rng: np.random.Generator) -> None:
        t, y = times("linear", 50), rng.standard_normal((3, 50))
        first, second = fit_curves(t, y, loss="huber"), fit_curves(t, y, loss="huber")
        assert (first.beta.tobytes(), first.K.tobytes()) == (second.beta.tobytes(), second.K.tobytes())

    def test_a_constant_with_one_outlier_is_the_constant(self) -> None:
        """More than half of the residuals vanish, so the deviation does."""
        y = np.full((1, 40), 7.0)
        y[0, 25] = 70.0
        np.testing.assert_allclose(
            fit_curves(np.arange(40.0), y, loss="huber").evaluate(np.arange(40.0)), 7.0, rtol=1e-3
        )

    @pytest.mark.parametrize("value", [0.0, 7.0, 1e100, 1e-300])
    def test_residuals_that_all_vanish_leave_no_deviation_to_divide_by(self, value: float) -> None:
        fits = fit_curves(np.arange(9.0), np.full((1, 9), value), loss="huber")
        np.testing.assert_allclose(fits.evaluate(np.arange(9.0)), value, rtol=1e-12)

    def test_too_few_points_give_nan(self) -> None:
        assert np.isnan(fit_curves(np.arange(5.0), np.ones((1, 5)), loss="huber").K).all()

    def test_another_loss_is_refused(self) -> None:
        other: Loss = "cauchy"  # type: ignore[assignment]
        with pytest.raises(ValueError, match="loss must be one of .*, got 'cauchy'"):
            fit_curves(np.arange(9.0), np.ones((1, 9)), loss=other)

    @settings(max_examples=10)
    @given(st.integers(0, 1000), st.floats(-30, 30), st.floats(-3, 5))
    def test_scaling_the_ratio_and_time(self, seed: int, power: float, slower: float) -> None:
        t, _, y = peaked(np.random.default_rng(seed), 0.03)
        y[0, 20] *= 10
        factor, pace = 10.0**power, 10.0**slower
        plain, scaled = fit_curves(t, y, loss="huber"), fit_curves(pace * t, factor * y, loss="huber")
        np.testing.assert_allclose(scaled.evaluate(pace * t), factor * plain.evaluate(t), rtol=1e-5)

    @settings(max_examples=25)
    @given(
        st.lists(st.one_of(st.floats(-LARGEST, LARGEST), st.integers(-2, 2).map(float), st.just(np.nan)), max_size=24),
        st.sampled_from(["linear", "logarithmic"]),
    )
    def test_whatever_is_finite_gives_a_finite_curve(self, values: list[float], spacing: str) -> None:
        """Where there are points enough for one."""
        t, y = times(spacing, max(2, len(values)))[: len(values)], np.array(values)
        usable = np.isfinite(y)
        fits = fit_curves(t, y[None], loss="huber")
        found = [
            fits.beta[0],
            fits.tau0[0],
            fits.A1[0],
            fits.A2[0],
            fits.K[0],
            fits.sse[0],
            *fits.evaluate(t[usable])[0],
        ]
        assert (np.isfinite(found) == (usable.sum() >= 6)).all()


class TestGaps:
    @pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf, 1e300])
    def test_points_that_are_not_finite_are_left_out_of_their_series(
        self, rng: np.random.Generator, hole: float
    ) -> None:
        t, y = times("linear", 30), shape("decay", np.linspace(0, 1, 30)) + 0.1 * rng.standard_normal((3, 30))
        holed = y.copy()
        holed[1, [3, 20]] = hole
        fits = fit_curves(t, holed)
        expected = fit_curves(np.delete(t, [3, 20]), np.delete(y, [3, 20], axis=1))
        np.testing.assert_allclose(fits.evaluate(t)[1], expected.evaluate(t)[1], rtol=1e-9)
        np.testing.assert_allclose(fits.evaluate(t)[[0, 2]], fit_curves(t, y).evaluate(t)[[0, 2]], rtol=SAME)

    def test_too_few_points_give_nan(self) -> None:
        y = np.vstack([np.arange(8.0), np.where(np.arange(8) < 5, np.arange(8.0), np.nan)])
        fits = fit_curves(np.arange(8.0), y)
        assert np.isfinite(fits.beta[0])
        assert np.isnan([fits.beta[1], fits.tau0[1], fits.A1[1], fits.A2[1], fits.K[1], fits.sse[1]]).all()

    def test_constant_series_is_its_constant(self) -> None:
        fits = fit_curves(np.arange(9.0), np.full((1, 9), 7.0))
        np.testing.assert_allclose(fits.evaluate(np.arange(9.0)), 7.0, rtol=1e-12)

    def test_no_points_and_no_series(self) -> None:
        assert np.isnan(fit_curves(np.zeros(0), np.zeros((2, 0))).beta).all()
        assert len(fit_curves(np.arange(9.0), np.zeros((0, 9))).beta) == 0


class TestBadArguments:
    @pytest.mark.parametrize(
        ("t", "y", "weights", "message"),
        [
            (np.zeros((2, 2)), np.zeros((1, 2)), None, r"times must be \[T\]"),
            (np.arange(3), np.zeros(3), None, r"series \[L, T\]"),
            (np.arange(3), np.zeros((1, 4)), None, "got shapes"),
            (np.array([0, 2, 1]), np.zeros((1, 3)), None, "ascending"),
            (np.array([-1, 2, 3]), np.zeros((1, 3)), None, "not negative"),
            (np.array([0, np.nan, 3]), np.zeros((1, 3)), None, "finite"),
            (np.arange(3), np.zeros((1, 3)), np.ones(4), "weights must be"),
            (np.arange(3), np.zeros((1, 3)), np.array([1, -1, 1]), "weights must be finite and not negative"),
            (np.arange(3), np.zeros((1, 3)), np.array([1, np.nan, 1]), "weights must be finite and not negative"),
        ],
    )
    def test_say_what_is_wrong(self, t: Floats, y: Floats, weights: Floats | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit_curves(t, y, weights=weights)


@st.composite
def noisy(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """A trajectory with noise: times and one series ``[1, n]``."""
    kind = draw(st.sampled_from(["early peak", "log increase", "decay", "dip"]))
    t = times(draw(st.sampled_from(["linear", "logarithmic"])), draw(st.integers(8, 60)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    clean = shape(kind, t / t[-1])
    return t, (clean * (1 + draw(st.floats(0.005, 0.1)) * rng.standard_normal(len(t))))[None]


class TestInvariance:
    """The residual sum follows; the curve does where the optimum is a single one, so the sum is what is tested."""

    @settings(max_examples=20)
    @given(noisy(), st.floats(-30, 30))
    def test_scaling_the_ratio(self, data: tuple[Floats, Floats], power: float) -> None:
        t, y = data
        factor = 10.0**power
        assert fit_curves(t, factor * y).sse[0] == pytest.approx(factor**2 * fit_curves(t, y).sse[0], rel=1e-6)

    @settings(max_examples=20)
    @given(noisy(), st.floats(-3, 5))
    def test_scaling_time(self, data: tuple[Floats, Floats], power: float) -> None:
        t, y = data
        factor = 10.0**power
        plain, scaled = fit_curves(t, y), fit_curves(factor * t, y)
        assert scaled.sse[0] == pytest.approx(plain.sse[0], rel=1e-6)

    @settings(max_examples=20)
    @given(noisy(), st.floats(-1e3, 1e3))
    def test_adding_a_constant(self, data: tuple[Floats, Floats], constant: float) -> None:
        t, y = data
        assert fit_curves(t, y + constant).sse[0] == pytest.approx(fit_curves(t, y).sse[0], rel=1e-6)

    @settings(max_examples=20)
    @given(noisy(), st.integers(2, 4))
    def test_duplicating_points(self, data: tuple[Floats, Floats], copies: int) -> None:
        t, y = data
        doubled = fit_curves(np.repeat(t, copies), np.repeat(y, copies, axis=1))
        assert doubled.sse[0] == pytest.approx(copies * fit_curves(t, y).sse[0], rel=1e-6)

    @settings(max_examples=20)
    @given(noisy())
    def test_mirroring_the_ratio(self, data: tuple[Floats, Floats]) -> None:
        t, y = data
        assert fit_curves(t, -y).sse[0] == pytest.approx(fit_curves(t, y).sse[0], rel=1e-6)

    def test_well_determined_curves_follow_too(self, rng: np.random.Generator) -> None:
        t = times("linear", 60)
        y = shape("early peak", t / t[-1])[None] + rng.standard_normal((1, 60))
        plain = fit_curves(t, y)
        moved = fit_curves(1e3 * t, 7 * y + 100)
        assert moved.beta[0] == pytest.approx(plain.beta[0] / 1e3, rel=1e-4)
        assert moved.K[0] == pytest.approx(7 * plain.K[0] + 100, rel=1e-4)
        np.testing.assert_allclose(moved.evaluate(1e3 * t), 7 * plain.evaluate(t) + 100, rtol=1e-5)


def test_evaluate_broadcasts_over_series() -> None:
    t = np.arange(5.0)
    both = evaluate(t, [[0.1], [0.2]], [[1.0], [2.0]], [[1.0], [2.0]], [[0.0], [1.0]], [[3.0], [4.0]])
    np.testing.assert_allclose(both[1], Curve(0.2, 2.0, 2.0, 1.0, 4.0).evaluate(t), rtol=1e-15)
