"""A contact sheet: pictures in rows and columns, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxdiff.pictures.image import load_image, open_picture, to_image

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

GAP = 8
MOST_PIXELS = 100_000_000
"""A larger sheet is made smaller."""

_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_LINES = 4  # of a label


def contact_sheet(
    cells: Sequence[Sequence[Path | None]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Put pictures on a sheet.

    Args:
        cells: rows of files; None leaves a place empty. All rows have the same length, and there
            is at least one file.
        rows, columns: a label for each row and column; none: there are no such labels.
        captions: a text under each picture; none: there are none.
    Raises: UsageError if a file cannot be read.
    """
    from PIL import Image, ImageDraw

    sizes = [_size_of(one) for row in cells for one in row if one is not None]
    width, height = max(one[0] for one in sizes), max(one[1] for one in sizes)
    shrink = (len(cells) * len(cells[0]) * width * height / MOST_PIXELS) ** 0.5
    if shrink > 1:
        width, height = max(1, int(width / shrink)), max(1, int(height / shrink))
    font = _font(max(11, min(width // 18, 40)))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    side = max((_size(draw, text, font, max(width, 160))[0] for text in rows), default=0)
    top = max((_size(draw, text, font, width)[1] for text in columns), default=0)
    under = max((_size(draw, text, font, width)[1] for row in captions for text in row), default=0)
    left, top = side + GAP * (2 if side else 1), top + GAP * (2 if top else 1)
    step = width + GAP, height + GAP + (under + GAP if under else 0)
    sheet = Image.new("RGB", (left + step[0] * len(cells[0]), top + step[1] * len(cells)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, text in enumerate(columns):
        _write(draw, text, font, (left + j * step[0], GAP), width)
    for i, row in enumerate(cells):
        y = top + i * step[1]
        if rows:
            size = _size(draw, rows[i], font, max(width, 160))
            _write(draw, rows[i], font, (GAP, y + (height - size[1]) // 2), max(width, 160))
        for j, picture in enumerate(row):
            x = left + j * step[0]
            if picture is not None:
                shown = to_image(load_image(picture))
                if shrink > 1:
                    shown = shown.resize(
                        (max(1, int(shown.width / shrink)), max(1, int(shown.height / shrink)))
                    )
                sheet.paste(shown, (x, y))
            if captions:
                _write(draw, captions[i][j], font, (x, y + height + GAP // 2), width)
    return sheet


def _size_of(path: Path) -> tuple[int, int]:
    with open_picture(path) as picture:
        return picture.size


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: object, width: int) -> str:
    """Break a text into lines of a width, and cut it after a few."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:  # type: ignore[arg-type]
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1]} ..."]
    for index, line in enumerate(lines):
        while line and draw.textlength(line, font=font) > width:  # type: ignore[arg-type]
            line = line[:-1]
        lines[index] = line
    return "\n".join(lines)


def _size(draw: ImageDraw.ImageDraw, text: str, font: object, width: int) -> tuple[int, int]:
    box = draw.multiline_textbbox((0, 0), _wrapped(draw, text, font, width), font=font)  # type: ignore[arg-type]
    return int(box[2]), int(box[3])


def _write(
    draw: ImageDraw.ImageDraw, text: str, font: object, place: tuple[int, int], width: int
) -> None:
    draw.multiline_text(place, _wrapped(draw, text, font, width), fill=_INK, font=font)  # type: ignore[arg-type]
