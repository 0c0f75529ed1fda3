"""A picture of layer × step, drawn with numpy and Pillow alone.

Layers go upwards as in the network. Steps follow ``log(1 + 30 u)``, u being the share of the run done: nearly linear in
the first few per cent, logarithmic after, because massive activations emerge early and drift late. Colour is the
logarithm of the value, as ratios span decades.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ma_monitor.errors import ConfigError

_ANCHORS = np.array(
    [
        (0x44, 0x01, 0x54),
        (0x47, 0x2D, 0x7B),
        (0x3B, 0x52, 0x8B),
        (0x2C, 0x72, 0x8E),
        (0x21, 0x91, 0x8C),
        (0x28, 0xAE, 0x80),
        (0x5E, 0xC9, 0x62),
        (0xAD, 0xDC, 0x30),
        (0xFD, 0xE7, 0x25),
    ],
    dtype=np.float64,
)
"""Nine equally spaced colours of viridis: lightness rises evenly, and no two are confused by the colour-blind."""

_NAN = (0xBD, 0xBD, 0xBD)
INK = (0x33, 0x33, 0x33)
FAINT = (0x70, 0x70, 0x70)
FRAME = (0x99, 0x99, 0x99)
_PLOT_WIDTH = 820
_PLOT_HEIGHT = 420
_ROW_HEIGHTS = (5, 72)
_LEFT, _TOP, _RIGHT, _BOTTOM = 56, 52, 100, 50
_BAR_GAP, _BAR_WIDTH, _TICK = 22, 16, 5
FONT_SIZE, TITLE_SIZE = 13, 15
_TIME_STRETCH = 30.0
_Mark = TypeVar("_Mark", int, float)


def heatmap(steps: NDArray[np.integer], values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Draws the ratios of layers 1 … L over steps.

    A column of pixels that covers several measurements shows their largest value, so that no spike is lost, and the
    size of the picture does not grow with the run. NaN and negative values are grey, zero takes the lowest colour
    and infinity the highest.

    Args:
        steps: Steps measured, strictly rising, ``[T]``.
        values: Their ratios, a row a layer, the first drawn at the bottom, ``[L, T]``.

    Returns:
        RGB picture ``[height, width, 3]``.

    Raises:
        ConfigError: If there is nothing to draw, the shapes disagree or the steps do not rise.
    """
    if values.ndim != 2 or steps.shape != values.shape[1:] or values.size == 0:
        raise ConfigError(
            f"`values` must be [layers, steps] with a column a step and at least one of both, "
            f"got values {values.shape} and steps {steps.shape}"
        )
    if np.any(np.diff(steps) <= 0):
        raise ConfigError("`steps` must rise strictly; keep one measurement a step")
    layers = values.shape[0]
    row_height = min(max(_PLOT_HEIGHT // layers, _ROW_HEIGHTS[0]), _ROW_HEIGHTS[1])
    height = layers * row_height
    low, high = limits(values)

    binned = _bin(_positions(steps), np.asarray(values, dtype=np.float64))
    cells = np.repeat(_colours(binned, low, high)[::-1], row_height, axis=0)

    picture = Image.new("RGB", (_LEFT + _PLOT_WIDTH + _RIGHT, _TOP + height + _BOTTOM), "white")
    draw = ImageDraw.Draw(picture)
    picture.paste(Image.fromarray(cells), (_LEFT, _TOP))
    draw.rectangle((_LEFT - 1, _TOP - 1, _LEFT + _PLOT_WIDTH, _TOP + height), outline=FRAME)
    draw.text((_LEFT, 24), "ratio max / median", fill=INK, font=ImageFont.load_default(TITLE_SIZE), anchor="ls")
    _layer_axis(draw, layers, row_height)
    _step_axis(draw, steps, _TOP + height)
    _colour_bar(picture, draw, low, high, height)
    if np.isnan(binned).any():
        _legend_of_grey(draw, _TOP + height)
    return np.asarray(picture, dtype=np.uint8)


def limits(values: NDArray[np.floating]) -> tuple[float, float]:
    """Ends of the colour scale: the values' range, widened to 1, 2 or 5 times powers of ten so that it seldom moves."""
    drawable = values[np.isfinite(values) & (values > 0)]
    if drawable.size == 0:
        return 1.0, 10.0
    low, high = float(drawable.min()), float(drawable.max())
    marks = round_values(low, high)
    below = max((mark for mark in marks if mark <= low), default=low)
    above = min((mark for mark in marks if mark >= high and mark > below), default=high)
    return below, above


def round_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten around low … high; powers of ten first."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [float(f"{digit}e{decade}") for digit in (1, 5, 2) for decade in decades]
    return [mark for mark in marks if 0 < mark < math.inf]


def _positions(steps: NDArray[np.integer]) -> NDArray[np.float64]:
    """Where steps lie on the time axis, 0 … 1, ``[T]``."""
    since = steps.astype(np.float64) - float(steps[0])
    return np.asarray(np.log1p(_TIME_STRETCH * since / max(since[-1], 1.0)) / math.log1p(_TIME_STRETCH))


def _bin(positions: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values by pixel column, ``[L, width]``: of the nearest measurement, or the largest of those that fall in it."""
    borders = (positions[1:] + positions[:-1]) / 2
    left_edges = np.arange(_PLOT_WIDTH) / _PLOT_WIDTH
    starts = np.searchsorted(borders, left_edges, side="right")
    return np.asarray(np.fmax.reduceat(values, starts, axis=1), dtype=np.float64)


def _colours(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """Colours of values on the logarithmic scale from low to high, ``[..., 3]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (np.log10(values) - math.log10(low)) / (math.log10(high) - math.log10(low))
    anchors = np.linspace(0.0, 1.0, len(_ANCHORS))
    channels = [np.interp(np.clip(share, 0.0, 1.0), anchors, _ANCHORS[:, channel]) for channel in range(3)]
    rgb = np.stack(channels, axis=-1)
    rgb[np.isnan(share)] = _NAN
    return np.rint(rgb).astype(np.uint8)


def _layer_axis(draw: ImageDraw.ImageDraw, layers: int, row_height: int) -> None:
    """Numbers the layers: the first, the last and every so many between."""
    font = ImageFont.load_default(FONT_SIZE)
    stride = next((s for s in (1, 2, 4, 5, 10) if s * row_height >= 18), 20)
    numbers = (1, layers, *(n for n in range(1, layers) if n % stride == 0))
    marks = {number: (number - 0.5) / layers for number in numbers}
    for number, share in with_room(marks, 17 / (layers * row_height)):
        y = _TOP + round(layers * row_height * (1 - share))
        draw.line((_LEFT - _TICK, y, _LEFT - 2, y), fill=FRAME)
        draw.text((_LEFT - _TICK - 4, y), str(number), fill=INK, font=font, anchor="rm")
    draw.text((_LEFT - _TICK - 4, _TOP - 10), "layer", fill=FAINT, font=font, anchor="rs")


def _step_axis(draw: ImageDraw.ImageDraw, steps: NDArray[np.integer], y: int) -> None:
    """Labels the first and the last step, and round steps between where there is room."""
    font = ImageFont.load_default(FONT_SIZE)
    first, last = int(steps[0]), int(steps[-1])
    between = [step for step in map(int, reversed(round_values(1.0, max(last, 1)))) if first < step < last]
    between.sort(key=lambda step: int(str(step)[0]) != 1)
    marks = {step: float(_positions(np.array([first, step, last]))[1]) for step in (first, last, *between)}
    if first == last:
        marks[first] = 0.5
    for step, share in with_room(marks, 60 / _PLOT_WIDTH):
        x = _LEFT + _PLOT_WIDTH * share
        draw.line((x, y + 1, x, y + _TICK), fill=FRAME)
        draw.text((x, y + _TICK + 4), f"{step:,}", fill=INK, font=font, anchor="mt")
    draw.text((_LEFT + _PLOT_WIDTH / 2, y + _BOTTOM - 8), "step", fill=FAINT, font=font, anchor="ms")


def _colour_bar(picture: Image.Image, draw: ImageDraw.ImageDraw, low: float, high: float, height: int) -> None:
    """Draws the colour scale with its numbers, right of the plot."""
    font = ImageFont.load_default(FONT_SIZE)
    x = _LEFT + _PLOT_WIDTH + _BAR_GAP
    ramp = _colours(np.geomspace(high, low, height)[:, None], low, high)
    picture.paste(Image.fromarray(np.repeat(ramp, _BAR_WIDTH, axis=1)), (x, _TOP))
    draw.rectangle((x - 1, _TOP - 1, x + _BAR_WIDTH, _TOP + height), outline=FRAME)
    span = math.log10(high) - math.log10(low)
    values = [low, high] + [value for value in round_values(low, high) if low < value < high]
    marks = {value: (math.log10(value) - math.log10(low)) / span for value in values}
    for value, share in with_room(marks, 18 / height):
        y = _TOP + (height - 1) * (1 - share)
        draw.line((x + _BAR_WIDTH + 1, y, x + _BAR_WIDTH + _TICK - 1, y), fill=FRAME)
        draw.text((x + _BAR_WIDTH + _TICK + 3, y), f"{value:,g}", fill=INK, font=font, anchor="lm")


def _legend_of_grey(draw: ImageDraw.ImageDraw, y: int) -> None:
    """Says what grey means."""
    x = _LEFT + _PLOT_WIDTH
    text = "not a number"
    font = ImageFont.load_default(FONT_SIZE)
    draw.text((x, y + _BOTTOM - 8), text, fill=FAINT, font=font, anchor="rs")
    left = x - draw.textlength(text, font=font) - 18
    draw.rectangle((left, y + _BOTTOM - 18, left + 11, y + _BOTTOM - 7), fill=_NAN)


def with_room(marks: dict[_Mark, float], gap: float) -> list[tuple[_Mark, float]]:
    """Those marks, first come first served, that keep a gap from one another on an axis from 0 to 1."""
    kept: list[tuple[_Mark, float]] = []
    for mark, share in marks.items():
        if all(abs(share - other) >= gap for _, other in kept):
            kept.append((mark, share))
    return kept
