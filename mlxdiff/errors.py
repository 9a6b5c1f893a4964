"""The errors that mlxdiff raises on purpose: one line that names the thing and the way out."""

from __future__ import annotations

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
