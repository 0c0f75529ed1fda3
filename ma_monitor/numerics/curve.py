"""The trajectory curve: an exponentially decaying logarithm with five parameters.

The paper writes it as Eq. 9, f(t) = A·e^(-λx)·ln x + K with x = γt + t₀ > 0 and γ > 0, and again as Eq. 14,
f(t) = e^(-βt)·[A₁·ln(t + τ₀) + A₂] + K. Everything here works on Eq. 14: A = A₁·e^(βτ₀) overflows on real optima.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import wrightomega

from ma_monitor.numerics.values import none_if_not_finite

Floats = NDArray[np.float64]
_SMALL = 0.5
"""Below this βt, e^(-βt) - 1 is formed directly: as β → 0, A₂ and K grow without bound and nearly cancel."""


@dataclass(frozen=True)
class PaperParameters:
    """The parameters of Eq. 9. None where a number is undefined or does not fit a float.

    Attributes:
        A: Amplitude; None where it overflows (``sign`` and ``log_abs_A`` still hold it) or is undefined.
        sign: Sign of A (and of A₁): 1, -1, or 0 where A₁ = 0.
        log_abs_A: ln abs(A).
        lambda_: Decay rate per unit of x.
        gamma: Scale of time, above 0.
        t0: Offset of x.
        K: Asymptote.
    """

    A: float | None
    sign: int
    log_abs_A: float | None
    lambda_: float | None
    gamma: float | None
    t0: float | None
    K: float | None


@dataclass(frozen=True)
class Curve:
    """Eq. 14: f(t) = e^(-βt)·[A₁·ln(t + τ₀) + A₂] + K, for t > -τ₀ (NaN elsewhere).

    Attributes:
        beta: Decay rate per unit of time, at least 0.
        tau0: Offset of time, in units of time; may be negative.
        A1: Amplitude of the logarithm, in units of the ratio.
        A2: Amplitude of the plain decay, in units of the ratio.
        K: Asymptote (for β > 0), in units of the ratio.
    """

    beta: float
    tau0: float
    A1: float
    A2: float
    K: float

    def evaluate(self, t: ArrayLike) -> Floats:
        """The curve at the times ``t`` (any shape)."""
        return evaluate(np.asarray(t, dtype=np.float64), self.beta, self.tau0, self.A1, self.A2, self.K)

    def jacobian(self, t: ArrayLike) -> Floats:
        """Derivatives by (β, τ₀, A₁, A₂, K) at the times ``t``: its shape with a last axis of 5."""
        times = np.asarray(t, dtype=np.float64)
        with np.errstate(all="ignore"):
            shifted, log = _shifted_log(times, self.tau0)
            decay = np.where(shifted > 0, np.exp(-self.beta * times), np.nan)
            by_beta = -times * decay * (self.A1 * log + self.A2)
            columns = [by_beta, self.A1 * decay / shifted, decay * log, decay, np.where(shifted > 0, 1.0, np.nan)]
        return np.stack(columns, axis=-1)

    def stationary_point(self) -> tuple[float, float] | None:
        """Time and height where the curve is flat: a maximum if A₁ > 0, else a trough. None if there is none.

        Eq. 13 in a form that neither overflows nor cancels: with ω + ln ω = A₂/A₁ - ln β (the Wright omega function;
        ω = W(1/λ)), x = t + τ₀ = 1/(βω) and the height is A₁·ω·e^(-βt) + K. There is none for β = 0 or A₁ = 0, nor
        where it lies beyond what a float can hold.
        """
        if not (self.beta > 0 and self.A1 != 0):
            return None
        with np.errstate(all="ignore"):
            omega = float(wrightomega(np.float64(self.A2) / self.A1 - math.log(self.beta)))
            time = float(np.float64(1) / (np.float64(self.beta) * omega) - self.tau0)
            height = float(self.A1 * omega * np.exp(np.float64(self.beta) * self.tau0 - 1 / np.float64(omega)) + self.K)
        return (time, height) if math.isfinite(time) and math.isfinite(height) else None

    def peak(self) -> tuple[float, float] | None:
        """Time and height of the maximum, or None: a trough (A₁ < 0), no decay (β = 0), or before time 0."""
        point = self.stationary_point() if self.A1 > 0 else None
        return point if point is not None and point[0] > 0 else None

    def to_paper(self) -> PaperParameters:
        """The same curve in the paper's parameters.

        γ = e^(A₂/A₁), λ = β/γ, t₀ = τ₀γ, A = A₁·e^(βτ₀). A₁ = 0 leaves γ, λ, t₀ and A undefined (the limit γ → ∞ or
        γ → 0); A₁ < 0 gives A < 0 and the same γ, λ, t₀; τ₀ < 0 gives t₀ < 0, and x > 0 only for t > -τ₀.
        """
        if self.A1 == 0 or not math.isfinite(self.A1):
            return PaperParameters(None, 0, None, None, None, None, none_if_not_finite(self.K))
        with np.errstate(all="ignore"):
            gamma = float(np.exp(np.float64(self.A2) / self.A1))
            lambda_ = float(self.beta / np.float64(gamma))
            t0 = self.tau0 * gamma
            amplitude = float(self.A1 * np.exp(np.float64(self.beta) * self.tau0))
        if gamma == 0:
            gamma = lambda_ = t0 = math.nan
        return PaperParameters(
            A=none_if_not_finite(amplitude),
            sign=1 if self.A1 > 0 else -1,
            log_abs_A=none_if_not_finite(math.log(abs(self.A1)) + self.beta * self.tau0),
            lambda_=none_if_not_finite(lambda_),
            gamma=none_if_not_finite(gamma),
            t0=none_if_not_finite(t0),
            K=none_if_not_finite(self.K),
        )

    @classmethod
    def from_paper(cls, parameters: PaperParameters) -> Curve:
        """The curve of Eq. 9: β = λγ, τ₀ = t₀/γ, A₁ = A·e^(-λt₀), A₂ = A₁·ln γ.

        Raises:
            ValueError: If γ is not above 0, λ is negative, or a parameter is missing.
        """
        p = parameters
        if p.lambda_ is None or p.gamma is None or p.t0 is None or p.K is None or (p.log_abs_A is None and p.sign != 0):
            raise ValueError(f"Eq. 9 needs all of A, lambda, gamma, t0 and K, got {p}")
        if not p.gamma > 0:
            raise ValueError(f"gamma must be above 0 (time runs forward), got {p.gamma}")
        if p.lambda_ < 0:
            raise ValueError(f"lambda must not be negative (a decay, not a growth), got {p.lambda_}")
        a1 = 0.0 if p.log_abs_A is None else p.sign * math.exp(p.log_abs_A - p.lambda_ * p.t0)
        return cls(p.lambda_ * p.gamma, p.t0 / p.gamma, a1, a1 * math.log(p.gamma), p.K)


def evaluate(t: Floats, beta: ArrayLike, tau0: ArrayLike, a1: ArrayLike, a2: ArrayLike, k: ArrayLike) -> Floats:
    """Eq. 14 with numpy broadcasting between the times and every parameter; NaN where t + τ₀ is not above 0.

    As β → 0 the curve tends to A₁·ln(t + τ₀) + straight line, with A₂ and K growing as 1/β and cancelling. There
    A₂·(e^(-βt) - 1) + (A₂ + K) keeps the digits that A₂·e^(-βt) + K would lose.
    """
    beta, tau0, a1, a2, k = (np.asarray(value, dtype=np.float64) for value in (beta, tau0, a1, a2, k))
    with np.errstate(all="ignore"):
        shifted, log = _shifted_log(t, tau0)
        exponent = -beta * t
        decay = np.exp(exponent)
        plain = np.where(exponent > -_SMALL, a2 * np.expm1(exponent) + (a2 + k), a2 * decay + k)
        return np.asarray(np.where(shifted > 0, a1 * decay * log + plain, np.nan), dtype=np.float64)


def _shifted_log(t: Floats, tau0: ArrayLike) -> tuple[Floats, Floats]:
    """Returns t + τ₀ and its logarithm, accurate near 0 too since it uses the rounding error of the sum."""
    offset = np.asarray(tau0, dtype=np.float64)
    total = t + offset
    part = total - t
    error = (t - (total - part)) + (offset - part)
    return total, np.log(total) + error / total
