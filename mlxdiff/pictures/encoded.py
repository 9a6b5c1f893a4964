"""Pictures as bytes: what a program sends and gets over a connection.

The bytes may come from anyone. A picture is measured before it is decoded, so that a small file
that stands for a huge picture costs nothing.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import _to_rgb

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that are read; Pillow has readers for many more, which nobody sends."""


def decode(data: bytes, what: str, most_pixels: int) -> Image.Image:
    """Decode a picture.

    Args:
        data: bytes of a file.
        what: name of the picture, for messages.
        most_pixels: refuse a larger picture.
    Returns: a Pillow image with all its pixels loaded; it keeps its text chunks.
    Raises: UsageError.
    """
    from PIL import Image

    bomb = Image.DecompressionBombError, Image.DecompressionBombWarning
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except bomb:
        raise UsageError(
            f"{what}: has far too many pixels; at most {most_pixels} are taken"
        ) from None
    except Exception:  # a damaged file can make Pillow's readers raise anything
        raise UsageError(f"{what}: is not a picture ({', '.join(FORMATS)} are read)") from None
    width, height = picture.size
    if width * height > most_pixels:
        raise UsageError(
            f"{what}: has {width}x{height} pixels; at most {most_pixels} are taken. Make it smaller"
        )
    try:
        picture.load()
    except Exception as error:
        raise UsageError(f"{what}: cannot be decoded ({error})") from None
    return picture


def enlarge(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize a picture with the Lanczos filter."""
    from PIL import Image

    return picture.resize((width, height), Image.Resampling.LANCZOS)


def fit(picture: Image.Image, width: int, height: int, *, fill: bool) -> Image.Image:
    """Make a picture of a size without stretching it.

    Args:
        fill: show all of the picture between borders of its own edge; else cut off what is beyond.
    """
    import numpy as np
    from PIL import Image

    scales = width / picture.width, height / picture.height
    scale = min(scales) if fill else max(scales)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    if not fill:
        return picture.crop((-left, -top, width - left, height - top))
    pixels = np.asarray(picture)
    borders = (top, height - size[1] - top), (left, width - size[0] - left)
    more = ((0, 0),) * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, (*borders, *more), mode="edge"))


def opaque(picture: Image.Image) -> Image.Image:
    """Return the picture as RGB, turned as its EXIF says."""
    from PIL import Image

    return Image.fromarray(_to_rgb(picture, "the image"))


def mask_of_transparency(picture: Image.Image) -> Image.Image | None:
    """Return a mask that is white where a picture is transparent; None if nothing is."""
    from PIL import ImageOps

    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else ImageOps.invert(alpha)


def inverted(mask: Image.Image) -> Image.Image:
    """Return a mask with black and white exchanged."""
    from PIL import ImageOps

    return ImageOps.invert(mask.convert("L"))
