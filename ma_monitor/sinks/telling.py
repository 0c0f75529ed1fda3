"""Alerts in a run's diary and in the log: told once, by whichever life of the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ma_monitor.runs.store import Run
from ma_monitor.sinks.alerts import Alert, told_in

ALERT = "alert"
"""The kind of event that an alert is; its message begins with the alert's key."""
_LOGGER = logging.getLogger("ma_monitor")
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def told_of(run: Run) -> list[str]:
    """Keys of the alerts that the run's diary knows of."""
    return told_in(event.message for event in run.events if event.kind == ALERT)


def tell(run: Run, alerts: Sequence[Alert], *, log: bool = True) -> list[str]:
    """Keeps alerts in the run's diary, and logs them; gives their keys."""
    for alert in alerts:
        if log:
            _LOGGER.log(_LEVELS[alert.level], "ma_monitor: %s. %s", alert.title, alert.text)
        run.event(ALERT, f"{alert.key} {alert.title}. {alert.text}")
    return [alert.key for alert in alerts]
