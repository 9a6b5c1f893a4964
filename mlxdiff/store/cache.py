"""The cache on this disk that mlxdiff shares with huggingface_hub.

Source: huggingface.co/docs/huggingface_hub, "Understand caching" (the layout
`models--org--name/refs`, `blobs`, `snapshots/<commit>`) and "Environment variables".
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

from mlxdiff.errors import UsageError, one_line
from mlxdiff.machine.disk import read_document
from mlxdiff.store.reference import (
    SINGLE_FILE_SUFFIXES,
    Reference,
    is_commit,
    is_digest,
    is_repo_path,
)
from mlxdiff.store.selection import INDEX, File, Incomplete, Listing, Select, Unusable

CHECK_SECONDS = 24 * 60 * 60
"""Time for which the last known commit of a branch counts as current."""


def cache_folder() -> Path:
    """Return the folder where huggingface_hub keeps models, from the same environment variables."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(key):
            return Path(os.path.expanduser(os.path.expandvars(os.environ[key])))
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.path.expanduser(os.path.expandvars(home))) / "hub"


def is_offline() -> bool:
    """Return True if the environment says that there is no network."""
    return any(
        os.environ.get(key, "").upper() in {"1", "ON", "YES", "TRUE"}
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def repo_folder(name: str) -> Path:
    """Return the cache folder of the repo `org/name`."""
    return cache_folder() / f"models--{name.replace('/', '--')}"


def origin(path: Path) -> str | None:
    """Return the hub id of a file in the cache, ``org/name/FILE@COMMIT``; None for other files."""
    try:
        folder, kind, commit, *inside = path.absolute().relative_to(cache_folder().absolute()).parts
    except ValueError:
        return None
    names = folder.split("--")
    if len(names) != 3 or names[0] != "models" or kind != "snapshots" or not inside:
        return None
    return f"{'/'.join((*names[1:], *inside))}@{commit}"


def snapshot_folder(reference: Reference, commit: str) -> Path:
    """Return the folder that holds, or will hold, the files of one commit."""
    return repo_folder(reference.name) / "snapshots" / commit


def snapshot_of(path: Path) -> Path:
    """Return the snapshot in a repo's cache folder, or in a copy of one; other paths unchanged.

    The snapshot is the commit of ``refs/main``, or else the only one.
    Raises: UsageError if there are several, or none.
    """
    if path.name == "snapshots":
        path = path.parent
    snapshots = path / "snapshots"
    if not snapshots.is_dir() or (path / "model_index.json").is_file():
        return path
    main = path / "refs" / "main"
    if main.is_file() and (found := snapshots / main.read_text().strip()).is_dir():
        return found
    commits = sorted(folder.name for folder in snapshots.iterdir() if folder.is_dir())
    if len(commits) != 1:
        what = f"has the snapshots {', '.join(commits)}" if commits else "has no snapshot"
        raise UsageError(
            f"{path}: is a cache folder of the hub and {what}; give one folder in snapshots/, or "
            "the hub id"
        )
    return snapshots / commits[0]


def cached_bytes(name: str) -> int:
    """Return the size in bytes of all cached files of the repo `org/name`."""
    blobs = repo_folder(name) / "blobs"
    return sum(blob.stat().st_size for blob in blobs.glob("*") if blob.is_file())


# Revisions


def cached_commit(reference: Reference) -> str | None:
    """Return the last known commit of a revision, or None if there is none."""
    if reference.is_pinned:
        return reference.revision
    try:
        commit = read_document(_ref_file(reference)).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if is_commit(commit) else None


def remember_commit(reference: Reference, commit: str) -> None:
    """Store the current commit of a branch or tag."""
    if reference.is_pinned:
        return
    file = _ref_file(reference)
    try:
        if cached_commit(reference) == commit:
            os.utime(file)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
            with new.open("x", encoding="utf-8") as opened:
                opened.write(commit)
            new.replace(file)
    except OSError:
        pass  # The cache is read-only: the next run looks the branch up again.


def _ref_file(reference: Reference) -> Path:
    return repo_folder(reference.name) / "refs" / reference.revision


def _was_checked_recently(reference: Reference) -> bool:
    if reference.is_pinned:
        return True
    try:
        age = time.time() - _ref_file(reference).stat().st_mtime
    except OSError:
        return False
    return 0 <= age < CHECK_SECONDS


# Files


def find_cached(reference: Reference, select: Select, components: tuple[str, ...]) -> Listing:
    """List the cached files of a model. Raises: Incomplete if the cached copy is not whole."""
    commit = cached_commit(reference)
    if commit is None or not snapshot_folder(reference, commit).is_dir():
        raise Incomplete("it is not in the cache")
    snapshot = snapshot_folder(reference, commit)
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    present = {path.relative_to(snapshot).as_posix() for path in paths}
    try:
        files, entry = select(present, is_offline())
        if entry.endswith(SINGLE_FILE_SUFFIXES) and not reference.file and not is_offline():
            # The repo can hold other checkpoints that the cache does not know.
            raise Incomplete(f"{INDEX} is missing, {entry} is there")
        check_complete(snapshot, files, components)
    except (Incomplete, Unusable) as error:
        raise Incomplete(f"its copy in the cache is incomplete ({error})") from None
    listed = {file: _file_of(snapshot / file) for file in files}
    return Listing(reference, commit, listed, entry, components, _was_checked_recently(reference))


def missing_files(listing: Listing) -> dict[str, File]:
    """Return the files of a listing that are not in the snapshot folder of its commit."""
    snapshot = snapshot_folder(listing.reference, listing.commit)
    return {n: file for n, file in listing.files.items() if not _is_present(snapshot / n, file)}


def missing_bytes(listing: Listing) -> int:
    """Return the bytes of a listing that the cache does not hold under any commit."""
    blobs = repo_folder(listing.reference.name) / "blobs"
    missing = missing_files(listing).values()
    return sum(f.size for f in missing if not f.digest or not (blobs / f.digest).exists())


def check_complete(snapshot: Path, files: set[str], components: tuple[str, ...]) -> None:
    """Check that each named component is selected and each shard is on the disk.

    Raises: Incomplete.
    """
    folders = {file.partition("/")[0] for file in files}
    if "config.json" in folders:  # a pixel-space model keeps U-Net and scheduler in the root
        folders |= {"unet", "scheduler"}
    if INDEX in files:
        for part in _component_names(snapshot / INDEX):
            if part in components and part not in folders:
                raise Incomplete(f"{part}/ is missing")
    for file in files:
        if re.search(r"\.(safetensors|bin)\b.*\.json$", file):
            folder = file.rpartition("/")[0]
            for shard in sorted(_shard_names(snapshot / file)):
                if not (snapshot / folder / shard).is_file():
                    raise Incomplete(f"{folder}/{shard} is missing")


def _file_of(path: Path) -> File:
    """Describe a cached file. Its link to a blob gives the digest."""
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return File(path.stat().st_size, blob if is_digest(blob) else "")


def _is_present(path: Path, file: File) -> bool:
    try:
        return path.stat().st_size == file.size or not file.digest
    except OSError:
        return False


def _component_names(index: Path) -> list[str]:
    """Return the components in a model_index.json. [null, null] marks an absent one."""
    return [
        key
        for key, value in _read_object(index).items()
        if isinstance(value, list) and value and value[0] is not None
    ]


def _shard_names(index: Path) -> set[str]:
    shards = _read_object(index).get("weight_map")
    if not isinstance(shards, dict):
        raise Incomplete(f"{index.name} names no shards")
    names = {shard if isinstance(shard, str) else "" for shard in shards.values()}
    if not all(is_repo_path(name) and "/" not in name for name in names):
        raise Incomplete(f"{index.name} names a shard that is not a file in its folder")
    return names


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_document(file).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Incomplete(f"{file.name} cannot be read ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise Incomplete(f"{file.name} is not a JSON object")
    return value
