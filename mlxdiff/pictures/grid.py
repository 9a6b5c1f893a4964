"""One picture of a grid: a sheet of pictures of equal size, in rows."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import open_picture

if TYPE_CHECKING:
    from PIL import Image

_CELL = re.compile(r"(\d{1,4}),(\d{1,4})/(\d{1,4})x(\d{1,4})")


class Cell(NamedTuple):
    """A place in a grid, from 1; and the rows and columns of the grid."""

    row: int
    column: int
    rows: int
    columns: int


def parse_cell(text: str) -> Cell:
    """Read ``ROW,COLUMN/ROWSxCOLUMNS``. Raises: UsageError."""
    match = _CELL.fullmatch(text.strip())
    cell = None if match is None else Cell(*map(int, match.groups()))
    if cell is None or not (1 <= cell.row <= cell.rows and 1 <= cell.column <= cell.columns):
        raise UsageError(
            f"cell is {text!r}; expected ROW,COLUMN/ROWSxCOLUMNS, such as 2,1/2x2 for the lower "
            "left of four"
        )
    return cell


def cell_of(source: str | os.PathLike[str], cell: Cell) -> Image.Image:
    """Return one picture of a grid.

    Args:
        source: the file of the grid.
    Raises: UsageError if the grid cannot be divided so.
    """
    with open_picture(source) as sheet:
        width, height = sheet.size
        if width % cell.columns or height % cell.rows:
            raise UsageError(
                f"{source}: {width}x{height} pixels cannot be divided into {cell.rows} rows and "
                f"{cell.columns} columns of equal pictures"
            )
        wide, high = width // cell.columns, height // cell.rows
        left, top = (cell.column - 1) * wide, (cell.row - 1) * high
        return sheet.crop((left, top, left + wide, top + high)).copy()
