"""``report.html``: one self-contained page of one run or several, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ma_monitor import __version__
from ma_monitor.errors import ConfigError, MissingExtraError
from ma_monitor.report.summary import summary
from ma_monitor.report.words import UNKNOWN, number, percent, shown
from ma_monitor.runs.files import replace_file, writing
from ma_monitor.runs.store import Run

try:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise MissingExtraError("jinja2", "report") from error

DATA = ("label", "drawn", "rows", "track", "now", "end", "live")
"""What of a summary the page's script gets; the rest is in the page as text."""


def render(runs: Sequence[Run], *, refresh: int | None = None, tokenizer: Path | None = None) -> str:
    """The page.

    Whatever is not this package's own text is escaped where it stands as text, and cannot end the data's script
    element; a content security policy allows the page's own two scripts and no request.

    Args:
        runs: Runs, a tab each.
        refresh: Seconds after which the page loads itself again; None for never.
        tokenizer: A ``tokenizer.json`` for the tokens' text; looked for beside each run where None.

    Raises:
        ConfigError: If there is no run.
    """
    if not runs:
        raise ConfigError("a report needs at least one run, got none")
    views = [summary(run, tokenizer) for run in runs]
    for view in views:
        view["json"] = _json({key: view.get(key) for key in DATA})
    style, script, library = (_static(name) for name in ("page.css", "page.js", "echarts.min.js"))
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "commas": _commas,
        "num": number,
        "percent": percent,
        "factor": _factor,
        "shown": shown,
        "score": _score,
    }
    return environment.from_string(_static("page.html")).render(
        runs=views,
        refresh=refresh,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=style,
        script=script,
        library=library,
        style_hash=_hash(style),
        hashes=Markup(f"'{_hash(library)}' '{_hash(script)}'"),
        pick=_pick,
    )


def write(runs: Sequence[Run], path: Path, *, refresh: int | None = None, tokenizer: Path | None = None) -> int:
    """Writes the page, whole or not at all; gives its size in bytes.

    Raises:
        StoreError: If the disk refuses.
    """
    data = render(runs, refresh=refresh, tokenizer=tokenizer).encode()
    with writing(path):
        replace_file(path, lambda temporary: temporary.write_bytes(data))
    return len(data)


def _json(document: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _static(name: str) -> str:
    return resources.files("ma_monitor.report").joinpath("static", name).read_text(encoding="utf-8")


def _commas(value: int) -> str:
    return f"{value:,}"


def _score(r2: float | None) -> str:
    return UNKNOWN if r2 is None else f"{round(r2, 3) + 0.0:.3f}"  # no -0.000


def _factor(error: float) -> str:
    return f"{np.exp(error):.3g}"


def _pick(layer: int) -> Markup:
    return Markup('<button type="button" class="pick">{}</button>').format(layer)
