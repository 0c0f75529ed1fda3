"""Intervals and shapes against a profile likelihood by brute force; the noise behind them; what they cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import f as f_distribution

from ma_monitor.numerics.batch import fit_group
from ma_monitor.numerics.curve import Curve
from ma_monitor.numerics.noise import PARAMETERS, effective_points, noise_factors, noise_variance
from ma_monitor.numerics.profile import LEVELS, Evidence, examine, f_quantile
from ma_monitor.numerics.projection import Floats

ROOM = 0.05
"""Relative error of an interval's half width: the net that walks the admissible set has gaps."""


def evidence(t: Floats, y: Floats, effective: float) -> Evidence:
    group = fit_group(t, y[None], None)
    return examine(group.problem, group.optimum, np.array([effective]), np.ones((1, len(t))))[0]


def profile(t: Floats, y: Floats, quantity: str, value: float, start: tuple[float, float]) -> float:
    """Lowest residual sum of the curves with this asymptote, or with their peak at this scaled time.

    K fixed leaves the columns e^(-bs)·ln(s + c) and e^(-bs); a peak at s = p fixes A2/A1 = 1/(b(p + c)) - ln(p + c).
    """
    s = t / t[-1]

    def residual(place: Floats) -> float:
        b, c = np.exp(place)
        decay = np.exp(-b * s)
        if quantity == "asymptote":
            design, target = np.stack([decay * np.log(s + c), decay], axis=1), y - value
        else:
            ratio = 1 / (b * (value + c)) - np.log(value + c)
            design, target = np.stack([decay * (np.log(s + c) + ratio), np.ones_like(s)], axis=1), y
        return float(((target - design @ np.linalg.lstsq(design, target, rcond=None)[0]) ** 2).sum())

    found = minimize(residual, np.log(start), method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-6})
    return float(found.fun)


class TestAgainstBruteForce:
    @pytest.mark.parametrize("quantity", ["asymptote", "peak"])
    def test_interval(self, rng: np.random.Generator, quantity: str) -> None:
        t = np.linspace(0, 1000, 60)
        s = t / t[-1]
        y = 10 + 80 * np.exp(-7 * s) * (np.log(s + 0.05) + 3.2) + rng.standard_normal(60)
        group = fit_group(t, y[None], None)
        found = examine(group.problem, group.optimum, np.array([60.0]), np.ones((1, 60)))[0]
        best = float((group.residual**2).sum())
        limit = best * (1 + float(f_distribution.ppf(LEVELS[0], 1, 60 - PARAMETERS)) / (60 - PARAMETERS))
        if quantity == "asymptote":
            mean, scale = group.problem.mean[0], group.problem.scale[0]
            low, high = mean + scale * found.asymptote[:, 0]
        else:
            low, high = found.peak_time[:, 0]
        start = float(group.optimum.b[0]), float(group.optimum.c[0])
        for bound in (low, high):
            middle = 0.5 * (low + high)
            inner, outer = (
                profile(t, y, quantity, middle + (1 + sign * ROOM) * (bound - middle), start) for sign in (-1, 1)
            )
            assert inner < limit < outer

    def test_wider_level_holds_the_narrower(self, rng: np.random.Generator) -> None:
        t = np.linspace(0, 1000, 60)
        s = t / t[-1]
        y = 10 + 80 * np.exp(-7 * s) * (np.log(s + 0.05) + 3.2) + rng.standard_normal((5, 60))
        group = fit_group(t, y, None)
        likely, wide = examine(group.problem, group.optimum, np.full(5, 60.0), np.ones((5, 60)))
        for name in ("asymptote", "peak_time", "peak_height"):
            narrow, broad = getattr(likely, name), getattr(wide, name)
            assert (broad[0] <= narrow[0]).all()
            assert (broad[1] >= narrow[1]).all()

    def test_quantile_is_that_of_f(self) -> None:
        freedom = np.array([1.0, 7.5, 100.0])
        for level in LEVELS:
            np.testing.assert_allclose(f_quantile(level, freedom), f_distribution.ppf(level, 1, freedom), rtol=1e-9)


class TestShapes:
    T = np.linspace(0, 1000, 80)
    S = np.linspace(0, 1, 80)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (6 + 90 * np.exp(-8 * S) * (np.log(S + 0.01) + 4.6), (False, True, False)),
            (6 + 5 * np.log1p(S / 0.01), (False, False, True)),
            (5 + 20 * np.exp(-12 * S), (True, False, False)),
            (9 - 30 * np.exp(-15 * S) * (np.log(S + 0.02) + 4), (True, False, True)),
        ],
        ids=["peak", "rise", "fall", "a dip that ends where it began"],
    )
    def test_only_the_true_ones_are_left_with_little_noise(
        self, rng: np.random.Generator, values: Floats, expected: tuple[bool, bool, bool]
    ) -> None:
        if expected == (True, False, True):
            values = values + 0.05 * (values[0] - values[-1])
        found = evidence(self.T, values * (1 + 0.003 * rng.standard_normal(80)), 80.0)
        shapes = bool(found.highest_first[0]), bool(found.highest_inside[0]), bool(found.highest_last[0])
        if expected == (True, False, True):
            assert not shapes[1]
        else:
            assert shapes == expected

    def test_rising_layer_has_neither_asymptote_nor_peak(self, rng: np.random.Generator) -> None:
        found = evidence(self.T, 6 + 5 * np.log1p(self.S / 0.01) + 0.3 * rng.standard_normal(80), 80.0)
        assert found.peak_time[1, 0] > 100
        assert found.asymptote[1, 0] > 100

    def test_too_few_independent_points_rule_nothing_out(self, rng: np.random.Generator) -> None:
        found = evidence(self.T, 5 + 20 * np.exp(-12 * self.S) + rng.standard_normal(80), 5.5)
        assert found.asymptote[:, 0].tolist() == [-np.inf, np.inf]
        assert found.highest_first[0]
        assert found.highest_inside[0]
        assert found.highest_last[0]
        assert found.change[0] == np.inf

    def test_change_bounds_that_of_the_truth(self, rng: np.random.Generator) -> None:
        y = 100 + 2 * self.S + 0.2 * rng.standard_normal(80)
        group = fit_group(self.T, y[None], None)
        found = examine(group.problem, group.optimum, np.array([80.0]), np.ones((1, 80)))[0]
        assert 2 <= found.change[0] * group.problem.scale[0] < 4


class TestEffectivePoints:
    @pytest.mark.parametrize("rho", [0.0, 0.3, 0.6])
    def test_is_that_of_autoregressive_noise(self, rng: np.random.Generator, rho: float) -> None:
        """Median over many series, each freed of the five smooth components that a fit takes."""
        n = 200
        noise = rng.standard_normal((200, n))
        for i in range(1, n):
            noise[:, i] = rho * noise[:, i - 1] + np.sqrt(1 - rho**2) * noise[:, i]
        basis = np.linalg.qr(np.polynomial.legendre.legvander(np.linspace(-1, 1, n), PARAMETERS - 1))[0]
        residual = noise - (noise @ basis) @ basis.T
        found = np.median(effective_points(np.arange(n, dtype=float), residual))
        assert found == pytest.approx(n * (1 - rho) / (1 + rho), rel=0.15)

    def test_repeated_times_count_once(self, rng: np.random.Generator) -> None:
        t, residual = np.arange(30.0), rng.standard_normal((1, 30))
        twice = effective_points(np.repeat(t, 2), np.repeat(residual, 2, axis=1))
        np.testing.assert_allclose(twice, effective_points(t, residual))

    def test_no_residual_counts_every_point(self) -> None:
        assert effective_points(np.arange(9.0), np.zeros((1, 9)))[0] > 0


class TestNoiseFactors:
    S = np.linspace(0, 1, 400)
    CLEAN = 10 + 80 * np.exp(-7 * S) * (np.log(S + 0.05) + 3.2)

    def factors(self, y: Floats) -> Floats:
        group = fit_group(self.S, y[None], None)
        variance = noise_variance(group.problem, group.residual / group.problem.scale[:, None])
        return noise_factors(group.problem, group.optimum.point, group.optimum.coefficients, variance)[:, 0]

    def test_even_noise_changes_nothing(self, rng: np.random.Generator) -> None:
        np.testing.assert_allclose(self.factors(self.CLEAN + rng.standard_normal(400)), 1, rtol=0.02)

    def test_proportional_noise_makes_the_peak_less_certain_and_the_asymptote_more(
        self, rng: np.random.Generator
    ) -> None:
        asymptote, _, height = self.factors(self.CLEAN * (1 + 0.03 * rng.standard_normal(400)))
        assert height > 1.5
        assert asymptote < 0.8

    def test_factors_are_the_ratio_of_variances(self, rng: np.random.Generator) -> None:
        """Spread of K over many noisy copies, against what an unweighted fit's covariance says."""
        t = self.S[::4]
        clean = self.CLEAN[::4]
        y = clean * (1 + 0.02 * rng.standard_normal((400, len(t))))
        group = fit_group(t, y, None)
        curve = Curve(*(float(v) for v in fit_group(t, clean[None], None).parameters[:, 0]))
        covariance = np.linalg.inv((jacobian := curve.jacobian(t)).T @ jacobian)
        claimed = covariance[4, 4] * (group.residual**2).sum(axis=1).mean() / (len(t) - PARAMETERS)
        variance = noise_variance(group.problem, group.residual / group.problem.scale[:, None])
        factors = noise_factors(group.problem, group.optimum.point, group.optimum.coefficients, variance)[0]
        assert group.parameters[4].var() / claimed == pytest.approx(np.median(factors), rel=0.3)
