"""A plain plot of curves, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_COLOURS = (
    (31, 91, 163), (201, 79, 28), (54, 128, 72), (122, 74, 150), (150, 120, 20), (90, 90, 90),
)  # fmt: skip
_MARGIN = (64, 16, 36, 30)  # left, right, bottom, top
_NAMES = 150  # width of the names beside the curves
_LINE = 14  # height of a line of text


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    *,
    width: int = 800,
    height: int = 400,
    logarithmic: bool = False,
    colours: Mapping[str, int] | None = None,
) -> Image.Image:
    """Draw curves with axes.

    Args:
        lines: name -> points (x, y), x rising; points that are not finite are left out.
        title: above the plot.
        logarithmic: both axes are; x has its ticks where the points are, and the names stand beside
            the ends of the curves.
        colours: name -> number of a colour; each curve has one of its own unless given.
    """
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    draw.text((_MARGIN[0], 8), title, fill="black", font=font)
    kept = {name: [(x, y) for x, y in some if math.isfinite(y)] for name, some in lines.items()}
    scaled = math.log10 if logarithmic else float
    points = [(scaled(x), scaled(y)) for some in kept.values() for x, y in some]
    if not points:
        return picture
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (0, 1))
    beside = _NAMES if logarithmic else 0
    box = (_MARGIN[0], _MARGIN[3], width - _MARGIN[1] - beside, height - _MARGIN[2])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (scaled(x) - left) / (right - left), (scaled(y) - low) / (high - low)
        return box[0] + across * (box[2] - box[0]), box[3] - up * (box[3] - box[1])

    first = next(point for some in kept.values() for point in some)
    powers = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
    for tick in powers if logarithmic else _ticks(low, high):
        y = place(first[0], tick)[1]
        draw.line([(box[0], y), (box[2], y)], fill=(225, 225, 225))
        draw.text((box[0] - 6, y), f"{tick:g}", fill="black", font=font, anchor="rm")
    found = sorted({x for some in kept.values() for x, _ in some})
    for tick in found if logarithmic else _ticks(left, right):
        x = place(tick, first[1])[0]
        draw.line([(x, box[3]), (x, box[3] + 4)], fill="black")
        draw.text((x, box[3] + 6), f"{tick:g}", fill="black", font=font, anchor="ma")
    draw.rectangle(box, outline="black")
    ends: list[tuple[float, str, tuple[int, int, int]]] = []
    for index, (name, some) in enumerate(kept.items()):
        colour = _COLOURS[(colours or {}).get(name, index) % len(_COLOURS)]
        draw.line([place(*point) for point in some], fill=colour, width=2, joint="curve")
        if logarithmic and some:
            ends.append((place(*some[-1])[1], name, colour))
        else:
            at = (box[2] - 8, box[1] + 6 + _LINE * index)
            draw.text(at, name, fill=colour, font=font, anchor="ra")
    rows = _apart([y for y, _, _ in sorted(ends)], box[1], box[3])
    for row, (y, name, colour) in zip(rows, sorted(ends), strict=True):
        draw.line([(box[2], y), (box[2] + 14, row)], fill=colour)
        draw.text((box[2] + 18, row), name, fill=colour, font=font, anchor="lm")
    return picture


def _apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Return rising heights near the given rising ones, a line of text apart."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + _LINE if found else top))
    limit = bottom
    for index in range(len(found) - 1, -1, -1):
        found[index] = min(found[index], limit)
        limit = found[index] - _LINE
    return found


def smoothed(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Return running means of a curve: exponential, over about this share of its length."""
    weight = 1 / max(1.0, share * len(values))
    found: list[float] = []
    total = held = 0.0
    for value in values:
        total += weight * (value - total)
        held += weight * (1 - held)
        found.append(total / held)
    return found


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    return [float(f"{t:.10g}") for t in np.arange(math.ceil(low / step), high / step + 1e-9) * step]
