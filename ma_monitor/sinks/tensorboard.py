"""Emissions into TensorBoard event files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ma_monitor.errors import MissingExtraError
from ma_monitor.sinks.base import Cell, Emission, Table

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_PER_LAYER = re.compile(r"(?P<group>.+)/layer_\d+")
_FORECAST = "ma/forecast/max_end"


class TensorBoardSink:
    """Writes through a ``SummaryWriter``: one that somebody else owns, or its own (see `to_directory`)."""

    def __init__(self, writer: SummaryWriter) -> None:
        """Writes through a given writer, into the file that it has open already."""
        self.name = "tensorboard"
        self.writer = writer
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
        """Writes scalars, pictures, tables as text, the run's facts as text, and once the layout of the charts."""
        self._lay_out(emission.scalars)
        if emission.config:
            facts = Table(("fact", "value"), tuple(emission.config.items()))
            self.writer.add_text("ma_monitor/config", markdown(facts), emission.step)
        for key, value in emission.scalars.items():
            self.writer.add_scalar(key, value, emission.step)
        for key, image in emission.images.items():
            self.writer.add_image(key, image, emission.step, dataformats="HWC")
        for key, table in emission.tables.items():
            self.writer.add_text(key, markdown(table), emission.step)
        self.writer.flush()

    def close(self) -> None:
        """Flushes; closes the writer if it is the sink's own."""
        if self._owned:
            self.writer.close()
        else:
            self.writer.flush()

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
            group: ["Multiline", [rf"^{re.escape(group)}/layer_\d+$"]] for group in self._charted
        }
        charts["largest ratio at the end, forecast"] = ["Margin", [_FORECAST, f"{_FORECAST}_low", f"{_FORECAST}_high"]]
        self.writer.add_custom_scalars({"massive activations": charts})


def markdown(table: Table) -> str:
    """The table in Markdown, which TensorBoard's text panel renders."""
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Cell) -> str:
    """One value: four significant digits, no exponent where it can be helped, a dash where it is not known."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
