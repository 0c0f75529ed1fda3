"""``ma-monitor watch``: a run in the terminal while it goes on."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.cli.common import Commands, add_command, emit_json, positive
from ma_monitor.errors import StoreError
from ma_monitor.report.words import band, number, peak_words, printable

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType

    from ma_monitor.runs.documents import Document
    from ma_monitor.runs.store import Run

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"
"""Eight heights; the second for terminals that cannot show the first."""
SPARK = 24
"""Characters of a layer's trajectory."""
PIPED, WIDE, TIGHT = 130, 108, 70
"""Widths: where there is no terminal; from which everything fits; what all but classes and trajectories takes."""
ALERTS = 5
"""Alerts shown, the latest, a line each."""
AROUND = 6
"""Other lines that are not the table's rows."""
LONGEST = 200
"""Characters of other people's text that are shown."""
LARGE, HUGE = 100, 1000
NUMBER, MOST_SHOWN = "a number or None", 1e300
_BAND = {"median": NUMBER, "p10": NUMBER, "p90": NUMBER}
_PEAK = {"status": str, "identified": bool, "step": NUMBER, "low": NUMBER, "high": NUMBER}
ENTRY: dict[Document, dict[str, Any]] = {
    "fits": {"layer": int, "class": str},
    "forecast": {"layer": int, "end": _BAND, "peak": _PEAK},
}
"""What is shown of a layer's entry in each document, which anybody may have written."""


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "watch",
        run,
        help="follow a run in the terminal while it goes on",
        text=(
            "Shows every layer's ratio and trajectory, its class, where it is heading and the latest alerts, and\n"
            "refreshes until the planned end is measured or Ctrl-C is pressed. It only reads, so it may run beside\n"
            "the training or on another machine that sees the files. Where the output is no terminal, or with\n"
            "--json, it shows the run once, without colour."
        ),
        example="ma-monitor watch out/ma_monitor --every 5",
    )
    parser.add_argument("run_dir", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--every", type=positive, default=2, metavar="SECONDS", help="time between two looks (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="show the run once")


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from rich.console import Console

    snapshot = read(args.run_dir)
    if args.json:
        emit_json(snapshot.document())
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED)
    if args.once or not console.is_terminal:
        console.print(view(snapshot, console, time.time()))
        return 0
    try:
        follow(Path(args.run_dir), snapshot, console, args.every)
    except KeyboardInterrupt:  # how a person ends it
        pass
    return 0


@dataclass(frozen=True)
class Snapshot:
    """What a run says at some moment.

    Attributes:
        run: Its directory.
        model: Its model's name.
        step: Last measured step, None before the first.
        total: Planned number of updates, None where unknown.
        measured: When that step was measured, in seconds since the epoch.
        left: Seconds until the planned end at the pace of the present life of the run, None where unknown.
        layers: A document a layer: ``ratio``, ``history`` (evenly spaced in steps) and, once there was a refit,
            ``class``, ``end``, ``peak``.
        alerts: The latest alerts' words.
    """

    run: str
    model: str
    step: int | None
    total: int | None
    measured: float
    left: float | None
    layers: tuple[dict[str, Any], ...]
    alerts: tuple[str, ...]

    @property
    def over(self) -> bool:
        """Whether the planned end is measured."""
        return self.step is not None and self.total is not None and self.step >= self.total

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        layers = [{key: value for key, value in layer.items() if key != "history"} for layer in self.layers]
        return {
            "run": self.run,
            "model": self.model,
            "step": self.step,
            "total_steps": self.total,
            "seconds_left": self.left,
            "layers": layers,
            "alerts": list(self.alerts),
        }


def read(path: str | Path) -> Snapshot:
    """Looks at a run; fits and forecast are those that it wrote last."""
    from ma_monitor.numerics.values import none_if_not_finite
    from ma_monitor.runs.documents import LOG
    from ma_monitor.runs.store import Run

    source = Run.open(path)
    step = int(source.steps[-1]) if len(source.steps) else None
    plan = source.plan_at(step or 0)
    total = None if plan is None else plan.total_steps
    said = [_by_layer(source, name) for name in ("fits", "forecast")]
    layers = []
    for i, row in zip(source.layers, source.ratios(), strict=True):
        fit, forecast = (documents.get(i, {}) for documents in said)
        entry = {
            "layer": i,
            "ratio": none_if_not_finite(row[-1]) if len(row) else None,
            "history": _evenly(source.steps, row),
            "class": fit.get("class"),
            "end": forecast.get("end"),
            "peak": forecast.get("peak"),
        }
        layers.append(entry)
    measured = (source.path / LOG).stat().st_mtime
    events = source.events
    # a key, a title, and then what happened
    words = [event.message.partition(". ")[2] for event in events if event.kind == "alert"][-ALERTS:]
    return Snapshot(
        run=str(source.path),
        model=source.meta.model.name,
        step=step,
        total=total,
        measured=measured,
        left=_seconds_left(source, step, total, measured),
        layers=tuple(layers),
        alerts=tuple(words),
    )


def _by_layer(source: Run, name: Document) -> dict[int, dict[str, Any]]:
    """The entries of a document by layer.

    Raises:
        StoreError: If they are not as this package writes them.
    """
    document = source.read_document(name)
    entries = [] if document is None else document.get("layers")
    if not isinstance(entries, list) or not all(_is_like(entry, ENTRY[name]) for entry in entries):
        raise StoreError(f"{source.path}: {name}.json is not what ma_monitor writes there; remove it")
    return {entry["layer"]: entry for entry in entries}


def _is_like(value: Any, kind: Any) -> bool:
    """Whether a value of a document is of a kind: a type, a number or None, or an object with these or None."""
    if kind is NUMBER:
        return value is None or (type(value) in (int, float) and abs(value) < MOST_SHOWN)
    if isinstance(kind, type):
        return type(value) is kind
    known = isinstance(value, dict) and all(key in value and _is_like(value[key], of) for key, of in kind.items())
    return known or (value is None and "layer" not in kind)


def _evenly(steps: Any, row: Any) -> list[float]:
    """The last measured value at each of ``SPARK`` evenly spaced steps."""
    import numpy as np

    if not len(steps):
        return []
    at = np.searchsorted(steps, np.linspace(steps[0], steps[-1], min(SPARK, len(steps))), side="right") - 1
    return [float(value) for value in row[at]]


def _seconds_left(source: Run, step: int | None, total: int | None, measured: float) -> float | None:
    """From the pace since the run was last begun or resumed; None where that is not known."""
    lives = [event for event in source.events if event.kind in ("opened", "resumed")]
    begun = re.match(r"created|from step (\d+)", lives[-1].message) if lives else None
    if step is None or total is None or begun is None or step >= total:
        return None
    try:
        done = step - int(begun.group(1) or 0)
        spent = measured - datetime.fromisoformat(lives[-1].time).timestamp()
        return spent / done * (total - step) if done > 0 and spent > 0 else None
    except (ValueError, OverflowError):  # anybody may have written the diary
        return None


def follow(path: Path, snapshot: Snapshot, console: Console, every: float) -> None:
    """Shows the run again and again until its planned end is measured; reads it anew only where a file changed."""
    from rich.live import Live

    seen = _stamps(path)
    with Live(view(snapshot, console, time.time()), console=console, auto_refresh=False) as live:
        while not snapshot.over:
            time.sleep(every)
            if (now := _stamps(path)) != seen:
                snapshot, seen = read(path), now
            live.update(view(snapshot, console, time.time()), refresh=True)


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """What tells that a run's files changed."""
    stats = ((file, file.stat()) for file in sorted(path.glob("*.*")) if file.is_file())
    return [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def view(snapshot: Snapshot, console: Console, now: float) -> Group:
    """The whole screen: where the training is, a row a layer (the largest where not all fit), the latest alerts."""
    from rich.console import Group
    from rich.text import Text

    room = console.height - AROUND - len(snapshot.alerts)
    rows = max(room, 3) if console.is_terminal else len(snapshot.layers)
    largest = sorted(snapshot.layers, key=lambda layer: -(layer["ratio"] or 0.0))[:rows]
    shown = [layer for layer in snapshot.layers if layer in largest]
    parts: list[RenderableType] = [Text(_words(snapshot.model), style="bold"), _progress(snapshot, now, console.width)]
    parts.append(_table(shown, console.width, BLOCKS if _can_show(console) else PLAIN))
    if len(shown) < len(snapshot.layers):
        parts.append(Text(f"the {len(shown)} largest of {len(snapshot.layers)} layers", style="dim"))
    one_line: dict[str, Any] = {"style": "yellow", "no_wrap": True, "overflow": "ellipsis"}
    parts += [Text(f"! {_words(words)}", **one_line) for words in snapshot.alerts]
    return Group(*parts)


def _can_show(console: Console) -> bool:
    try:
        BLOCKS.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _progress(snapshot: Snapshot, now: float, width: int) -> RenderableType:
    """How far the training is, how long it will take and when it was last measured."""
    from rich.columns import Columns
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    if snapshot.step is None:
        return Text("nothing measured yet")
    ago = f"measured {_duration(now - snapshot.measured)} ago"
    if not snapshot.total:
        return Text(f"step {snapshot.step:,}, {ago}")
    share = min(snapshot.step / snapshot.total, 1.0)
    left = "time left unknown" if snapshot.left is None else f"{_duration(snapshot.left)} left"
    done = f"step {snapshot.step:,} of {snapshot.total:,} ({share:.0%})"
    bar = ProgressBar(total=snapshot.total, completed=snapshot.step, width=max(min(30, width - 60), 5))
    return Columns([bar, Text(f"{done}, {'done' if snapshot.over else left}, {ago}")])


def _duration(seconds: float) -> str:
    """In the largest unit that gives at least 2: ``90 s``, ``12 min``, ``31 h``, ``4 days``."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def _table(layers: Sequence[dict[str, Any]], width: int, ramp: str) -> RenderableType:
    """A row a layer; a narrow terminal gets shorter trajectories and no classes."""
    from rich.table import Table
    from rich.text import Text

    wide = width >= WIDE
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("layer", "ratio"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len("layer"))
    for name in ("so far", *(("class",) if wide else ()), "at the end [80 %]", "peak step [80 %]"):
        table.add_column(name, no_wrap=True)
    for layer in layers:
        ratio, end = layer["ratio"], layer["end"] or {}
        style = "" if ratio is None or ratio < LARGE else "yellow" if ratio < HUGE else "bold red"
        table.add_row(
            str(layer["layer"]),
            Text(number(ratio), style=style),
            sparkline(_thinned(layer["history"], max(width - TIGHT, 1)), ramp),
            *((Text(_words(layer["class"] or "")),) if wide else ()),
            band(end.get("median"), end.get("p10"), end.get("p90")),
            Text(_words(peak_words(layer["peak"]) if layer["class"] else "")),
        )
    return table


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """At most so many of the values, evenly spaced, the last among them."""
    count = min(most, len(values))
    return [values[(i + 1) * len(values) // count - 1] for i in range(count)]


def sparkline(values: Sequence[float], ramp: str = BLOCKS) -> str:
    """A character a value, its height by the logarithm from the smallest to the largest; a blank where not known."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array) & (array > 0)
    logs = np.log(np.where(known, array, 1.0))
    if not known.any():
        return " " * len(array)
    low, span = logs[known].min(), np.ptp(logs[known])
    heights = np.rint((logs - low) / span * (len(ramp) - 1)) if span > 0 else np.zeros(len(array))
    return "".join(ramp[int(height)] if here else " " for height, here in zip(heights, known, strict=True))


def _words(text: str) -> str:
    return printable(text)[:LONGEST]
