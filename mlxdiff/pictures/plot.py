"""A plain plot of curves, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_COLOURS = ((31, 91, 163), (201, 79, 28), (54, 128, 72), (122, 74, 150))
_MARGIN = (64, 16, 36, 30)  # left, right, bottom, top


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    *,
    width: int = 800,
    height: int = 400,
) -> Image.Image:
    """Draw curves with axes.

    Args:
        lines: name -> points (x, y), x rising; points that are not finite are left out.
        title: above the plot.
    """
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    draw.text((_MARGIN[0], 8), title, fill="black", font=font)
    kept = {name: [(x, y) for x, y in some if math.isfinite(y)] for name, some in lines.items()}
    points = [point for some in kept.values() for point in some]
    if not points:
        return picture
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (0, 1))
    box = (_MARGIN[0], _MARGIN[3], width - _MARGIN[1], height - _MARGIN[2])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return box[0] + across * (box[2] - box[0]), box[3] - up * (box[3] - box[1])

    for tick in _ticks(low, high):
        _, y = place(left, tick)
        draw.line([(box[0], y), (box[2], y)], fill=(225, 225, 225))
        draw.text((box[0] - 6, y), f"{tick:g}", fill="black", font=font, anchor="rm")
    for tick in _ticks(left, right):
        x, _ = place(tick, low)
        draw.line([(x, box[3]), (x, box[3] + 4)], fill="black")
        draw.text((x, box[3] + 6), f"{tick:g}", fill="black", font=font, anchor="ma")
    draw.rectangle(box, outline="black")
    for index, (name, some) in enumerate(kept.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        draw.line([place(*point) for point in some], fill=colour, width=2, joint="curve")
        draw.text((box[2] - 8, box[1] + 6 + 14 * index), name, fill=colour, font=font, anchor="ra")
    return picture


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
