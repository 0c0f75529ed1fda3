"""Measures, fits and forecasts massive activations while a transformer trains.

Names are resolved when they are first used (PEP 562), so that ``import ma_monitor`` loads neither torch nor a sink.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ma_monitor.callback import MassiveActivationCallback
    from ma_monitor.config import MonitorConfig
    from ma_monitor.errors import MaMonitorError
    from ma_monitor.measure.probe import Probe
    from ma_monitor.monitor import Monitor
    from ma_monitor.runs.store import Run

__version__ = "0.1.0"
__all__ = ["MaMonitorError", "MassiveActivationCallback", "Monitor", "MonitorConfig", "Probe", "Run"]

_HOME = {
    "MaMonitorError": "ma_monitor.errors",
    "MassiveActivationCallback": "ma_monitor.callback",
    "Monitor": "ma_monitor.monitor",
    "MonitorConfig": "ma_monitor.config",
    "Probe": "ma_monitor.measure.probe",
    "Run": "ma_monitor.runs.store",
}


def __getattr__(name: str) -> Any:
    """Loads a public name's module when the name is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'ma_monitor' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__"])
