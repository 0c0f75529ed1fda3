"""The curve against 50-digit arithmetic, and the two ways of writing it against each other."""

from __future__ import annotations

import math

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ma_monitor.numerics.curve import Curve, PaperParameters

DIGITS = 50
RELATIVE = 1e-12
"""Relative to the largest term of the sum: where terms cancel, no sum of floats can be relative to its result."""


def exact_terms(curve: Curve, t: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Eq. 14 in 50 digits, and the size of its largest term."""
    with mpmath.workdps(DIGITS):
        decay = mpmath.exp(-mpmath.mpf(curve.beta) * mpmath.mpf(t))
        x = mpmath.mpf(t) + mpmath.mpf(curve.tau0)
        terms = [curve.A1 * mpmath.log(x) * decay, curve.A2 * decay, mpmath.mpf(curve.K)]
        return mpmath.fsum(terms), max(abs(term) for term in terms)


def exact_omega(z: mpmath.mpf) -> mpmath.mpf:
    """ω with ω + ln ω = z, by bisection on ln ω: slow, and obvious."""
    low, high = mpmath.mpf(-2000), mpmath.mpf(2000)
    for _ in range(220):
        middle = (low + high) / 2
        if middle + mpmath.exp(middle) < z:
            low = middle
        else:
            high = middle
    return mpmath.exp(low)


curves = st.builds(
    Curve,
    beta=st.floats(1e-12, 1e2),
    tau0=st.floats(1e-6, 1e6),
    A1=st.floats(-1e6, 1e6),
    A2=st.floats(-1e6, 1e6),
    K=st.floats(-1e6, 1e6),
)


class TestValues:
    @given(curves, st.floats(0, 1e6))
    def test_value_has_twelve_digits(self, curve: Curve, t: float) -> None:
        expected, size = exact_terms(curve, t)
        assert abs(float(curve.evaluate(t)) - expected) <= RELATIVE * size

    @given(curves, st.floats(0, 1e6))
    def test_jacobian_has_twelve_digits(self, curve: Curve, t: float) -> None:
        with mpmath.workdps(DIGITS):
            decay = mpmath.exp(-mpmath.mpf(curve.beta) * mpmath.mpf(t))
            x = mpmath.mpf(t) + mpmath.mpf(curve.tau0)
            log = mpmath.log(x)
            expected = [-t * decay * (curve.A1 * log + curve.A2), curve.A1 * decay / x, decay * log, decay, 1]
            sizes = [t * decay * max(abs(curve.A1 * log), abs(curve.A2)), *(abs(value) for value in expected[1:])]
        for value, wanted, size in zip(curve.jacobian(t), expected, sizes, strict=True):
            assert abs(float(value) - wanted) <= RELATIVE * size + 5e-324

    def test_jacobian_is_the_derivative(self) -> None:
        curve, t, step = Curve(0.3, 0.7, 2.0, -1.0, 5.0), np.linspace(0, 9, 7), 1e-6
        for i, name in enumerate(("beta", "tau0", "A1", "A2", "K")):
            moved = [Curve(**{**curve.__dict__, name: getattr(curve, name) + h}) for h in (step, -step)]
            slope = (moved[0].evaluate(t) - moved[1].evaluate(t)) / (2 * step)
            np.testing.assert_allclose(curve.jacobian(t)[:, i], slope, rtol=1e-8, atol=1e-8)

    def test_outside_its_domain_it_is_nan(self) -> None:
        curve = Curve(0.1, -2.0, 1.0, 0.0, 3.0)
        assert np.isnan(curve.evaluate([1.0, 2.0])).all()
        assert np.isnan(curve.jacobian([1.0, 2.0])).all()
        assert np.isfinite(curve.evaluate(2.5))

    def test_near_zero_decay_the_large_constants_cancel_cleanly(self) -> None:
        """At β = 1e-9 the line 5t is A₂·(e^(-βt) - 1) with A₂ = -5e9: naive evaluation would be off by 1e-6."""
        curve = Curve(1e-9, 1.0, 0.0, -5e9, 5e9)
        np.testing.assert_allclose(curve.evaluate(np.arange(5.0)), 5 * np.arange(5.0), rtol=3e-9)


class TestPeak:
    @given(
        log_lambda=st.floats(-300, 3),
        log_gamma=st.floats(-8, 8),
        t0=st.floats(1e-3, 1e3),
        amplitude=st.floats(1e-3, 1e3),
        level=st.floats(-100, 100),
    )
    def test_over_the_whole_domain_it_has_twelve_digits(
        self, log_lambda: float, log_gamma: float, t0: float, amplitude: float, level: float
    ) -> None:
        """λ from 1e-300 to 1e3, through the parameters of Eq. 9; A₁ = A·e^(-λt₀) must fit a float."""
        assume(10.0**log_lambda * t0 < 600)
        gamma = 10.0**log_gamma
        curve = Curve.from_paper(PaperParameters(None, 1, math.log(amplitude), 10.0**log_lambda, gamma, t0, level))
        point = curve.stationary_point()
        assert point is not None
        with mpmath.workdps(DIGITS):
            beta = mpmath.mpf(curve.beta)
            omega = exact_omega(mpmath.mpf(curve.A2) / mpmath.mpf(curve.A1) - mpmath.log(beta))
            x = 1 / (beta * omega)
            time = x - mpmath.mpf(curve.tau0)
            height = curve.A1 * omega * mpmath.exp(-beta * time)
            assert abs(point[0] - time) <= RELATIVE * max(x, abs(curve.tau0))
            assert abs(point[1] - (height + curve.K)) <= RELATIVE * max(abs(height), abs(curve.K))

    @given(st.floats(-300, 3))
    def test_it_is_the_papers_equation_13(self, log_lambda: float) -> None:
        """With γ = 1 and t₀ = 1, the peak is at e^(W(1/λ)) - 1."""
        decay = 10.0**log_lambda
        point = Curve(decay, 1.0, 1.0, 0.0, 0.0).stationary_point()
        with mpmath.workdps(DIGITS):
            x = mpmath.exp(mpmath.lambertw(1 / mpmath.mpf(decay)))
        assert point is not None
        assert abs(point[0] + 1 - x) <= RELATIVE * x

    def test_moves_with_the_unit_of_time(self) -> None:
        slow = Curve(0.01, 5.0, 10.0, 2.0, 1.0)
        step, height = slow.peak() or (math.nan, math.nan)
        fast = Curve(
            10.0, 0.005, 10.0, 2.0 + 10.0 * math.log(1000), 1.0
        )  # time in thousands: ln(t + τ) shifts by ln 1000
        assert fast.peak() == pytest.approx((step / 1000, height), rel=1e-9)
        assert 0 < step / 1000 < 1

    def test_is_the_highest_point_of_the_curve(self) -> None:
        curve = Curve(0.02, 3.0, 4.0, 1.0, 7.0)
        peak = curve.peak()
        assert peak is not None
        t = np.linspace(0, 200, 200_001)
        values = curve.evaluate(t)
        assert peak[0] == pytest.approx(t[values.argmax()], abs=1e-3)
        assert peak[1] == pytest.approx(values.max(), rel=1e-9)

    @pytest.mark.parametrize(
        "curve",
        [
            Curve(0.0, 1.0, 1.0, 0.0, 0.0),  # never decays
            Curve(0.1, 1.0, -1.0, 0.0, 0.0),  # a trough
            Curve(0.1, 1.0, 0.0, 1.0, 0.0),  # a plain decay
            Curve(0.1, 1.0, 1.0, 50.0, 0.0),  # falls from the start: its maximum is before time 0
            Curve(1e-300, 1.0, 1.0, -1e4, 0.0),  # beyond what a float holds
        ],
    )
    def test_there_is_none(self, curve: Curve) -> None:
        assert curve.peak() is None

    def test_trough_is_stationary_but_no_peak(self) -> None:
        point = Curve(0.1, 1.0, -1.0, 0.0, 0.0).stationary_point()
        mirrored = Curve(0.1, 1.0, 1.0, 0.0, 0.0).peak()
        assert point is not None
        assert mirrored is not None
        assert point == (mirrored[0], -mirrored[1])


class TestPaperForm:
    @given(
        sign=st.sampled_from([-1, 1]),
        amplitude=st.floats(1e-3, 1e3),
        decay=st.floats(1e-3, 10),
        gamma=st.floats(1e-3, 1e3),
        t0=st.floats(-3, 3),
        level=st.floats(-100, 100),
    )
    def test_there_and_back(
        self, sign: int, amplitude: float, decay: float, gamma: float, t0: float, level: float
    ) -> None:
        paper = PaperParameters(sign * amplitude, sign, math.log(amplitude), decay, gamma, t0, level)
        back = Curve.from_paper(paper).to_paper()
        assert back.sign == sign
        for name in ("A", "lambda_", "gamma", "t0", "K"):
            assert getattr(back, name) == pytest.approx(getattr(paper, name), rel=1e-10, abs=1e-12)
        assert back.log_abs_A == pytest.approx(paper.log_abs_A, abs=1e-10)

    def test_both_forms_are_the_same_curve(self) -> None:
        amplitude, decay, gamma, t0, level = -3.0, 0.4, 0.02, 1.5, 8.0
        curve = Curve.from_paper(PaperParameters(amplitude, -1, math.log(3.0), decay, gamma, t0, level))
        t = np.linspace(0, 500, 50)
        x = gamma * t + t0
        np.testing.assert_allclose(curve.evaluate(t), amplitude * np.exp(-decay * x) * np.log(x) + level, rtol=1e-12)

    def test_overflowing_amplitude_keeps_its_logarithm(self) -> None:
        paper = Curve(1.0, 1000.0, -2.0, 1.0, 3.0).to_paper()
        assert paper.A is None
        assert paper.sign == -1
        assert paper.log_abs_A == pytest.approx(math.log(2) + 1000)

    def test_without_a_logarithm_only_the_asymptote_is_defined(self) -> None:
        assert Curve(1.0, 1.0, 0.0, 2.0, 3.0).to_paper() == PaperParameters(None, 0, None, None, None, None, 3.0)

    @pytest.mark.parametrize("a2", [-1e6, 1e6])
    def test_gamma_beyond_floats_is_none(self, a2: float) -> None:
        paper = Curve(1.0, 1.0, 1.0, a2, 3.0).to_paper()
        assert paper.gamma is None
        assert paper.log_abs_A == 1.0

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"gamma": 0.0}, "gamma must be above 0"),
            ({"gamma": -1.0}, "gamma must be above 0"),
            ({"lambda_": -0.1}, "lambda must not be negative"),
            ({"t0": None}, "needs all of"),
            ({"log_abs_A": None}, "needs all of"),
        ],
    )
    def test_says_what_is_wrong(self, changes: dict[str, float | None], message: str) -> None:
        good: dict[str, float | None] = {"A": 1.0, "log_abs_A": 0.0, "lambda_": 0.1, "gamma": 1.0, "t0": 1.0, "K": 0.0}
        with pytest.raises(ValueError, match=message):
            Curve.from_paper(PaperParameters(sign=1, **{**good, **changes}))
