"""The other hypotheses: as printed in the paper, found again where they are true, and compared by AICc."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import Bounds, differential_evolution

from ma_monitor.numerics.hypotheses import HypothesisFits, aicc, fit_hypotheses
from ma_monitor.numerics.projection import Floats

T = 2000.0
STEPS = np.linspace(0, T, 80)
LEFT = 1e-8
"""Share of the variance that may be left where a hypothesis is exactly true."""
R2_ROOM = 2e-3
"""R² that a hypothesis may lose against a slow global search: their figures are compared to two or three digits."""


def first_order(t: Floats, tau: float) -> Floats:
    return 1 - np.exp(-t / tau)


def second_order(t: Floats, omega: float, zeta: float) -> Floats:
    """Eq. 16 to 18 as printed."""
    if zeta < 1:
        damped = omega * math.sqrt(1 - zeta**2)
        swing = np.sin(damped * t + math.acos(zeta))
        return np.asarray(1 - np.exp(-zeta * omega * t) * swing / math.sqrt(1 - zeta**2))
    if zeta == 1:
        return np.asarray(1 - np.exp(-omega * t) * (1 + omega * t))
    r1, r2 = (-omega * (zeta + sign * math.sqrt(zeta**2 - 1)) for sign in (-1, 1))
    return np.asarray(1 - (r2 / (r2 - r1) * np.exp(r1 * t) + r1 / (r1 - r2) * np.exp(r2 * t)))


def by_name(y: Floats, t: Floats = STEPS) -> dict[str, HypothesisFits]:
    return {fit.name: fit for fit in fit_hypotheses(t, y[None])}


def left(fit: HypothesisFits, y: Floats) -> float:
    return float(fit.sse[0] / ((y - y.mean()) ** 2).sum())


class TestTruth:
    """A hypothesis that made the data explains them, and gives back its parameters."""

    def test_first_order(self) -> None:
        y = 30 * first_order(STEPS, 250.0)
        fit = by_name(y)["first_order"]
        assert left(fit, y) < LEFT
        assert fit.parameters["tau"][0] == pytest.approx(250, rel=1e-4)
        assert fit.parameters["amplitude"][0] == pytest.approx(30, rel=1e-4)
        assert fit.count == 2

    @pytest.mark.parametrize(
        ("name", "zeta"),
        [
            ("second_order_underdamped", 0.3),
            ("second_order_critically_damped", 1.0),
            ("second_order_overdamped", 2.5),
        ],
    )
    def test_second_order(self, name: str, zeta: float) -> None:
        y = 30 * second_order(STEPS, 0.008, zeta)
        fits = by_name(y)
        assert left(fits[name], y) < LEFT
        assert fits[name].parameters["omega"][0] == pytest.approx(0.008, rel=1e-3)
        assert left(fits[f"{name}_offset"], y) < 1e-6

    @pytest.mark.parametrize("zeta", [0.3, 1.0, 2.5])
    def test_with_an_offset(self, zeta: float) -> None:
        kind = {0.3: "under", 1.0: "critically_", 2.5: "over"}[zeta]
        name = f"second_order_{kind}damped_offset"
        y = 7 + 30 * second_order(STEPS, 0.008, zeta)
        fit = by_name(y)[name]
        assert left(fit, y) < 1e-6
        assert fit.parameters["offset"][0] == pytest.approx(7, abs=0.05)

    def test_logarithm(self) -> None:
        y = 4 * np.log((STEPS + 50) / T) + 20
        fit = by_name(y)["logarithm"]
        assert left(fit, y) < LEFT
        assert fit.parameters["tau"][0] == pytest.approx(50, rel=1e-3)
        assert fit.parameters["amplitude"][0] == pytest.approx(4, rel=1e-3)
        assert fit.parameters["offset"][0] == pytest.approx(20, rel=1e-3)

    @pytest.mark.parametrize("exponent", [-1.3, 0.5, 2.0])
    def test_power_law(self, exponent: float) -> None:
        y = 12 + 5 * ((STEPS + 80) / T) ** exponent
        fit = by_name(y)["power_law"]
        assert left(fit, y) < 1e-6
        assert fit.parameters["exponent"][0] == pytest.approx(exponent, abs=0.05)

    def test_constant_is_the_mean(self, rng: np.random.Generator) -> None:
        y = rng.standard_normal(80)
        fit = by_name(y)["constant"]
        assert fit.parameters["K"][0] == pytest.approx(y.mean())
        assert left(fit, y) == pytest.approx(1)


class TestSearch:
    @pytest.mark.parametrize("name", ["second_order_underdamped", "second_order_overdamped"])
    @pytest.mark.parametrize("offset", [False, True])
    def test_is_as_good_as_a_slow_global_search(self, rng: np.random.Generator, name: str, offset: bool) -> None:
        y = 7 + 9 * np.log1p(STEPS / 40) * np.exp(-STEPS / 1500) + 0.5 * rng.standard_normal(80)

        def residual(place: Floats) -> float:
            zeta = place[1] if name.endswith("underdamped") else 1 + 10 ** place[1]
            design = [second_order(STEPS, 10 ** place[0] / T, float(zeta))]
            design += [np.ones_like(STEPS)] if offset else []
            columns = np.stack(design, axis=1)
            return float(((y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]) ** 2).sum())

        box = [(-1.0, 4.0), (0.0, 0.999)] if name.endswith("underdamped") else [(-2.0, 5.0), (-2.0, 2.0)]
        slow = differential_evolution(residual, Bounds(*np.transpose(box)), seed=0, maxiter=60)
        fit = by_name(y)[name + ("_offset" if offset else "")]
        assert left(fit, y) <= slow.fun / ((y - y.mean()) ** 2).sum() + R2_ROOM

    def test_an_offset_never_makes_it_worse(self, rng: np.random.Generator) -> None:
        y = 7 + 3 * np.log1p(STEPS / 100) + 0.3 * rng.standard_normal(80)
        fits = by_name(y)
        for name in ("first_order", "second_order_critically_damped", "second_order_overdamped"):
            assert fits[f"{name}_offset"].sse[0] <= fits[name].sse[0]

    def test_series_do_not_mix(self, rng: np.random.Generator) -> None:
        y = 7 + np.stack([np.log1p(STEPS / 50), np.exp(-STEPS / 300)]) + 0.1 * rng.standard_normal((2, 80))
        both = fit_hypotheses(STEPS, y)
        for row in range(2):
            for fit, alone in zip(both, fit_hypotheses(STEPS, y[row : row + 1]), strict=True):
                assert fit.sse[row] == pytest.approx(alone.sse[0], rel=1e-6), fit.name

    def test_many_points_are_all_used_at_the_end(self, rng: np.random.Generator) -> None:
        t = np.linspace(0, T, 1500)
        y = 7 + np.log1p(t / 50) + 0.1 * rng.standard_normal(1500)
        fit = by_name(y, t)["logarithm"]
        amplitude, tau, offset = (fit.parameters[name][0] for name in ("amplitude", "tau", "offset"))
        residual = y - offset - amplitude * np.log((t + tau) / T)
        assert fit.sse[0] == pytest.approx((residual**2).sum(), rel=1e-9)


class TestAicc:
    def test_is_the_textbook_formula(self) -> None:
        """With k parameters and the noise's variance: n·ln(SSE/n) + 2(k+1) + 2(k+1)(k+2)/(n-k-2)."""
        value = aicc(np.array([3.0]), 4, 20, np.array([20.0]))
        assert value[0] == pytest.approx(20 * math.log(3 / 20) + 10 + 2 * 5 * 6 / 14)

    def test_fewer_effective_points_ask_for_more_evidence(self) -> None:
        sse = np.array([10.0, 8.0])
        gain = [
            float(aicc(sse[:1], 1, 100, np.array([n]))[0] - aicc(sse[1:], 5, 100, np.array([n]))[0])
            for n in (100.0, 20.0)
        ]
        assert gain[0] > 0 > gain[1]

    @pytest.mark.parametrize(("sse", "effective"), [(0.0, 20.0), (1.0, 5.0), (math.nan, 20.0)])
    def test_is_nan_where_undefined(self, sse: float, effective: float) -> None:
        assert np.isnan(aicc(np.array([sse]), 4, 20, np.array([effective]))[0])
