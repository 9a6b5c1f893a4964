"""``--from-image``: the options that a picture was drawn with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlxdiff.cli import embeddings, loras
from mlxdiff.errors import UsageError
from mlxdiff.run.options import GenerateOptions, LoadOptions
from mlxdiff.run.table import Option, entries
from mlxdiff.run.values import Each, Files, Picture, Unfit

BUILTIN_NAME = "builtin"  # what pictures of the built-in model say that they are made with
TABLES: tuple[type, ...] = (LoadOptions, GenerateOptions)


def replayed(given: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """The options given on the command line, and those of a picture that are not given.

    Args:
        given: by Python name.
        path: of the picture; None: there is none.
    Raises: UsageError where the picture was drawn with files that are not at hand.
    """
    found = {} if path is None else _recorded(path, set(given) - {"loras", "embeddings"})
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
        value = values.get(entry.key or "")
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
    fault = f"{path}: {entry.key} in its metadata is {value!r}"
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


def _missing(entry: Option, names: Any, path: str | None) -> str:
    """Which pictures a run needs again."""
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
