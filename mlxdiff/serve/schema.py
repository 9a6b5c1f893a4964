"""JSON schema of the option tables: what a request may hold, and what a model honours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdiff._version import __version__
from mlxdiff.convert import open_source
from mlxdiff.errors import UsageError
from mlxdiff.loading import make_backend
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.kind import PARTS, Kind
from mlxdiff.run.options import LoadOptions, RunOptions
from mlxdiff.run.table import Option, entries
from mlxdiff.run.values import (
    Anything,
    Bits,
    Choice,
    Each,
    Files,
    Flag,
    NameOrPlace,
    Number,
    Numbers,
    Picture,
    Place,
    Ratio,
    SeedAndShare,
    Text,
    Whole,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NOT_SENT = frozenset({"noise"})
"""Options of a run that only Python takes."""


def options() -> Mapping[str, Option]:
    """Options of a run that a request may hold."""
    return {name: one for name, one in entries(RunOptions).items() if name not in NOT_SENT}


def is_picture(kind: Anything) -> bool:
    """Return True if the value is a picture, or several."""
    return isinstance(kind.kind if isinstance(kind, Each) else kind, Picture)


def schema_of(kind: Anything) -> dict[str, Any]:
    """JSON schema of a kind of values."""
    if isinstance(kind, Each):
        one = schema_of(kind.kind)
        return {"anyOf": [one, {"type": "array", "items": one}]}
    if isinstance(kind, Picture):
        return {
            "type": "string",
            "contentEncoding": "base64",
            "description": "a picture file in base64, or a data: URL of it",
        }
    if isinstance(kind, Flag):
        return {"type": "boolean"}
    if isinstance(kind, Whole):
        return {"type": "integer"} | _bounds(kind.least, kind.most)
    if isinstance(kind, Number):
        above = {} if kind.above is None else {"exclusiveMinimum": kind.above}
        return {"type": "number"} | _bounds(kind.least, kind.most) | above
    if isinstance(kind, Numbers):
        count = len(kind.names)
        return {
            "type": "array",
            "items": schema_of(kind.each),
            "minItems": count,
            "maxItems": count,
            "description": kind.form,
        }
    if isinstance(kind, (Ratio, SeedAndShare)):
        return {"type": ["string", "array"], "description": kind.metavar}
    if isinstance(kind, Choice):
        return {"enum": list(kind.words)}
    if isinstance(kind, Bits):
        return {"enum": [int(word) if word.isdigit() else word for word in kind.words]}
    if isinstance(kind, Files):
        return {"type": "array", "description": kind.form}
    if isinstance(kind, NameOrPlace):
        return {"enum": list(kind.names)}
    if isinstance(kind, (Text, Place)):
        return {"type": "string"}
    return {}


def _bounds(least: float | None, most: float | None) -> dict[str, Any]:
    found = {"minimum": least, "maximum": most}
    return {name: value for name, value in found.items() if value is not None}


def option_schema(entry: Option) -> dict[str, Any]:
    """JSON schema of an option, with its meaning and its default."""
    found = schema_of(entry.kind)
    form = found.pop("description", None)
    said = f"{entry.doc} ({form})" if form else entry.doc
    default = {} if entry.default is None else {"default": entry.default}
    return found | {"description": said, "title": entry.name} | default


def _named(what: str) -> dict[str, Any]:
    return {"type": "string", "description": f"{what}, by a name that /api/models lists"}


def _scaled(what: str, value: str, form: Mapping[str, Any]) -> dict[str, Any]:
    one = {
        "type": "object",
        "properties": {"name": _named(what), value: form},
        "required": ["name"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": {"anyOf": [{"type": "string"}, one]}}


def request_schema() -> dict[str, Any]:
    """JSON schema of a request for pictures: options of a run, and names of files."""
    names = {
        "model": _named("the model; default: that of the server"),
        "loras": _scaled("a LoRA", "scale", {"type": "number", "default": 1}),
        "embeddings": _scaled("a textual inversion", "word", {"type": "string"}),
        "vae": _named("another VAE"),
        "controlnets": {"type": "array", "items": _named("a ControlNet")},
        "ip_adapters": {"type": "array", "items": _named("an IP-Adapter")},
        "refiner": _named("SDXL: a model that draws the last part"),
        "vary_option": {
            "type": "object",
            "additionalProperties": {"type": "array"},
            "maxProperties": 2,
            "description": "options that take several values: all combinations are drawn",
        },
        "wildcards": {
            "type": "boolean",
            "default": False,
            "description": "fill in {a|b} and __name__ in prompts; the seed decides",
        },
        "save": {
            "type": "boolean",
            "default": True,
            "description": "keep the pictures in the gallery",
        },
    }
    run = {name: option_schema(entry) for name, entry in options().items()}
    return {
        "$schema": DIALECT,
        "title": "Request",
        "type": "object",
        "properties": names | run,
        "additionalProperties": False,
    }


# What programs ask first


def local_place(place: Any) -> Any:
    """The folder or file of a model that is on this machine. Raises: UsageError."""
    from mlxdiff import library

    if place is None or isinstance(place, Path):
        return place
    found = library.local_path(place) or Path(place)
    if not found.exists():
        raise UsageError(f"{place} is not on this machine yet; draw a picture with it first")
    return found


def lacks(place: Any, part: str) -> str | None:
    """Say why a model lacks a part (``Kind.lacks``). No network is loaded, nothing is fetched.

    Args:
        place: of the model, by the shelf.
        part: one of ``PARTS``.
    Raises: UsageError if it is not on this machine; CheckpointError, ConfigError.
    """
    return Pipeline(open_source(local_place(place)), make_backend()).model.lacks(part)


def capabilities(model: Any = None, name: str = "builtin") -> dict[str, Any]:
    """Every option, and whether a model honours it. No network is loaded, nothing is fetched.

    Args:
        model: path of a model; None: only the options.
        name: what to call it.
    Returns: JSON values.
    Raises: CheckpointError, ConfigError, UsageError.
    """
    kind = None if model is None else Pipeline(open_source(model), make_backend()).model
    lacks = {} if kind is None else {part: kind.lacks(part) for part in PARTS}
    listed = []
    for table in (RunOptions, LoadOptions):
        for entry in entries(table).values():
            if entry.flags or entry.name in options():
                listed.append(_described(entry, table.taken_by, lacks if kind else None))
    return {
        "schema": "mlxdiff.capabilities/1",
        "version": __version__,
        "model": None if kind is None else {"name": name} | _facts(kind, lacks),
        "options": listed,
    }


def _facts(kind: Kind, lacks: Mapping[str, str | None]) -> dict[str, Any]:
    try:
        height, width = kind.default_size
    except UsageError:
        height = width = None  # type: ignore[assignment]
    return {
        "family": kind.source.family,
        "width": width,
        "height": height,
        "multiple_of": getattr(kind.vae_config, "factor", 1),
        "steps": kind.default_steps(kind.default_sampler),
        "guidance": kind.default_guidance,
        "strength": kind.default_strength,
        "parts": {part: reason is None for part, reason in lacks.items()},
    }


def _described(
    entry: Option, taken_by: str, lacks: Mapping[str, str | None] | None
) -> dict[str, Any]:
    said: dict[str, Any] = {
        "name": entry.name,
        "flags": list(entry.flags),
        "section": entry.section,
        "taken_by": taken_by,
        "schema": option_schema(entry),
        "help": entry.help or entry.doc,
        "part": entry.part or None,
        "also_called": list(entry.elsewhere),
    }
    if lacks is not None:
        reason = lacks.get(entry.part) if entry.part else None
        said |= {"honoured": reason is None, "reason": reason}
    return said
