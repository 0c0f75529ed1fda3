"""Emissions into TensorBoard event files."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_monitor.errors import MissingExtraError
from ma_monitor.report.words import band, number, printable
from ma_monitor.sinks.base import Cell, Emission, Table

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_PER_LAYER = re.compile(r"(?P<group>.+)/layer_\d+")
_EVENTS = "events.out.tfevents.*"
_FORECAST = "ma/forecast/max_end"
_LARGEST = "ma/max_ratio"
_CHARTS = {
    "largest ratio": ["Multiline", [rf"^{_LARGEST}$"]],
    "number of layers past 100 and past 1000": ["Multiline", [r"^ma/layers_past_\d+$"]],
    "largest ratio at the end, forecast": ["Margin", [_FORECAST, f"{_FORECAST}_low", f"{_FORECAST}_high"]],
}
"""Title → kind and tags of the charts below those of the layers."""
_MARKDOWN = re.compile(r"([\\`*_\[\]|])")
"""What has a meaning in Markdown within a line."""


class TensorBoardSink:
    """Writes through a ``SummaryWriter``: one that somebody else owns, or its own (see `to_directory`)."""

    def __init__(self, writer: SummaryWriter) -> None:
        """Writes through a given writer, into the file that it has open already."""
        self.name = "tensorboard"
        self.writer = writer
        self._begun = False
        self._owned = False
        self._charted: list[str] = []

    @classmethod
    def to_directory(cls, directory: str | Path) -> TensorBoardSink:
        """A sink with a writer of its own, which `close` closes.

        Raises:
            MissingExtraError: If tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard") from error
        sink = cls(SummaryWriter(str(directory)))
        sink._owned = True
        return sink

    def emit(self, emission: Emission) -> None:
        """Writes scalars, pictures, tables, alerts and the run's facts, and once the layout of the charts."""
        self._begin(emission.step)
        self._lay_out(emission.scalars)
        if emission.config:
            self._describe(emission.config, emission.step)
        for key, value in emission.scalars.items():
            self.writer.add_scalar(key, value, emission.step)
        for key, image in emission.images.items():
            self.writer.add_image(key, image, emission.step, dataformats="HWC")
        for key, table in emission.tables.items():
            self.writer.add_text(key, markdown(table), emission.step)
        if emission.alerts:
            told = "\n\n".join(f"**{_text(alert.title)}.** {_text(alert.text)}" for alert in emission.alerts)
            self.writer.add_text("ma_monitor/alerts", told, emission.step)
        self.writer.flush()

    def close(self) -> None:
        """Flushes; closes the writer if it is the sink's own."""
        if self._owned:
            self.writer.close()
        else:
            self.writer.flush()

    def _begin(self, step: int) -> None:
        """Takes back what an earlier life of a resumed training wrote into this directory from this step on."""
        if step > 0 and not self._begun and len(list(Path(self.writer.log_dir).glob(_EVENTS))) > 1:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            file: Any = self.writer.file_writer
            file.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
        self._begun = True

    def _describe(self, config: dict[str, Cell], step: int) -> None:
        """Writes the run's facts as text, and as hyperparameters beside the run's own scalars.

        ``SummaryWriter.add_hparams`` would make another run of them, in a directory and a file of its own.
        """
        from torch.utils.tensorboard.summary import hparams

        self.writer.add_text("ma_monitor/config", markdown(Table(("fact", "value"), tuple(config.items()))), step)
        known = {name: fact for name, fact in config.items() if fact is not None}
        experiment, session, _ = hparams(known, dict.fromkeys((_LARGEST, _FORECAST), 0.0))
        file: Any = self.writer.file_writer
        for summary in (experiment, session):
            file.add_summary(summary, step)

    def _lay_out(self, keys: Iterable[str]) -> None:
        """Puts the layers of one quantity into one chart; TensorBoard would give every layer a chart of its own.

        Written at the first emission, and again only if a per-layer quantity appears that was not there before: of
        several layouts of a run TensorBoard takes the last.
        """
        matches = (_PER_LAYER.fullmatch(key) for key in keys)
        groups = dict.fromkeys(match["group"] for match in matches if match)
        new = [group for group in groups if group not in self._charted]
        if not new:
            return
        self._charted += new
        charts: dict[str, list[object]] = {
            f"{group.removeprefix('ma/')} of every layer": ["Multiline", [rf"^{re.escape(group)}/layer_\d+$"]]
            for group in self._charted
        }
        self.writer.add_custom_scalars({"massive activations": charts | _CHARTS})


def markdown(table: Table) -> str:
    """The table in Markdown, which TensorBoard's text panel renders; an interval stands in the cell of its value."""
    ends = {name for column in table.columns for name in (f"{column} low", f"{column} high")}
    heading, *rows = ("| " + " | ".join(line) + " |" for line in _joined(table, ends))
    return "\n".join((heading, "| --- " * (len(table.columns) - len(ends & set(table.columns))) + "|", *rows))


def _joined(table: Table, ends: set[str]) -> Iterator[list[str]]:
    """Headings and cells of the columns that are no end of an interval, as text."""
    kept = [name for name in table.columns if name not in ends]
    with_ends = {name for name in kept if {f"{name} low", f"{name} high"} <= set(table.columns)}
    yield [_text(f"{name} [80 %]" if name in with_ends else name) for name in kept]
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        yield [
            _text(band(*(_number(cells[key]) for key in (name, f"{name} low", f"{name} high"))))
            if name in with_ends
            else _cell(cells[name])
            for name in kept
        ]


def _number(value: Cell) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _cell(value: Cell) -> str:
    """One value; a dash where it is not known."""
    return _text(value if isinstance(value, str | bool) else number(value))


def _text(words: object) -> str:
    """Other people's words, which are to be read as they are: neither HTML nor Markdown."""
    return _MARKDOWN.sub(r"\\\1", html.escape(printable(" ".join(str(words).split())), quote=False))
