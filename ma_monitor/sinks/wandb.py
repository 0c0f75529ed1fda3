"""Emissions into a Weights & Biases run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from ma_monitor.errors import ConfigError, MissingExtraError
from ma_monitor.sinks.base import Emission, Table

if TYPE_CHECKING:
    import wandb

STEP_METRIC = "train/global_step"
"""The x axis that transformers' own W&B callback uses for everything that it logs."""
_LAST = "ma_monitor/step"
"""The last step that a run has points of, in its summary."""
_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR"}
_APART = 1
"""Seconds, the least, for which W&B leaves out alerts of one title. Ours come once and differ by layer and step."""


class WandbSink:
    """Logs to a W&B run that somebody else began and will finish."""

    def __init__(self, run: wandb.Run) -> None:
        """Makes the optimizer step the x axis of everything under ``ma/``.

        In a run of the Trainer that is the case already, and saying it twice does no harm.

        Raises:
            MissingExtraError: If wandb is not installed.
        """
        _require_wandb()
        self.name = "wandb"
        self.run = run
        self._shown = int(run.summary.get(_LAST, -1)) if run.resumed else -1  # type: ignore[no-untyped-call]
        run.define_metric(STEP_METRIC)
        run.define_metric("ma/*", step_metric=STEP_METRIC)

    @classmethod
    def active(cls) -> WandbSink:
        """A sink for the run that ``wandb.init`` began, for loops without a Trainer.

        Raises:
            MissingExtraError: If wandb is not installed.
            ConfigError: If no run is active.
        """
        _require_wandb()
        import wandb

        if wandb.run is None:
            raise ConfigError("logging to W&B needs an active run and there is none; call wandb.init(...) first")
        return cls(wandb.run)

    def emit(self, emission: Emission) -> None:
        """Logs everything in one row, and sends the alerts.

        The step travels as a value. W&B's own ``step=`` counts rows, not updates: a row whose ``step=`` lies behind
        that counter is dropped. A W&B run that is resumed from a checkpoint behind its last point keeps the points that
        it has.
        """
        if emission.config:
            self.run.config.update(emission.config, allow_val_change=True)  # type: ignore[no-untyped-call]
        if (emission.scalars or emission.tables) and emission.step > self._shown:
            self._log_row(emission)
        for alert in emission.alerts:
            self.run.alert(alert.title, alert.text, level=_LEVELS[alert.level], wait_duration=_APART)

    def _log_row(self, emission: Emission) -> None:
        import wandb

        row: dict[str, Any] = {**emission.scalars, STEP_METRIC: emission.step}
        row.update((key, wandb.Image(Image.fromarray(image))) for key, image in emission.images.items())
        row.update((key, _table(table)) for key, table in emission.tables.items())
        self.run.log(row)
        self.run.summary.update({**emission.summary, _LAST: emission.step})

    def close(self) -> None:
        """Does nothing: the run is not the sink's to finish."""


def _table(table: Table) -> wandb.Table:
    """W&B's form of a table. The panel of a key shows the table logged last."""
    import wandb

    return wandb.Table(columns=list(table.columns), data=list(table.rows), allow_mixed_types=True)


def _require_wandb() -> None:
    """Checks that wandb can be imported.

    Raises:
        MissingExtraError: If it cannot.
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("wandb", "wandb") from error
