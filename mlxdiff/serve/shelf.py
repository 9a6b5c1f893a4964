"""Names that clients may use: models, LoRAs and other files in the folders of the server.

A name is looked up in a list of what is there. It is never joined to a path, so that no name leads
out of a folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxdiff import library
from mlxdiff.errors import UsageError
from mlxdiff.store.catalogue import SHIPPED

BUILTIN_NAME = "builtin"
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""Endings of files with weights."""
FOLDER_MARKS = ("mlxdiff.json", "model_index.json", "config.json")
"""A folder with one of these files is a model."""
DEPTH = 3
"""Folders within folders that are looked into."""

KINDS = ("models", "loras", "embeddings", "vaes", "controlnets", "ip_adapters")
"""Kinds of files; each has its own folders."""


class UnknownName(UsageError):
    """A name that is not on the shelf.

    Attributes:
        kind, name: what was asked for.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        there = ", ".join(list(known)[:10]) or "none"
        what = kind.removesuffix("s").replace("_", " ")
        super().__init__(f"there is no {what} {name!r} here; there are: {there}")
        self.kind, self.name = kind, name


class Shelf:
    """The names that clients may use.

    Args:
        models: what ``mlxdiff.load`` takes, each a path, hub id or short name; the first is the
            default. None: the built-in model is.
        folders: folders by kind (``KINDS``).
        wildcards: folder of the files of wildcards; None: there are none.
    Raises: UsageError if a folder does not exist.
    """

    def __init__(
        self,
        models: Iterable[str] = (),
        folders: Mapping[str, Iterable[Path]] | None = None,
        wildcards: Path | None = None,
    ) -> None:
        self.wildcards = wildcards
        self._given = {_short(model): model for model in models}
        self._folders = {kind: [Path(f) for f in (folders or {}).get(kind, ())] for kind in KINDS}
        for kind, several in self._folders.items():
            for one in several:
                if not one.is_dir():
                    raise UsageError(f"{one}: is no folder; give a folder of {kind}")
        self.default = next(iter(self._given), BUILTIN_NAME)

    def names(self, kind: str) -> dict[str, Any]:
        """Return the names that exist now, each with its argument for the library."""
        found: dict[str, Any] = {}
        if kind == "models":
            found |= self._given
            found |= {entry.short or entry.name: entry.name for entry in library.entries()}
            found |= SHIPPED
        for folder in self._folders[kind]:
            for path in _listed(folder, DEPTH):
                name = path.relative_to(folder)
                found.setdefault((name if path.is_dir() else name.with_suffix("")).as_posix(), path)
        return found

    def find(self, kind: str, name: Any) -> Any:
        """Return the argument of the library for a name. Raises: UnknownName."""
        known = self.names(kind)
        if not isinstance(name, str):
            raise UnknownName(kind, str(name), known)
        place = known.get(name)
        if place is None:
            place = known.get(name.rpartition(".")[0]) if name.endswith(FILES) else None
        if place is None:
            raise UnknownName(kind, name, known)
        return place


def _short(model: str) -> str:
    """The name of a model that was given by its path: never the path."""
    path = Path(model).expanduser()
    return path.stem if path.is_file() else path.name if path.is_dir() else model


def _listed(folder: Path, depth: int) -> list[Path]:
    """Files with weights, and folders that are models."""
    found = []
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            is_model = any((path / mark).is_file() for mark in FOLDER_MARKS)
            found += [path] if is_model else _listed(path, depth - 1) if depth > 1 else []
        elif path.suffix in FILES:
            found.append(path)
    return found
