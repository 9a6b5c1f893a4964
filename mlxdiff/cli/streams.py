"""Standard output and standard error of a command, which can be lost or unable to print a text."""

from __future__ import annotations

import contextlib
import os
import sys

import click

_DEFAULT_WIDTH = 80
_NARROWEST, _WIDEST = 8, 30  # columns of a bar

_shown = 0
"""Characters of the line that ``show`` wrote last and that still stands there."""


def make_printable() -> None:
    """Print replacements for characters that a stream cannot hold, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def let_go() -> None:
    """Drop what a lost stream still holds: at its end Python would fail to write it, status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text: str) -> None:
    """Print a line on stderr. If stderr is lost, with its terminal, nobody reads it anyway."""
    clear()
    with contextlib.suppress(OSError, ValueError):
        click.echo(text, err=True)


def is_terminal() -> bool:
    """Return True if stderr is a terminal, so that a line of it can be written again."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return sys.stderr.isatty()
    return False


def width() -> int:
    """Return the columns of stderr's terminal."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or _DEFAULT_WIDTH
    return _DEFAULT_WIDTH


def show(text: str) -> None:
    """Write a line of a terminal again, shortened to its width. Elsewhere nothing is written.

    It stays until the next line is shown or told: ``tell`` clears it first.
    """
    global _shown
    if is_terminal():
        text = text[: width() - 1]  # a full line would wrap, and could not be cleared
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"\r{text.ljust(_shown)}")
            sys.stderr.flush()
        _shown = len(text)


def clear() -> None:
    """Clear the line that is shown, if there is one."""
    global _shown
    if _shown:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"\r{' ' * _shown}\r")
            sys.stderr.flush()
        _shown = 0


def keep() -> None:
    """Let the line that is shown stand, and go to the next one."""
    global _shown
    if _shown:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write("\n")
            sys.stderr.flush()
        _shown = 0


def with_bar(head: str, share: float, tail: str) -> str:
    """Return a line with a bar in the middle, or without one where the terminal is too narrow.

    Args:
        head, tail: what stands before and after it.
        share: how much of it is filled, 0 to 1.
    """
    room = min(width() - 1 - len(f"{head}  []  {tail}"), _WIDEST)
    if room < _NARROWEST:
        return f"{head}  {tail}"
    done = round(room * share)
    return f"{head}  [{'#' * done}{'-' * (room - done)}]  {tail}"


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
