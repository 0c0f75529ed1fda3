"""A picture of where the largest layers are heading, drawn with numpy and Pillow alone, as training waits for it.

A panel a layer on one logarithmic scale of ratios: what was measured, and the forecast's median with its 80 and 95 %
bands up to the planned end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ma_monitor.numerics.forecast import Forecast, LayerForecast
from ma_monitor.sinks.heatmap import FAINT, FONT_SIZE, FRAME, INK, TITLE_SIZE, limits, round_values, with_room

LAYERS = 3
"""Layers shown: those that are forecast to end largest."""
_PANEL, _HEIGHT, _GAP = 280, 230, 42
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 64, 30, 46
_FINE = 3
"""What is inside a panel is drawn so many times larger and scaled down, for smooth edges."""
_DOT, _DIAMOND = 1.7, 4.5
_TICKS = 4
_BLUE, _ORANGE, _GRID, _NOW = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xE8, 0xE8, 0xE8), (0xCC, 0xCC, 0xCC)
_MEDIAN = 3
_BANDS = ((0, 6, (0xD9, 0xEA, 0xF4)), (1, 5, (0x9F, 0xCB, 0xE3)))
"""Outer and inner band: index of its two quantiles, and colour."""

_Place = Callable[[float, float], tuple[float, float]]
"""Step and ratio → a point of the enlarged panel."""


def fan(steps: NDArray[np.int64], ratios: NDArray[np.float64], forecast: Forecast) -> NDArray[np.uint8] | None:
    """Draws the layers that are forecast to end largest, the largest first.

    Args:
        steps: Measured steps, ``[T]``.
        ratios: Ratios of layers 1 … L, ``[L, T]``.
        forecast: What was forecast from them.

    Returns:
        RGB picture ``[height, width, 3]``; None where no layer is forecast any further.
    """
    known = [layer for layer in forecast.layers if layer.steps.size and np.isfinite(layer.quantiles).all()]
    shown = sorted(known, key=lambda layer: -layer.quantiles[_MEDIAN, -1])[:LAYERS]
    if not shown:
        return None
    rows = [ratios[layer.layer - 1] for layer in shown]
    low, high = limits(np.concatenate([*rows, *(layer.quantiles.ravel() for layer in shown)]))
    marks = {
        v: math.log(v / low) / math.log(high / low) for v in (low, high, *round_values(low, high)) if low <= v <= high
    }
    levels = dict(with_room(marks, 24 / _HEIGHT))
    first, last = int(steps[0]), int(shown[0].steps[-1])

    def place(step: float, ratio: float) -> tuple[float, float]:
        height = math.log(min(max(ratio, low), high) / low) / math.log(high / low)
        return _FINE * _PANEL * (step - first) / (last - first), _FINE * (_HEIGHT - 1) * (1 - height)

    width = _LEFT + len(shown) * (_PANEL + _GAP) - _GAP + _RIGHT
    picture = Image.new("RGB", (width, _TOP + _HEIGHT + _BOTTOM), "white")
    draw = ImageDraw.Draw(picture)
    for number, (layer, row) in enumerate(zip(shown, rows, strict=True)):
        left = _LEFT + number * (_PANEL + _GAP)
        picture.paste(_panel(steps, row, layer, place, list(levels)), (left, _TOP))
        _frame(draw, left, f"layer {layer.layer}", first, last)
    font = ImageFont.load_default(FONT_SIZE)
    for value, share in levels.items():
        draw.text((_LEFT - 8, _TOP + (_HEIGHT - 1) * (1 - share)), f"{value:,g}", fill=INK, font=font, anchor="rm")
    draw.text((width / 2, _TOP + _HEIGHT + _BOTTOM - 8), "step", fill=FAINT, font=font, anchor="ms")
    _legend(draw)
    return np.asarray(picture, dtype=np.uint8)


def _panel(
    steps: NDArray[np.int64], values: NDArray[np.float64], layer: LayerForecast, place: _Place, levels: Sequence[float]
) -> Image.Image:
    """The inside of a layer's panel."""
    panel = Image.new("RGB", (_FINE * _PANEL, _FINE * _HEIGHT), "white")
    draw = ImageDraw.Draw(panel)
    for level in levels:
        y = place(float(steps[0]), level)[1]
        draw.line((0, y, panel.width, y), fill=_GRID, width=_FINE)
    for below, above, colour in _BANDS:
        edges = (layer.quantiles[below], layer.quantiles[above][::-1])
        around = zip(np.concatenate([layer.steps, layer.steps[::-1]]), np.concatenate(edges), strict=True)
        draw.polygon([place(step, value) for step, value in around], fill=colour)
    now = place(float(steps[-1]), 1.0)[0]
    draw.line((now, 0, now, panel.height), fill=_NOW, width=_FINE)
    median = [place(step, value) for step, value in zip(layer.steps, layer.quantiles[_MEDIAN], strict=True)]
    draw.line(median, fill=_BLUE, width=2 * _FINE, joint="curve")
    usable = np.isfinite(values) & (values > 0)
    for step, value in zip(steps[usable], values[usable], strict=True):
        draw.circle(place(step, value), _DOT * _FINE, fill=INK)
    peak = layer.peak
    if peak is not None and peak.identified and None not in (peak.step, peak.height, peak.low, peak.high):
        x, y = place(float(peak.step or 0), float(peak.height or 0))
        ends = [place(float(end or 0), 1.0)[0] for end in (peak.low, peak.high)]
        draw.line((ends[0], y, ends[1], y), fill=_ORANGE, width=2 * _FINE)
        draw.regular_polygon((x, y, _DIAMOND * _FINE), 4, rotation=45, fill=_ORANGE)
    return panel.reduce(_FINE)


def _frame(draw: ImageDraw.ImageDraw, left: int, title: str, first: int, last: int) -> None:
    """Title, axes and round steps of a panel."""
    font, bottom = ImageFont.load_default(FONT_SIZE), _TOP + _HEIGHT
    draw.text((left + _PANEL / 2, _TOP - 8), title, fill=INK, font=font, anchor="ms")
    draw.line((left - 1, _TOP, left - 1, bottom, left + _PANEL, bottom), fill=FRAME)
    units = sorted(value for value in round_values(1.0, float(last - first)) if value >= 1)
    unit = int(next(unit for unit in units if (last - first) / unit <= _TICKS))
    for step in range(-(-first // unit) * unit, last + 1, unit):
        x = left + _PANEL * (step - first) / (last - first)
        draw.line((x, bottom, x, bottom + 4), fill=FRAME)
        draw.text((x, bottom + 8), f"{step:,}", fill=INK, font=font, anchor="mt")


def _legend(draw: ImageDraw.ImageDraw) -> None:
    """What is what, in one line above the panels."""
    font, x, y = ImageFont.load_default(FONT_SIZE), float(_LEFT), 26.0
    draw.text((x, y), "largest / median of |h|", fill=INK, font=ImageFont.load_default(TITLE_SIZE), anchor="lm")
    x += 180
    for words, colour in (
        ("measured", INK),
        ("forecast", _BLUE),
        *zip(("95 %", "80 %"), (c for *_, c in _BANDS), strict=True),
    ):
        draw.rectangle((x, y - 5, x + 12, y + 5), fill=colour)
        draw.text((x + 18, y), words, fill=INK, font=font, anchor="lm")
        x += 34 + draw.textlength(words, font=font)
    draw.regular_polygon((x + 6, y, _DIAMOND + 1), 4, rotation=45, fill=_ORANGE)
    draw.text((x + 18, y), "peak", fill=INK, font=font, anchor="lm")
