from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ma_monitor.learned.boosting import read_trees
from ma_monitor.learned.correction import packaged_path
from ma_monitor.learned.inputs import NAMES

FLOAT32 = 1e-5
"""Relative and absolute: XGBoost adds leaves in single precision."""


@pytest.mark.parametrize("objective", ["reg:squarederror", "reg:quantileerror"])
def test_trees_say_what_xgboost_says(objective: str) -> None:
    import xgboost

    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)).astype(np.float32)
    y = np.stack([x[:, 0] + np.abs(x[:, 1]), x[:, 2] * x[:, 3]], axis=1) + 0.1 * rng.standard_normal((400, 2))
    quantiles = {"quantile_alpha": np.array([0.1, 0.5, 0.9])} if "quantile" in objective else {}
    target = y[:, 0] if quantiles else y
    booster = xgboost.train(
        {"objective": objective, "max_depth": 4, "nthread": 1, **quantiles}, xgboost.QuantileDMatrix(x, target), 20
    )
    new = rng.standard_normal((50, 6)).astype(np.float32)
    ours = read_trees(json.loads(bytes(booster.save_raw("json"))), 6).predict(new)
    np.testing.assert_allclose(ours, booster.inplace_predict(new), rtol=FLOAT32, atol=FLOAT32)


def test_the_packaged_trees_say_what_xgboost_says() -> None:
    import xgboost

    document = json.loads(packaged_path().read_text())["trees"]
    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(json.dumps(document).encode()))
    x = np.random.default_rng(1).standard_normal((100, len(NAMES))).astype(np.float32)
    ours = read_trees(document, len(NAMES)).predict(x)
    np.testing.assert_allclose(ours, booster.inplace_predict(x), rtol=FLOAT32, atol=FLOAT32)


def test_a_forecast_imports_no_xgboost(tmp_path: Path) -> None:
    """And leaves Python's random numbers alone."""
    code = (
        "import random, sys\n"
        "import numpy as np; from pathlib import Path\n"
        "from transformers import GPTNeoXConfig\n"
        "from ma_monitor.learned.correction import Corrections, packaged_path\n"
        "from ma_monitor.numerics.forecast import forecast\n"
        "from ma_monitor.architecture.prediction import prior\n"
        "config = GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64)\n"
        "random.seed(1); state = random.getstate()\n"
        "steps = np.arange(0, 200, 10); lr = np.linspace(1e-3, 0, 401)\n"
        "said = forecast(steps, 5 + np.log1p(steps)[None], lr=lr, correct=Corrections(Path('.')))\n"
        "prior(config, 400, lr)\n"
        "assert said.past_runs > 0, said.rests_on\n"
        "assert 'xgboost' not in sys.modules, 'imported'\n"
        "assert random.getstate() == state, 'drawn'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
