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
        """Logs everything in one row.

        The step travels as a value. W&B's own ``step=`` counts rows, not updates: a row whose ``step=`` lies behind
        that counter is dropped.
        """
        import wandb

        if emission.config:
            self.run.config.update(emission.config, allow_val_change=True)  # type: ignore[no-untyped-call]
        row: dict[str, Any] = {**emission.scalars, STEP_METRIC: emission.step}
        row.update((key, wandb.Image(Image.fromarray(image))) for key, image in emission.images.items())
        row.update((key, _table(table)) for key, table in emission.tables.items())
        self.run.log(row)

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
