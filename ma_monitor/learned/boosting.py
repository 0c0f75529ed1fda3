"""XGBoost, imported late and without a trace."""

from __future__ import annotations

import random
from types import ModuleType


def import_xgboost() -> ModuleType:
    """XGBoost. Its import draws from Python's own random numbers (through scikit-learn and rich); they are put back.

    Raises:
        ImportError: If it is not installed.
    """
    state = random.getstate()
    try:
        import xgboost
    finally:
        random.setstate(state)
    return xgboost
