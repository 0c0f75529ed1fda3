"""The made sweep and what is learned from it, once for all tests."""

from __future__ import annotations

import pytest

from ma_monitor.architecture.predictor import Predictor, fit_predictor
from ma_monitor.architecture.sweep import Training
from tests.architecture.made import make_sweep


@pytest.fixture(scope="session")
def sweep() -> list[Training]:
    return make_sweep()


@pytest.fixture(scope="session")
def predictor(sweep: list[Training]) -> Predictor:
    return fit_predictor(sweep)
