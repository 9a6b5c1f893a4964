"""Standard output and standard error of a command, which can be lost or unable to print a text."""

from __future__ import annotations

import contextlib
import sys

import click


def make_printable() -> None:
    """Print replacements for characters that a stream cannot hold, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def tell(text: str) -> None:
    """Print a line on stderr. If stderr is lost, with its terminal, nobody reads it anyway."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(text, err=True)
