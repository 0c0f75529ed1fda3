"""A W&B workspace with the panels that ma_monitor's keys are made for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ma_monitor.errors import MissingExtraError
from ma_monitor.sinks.wandb import STEP_METRIC

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

TITLE = "Massive activations"
LAYERS = r"ma/ratio/layer_\d+"
"""Regular expression of the keys of every layer's ratio: one panel, however many layers."""
LINES = {
    "largest ratio, now and forecast for the end (80 % band)": (
        "ma/max_ratio",
        "ma/forecast/max_end",
        "ma/forecast/max_end_low",
        "ma/forecast/max_end_high",
    ),
    "layers past 100 and 1000": ("ma/layers_past_100", "ma/layers_past_1000"),
    "share of layers whose peak or asymptote is identified": ("ma/share_identified",),
}
"""Title of a line plot → its keys."""
PICTURES = {"layer × step": "ma/heatmap", "where the largest layers are heading": "ma/fan"}
TABLE = "ma/layers"


def build(entity: str, project: str) -> Workspace:
    """The workspace, not saved yet: pictures, every layer's ratio in one chart, the table of fits and forecasts.

    Raises:
        MissingExtraError: If wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise MissingExtraError("wandb-workspaces", "workspace") from error

    shown: list[Any] = [
        panels.LinePlot(title="ratio of every layer", x=STEP_METRIC, metric_regex=LAYERS, log_y=True),
        *(panels.MediaBrowser(title=title, media_keys=[key]) for title, key in PICTURES.items()),
        *(panels.LinePlot(title=title, x=STEP_METRIC, y=list(keys)) for title, keys in LINES.items()),
        panels.WeavePanelSummaryTable(table_name=TABLE, layout=panels.Layout(w=24, h=10)),
    ]
    section = workspaces.Section(name=TITLE, panels=shown, is_open=True)
    return workspaces.Workspace(
        entity=entity, project=project, name=TITLE, sections=[section], auto_generate_panels=True
    )


def document(workspace: Workspace) -> dict[str, Any]:
    """The workspace as the W&B server takes it."""
    view: dict[str, Any] = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return view
