"""Wildcards of prompts: ``{red|blue}`` and ``__colour__``, a line of the file colour.txt.

The seed of a picture decides what is chosen: the same seed, prompt and files give the same text on
every machine.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from mlxdiff.errors import UsageError
from mlxdiff.machine.disk import read_document

_NAME = re.compile(r"__([\w./ -]{0,99}?\w)__")  # bounded: a prompt may come from anyone
_BRACES = re.compile(r"\{([^{}]*)\}")
MOST = 1000
"""Choices in one text."""
LONGEST = 100_000
"""Characters of a text that is filled in."""


class Wildcards:
    """Fills in the wildcards of texts.

    Args:
        folder: of the files. Each has a choice a line; a line that begins with # is a comment.
            None: there are no files.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lines: dict[str, list[str]] = {}

    def has_any(self, text: str) -> bool:
        """Return True if something is to be filled in."""
        return _NAME.search(text) is not None or _choice(text) is not None

    def fill(self, text: str, seed: int) -> str:
        """Return the text with one choice for each wildcard, from the inside out.

        Args:
            seed: of the picture.
        Raises: UsageError for a file that is not there, and for wildcards without end.
        """
        for number in range(MOST):
            if len(text) > LONGEST:
                break
            found = _NAME.search(text)
            if found is not None:
                choices = self._file(found[1])
            elif (found := _choice(text)) is not None:
                choices = found[1].split("|")
            else:
                return text
            chosen = choices[_pick(seed, number, len(choices))]
            text = text[: found.start()] + chosen + text[found.end() :]
        raise UsageError(
            f"the wildcards of a prompt name each other without end, or give more than {LONGEST} "
            f"characters ({text[:60]}...)"
        )

    def _file(self, name: str) -> list[str]:
        if name not in self._lines:
            self._lines[name] = self._read(name)
        return self._lines[name]

    def _read(self, name: str) -> list[str]:
        if self.folder is None:
            raise UsageError(f"__{name}__: there is no folder of wildcards here")
        path = self.folder / f"{name}.txt"
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UsageError(f"__{name}__ leads out of the folder of wildcards")
        try:
            text = read_document(path).decode("utf-8")
        except OSError:
            there = sorted(
                one.relative_to(self.folder).with_suffix("").as_posix()
                for one in self.folder.rglob("*.txt")
            )
            said = f"there are {', '.join(there[:20])}" if there else "there is none"
            # Without the folder, which is no concern of a server's clients.
            raise UsageError(
                f"__{name}__: there is no {name}.txt in the folder of wildcards; {said}"
            ) from None
        except UnicodeDecodeError:
            raise UsageError(f"{path}: is not a UTF-8 text file") from None
        lines = [line.strip() for line in text.removeprefix("\ufeff").splitlines()]
        choices = [line for line in lines if line and not line.startswith("#")]
        if not choices:
            raise UsageError(f"{path}: holds no line to choose")
        return choices


def _choice(text: str) -> re.Match[str] | None:
    """The first braces that hold choices and no braces."""
    return next((one for one in _BRACES.finditer(text) if "|" in one[1]), None)


def _pick(seed: int, number: int, count: int) -> int:
    """Choose one of ``count``. A hash, because Python's random numbers may change."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % count
