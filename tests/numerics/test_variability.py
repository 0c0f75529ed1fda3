"""CV, standard error and interval over sequences."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_monitor.numerics.variability import Variability, variability

PRINTED = {"14M": (6.95, 2.20, 4.97), "410M": (4.64, 1.47, 3.32), "12B": (4.22, 1.34, 3.02)}
HALF_A_DIGIT = 0.005 * (1 + 2.262 / math.sqrt(10))
"""What rounding CV and the number compared to two decimals may make of it."""


def with_cv(percent: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Ten values of mean 1 and this coefficient of variation."""
    values = np.linspace(-1, 1, 10)
    return np.asarray(1 + percent / 100 * values / values.std(ddof=1))


@pytest.mark.parametrize("model", PRINTED)
def test_the_papers_table_2_is_one_number_in_three_forms(model: str) -> None:
    cv, sem, half = PRINTED[model]
    found = variability(with_cv(cv))
    assert found.cv_percent == pytest.approx(cv, rel=1e-12)
    assert found.sem_percent == pytest.approx(sem, abs=HALF_A_DIGIT)
    assert found.ci95_percent == pytest.approx(half, abs=HALF_A_DIGIT)


@given(st.lists(st.lists(st.floats(0.01, 1e4) | st.just(math.nan) | st.just(math.inf), min_size=5, max_size=5)))
def test_against_the_standard_library(rows: list[list[float]]) -> None:
    cvs = []
    for row in rows:
        kept = [value for value in row if math.isfinite(value)]
        if len(kept) >= 2:
            cvs.append(100 * statistics.stdev(kept) / statistics.mean(kept))
    found = variability(np.array(rows).reshape(-1, 5))
    assert found.measurements == len(cvs)
    if cvs:
        # Both subtract the mean first; what is left of values that agree to the last digit is rounding.
        assert found.cv_percent == pytest.approx(statistics.mean(cvs), rel=1e-9, abs=1e-9)
    else:
        assert found == Variability(None, None, None, 0)


def test_the_shape_before_the_last_axis_does_not_matter(rng: np.random.Generator) -> None:
    values = rng.uniform(1, 2, (3, 4, 10))
    whole, parts = variability(values), [variability(layer) for layer in values]
    assert whole.cv_percent == pytest.approx(np.mean([part.cv_percent for part in parts]), rel=1e-12)
    assert whole.measurements == sum(part.measurements for part in parts)


def test_zero_and_single_sequences_say_nothing() -> None:
    assert variability(np.zeros((2, 4))).measurements == 0
    assert variability(np.ones((7, 1))) == Variability(None, None, None, 0)
    assert variability(np.full((1, 3), 1e200)).measurements == 0, "its square would not fit a float"
