"""Texts in the lowest bits of pixels ("stealth PNG info"): NovelAI's, and those of an extension.

The bits run down the columns: fifteen letters that say the kind, 32 bits for the count of bits, and
the text, as it is or with gzip. They lie in alpha, or in red, green and blue in turn.

Source: novelai-image-metadata (NovelAI, MIT); sd-webui-stealth-pnginfo (the other three kinds).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from mlxdiff.pictures.foreign.record import Texts, document

if TYPE_CHECKING:
    from PIL import Image

_KINDS = {
    b"stealth_pnginfo": (True, False),
    b"stealth_pngcomp": (True, True),
    b"stealth_rgbinfo": (False, False),
    b"stealth_rgbcomp": (False, True),
}
_LETTERS = 15
_LONGEST = 4 << 20  # bytes of a text, packed or not


def texts_of(picture: Image.Image) -> Texts:
    """Return the texts in the pixels of a picture, by name; none is the usual case."""
    if picture.mode not in ("RGB", "RGBA"):
        return Texts()
    for of_alpha in (True, False):
        if of_alpha and picture.mode != "RGBA":
            continue
        bits = _Bits(picture, of_alpha)
        kind = _KINDS.get(bits.take(_LETTERS))
        if kind is None or kind[0] != of_alpha:
            continue
        length = int.from_bytes(bits.take(4), "big") // 8
        if not 0 < length <= min(_LONGEST, bits.left):
            return Texts()
        text = _text(bits.take(length), packed=kind[1])
        return Texts() if text is None else _named(text)
    return Texts()


class _Bits:
    """Bytes from the lowest bits of a picture; only the columns that are asked for are read."""

    def __init__(self, picture: Image.Image, of_alpha: bool) -> None:
        self._picture = picture
        self._bands = [3] if of_alpha else [0, 1, 2]
        self._place = 0

    @property
    def left(self) -> int:
        """Bytes that can still be taken."""
        width, height = self._picture.size
        return width * height * len(self._bands) // 8 - self._place

    def take(self, count: int) -> bytes:
        """Take the next bytes; fewer where the picture ends."""
        width, height = self._picture.size
        column = height * len(self._bands)  # bits
        start, end = 8 * self._place, 8 * (self._place + count)
        left, right = start // column, min(-(-end // column), width)
        self._place += count
        if left >= right:
            return b""
        pixels = np.asarray(self._picture.crop((left, 0, right, height)))
        bits = (pixels[:, :, self._bands] & 1).transpose(1, 0, 2).reshape(-1)
        return np.packbits(bits[start - left * column : end - left * column]).tobytes()


def _text(data: bytes, packed: bool) -> str | None:
    if packed:
        try:
            unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            data = unpacker.decompress(data, _LONGEST)
            if unpacker.unconsumed_tail:
                return None
        except zlib.error:
            return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _named(text: str) -> Texts:
    """NovelAI hides all of its chunks as one JSON object; the extension hides A1111's text."""
    values = document(text)
    if not isinstance(values, dict):
        return Texts(parameters=text)
    return Texts({key: value for key, value in values.items() if isinstance(value, str)})
