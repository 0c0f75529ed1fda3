"""The public surface: complete, lazy, typed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ma_monitor
from ma_monitor import errors

PINNED = {"MassiveActivationCallback", "MonitorConfig", "Monitor", "Probe", "Run"}


def test_every_public_name_resolves_and_is_documented() -> None:
    assert set(ma_monitor.__all__) >= PINNED
    assert set(dir(ma_monitor)) == {*ma_monitor.__all__, "__version__"}
    for name in ma_monitor.__all__:
        assert inspect.getdoc(getattr(ma_monitor, name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Callback'; it has MaMonitorError"):
        _ = ma_monitor.Callback


def test_importing_loads_neither_torch_nor_a_sink() -> None:
    heavy = "torch transformers wandb tensorboard pandas xgboost scipy".split()
    code = f"import sys, ma_monitor, ma_monitor.errors; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_numerics_and_runs_load_no_torch() -> None:
    code = "import sys, ma_monitor.analysis; print('torch' in sys.modules or 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_package_is_typed_and_its_errors_are_few() -> None:
    assert Path(ma_monitor.__file__).with_name("py.typed").is_file()
    tree = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.MaMonitorError)]
    assert len(tree) <= 6
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)


def test_a_missing_extra_names_the_command() -> None:
    with pytest.raises(ImportError, match=r"wandb is not installed; run: pip install 'ma_monitor\[wandb\]'"):
        raise errors.MissingExtraError("wandb", "wandb")
