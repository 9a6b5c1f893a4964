"""Files of prompts: one job a line.

A line is a prompt; or a JSON object of options; or options as A1111's script "Prompts from file"
takes them (``--prompt "a house" --steps 20``). A line that begins with ``#`` is a comment.

Source of the third form: stable-diffusion-webui, scripts/prompts_from_file.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxdiff.batch import words
from mlxdiff.errors import UsageError, one_line
from mlxdiff.run.values import Flag

_OBJECT = re.compile(r'\{\s*("[^"]*"\s*:|\}$)')
_PICTURES = frozenset(".png .jpg .jpeg .webp .avif .bmp .tif .tiff .heic .heif".split())


@dataclass(frozen=True)
class Line:
    """What one line asks for.

    Attributes:
        options: by Python name.
        place: of the line, for messages; "": the command line.
        fault: why it cannot be honoured; None: it can.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    fault: UsageError | None = None


def read_lines(text: str, where: str) -> list[Line]:
    """Read a file of prompts. A line that is wrong says so in its ``fault``.

    Args:
        where: name of the file.
    """
    found = []
    # Lines as text editors have them: str.splitlines would also cut at U+2028 and the like.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff")), 1):
        place = f"{where}, line {number}"
        if not line.strip() or line.startswith("#"):
            continue
        try:
            found.append(Line(_options(line), place))
        except UsageError as error:
            found.append(Line(place=place, fault=error))
    return found


def _options(line: str) -> dict[str, Any]:
    if _OBJECT.match(line):
        return _of_json(line)
    if line.startswith("--"):
        return _of_words(line)
    return {"prompt": line}


def _of_json(line: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"is not JSON ({one_line(error)})") from None
    return words.all_accepted(given)


def _of_words(line: str) -> dict[str, Any]:
    try:
        given = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{one_line(error)}; put quotes around a text with blanks") from None
    found: dict[str, Any] = {}
    while given:
        flag = given.pop(0)
        if not flag.startswith("--"):
            raise UsageError(f"{flag!r} belongs to no option; put quotes around a text with blanks")
        entry = words.find(flag)
        if isinstance(entry.kind, Flag) and (not given or given[0].startswith("--")):
            value: Any = True
        elif not given:
            raise UsageError(f"{flag} has no value")
        else:
            value = words.of_word(entry, given.pop(0))
        if isinstance(found.get(entry.name), tuple):  # files add up
            found[entry.name] += value
        elif entry.name in found:
            raise UsageError(f"{entry.name} is given twice")
        else:
            found[entry.name] = value
    return found


def with_folders(lines: list[Line], options: Mapping[str, Any]) -> list[Line]:
    """Put a line for each picture in place of one whose ``image`` is a folder.

    Beside a motion adapter a folder is one video.

    Args:
        options: of all lines.
    """
    found = []
    for line in lines:
        image = line.options.get("image", options.get("image"))
        motion = line.options.get("motion_adapter", options.get("motion_adapter"))
        if motion is not None or not isinstance(image, str) or not _is_folder(image):
            found.append(line)
            continue
        try:
            for path in pictures_in(Path(image).expanduser()):
                place = f"{line.place}: {path.name}" if line.place else path.name
                found.append(Line({**line.options, "image": str(path)}, place, line.fault))
        except UsageError as error:
            if not line.place:
                raise
            found.append(Line(line.options, line.place, error))
    return found


def _is_folder(path: str) -> bool:
    return Path(path).expanduser().is_dir()


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder by name, without folders in it. Raises: UsageError."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})") from None
    found = [
        path
        for path in inside
        if path.suffix.lower() in _PICTURES and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise UsageError(f"{folder}: holds no picture ({', '.join(sorted(_PICTURES))})")
    return found
