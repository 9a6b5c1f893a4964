"""The errors that mlxdiff raises on purpose: one line that names the thing and the way out.

A message names an option by ``argument``: as Python knows it, or as a flag where the command line
says so (``naming``). So one text serves both.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in mlxdiff/__init__.py: this module is there before signals are handled
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Name = Callable[[str, Any, str], str]

MAX_MESSAGE = 2000
"""Longest text of an error, in characters. A longer one loses its middle."""


class MlxdiffError(Exception):
    """Base class of all errors that the user's input causes. The command line exits with 2.

    The text is one line that is safe to print, whatever a file or a hub put into it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(printable(str(message)), MAX_MESSAGE))


class UsageError(MlxdiffError):
    """An argument, an option or a combination of options that mlxdiff cannot honour."""


class UnknownAttribute(UsageError, AttributeError):
    """An attribute that an object does not have."""


class ConfigError(MlxdiffError):
    """A configuration file that is malformed or asks for an unsupported feature."""


class CheckpointError(MlxdiffError):
    """Weights or tokenizer files that are missing, damaged, incomplete or of another kind."""


class HubError(MlxdiffError):
    """A model that cannot be fetched from the Hugging Face hub and is not in the cache."""


class Cancelled(MlxdiffError):
    """What was cancelled: by its ``mlxdiff.Cancel``, or by another request to a server."""


def in_python(name: str, value: Any, form: str) -> str:
    """Name an option as an argument in Python, ``steps`` or ``steps=20``."""
    return name if value is None else f"{name}={value!r}"


_names: list[Name] = [in_python]  # the last one counts


class naming:
    """Let messages name options in another way, in the whole process, inside the block.

    Args:
        name: gets the arguments of ``argument``.
    """

    def __init__(self, name: Name) -> None:
        self.name = name

    def __enter__(self) -> None:
        _names.append(self.name)

    def __exit__(self, *error: object) -> None:
        _names.pop()


def argument(name: str, value: Any = None, form: str = "") -> str:
    """Name an option in a message, in the words of who reads it.

    Args:
        name: in Python.
        value: what to give; None: the reader knows.
        form: how its value stands on the command line, such as "PATH[:SCALE]".
    Returns: ``steps`` or ``steps=20``; on the command line ``--steps`` or ``--steps 20``.
    """
    return _names[-1](name, value, form)


def printable(text: str) -> str:
    """Return a text as one line without control characters, which could steer a terminal.

    Line breaks become spaces. Other characters that are not printable, halves of surrogate pairs
    among them, are escaped as in Python.
    """
    text = text.replace("\r\n", " ").replace("\n", " ")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, most: int = 200) -> str:
    """Return a text of at most ``most`` characters. A longer one keeps its beginning and end."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail - 3]}...{text[-tail:]}"


def quoted(value: object, most: int = 200) -> str:
    """Return ``repr`` of a foreign value for a message: at most ``most`` characters."""
    try:
        return shortened(repr(value), most)
    except (RecursionError, ValueError):  # too deep, or an integer of too many digits
        return f"a {type(value).__name__}"


def one_line(error: object) -> str:
    """Return the text of an error on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
