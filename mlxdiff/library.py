"""The library: models of the hub, converted once and kept.

    $MLXDIFF_HOME/models/org--name/<fingerprint>-float16-v1/     a converted folder
    ..............................<fingerprint>-float16_q4-v2/   one that is quantized, by recipe
    $MLXDIFF_HOME/models/org--name/index.json                    which branch or commit is which

MLXDIFF_HOME is ~/.cache/mlxdiff where nothing else is said ($XDG_CACHE_HOME/mlxdiff). An entry is
named after the contents of the files it was made of, so that a branch that moves without a change
to them makes no new one. Folders and files of the user's own are opened where they are.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxdiff.convert import convert, open_source
from mlxdiff.convert.report import human_bytes
from mlxdiff.convert.sources import check_published
from mlxdiff.errors import CheckpointError, ConfigError, HubError, UsageError
from mlxdiff.machine.disk import exclusive, require_space
from mlxdiff.store import catalogue, hub
from mlxdiff.store.cache import CHECK_SECONDS, cache_folder, is_offline, missing_bytes
from mlxdiff.store.folder import (
    FORMAT_VERSION,
    MANIFEST,
    QUANTIZED_VERSION,
    ConvertedFolder,
    ModelSource,
    Progress,
    open_folder,
)
from mlxdiff.store.recipes import find_recipe, quantized_model
from mlxdiff.store.reference import Reference, parse
from mlxdiff.store.selection import Listing

logger = logging.getLogger("mlxdiff")

_ENTRY = re.compile(r"[0-9a-f]{16}-\w+-v\d+")


def folder() -> Path:
    """Where the converted models are kept."""
    home = os.environ.get("MLXDIFF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mlxdiff"
    )
    return Path(os.path.expandvars(home)).expanduser().absolute() / "models"


def open_model(
    model: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
    quantize: int | str | None = None,
    **single_file: Any,
) -> ModelSource:
    """Open a model, whatever it is given as; one of the hub is fetched and converted at first use.

    Args:
        model: folder, file, hub id or short name.
        dtype: what it is to compute in. For "float32" a hub model is taken and kept in float32,
            else in float16.
        quantize: bits, or a float mode; None: not. A hub model is kept quantized.
        revision, variant, progress, single_file: as ``convert.open_source`` takes them. A file of
            the hub that is opened with options for single files is not kept.
    Returns: the model.
    Raises: CheckpointError, ConfigError, HubError, UsageError.
    """
    recipe = None if quantize is None else find_recipe(quantize)
    reference = None
    if isinstance(model, str) and not Path(model).exists():
        model = str(catalogue.expand(model))
        reference = parse(model, revision)
    if reference is None or any(single_file.values()):
        opened = open_source(model, revision, variant, progress, **single_file)
        if recipe is None:
            return opened
        return quantized_model(opened, recipe, "bfloat16" if dtype == "bfloat16" else "float16")
    if variant is None and dtype == "float32" and recipe is None:
        variant = ""
    form = _Form("float32" if dtype == "float32" and recipe is None else "float16", quantize)
    return _Shelf(reference.name).open(reference, variant, form, progress)


@dataclass(frozen=True)
class _Form:
    """What a model is kept as.

    Attributes:
        dtype: of its weights.
        quantize: as ``find_recipe`` takes it; None: not quantized.
    """

    dtype: str
    quantize: int | str | None = None

    def __str__(self) -> str:
        """As the names of entries have it: "float16", "float16_affine_4_64"."""
        if self.quantize is None:
            return self.dtype
        return f"{self.dtype}_{find_recipe(self.quantize).name.replace('-', '_')}"

    @property
    def version(self) -> int:
        return FORMAT_VERSION if self.quantize is None else QUANTIZED_VERSION


@dataclass(frozen=True)
class _Seen:
    """What a revision was when it was last looked up.

    Attributes:
        commit: where it stood.
        fingerprint: of the files that are needed.
        checked: when that was, in seconds since 1970.
    """

    commit: str
    fingerprint: str
    checked: float

    @property
    def is_recent(self) -> bool:
        return 0 <= time.time() - self.checked < CHECK_SECONDS


class _Shelf:
    """The entries of one repo."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = folder() / name.replace("/", "--")
        self._index = self.path / "index.json"

    def open(
        self, reference: Reference, variant: str | None, form: _Form, progress: Progress | None
    ) -> ConvertedFolder:
        seen = self._seen(reference, variant)
        if seen and (reference.is_pinned or seen.is_recent or is_offline()):
            if (model := self._entry(seen.fingerprint, form)) is not None:
                return model
        try:
            listing = hub.find(reference, variant)
        except HubError as error:
            if seen and (model := self._entry(seen.fingerprint, form)) is not None:
                why = str(error).removeprefix(f"{self.name}: ")
                logger.warning(
                    "%s: the copy in the library is used, there may be a newer one: %s",
                    reference,
                    why,
                )
                return model
            raise
        if MANIFEST in listing.files:  # converted by its publisher
            published = open_folder(hub.fetch(listing, progress))
            if form.quantize is None or published.recipe == find_recipe(form.quantize).name:
                return published
        same = seen is not None and seen.commit == listing.commit
        fingerprint = seen.fingerprint if seen and same else listing.fingerprint
        if seen and fingerprint != seen.fingerprint:
            logger.warning(
                "%s has changed on the hub; the old one is %s@%s",
                reference,
                self.name,
                seen.commit,
            )
        model = self._entry(fingerprint, form)
        if model is None:
            model = self._make(listing, variant, fingerprint, form, progress)
        if listing.is_current:
            self._remember(reference, variant, _Seen(listing.commit, fingerprint, time.time()))
        return model

    def _entry(self, fingerprint: str, form: _Form, tell: bool = False) -> ConvertedFolder | None:
        """The converted folder; None where there is none, or none that is whole (if told: why)."""
        path = self._entry_path(fingerprint, form)
        if not path.exists():
            return None
        try:
            return open_folder(path)
        except (CheckpointError, ConfigError) as error:
            if tell:
                logger.warning("%s: its converted copy is made again: %s", self.name, error)
            return None

    def _entry_path(self, fingerprint: str, form: _Form) -> Path:
        return self.path / f"{fingerprint}-{form}-v{form.version}"

    def _make(
        self,
        listing: Listing,
        variant: str | None,
        fingerprint: str,
        form: _Form,
        progress: Progress | None,
    ) -> ConvertedFolder:
        dest = self._entry_path(fingerprint, form)
        with self._locked() as alone:
            # Another process may have made it while this one waited.
            if (model := self._entry(fingerprint, form, tell=True)) is not None:
                return model
            if alone:
                self._clean()
            shutil.rmtree(dest, ignore_errors=True)
            require_space(
                {
                    cache_folder(): missing_bytes(listing),
                    self.path: _converted_bytes(listing, form.dtype),
                },
                f"{listing.reference}: download and conversion",
                "make room, or set MLXDIFF_HOME or HF_HOME to a folder on another disk",
            )
            check_published(listing)
            logger.warning(
                "%s: %s to fetch, then it is converted, once, into %s",
                listing.reference,
                human_bytes(missing_bytes(listing)),
                dest,
            )
            hub.fetch(listing, progress)
            file = listing.entry if listing.entry in listing.files else ""
            source = Reference(self.name, listing.commit, file)
            try:
                convert(
                    str(source),
                    dest,
                    dtype=form.dtype,
                    quantize=form.quantize,
                    variant=variant,
                    progress=progress,
                )
            except UsageError:
                # Without locks two processes may have worked at once: the first one's stays.
                if (model := self._entry(fingerprint, form)) is not None:
                    return model
                raise
            return open_folder(dest)

    def _clean(self) -> None:
        """Remove what conversions left behind that were killed."""
        for left in (*self.path.glob(".*.partial"), *self.path.glob(".*.old")):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def _locked(self, what: str = "entries") -> Iterator[bool]:
        """Hold the shelf's entries, or its index, alone. Yields: whether they are held."""

        def waiting(pid: str) -> None:
            logger.warning("%s: another process (%s) prepares it; waiting", self.name, pid)

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be written ({error.strerror}); set MLXDIFF_HOME to a folder "
                "for converted models"
            ) from None
        with exclusive(folder() / ".locks" / f"{self.path.name}.{what}", waiting) as alone:
            yield alone

    # The index

    def _read(self) -> dict[str, Any]:
        """Question -> commit, fingerprint, checked. One that cannot be read is made anew."""
        try:
            seen = json.loads(self._index.read_text(encoding="utf-8"))["seen"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return seen if isinstance(seen, dict) else {}

    def _seen(self, reference: Reference, variant: str | None) -> _Seen | None:
        index = self._read()
        entry: Any = index.get(_question(reference, variant))
        if entry is None and reference.is_pinned:  # a branch may have stood there
            tail = _question(reference, variant).partition("|")[2]
            entry = next(
                (
                    value
                    for key, value in index.items()
                    if key.partition("|")[2] == tail
                    and isinstance(value, dict)
                    and value.get("commit") == reference.revision
                ),
                None,
            )
        try:
            return _Seen(str(entry["commit"]), str(entry["fingerprint"]), float(entry["checked"]))
        except (TypeError, KeyError, ValueError):
            return None

    def _remember(self, reference: Reference, variant: str | None, seen: _Seen) -> None:
        try:
            with self._locked("index"):
                index = self._read() | {_question(reference, variant): vars(seen)}
                new = self._index.with_name(f".index.{uuid.uuid4().hex[:8]}")
                new.write_text(json.dumps({"seen": index}, indent=1), encoding="utf-8")
                new.replace(self._index)
        except (OSError, UsageError):
            pass  # a library that cannot be written: it is looked up again next time


def _question(reference: Reference, variant: str | None) -> str:
    """What was asked for, as the index has it."""
    asked = "auto" if variant is None else variant or "plain"
    return f"{reference.revision}|{reference.file}|{asked}"


def _converted_bytes(listing: Listing, dtype: str) -> int:
    """About what a converted copy takes: float32 files in float16 are half as large.

    Whether a file without a variant holds float32 is not known before it is fetched: the smaller
    size is taken, so that nothing is refused that fits. (The conversion itself knows, and checks.)
    """
    weights = {n: f.size for n, f in listing.files.items() if not n.endswith((".json", ".txt"))}
    if dtype == "float32":
        return sum(weights.values())
    return sum(size if ".fp16." in name else size // 2 for name, size in weights.items())


# What there is


@dataclass(frozen=True)
class Entry:
    """A converted model of the library.

    Attributes:
        name: the hub id it was made of.
        short: its short name, if it has one.
        family, dtype: as its manifest says; "damaged" where that cannot be read.
        revision: the commit.
        path: its folder.
        size: bytes on the disk.
        date: when it was made, in seconds since 1970.
    """

    name: str
    short: str | None
    family: str
    dtype: str
    revision: str
    path: Path
    size: int
    date: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"path": str(self.path)}


def entries() -> list[Entry]:
    """All converted models, by name and age."""
    found = [_read_entry(path) for path in folder().glob("*--*/*") if _ENTRY.fullmatch(path.name)]
    return sorted(found, key=lambda entry: (entry.name.lower(), entry.date))


def _read_entry(path: Path) -> Entry:
    name = path.parent.name.replace("--", "/", 1)
    family = dtype = "damaged"
    revision = ""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        source = manifest["source"]
        name, revision = str(source["source"]), str(source.get("revision", ""))
        family, dtype = str(manifest["family"]), str(manifest["dtype"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    return Entry(
        name=name,
        short=next((k.name for k in catalogue.KNOWN if k.repo == name), None),
        family=family,
        dtype=dtype,
        revision=revision,
        path=path,
        size=sum(file.st_size for file in files),
        date=path.stat().st_mtime,
    )


def local_path(model: str) -> Path | None:
    """The newest converted copy of a model that is called by hub id or short name, if there is one.

    A folder or file of that name comes first: None.
    """
    if Path(model).exists():
        return None
    found = _called(model, entries())
    return max(found, key=lambda entry: entry.date).path if found else None


def _called(name: str, there: list[Entry]) -> list[Entry]:
    wanted, _, revision = str(catalogue.expand(name)).partition("@")
    return [e for e in there if e.name == wanted and e.revision.startswith(revision)]


def remove(*names: str) -> list[Entry]:
    """Remove converted models.

    Args:
        names: hub ids or short names, with ``@`` and the first digits of the commit for one of
            several.
    Returns: what was removed.
    Raises: UsageError where one is not there; then nothing is removed.
    """
    there = entries()
    chosen: dict[Path, Entry] = {}
    for name in names:
        found = _called(name, there)
        if not found:
            have = ", ".join(dict.fromkeys(e.short or e.name for e in there)) or "none"
            raise UsageError(f"{name} is not in the library {folder()}; there are: {have}")
        chosen |= {entry.path: entry for entry in found}
    for path in chosen:
        with _Shelf(path.parent.name.replace("--", "/", 1))._locked():
            gone = path.with_name(f".{path.name}.old")
            path.rename(gone)
            shutil.rmtree(gone)
        if not any(_ENTRY.fullmatch(other.name) for other in path.parent.iterdir()):
            shutil.rmtree(path.parent)
    return list(chosen.values())
