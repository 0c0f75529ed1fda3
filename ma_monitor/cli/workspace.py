"""``ma-monitor workspace``: a W&B workspace with the panels that live logging fills."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ma_monitor.cli.common import Commands, add_command, emit_json, note, say
from ma_monitor.errors import ConfigError

FILE = "ma_monitor_workspace.json"


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "workspace",
        run,
        help="build a W&B workspace with the panels for massive activations",
        text=(
            "Adds a saved view to a W&B project: every layer's ratio in one chart, heat map, forecast, table. Where\n"
            "no server answers (no login, no network) the view is written as JSON. Needs the extra `workspace`."
        ),
        example="ma-monitor workspace --entity my-team --project pretraining",
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", required=True, help="W&B project, where runs have been logged to")
    parser.add_argument(
        "--out", metavar="FILE", help=f"write the view there and save nothing (default: {FILE}, if need be)"
    )


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.sinks.workspace import build, document

    workspace = build(args.entity, args.project)
    url = None if args.out else saved(workspace)
    file = None if url else Path(args.out or FILE)
    if file is not None:
        try:
            file.write_text(json.dumps(document(workspace), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be written ({error.strerror}); give another --out") from error
    if args.json:
        emit_json({"url": url, "file": None if file is None else str(file)})
    else:
        say(f"workspace saved: {url}" if url else f"workspace written to {file}")
    return 0


def saved(workspace: Any) -> str | None:
    """Saves the view and gives its address; None, with a note of the reason, where that cannot be done."""
    try:
        workspace.save()
        return str(workspace.url)
    except Exception as error:  # whatever a missing login, a missing network or a server that refuses raises
        note(f"ma-monitor: W&B did not take the workspace ({error}); log in with `wandb login` and run this again")
        return None
