"""The texts of a picture file: PNG chunks, EXIF, XMP, comments, and those hidden in its pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxdiff.pictures.foreign.record import Texts

if TYPE_CHECKING:
    from PIL import Image

_LONGEST = 4 << 20
_EXIF = {0x010E: "ImageDescription", 0x010F: "Make", 0x0110: "Model", 0x0131: "Software"}
EXIF_PART, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
"""EXIF's tag of its inner part, and two tags in that."""
_XMP = ("xmp", "XML:com.adobe.xmp")


def texts_of(picture: Image.Image) -> Texts:
    """Return the texts of a picture that Pillow has opened, by the names of their places.

    EXIF's are ``UserComment``, ``MakerNote``, ``ImageDescription``, ``Make``, ``Model`` and
    ``Software``; XMP is ``XMP``. A chunk of the same name counts more.

    Raises: whatever Pillow's readers raise for a damaged file.
    """
    # Text after the pixels is seen only once they are read.
    chunks: Any = getattr(picture, "text", None) or {}
    found = Texts(_exif_texts(picture))
    for name, value in {**picture.info, **chunks}.items():
        text = _decoded(value) if name in (*_XMP, "comment") else value
        if isinstance(name, str) and isinstance(text, str) and len(text) <= _LONGEST:
            found["XMP" if name in _XMP else name] = _as_utf8(str(text)).lstrip("\ufeff")
    return found


def _exif_texts(picture: Image.Image) -> dict[str, str]:
    exif = picture.getexif()
    inner = exif.get_ifd(EXIF_PART)
    found = {name: exif.get(tag) for tag, name in _EXIF.items()}
    comment = inner.get(USER_COMMENT, exif.get(USER_COMMENT))  # some put it beside the inner part
    found["UserComment"] = _comment(comment) if isinstance(comment, bytes) else comment
    found["MakerNote"] = inner.get(MAKER_NOTE)
    texts = {name: _decoded(value) for name, value in found.items()}
    return {name: text for name, text in texts.items() if text and len(text) <= _LONGEST}


def _decoded(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value.strip("\0\ufeff") if isinstance(value, str) else None


def _as_utf8(text: str) -> str:
    """Return a text whose UTF-8 was taken for Latin-1, as it was meant; another as it is.

    A PNG's plain text chunk is Latin-1, and some programs write UTF-8 there.
    """
    if text.isascii():
        return text
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _comment(comment: bytes) -> str:
    """EXIF UserComment: eight bytes name the encoding, then the text."""
    code, body = comment[:8], comment[8:]
    if code.startswith(b"UNICODE"):
        # Written as UTF-16 big-endian by A1111 whatever the file's byte order; by others as they
        # like.
        little = body.startswith(b"\xff\xfe") or body[1:2] == b"\0" != body[:1]
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff")
    if code[:5] not in (b"ASCII", b"JIS\0\0") and code.strip(b"\0") != b"":
        body = comment  # some write no name
    return body.decode("utf-8", "replace")
