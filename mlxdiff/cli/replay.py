"""``--from-image``: the options that a picture was drawn with.

A picture can come from a stranger. What it names is opened if it is in the working folder, or is a
model of the hub that is on this machine already. Only ``--trust-image`` lets a picture choose other
files, or fetch from the hub.

A picture of another program gives what mlxdiff can honour; one note names the rest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from mlxdiff.cli import embeddings, loras
from mlxdiff.errors import UsageError, printable, quoted, shortened
from mlxdiff.run.options import GenerateOptions, LoadOptions
from mlxdiff.run.table import Option, entries
from mlxdiff.run.values import Each, Files, Picture, Place, Unfit
from mlxdiff.store.catalogue import SHIPPED

if TYPE_CHECKING:
    from mlxdiff.pictures.metadata import Metadata

logger = logging.getLogger("mlxdiff")

BUILTIN_NAME = "builtin"  # what pictures of the built-in model say that they are made with
TABLES: tuple[type, ...] = (LoadOptions, GenerateOptions)
_MOST_NAMED, _LONGEST_NAMED = 40, 120  # in a note
_SUFFIXES = (".safetensors", ".ckpt")  # A1111 names a checkpoint without its ending
_ESSENTIAL = ("sampler", "schedule", "model")  # without these it would be another picture


def replayed(given: Mapping[str, Any], path: str | None, trust: bool = False) -> dict[str, Any]:
    """The options given on the command line, and those of a picture that are not given.

    Args:
        given: by Python name.
        path: of the picture; None: there is none.
        trust: open whatever the picture names.
    Raises: UsageError where the picture was drawn with files that are not at hand.
    """
    if path is None:
        found: dict[str, Any] = {}
    else:
        if given.get("aspect") is not None:  # it says the size
            given = {"width": None, "height": None} | dict(given)
        metadata = _read(path)
        overridden = set(given) - {"loras", "embeddings"}
        found = _recorded(metadata, path, overridden, trust)
        if found.get("fast") and not trust:
            _require_fast_here(metadata, path)
    for name, value in _of_kind(Picture):
        if name in found and name not in given:
            raise UsageError(_missing(value, found[name], path))
    merged = {name: value for name, value in found.items() if name not in given} | dict(given)
    merged["loras"] = loras.replayed(given.get("loras", ()), found.get("loras"), path)
    merged["embeddings"] = embeddings.replayed(
        given.get("embeddings", ()), found.get("embeddings"), path
    )
    return {name: value for name, value in merged.items() if value is not None}


def clip_skip_for_sdxl(options: Mapping[str, Any], path: str | None, given: bool) -> dict[str, Any]:
    """The options of a run for an SDXL model, whose text encoders others count in another way.

    SDXL always leaves out the last layer of its text encoders. Other programs count it, and write
    2 where diffusers writes nothing.

    Args:
        path: of the picture; None: there is none.
        given: whether the command line gives the clip skip.
    """
    skipped = options.get("clip_skip")
    if path is None or given or not skipped or not _is_foreign(_read(path)):
        return dict(options)
    return dict(options) | {"clip_skip": skipped - 1 or None}


def _is_foreign(metadata: Metadata) -> bool:
    """Return True for a picture of another program."""
    return "tool" in metadata.extra


def _read(path: str) -> Metadata:
    from mlxdiff.pictures.metadata import read

    return read(path)


def _recorded(metadata: Metadata, path: str, overridden: set[str], trust: bool) -> dict[str, Any]:
    """The options that a picture's metadata hold, by Python name, but for those overridden."""
    values = metadata.to_dict()
    is_foreign = _is_foreign(metadata)
    found: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    if (place := values.get("unread_prompt")) is not None and "prompt" not in overridden:
        raise UsageError(
            f"{path}: does not say its prompt {quoted(place)}: give one as an argument"
        )
    for entry in _all():
        value = None if entry.key is None else values.get(entry.key)
        if value is None or entry.name in overridden:
            continue
        try:
            accepted = _accepted(entry, value, path)
            if isinstance(getattr(entry.kind, "kind", entry.kind), Place) and not trust:
                if is_foreign:
                    accepted = _with_suffix(accepted)
                if entry.name != "model" or accepted not in SHIPPED:
                    accepted = _at_hand(entry, accepted, path)
            found[entry.name] = accepted
        except UsageError:
            if not is_foreign or entry.name in _ESSENTIAL:
                raise
            rest[entry.name.replace("_", " ")] = value
    if is_foreign:
        found.setdefault("prompt_syntax", "a1111")
        said = values.get("parameters")
        _note_rest(path, values.get("tool"), (said if isinstance(said, dict) else {}) | rest)
    elif values.get("without_syntax"):
        logger.warning(
            "%s: its text does not say in which syntax its prompt is; it is taken as %s",
            path,
            "given" if "prompt_syntax" in overridden else "plain (--prompt-syntax)",
        )
    if found.get("model") == BUILTIN_NAME:
        del found["model"]
    elif "model" in found and metadata.revision is not None:
        found["model"] += f"@{metadata.revision}"
    return found


def _note_rest(path: str, tool: Any, rest: Mapping[str, Any]) -> None:
    """Name in one note what of a picture is not honoured."""
    if not rest:
        return
    named = [shortened(f"{name} {value}", _LONGEST_NAMED) for name, value in rest.items()]
    more = f"; and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    said = f"{'; '.join(named[:_MOST_NAMED])}{more}"
    logger.warning("%s", printable(f"{path}: drawn by {tool}; not taken over: {said}"))


def _with_suffix(name: Any) -> Any:
    """The name of a checkpoint with its ending, where a file of that name is here."""
    if isinstance(name, str) and not _leads_away(name) and not os.path.exists(name):
        return next((name + end for end in _SUFFIXES if os.path.isfile(name + end)), name)
    return name


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
        elif isinstance(kind, Files):  # descriptions of files: their own readers check them
            if not isinstance(value, list):
                raise UsageError(fault)
            return value
        return kind.accept(value)
    except Unfit as unfit:
        raise UsageError(f"{fault}; expected {unfit.expected}") from None


def _at_hand(entry: Option, names: Any, path: str) -> Any:
    """The places that a picture names, if they can be opened without trust in it.

    Raises: UsageError.
    """
    if isinstance(names, (list, tuple)):
        return [_at_hand(entry, name, path) for name in names]
    if not isinstance(names, str) or names in getattr(entry.kind, "names", ()):
        return names
    from mlxdiff.library import without_hub

    what = entry.name.replace("_", " ")
    if _leads_away(names):
        why = "which is outside this folder"
    elif (place := without_hub(names)) is not None and (place != names or os.path.exists(place)):
        return place
    else:
        why = "which is not on this machine"
    raise UsageError(
        f"{path}: names the {what} {quoted(names)}, {why}: give it with {entry.flag}, or let the "
        "picture choose with --trust-image"
    )


def _require_fast_here(metadata: Metadata, path: str) -> None:
    """Raise UsageError if the few-step LoRA of a picture would be fetched from the hub."""
    from mlxdiff.store.few_step import FEW_STEP
    from mlxdiff.store.hub import holds_lora

    loras = metadata.extra.get("loras")
    named = [one.get("fast") for one in loras or () if isinstance(one, dict)]
    for way in FEW_STEP:
        if way.id in named and not (way.is_shipped or holds_lora(way.id)):
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
