"""``--from-image``: the options that a picture was drawn with.

A picture can come from a stranger. What it names is opened if it is in the working folder, or is a
model of the hub that is on this machine already. Only ``--trust-image`` lets a picture choose other
files, or fetch from the hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from mlxdiff.cli import embeddings, loras
from mlxdiff.errors import UsageError, quoted
from mlxdiff.run.options import GenerateOptions, LoadOptions
from mlxdiff.run.table import Option, entries
from mlxdiff.run.values import Each, Files, Picture, Place, Unfit

BUILTIN_NAME = "builtin"  # what pictures of the built-in model say that they are made with
TABLES: tuple[type, ...] = (LoadOptions, GenerateOptions)


def replayed(given: Mapping[str, Any], path: str | None, trust: bool = False) -> dict[str, Any]:
    """The options given on the command line, and those of a picture that are not given.

    Args:
        given: by Python name.
        path: of the picture; None: there is none.
        trust: open whatever the picture names.
    Raises: UsageError where the picture was drawn with files that are not at hand.
    """
    found = {} if path is None else _recorded(path, set(given) - {"loras", "embeddings"})
    if path is not None and not trust:
        for name, entry in _of_kind(Place):
            if name in found:
                found[name] = _at_hand(entry, found[name], path)
        if found.get("fast"):
            _require_fast_here(path)
    for name, value in _of_kind(Picture):
        if name in found and name not in given:
            raise UsageError(_missing(value, found[name], path))
    merged = {name: value for name, value in found.items() if name not in given} | dict(given)
    merged["loras"] = loras.replayed(given.get("loras", ()), found.get("loras"), path)
    merged["embeddings"] = embeddings.replayed(
        given.get("embeddings", ()), found.get("embeddings"), path
    )
    return merged


def _recorded(path: str, overridden: set[str]) -> dict[str, Any]:
    """The options that a picture's metadata hold, by Python name, but for those overridden."""
    from mlxdiff.pictures.metadata import read

    metadata = read(path)
    values = metadata.to_dict()
    found = {}
    for entry in _all():
        value = None if entry.key is None else values.get(entry.key)
        if value is not None and entry.name not in overridden:
            found[entry.name] = _accepted(entry, value, path)
    if metadata.version is None:  # by A1111, or a program that writes as it does
        found["prompt_syntax"] = "a1111"
    if found.get("model") == BUILTIN_NAME:
        del found["model"]
    elif "model" in found and metadata.revision is not None:
        found["model"] += f"@{metadata.revision}"
    return found


def _accepted(entry: Option, value: Any, path: str) -> Any:
    """A value of the metadata, if the option takes it: the file may come from anyone."""
    kind = entry.kind
    fault = f"{path}: {entry.key} in its metadata is {quoted(value)}"
    try:
        if isinstance(kind, (Picture, Each)):
            names = value if isinstance(value, list) else [value]
            texts = isinstance(getattr(kind, "kind", kind), Picture)
            if not names or (texts and not all(isinstance(name, str) for name in names)):
                raise UsageError(fault)
        elif isinstance(kind, Files) and not isinstance(value, list):
            raise UsageError(fault)
        return kind.accept(value)
    except Unfit as unfit:
        raise UsageError(f"{fault}; expected {unfit.expected}") from None


def _at_hand(entry: Option, names: Any, path: str) -> Any:
    """The places that a picture names, if they can be opened without trust in it.

    Raises: UsageError.
    """
    if isinstance(names, (list, tuple)):
        return [_at_hand(entry, name, path) for name in names]
    if not isinstance(names, str):
        return names
    from mlxdiff.library import without_hub

    what = entry.name.replace("_", " ")
    if _leads_away(names):
        why = "which is outside this folder"
    elif (place := without_hub(names)) is not None:
        return place
    else:
        why = "which is not on this machine"
    raise UsageError(
        f"{path}: names the {what} {quoted(names)}, {why}: give it with {entry.flag}, or let the "
        "picture choose with --trust-image"
    )


def _require_fast_here(path: str) -> None:
    """Raise UsageError if the few-step LoRA of a picture would be fetched from the hub."""
    from mlxdiff.pictures.metadata import read
    from mlxdiff.store.few_step import FEW_STEP
    from mlxdiff.store.hub import holds_lora

    loras = read(path).extra.get("loras")
    named = [one.get("fast") for one in loras or () if isinstance(one, dict)]
    for way in FEW_STEP:
        if way.id in named and not holds_lora(way.id):
            raise UsageError(
                f"{path}: was drawn with {way}, which is not on this machine: give --fast, or let "
                "the picture choose with --trust-image"
            )


def _leads_away(name: str) -> bool:
    """Return True for a path that leads out of the working folder on any system."""
    windows = PureWindowsPath(name)
    return (
        name.startswith("~")
        or PurePosixPath(name).is_absolute()
        or bool(windows.drive or windows.root)
        or ".." in windows.parts  # it separates at both kinds of slashes
    )


def _missing(entry: Option, names: Any, path: str | None) -> str:
    """Name the pictures that a run needs again."""
    what = entry.name.replace("_", " ")
    named = " and ".join([names] if isinstance(names, str) else names)
    return f"{path}: was drawn with the {what} {named}: give it with {entry.flag}"


def _all() -> Iterable[Option]:
    return (entry for table in TABLES for entry in entries(table).values())


def _of_kind(kind: type) -> Iterable[tuple[str, Option]]:
    """Options whose value, or whose values, are of a kind."""
    for entry in _all():
        if isinstance(getattr(entry.kind, "kind", entry.kind), kind):
            yield entry.name, entry
