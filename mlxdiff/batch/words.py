"""Options by the names and words that files of prompts, presets and axes give them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from mlxdiff.errors import UsageError
from mlxdiff.run.options import LoadOptions, RunOptions
from mlxdiff.run.table import Option, entries
from mlxdiff.run.values import Files, Flag, Unfit

MACHINE = "Machine"
"""Section of the options that hold for all pictures of a process."""

_NOT_WORDS = frozenset({"noise", "progress", "on_progress", "cancel"})


def options() -> dict[str, Option]:
    """All options that one picture can have of its own, and those of the machine."""
    both = {**entries(LoadOptions), **entries(RunOptions)}
    return {name: entry for name, entry in both.items() if name not in _NOT_WORDS}


def find(name: str, *, machine: bool = False) -> Option:
    """Return the option of a name: Python's, a flag without dashes, or that of another program.

    Args:
        machine: options of the machine count, too.
    Raises: UsageError.
    """
    plain = name.strip().removeprefix("--").replace("-", "_")
    known = options()
    entry = known.get(plain) or next(
        (one for one in known.values() if plain in _other_names(one)), None
    )
    if entry is None:
        near = difflib.get_close_matches(plain, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; mlxdiff generate --help lists them"
        raise UsageError(f"there is no option {name!r}{hint}")
    if entry.section == MACHINE and not machine:
        raise UsageError(
            f"{entry.name} is the same for all pictures; give it on the command line ({entry.flag})"
        )
    return entry


def _other_names(entry: Option) -> Iterable[str]:
    flags = (one for flag in entry.flags for one in flag.split("/"))
    return {*(one.lstrip("-").replace("-", "_") for one in flags), *entry.elsewhere}


def of_word(entry: Option, word: str) -> Any:
    """Read the value of an option from a word. Raises: UsageError."""
    if isinstance(entry.kind, Flag):
        if word.lower() not in ("true", "false"):
            raise UsageError(f"{entry.name} is {word!r}; expected true or false")
        return word.lower() == "true"
    if isinstance(entry.kind, Files):
        return accepted(entry, [_file(entry, word)] if word else [])
    try:
        return entry.kind.parse(word)
    except Unfit as unfit:
        raise UsageError(f"{entry.name} is {unfit}") from None


def accepted(entry: Option, value: Any) -> Any:
    """Return a value of JSON or TOML as the library takes it. Raises: UsageError."""
    if isinstance(entry.kind, Files) and isinstance(value, list):
        value = [_file(entry, one) for one in value]
    try:
        return entry.kind.accept(value)
    except Unfit as unfit:
        raise UsageError(f"{entry.name} is {unfit}") from None


def _file(entry: Option, value: Any) -> Any:
    """A file with a scale or a word: ``"PATH:SCALE"`` or ``["PATH", SCALE]``."""
    if isinstance(value, str):
        try:
            value = tuple(entry.kind.parse(value))
        except Unfit as unfit:
            raise UsageError(f"{entry.name} is {unfit}") from None
    if isinstance(value, list):
        value = tuple(value)
    return value[0] if isinstance(value, tuple) and value[1:] == (None,) else value


def all_accepted(given: Mapping[str, Any], *, machine: bool = False) -> dict[str, Any]:
    """Options of a JSON object or a TOML table, by Python name. Raises: UsageError."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        entry = find(name, machine=machine)
        if entry.name in found:
            raise UsageError(f"{entry.name} is given twice")
        if value is not None:
            found[entry.name] = accepted(entry, value)
    return found
