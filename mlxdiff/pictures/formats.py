"""Picture files as bytes: PNG, JPEG, WebP and AVIF with their metadata; animations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import png_bytes
from mlxdiff.pictures.metadata import Metadata, exif, of_picture

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
"""Endings of picture files that are written -> Pillow's name of the format."""

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
"""Endings of animations that are written -> Pillow's name of the format."""

QUALITY = 90
LOSSLESS = 100
"""At this quality a WebP file keeps every pixel."""

_MOST_EXIF = 65_000
"""Bytes of EXIF in a JPEG file, about: a segment has 65,535."""

FRAME_MS, LAST_FRAME_MS = 200, 1500


def ending(path: PurePath | str) -> str:
    """Return the ending of a path in small letters, with its dot."""
    return PurePath(path).suffix.lower()


def require_writer(name: str) -> None:
    """Raise UsageError if this Pillow cannot write files of an ending."""
    from PIL import features

    if name == ".avif" and not features.check("avif"):
        raise UsageError("AVIF: this Pillow was built without it; end the name in .webp or .png")


def encode(
    image: Image.Image,
    name: str = ".png",
    metadata: Metadata | None = None,
    quality: int | None = None,
) -> bytes:
    """Encode a picture as a file.

    Args:
        image: the picture.
        name: the ending of the file (``ENDINGS``). PNG keeps 16 bits of grey, others have 8.
        metadata: how it was made; None: the file says nothing.
        quality: 1 to 100, for all formats but PNG; None: ``QUALITY``. WebP is lossless at 100.
    Raises: UsageError if this Pillow cannot write the format.
    """
    form = ENDINGS[name]
    if form == "PNG":
        return png_bytes(image, None if metadata is None else metadata.chunks())
    require_writer(name)
    quality = QUALITY if quality is None else quality
    how: dict[str, Any] = {"quality": quality}
    if form == "WEBP" and quality == LOSSLESS:
        how["lossless"] = True
    if metadata is not None:
        how["exif"] = exif(metadata, _MOST_EXIF if form == "JPEG" else None)
    encoded = io.BytesIO()
    _in_8_bits(image).convert("RGB").save(encoded, format=form, **how)
    return encoded.getvalue()


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return a picture whose 16 bits of grey, if it has them, are brought to 8."""
    from PIL import Image

    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def reencode(png: bytes, name: str, quality: int | None = None) -> bytes:
    """Return a PNG file of ours in another format, with its metadata.

    Args:
        name, quality: as for ``encode``.
    """
    from PIL import Image

    if ENDINGS[name] == "PNG":
        return png
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        picture.load()
        return encode(picture, name, of_picture(picture, "the picture"), quality)


def animation(frames: Sequence[Image.Image], name: str) -> bytes:
    """Encode pictures of one size as an animation that runs once and stays on the last.

    Args:
        frames: at least one picture.
        name: the ending of the file (``ANIMATIONS``).
    """
    times = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    return moving(frames, name, duration=times if len(frames) > 1 else LAST_FRAME_MS)


def moving(frames: Sequence[Image.Image], name: str, **how: Any) -> bytes:
    """Encode pictures of one size as a file that shows one after the other.

    Args:
        frames: at least one picture.
        name: the ending of the file: .gif, .webp or .png.
        how: what Pillow's writer of the format takes.
    """
    encoded = io.BytesIO()
    first, *rest = (frame.convert("RGB") for frame in frames)
    form = (ENDINGS | ANIMATIONS)[name]
    first.save(encoded, format=form, save_all=True, append_images=rest, **how)
    return encoded.getvalue()
