"""Names of picture files, filled in from a template such as ``{date}/{prompt}-{seed:05d}.png``."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxdiff.errors import UsageError
from mlxdiff.pictures.formats import ENDINGS

NUMBERS = ("seed", "index", "step", "frame")
"""Fields that are whole numbers; each may have a width, ``{seed:05d}``."""

TEXTS = ("prompt", "model", "image", "date")
"""Fields that are texts, shortened to what every file system takes."""

FIELDS = (*NUMBERS, *TEXTS)

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<field>[a-z]+)(?::0(?P<width>[1-9])d)?\}|[{}]")
_MOST = 60  # characters of a text in a name
_MOST_BYTES = 120  # of these characters in UTF-8; a file system takes 255 for the whole name


class Template:
    """A name of files with fields in braces. ``{{`` and ``}}`` stand for braces.

    Args:
        text: the template.
        what: the option that it comes from, for messages.
        fields: the fields that may stand in it.
        endings: what it may end in.
    Raises: UsageError for anything else in braces, and for another ending.
    """

    def __init__(
        self,
        text: str,
        what: str,
        fields: Sequence[str] = FIELDS,
        endings: Sequence[str] = tuple(ENDINGS),
    ) -> None:
        self.text, self.what, self.endings = text, what, tuple(endings)
        self._parts: list[str | tuple[str, int]] = []
        end = 0
        for token in _TOKEN.finditer(text):
            self._parts.append(text[end : token.start()])
            self._parts.append(self._part(token, fields))
            end = token.end()
        self._parts.append(text[end:])
        if not text.lower().endswith(tuple(endings)):
            if os.path.isdir(os.path.expanduser(text)):
                raise UsageError(f"{self}: is a folder; add a name, such as {{seed}}{endings[0]}")
            raise UsageError(f"{self}: end it in one of {', '.join(endings)}")
        if "\0" in text:
            raise UsageError(f"{self}: a name of a file cannot hold a zero byte; leave it out")

    def __str__(self) -> str:
        text = self.text if len(self.text) <= 100 else f"{self.text[:97]}..."
        return f"{self.what} {text!r}"

    def _part(self, token: re.Match[str], fields: Sequence[str]) -> str | tuple[str, int]:
        if token[0] in ("{{", "}}"):
            return token[0][0]
        field, width = token["field"], int(token["width"] or 0)
        if field not in fields or (width and field not in NUMBERS):
            listed = ", ".join(f"{{{name}}}" for name in fields)
            raise UsageError(
                f"{self}: only {listed} are filled in, and numbers with a width as {{seed:05d}} "
                "(1 to 9 digits); write {{ for a brace"
            )
        return field, width

    @property
    def fields(self) -> set[str]:
        """The fields that stand in it."""
        return {part[0] for part in self._parts if isinstance(part, tuple)}

    def fill(self, **values: int | str) -> Path:
        """Return the path with these values in it. A text cannot leave the folder.

        Raises: UsageError if the folder of a user (``~name``) is not known, or a character is none.
        """
        said = ""
        for part in self._parts:
            if isinstance(part, str):
                said += part
            else:
                field, width = part
                value = values[field]
                said += safe(value) if isinstance(value, str) else f"{value:0{width}d}"
        try:
            return Path(said).expanduser()
        except RuntimeError:
            raise UsageError(f"{self}: there is no such user; write the folder out") from None
        except ValueError:  # a lone surrogate, with which ~ cannot be looked up
            raise UsageError(f"{self}: holds a character that is none; leave it out") from None


def safe(text: str) -> str:
    """Make a text part of a file name: letters, digits, ``_``, ``-`` and ``.``, limited length."""
    kept = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text[:1000]))
    kept = kept.strip("-._")[:_MOST]
    while len(kept.encode()) > _MOST_BYTES:
        kept = kept[:-1]
    return kept.rstrip("-._") or "untitled"


def numbered(path: Path) -> Iterator[Path]:
    """Yield the path, then ``name_2.png``, ``name_3.png`` and so on."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
