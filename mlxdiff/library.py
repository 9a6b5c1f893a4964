"""The library: models from the hub, converted once and kept.

    $MLXDIFF_HOME/models/org--name/<fingerprint>-float16-v1/     a converted folder
    ..............................<fingerprint>-float16_q4-v2/   a quantized one, with its recipe
    $MLXDIFF_HOME/models/org--name/index.json                    commit of each branch

The default of MLXDIFF_HOME is $XDG_CACHE_HOME/mlxdiff or ~/.cache/mlxdiff. The name of an entry is
a fingerprint of its source files. So a branch that moves without a change to these files makes no
new entry. The user's own folders and files are opened in place.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxdiff.convert import convert, open_source
from mlxdiff.convert.report import human_bytes
from mlxdiff.convert.sources import check_published
from mlxdiff.errors import CheckpointError, ConfigError, HubError, UsageError
from mlxdiff.machine.disk import exclusive, read_document, require_space
from mlxdiff.store import catalogue, hub
from mlxdiff.store.cache import (
    CHECK_SECONDS,
    cache_folder,
    cached_commit,
    find_cached,
    is_offline,
    missing_bytes,
)
from mlxdiff.store.folder import (
    FORMAT_VERSION,
    MANIFEST,
    QUANTIZED_VERSION,
    ConvertedFolder,
    ModelSource,
    Progress,
    open_folder,
)
from mlxdiff.store.recipes import find_recipe, quantized_model, unpacked_model
from mlxdiff.store.reference import Reference, is_commit, parse
from mlxdiff.store.selection import (
    COMPONENTS,
    Incomplete,
    Listing,
    Select,
    component_selector,
    model_selector,
)

logger = logging.getLogger("mlxdiff")

_ENTRY = re.compile(r"[0-9a-f]{16}-\w+-v\d+")


def folder() -> Path:
    """Return the folder of the converted models."""
    home = os.environ.get("MLXDIFF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mlxdiff"
    )
    return Path(os.path.expanduser(os.path.expandvars(home))).absolute() / "models"


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
    """Open a model of any form. Fetch and convert a hub model on first use.

    Args:
        model: folder, file, hub id or short name.
        dtype: type of the computation. A hub model is kept in float32 for "float32", else in
            float16.
        quantize: bits or a float mode, or None for no quantization. A hub model is kept quantized.
        revision, variant, progress, single_file: see ``convert.open_source``. A hub file that is
            opened with options for single files is not kept.
    Returns: the model.
    Raises: CheckpointError, ConfigError, HubError, UsageError.
    """
    recipe = None if quantize is None else find_recipe(quantize)
    reference = None
    if isinstance(model, str) and not os.path.exists(model):
        model = str(catalogue.expand(model))
        reference = parse(model, revision)
    if reference is None or any(value is not None for value in single_file.values()):
        opened = open_source(model, revision, variant, progress, **single_file)
        if recipe is None:
            return unpacked_model(opened, dtype or "float16")
        return quantized_model(opened, recipe, "bfloat16" if dtype == "bfloat16" else "float16")
    if variant is None and dtype == "float32" and recipe is None:
        variant = ""
    form = _Form("float32" if dtype == "float32" and recipe is None else "float16", quantize)
    return _Shelf(reference.name).open(reference, variant, form, progress)


@dataclass(frozen=True)
class _Form:
    """The form in which a model is kept.

    Attributes:
        dtype: type of its weights.
        quantize: see ``find_recipe``; None if not quantized.
    """

    dtype: str
    quantize: int | str | None = None

    def __str__(self) -> str:
        """Return the form's part in the name of an entry: "float16", "float16_affine_4_64"."""
        if self.quantize is None:
            return self.dtype
        return f"{self.dtype}_{find_recipe(self.quantize).name.replace('-', '_')}"

    @property
    def version(self) -> int:
        return FORMAT_VERSION if self.quantize is None else QUANTIZED_VERSION


@dataclass(frozen=True)
class _LookUp:
    """The result of the last look-up of a revision.

    Attributes:
        commit: commit of the revision.
        fingerprint: fingerprint of the needed files.
        checked: time of the look-up, in seconds since 1970.
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
        seen = self._last_look_up(reference, variant)
        if seen and (reference.is_pinned or seen.is_recent or is_offline()):
            if (model := self._entry(seen.fingerprint, form)) is not None:
                return model
        try:
            listing = hub.find(reference, variant)
        except HubError as error:
            if seen and (model := self._entry(seen.fingerprint, form)) is not None:
                why = str(error).removeprefix(f"{self.name}: ")
                logger.warning(
                    "%s: using the copy in the library; a newer one may exist: %s",
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
                "%s has changed on the hub; the old version is %s@%s",
                reference,
                self.name,
                seen.commit,
            )
        model = self._entry(fingerprint, form)
        if model is None:
            model = self._make(listing, variant, fingerprint, form, progress)
        if listing.is_current:
            self._remember(reference, variant, _LookUp(listing.commit, fingerprint, time.time()))
        return model

    def _entry(self, fingerprint: str, form: _Form, warn: bool = False) -> ConvertedFolder | None:
        """Open an entry. Return None if it is absent or damaged; ``warn`` reports the damage."""
        path = self._entry_path(fingerprint, form)
        if not path.exists():
            return None
        try:
            return open_folder(path)
        except (CheckpointError, ConfigError) as error:
            if warn:
                logger.warning("%s: converting it again: %s", self.name, error)
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
            # Another process may have made the entry while this one waited.
            if (model := self._entry(fingerprint, form, warn=True)) is not None:
                return model
            if alone:
                self._remove_leftovers()
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
                "%s: fetching %s, then converting it once into %s",
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
                # Without locks two processes can convert at the same time. The first result stays.
                if (model := self._entry(fingerprint, form)) is not None:
                    return model
                raise
            return open_folder(dest)

    def _remove_leftovers(self) -> None:
        """Remove the temporary folders of conversions that were killed."""
        for leftover in (*self.path.glob(".*.partial"), *self.path.glob(".*.old")):
            shutil.rmtree(leftover, ignore_errors=True)

    @contextmanager
    def _locked(self, what: str = "entries") -> Iterator[bool]:
        """Lock the entries or the index of this repo. Yields: True if the lock is held."""

        def waiting(pid: str) -> None:
            logger.warning("%s: another process (%s) is preparing it; waiting", self.name, pid)

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be written ({error.strerror}); set MLXDIFF_HOME to a "
                "writable folder for converted models"
            ) from None
        with exclusive(folder() / ".locks" / f"{self.path.name}.{what}", waiting) as alone:
            yield alone

    # The index

    def _read(self) -> dict[str, Any]:
        """Read the index: request -> commit, fingerprint, checked; {} if it is damaged."""
        try:
            seen = json.loads(read_document(self._index))["seen"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return seen if isinstance(seen, dict) else {}

    def _last_look_up(self, reference: Reference, variant: str | None) -> _LookUp | None:
        index = self._read()
        entry: Any = index.get(_question(reference, variant))
        if entry is None and reference.is_pinned:  # a branch may have pointed to this commit
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
            return _LookUp(str(entry["commit"]), str(entry["fingerprint"]), float(entry["checked"]))
        except (TypeError, KeyError, ValueError):
            return None

    def _remember(self, reference: Reference, variant: str | None, seen: _LookUp) -> None:
        try:
            with self._locked("index"):
                for leftover in self.path.glob(".index.*"):  # of a process that was killed
                    leftover.unlink()
                index = self._read() | {_question(reference, variant): vars(seen)}
                new = self._index.with_name(f".index.{uuid.uuid4().hex[:8]}")
                new.write_text(json.dumps({"seen": index}, indent=1), encoding="utf-8")
                new.replace(self._index)
        except (OSError, UsageError):
            pass  # The library is read-only: the next run looks the branch up again.


def _question(reference: Reference, variant: str | None) -> str:
    """Return the key of a request in the index."""
    wanted = "auto" if variant is None else variant or "plain"
    return f"{reference.revision}|{reference.file}|{wanted}"


def _converted_bytes(listing: Listing, dtype: str) -> int:
    """Estimate the size of a converted copy: float32 files shrink to half in float16.

    Before a download it is unknown if a file without a variant holds float32. The estimate assumes
    the smaller size, so nothing that fits is refused. (The conversion itself knows the size, and
    checks it.)
    """
    weights = {n: f.size for n, f in listing.files.items() if not n.endswith((".json", ".txt"))}
    if dtype == "float32":
        return sum(weights.values())
    return sum(size if ".fp16." in name else size // 2 for name, size in weights.items())


# List and remove entries


@dataclass(frozen=True)
class Entry:
    """A converted model in the library.

    Attributes:
        name: hub id of the source.
        short: short name, or None if it has none.
        family, dtype: from its manifest; "damaged" if that is not readable.
        revision: the commit.
        path: its folder.
        size: bytes on the disk.
        date: time of the conversion, in seconds since 1970.
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
        """Return plain JSON values."""
        return vars(self) | {"path": str(self.path)}


def entries() -> list[Entry]:
    """Return all converted models, by name and age."""
    found = [_read_entry(path) for path in folder().glob("*--*/*") if _ENTRY.fullmatch(path.name)]
    return sorted(found, key=lambda entry: (entry.name.lower(), entry.date))


def _read_entry(path: Path) -> Entry:
    name = path.parent.name.replace("--", "/", 1)
    family = dtype = "damaged"
    revision = ""
    try:
        manifest = json.loads(read_document(path / MANIFEST))
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
    """Return the newest converted copy of a hub id or short name, or None if there is none.

    The copy of a model in the package is its folder there. A local file or folder of that name
    takes precedence: the result is then None.
    """
    if os.path.exists(model):
        return None
    if model in catalogue.SHIPPED:
        return catalogue.SHIPPED[model]
    found = _matching(model, entries())
    return max(found, key=lambda entry: entry.date).path if found else None


def without_hub(model: str) -> str | None:
    """Return the name of a model or part with its commit, so that opening it asks no hub.

    A name that is no hub id is returned as it is: it is a local file or folder, or an error.

    Returns: None if this machine does not hold it whole.
    """
    if os.path.exists(model):
        return model
    reference = parse(str(catalogue.expand(model)))
    if reference is None:
        return model
    known = [entry.revision for entry in _matching(model, entries()) if is_commit(entry.revision)]
    commit = known[0] if known else cached_commit(reference)
    if commit is None:
        return None
    pinned = replace(reference, revision=commit)
    parts = ("vae", "controlnet", "unet", "image_encoder", "text_encoder")
    if not known and not any(
        _is_cached(pinned, select)
        for select in (
            model_selector(pinned, None),
            *(component_selector(part, None) for part in parts),
        )
    ):
        return None
    return str(pinned)


def _is_cached(reference: Reference, select: Select) -> bool:
    try:
        find_cached(reference, select, COMPONENTS)
    except Incomplete:
        return False
    return True


def _matching(name: str, there: list[Entry]) -> list[Entry]:
    wanted, _, revision = str(catalogue.expand(name)).partition("@")
    return [e for e in there if e.name == wanted and e.revision.startswith(revision)]


def remove(*names: str) -> list[Entry]:
    """Remove converted models.

    Args:
        names: hub ids or short names. With ``@`` and the first digits of the commit, only that
            version is removed.
    Returns: the removed entries.
    Raises: UsageError if a name is not in the library; then nothing is removed.
    """
    there = entries()
    chosen: dict[Path, Entry] = {}
    for name in names:
        found = _matching(name, there)
        if not found:
            have = ", ".join(dict.fromkeys(e.short or e.name for e in there)) or "none"
            raise UsageError(f"{name} is not in the library {folder()}; its models: {have}")
        chosen |= {entry.path: entry for entry in found}
    for path in chosen:
        with _Shelf(path.parent.name.replace("--", "/", 1))._locked():
            gone = path.with_name(f".{path.name}.old")
            path.rename(gone)
            shutil.rmtree(gone)
        if not any(_ENTRY.fullmatch(other.name) for other in path.parent.iterdir()):
            shutil.rmtree(path.parent)
    return list(chosen.values())
