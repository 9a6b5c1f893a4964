"""Models of the Hugging Face hub: find the files, fetch them, keep them in the shared cache.

A commit that is whole in the cache needs no network. A branch is looked up once a day. If the
look-up fails, the cached copy is used, with a note. Only missing files are fetched. They go into
the cache that huggingface_hub shares with other programs. Each file is checked against the hub's
digest, and an interrupted download continues where it stopped.

What a hub says is not trusted: it can be a mirror (HF_ENDPOINT). Only checked names become paths:
a commit is 40 hex digits, a blob has the name of its digest in the listing (hex, never an ETag), a
file stays inside its repo. A body is cut off at the size in the listing.

huggingface_hub does the requests: addresses, tokens, retries, errors. Its hf_hub_download is not
used, because it names files after the ETag of an answer, asks the network for whole models in the
cache, and starts interrupted downloads again from the beginning.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlxdiff.errors import HubError, MlxdiffError, one_line, quoted
from mlxdiff.machine.disk import MAX_DOCUMENT, SourceFile, exclusive, open_own, require_space
from mlxdiff.store.cache import (
    cache_folder,
    check_complete,
    find_cached,
    is_offline,
    missing_bytes,
    missing_files,
    remember_commit,
    repo_folder,
    snapshot_folder,
)
from mlxdiff.store.reference import (
    WEIGHT_SUFFIXES,
    Reference,
    is_commit,
    is_digest,
    is_repo_path,
    parse_or_raise,
)
from mlxdiff.store.selection import (
    COMPONENTS,
    File,
    Incomplete,
    Listing,
    Select,
    Unusable,
    clip_selector,
    component_selector,
    file_selector,
    lora_selector,
    model_selector,
)

logger = logging.getLogger("mlxdiff")

Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the total bytes, and the name of the current file."""

_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def resolve(
    repo: str,
    variant: str | None = None,
    *,
    components: Sequence[str] = COMPONENTS,
    progress: Progress | None = None,
) -> Path:
    """Return the local copy of a hub model. Fetch the files that the cache lacks.

    Args:
        repo: see `reference.parse`.
        variant: weights variant. None: the fp16 files of each component that has them (half the
            bytes), else the plain files. "": the plain files. Another name: the files of that
            variant for each component that has them, else the plain files. Safetensors files
            come before pickles.
        components: the parts that the caller needs. Parts that the model lacks are skipped.
        progress: called during a download.

    Returns: the snapshot folder in the cache. Its name is the commit. For a single-file
        checkpoint: the file in that folder.

    Raises:
        HubError: the text is not a repo id; the repo or revision does not exist, is gated or is
            not a model; or there is no network and the cache does not hold the model.
        UsageError: the disk does not have enough room.
    """
    return fetch(find(repo, variant, components=components), progress)


def resolve_component(
    repo: str,
    component: str = "vae",
    variant: str | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Return the folder (config.json and weights) of one component.

    The component is the folder `component/` in the repo of a model, or a repo of its own.

    Args, Raises: as for `resolve`.
    """
    select = component_selector(component, variant)
    return fetch(_find(parse_or_raise(repo), select), progress)


def resolve_clip(
    repo: str, variant: str | None = None, *, progress: Progress | None = None
) -> Path:
    """Return the folder of a CLIP: config, weights, tokenizer, preparation of pictures.

    Args, Raises: as for `resolve`.
    """
    return fetch(_find(parse_or_raise(repo), clip_selector(variant)), progress)


def resolve_lora(repo: str, *, progress: Progress | None = None) -> Path:
    """Return the file of a LoRA, `org/name[/FILE][@revision]`.

    Args, Raises: as for `resolve`.
    """
    reference = parse_or_raise(repo)
    return fetch(_find(reference, lora_selector(reference)), progress)


def holds_lora(repo: str) -> bool:
    """Return True if the cache holds the file of a LoRA, `org/name[/FILE][@revision]`."""
    reference = parse_or_raise(repo)
    try:
        find_cached(reference, lora_selector(reference), ())
    except Incomplete:
        return False
    return True


def fetch_files(repo: str, files: Sequence[str], *, progress: Progress | None = None) -> Path:
    """Return the snapshot folder of a repo with these files in it. Cached files need no network.

    Args, Raises: as for `resolve`.
    """
    reference, select = parse_or_raise(repo), file_selector(files)
    try:
        return fetch(find_cached(reference, select, ()))
    except Incomplete:
        return fetch(_find(reference, select), progress)


def find(
    repo: str | Reference, variant: str | None = None, *, components: Sequence[str] = COMPONENTS
) -> Listing:
    """List the files that a model needs, and their commit. Fetch nothing.

    Args, Raises: as for `resolve`.
    """
    reference = parse_or_raise(repo) if isinstance(repo, str) else repo
    select = model_selector(reference, variant, components)
    return _find(reference, select, tuple(components))


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def reach(seconds: float = 10.0) -> None:
    """Check that the hub answers. Raises: HubError if it does not."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    address = _endpoint() or "https://huggingface.co"
    try:
        urlopen(Request(address, method="HEAD"), timeout=seconds).close()
    except HTTPError:
        return  # an error status is an answer too
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise HubError(f"{address} does not answer ({one_line(reason)})") from None


def _find(reference: Reference, select: Select, components: tuple[str, ...] = ()) -> Listing:
    """Return the cached listing if it is whole and current. Otherwise ask the hub."""
    cached, lacking = None, ""
    try:
        cached = find_cached(reference, select, components)
        if cached.is_current or is_offline():
            return cached
    except Incomplete as error:
        lacking = str(error)
    if is_offline():
        raise HubError(
            f"{reference}: offline (HF_HUB_OFFLINE), and {lacking}; fetch it once with a network, "
            f"or set HF_HOME to a cache that holds it (now {cache_folder()})"
        )
    try:
        commit, there = _ask(reference, lacking)
        if cached is not None and _is_unchanged(cached, commit, there):
            remember_commit(reference, cached.commit)
            return replace(cached, is_current=True)
        try:
            files, entry = select(set(there), True)
        except (Unusable, Incomplete) as error:
            raise HubError(f"{reference} cannot be used: {error}") from None
    except HubError as error:
        if cached is None:
            raise
        why = str(error).removeprefix(f"{reference.name}: ")
        logger.warning("%s: using the copy in the cache; a newer one may exist: %s", reference, why)
        return cached
    if cached is not None:
        logger.warning(
            "%s has changed on the hub; the old version is %s@%s",
            reference,
            reference.name,
            cached.commit,
        )
    listed = {file: there[file] for file in sorted(files)}
    return Listing(reference, commit, listed, entry, components)


def _is_unchanged(cached: Listing, commit: str, there: Mapping[str, File]) -> bool:
    """Return True if the needed files are the same at the hub's commit."""
    same = all(file.digest and there.get(name) == file for name, file in cached.files.items())
    return same or commit == cached.commit


def _ask(reference: Reference, lacking: str) -> tuple[str, dict[str, File]]:
    """Ask the hub for the commit of a revision and for all its files."""
    try:
        info = _model_info(reference)
    except MlxdiffError:
        raise
    except Exception as error:
        raise _explained(error, reference, lacking) from error
    commit = info.sha
    if not isinstance(commit, str) or not is_commit(commit):
        raise _malformed(reference, "commit", commit)
    return commit, dict(_listed(reference, file) for file in info.siblings or ())


def _model_info(reference: Reference) -> Any:
    """Return what ``HfApi.model_info`` would. That reads an answer of any length.

    Raises: HubError for an answer of more than MAX_DOCUMENT bytes; the errors of model_info.
    """
    from huggingface_hub.hf_api import ModelInfo
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    address = f"{_endpoint() or 'https://huggingface.co'}/api/models/{reference.name}"
    if reference.revision is not None:
        address += f"/revision/{quote(reference.revision, safe='')}"
    headers = {**build_hf_headers(library_name="mlxdiff"), "Accept-Encoding": "identity"}
    asked: dict[str, Any] = {"headers": headers, "params": {"blobs": True}, "timeout": 15}
    with get_session().stream("GET", address, **asked) as response:
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > MAX_DOCUMENT:
                raise HubError(
                    f"{reference}: the hub's answer is malformed: it has more than {MAX_DOCUMENT} "
                    f"bytes; check HF_ENDPOINT (now {_endpoint() or 'not set'})"
                )
        kept = {
            name: value
            for name, value in response.headers.items()
            if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
        }
        # hf_raise_for_status needs an answer that is read, whatever its length.
        whole = type(response)(
            response.status_code, headers=kept, content=bytes(body), request=response.request
        )
    hf_raise_for_status(whole)
    return ModelInfo(**whole.json())  # type: ignore[no-untyped-call]


def _listed(reference: Reference, sibling: Any) -> tuple[str, File]:
    """Check a file of the hub's listing. Its name, digest and size decide what is written here."""
    name, size = sibling.rfilename, sibling.size
    digest = getattr(sibling.lfs, "sha256", None) or sibling.blob_id or ""
    if not isinstance(name, str) or not is_repo_path(name):
        raise _malformed(reference, "name of a file", name)
    if digest and not (isinstance(digest, str) and is_digest(digest)):
        raise _malformed(reference, f"digest of {name}", digest)
    if size is None:
        size, digest = 0, ""
    if type(size) is not int or not 0 <= size < 1 << 50:
        raise _malformed(reference, f"size of {name}", size)
    return name, File(size, digest)


def _malformed(reference: Reference, what: str, value: object) -> HubError:
    return HubError(
        f"{reference}: the hub's answer is malformed: it gives {quoted(value)} as the {what}; "
        f"check HF_ENDPOINT (now {_endpoint() or 'not set'})"
    )


def fetch(listing: Listing, progress: Progress | None = None) -> Path:
    """Fetch the missing files of a listing into the cache.

    Args:
        listing: returned by `find`.
        progress: called during the download.

    Returns: the snapshot folder, or the path of `Listing.entry` in it.

    Raises: as for `resolve`.
    """
    reference = listing.reference
    snapshot = snapshot_folder(reference, listing.commit)
    if missing := missing_files(listing):
        if is_offline():
            raise HubError(
                f"{reference}: offline (HF_HUB_OFFLINE), and its copy in the cache is not whole; "
                "fetch it once with a network"
            )
        require_space(
            {snapshot: missing_bytes(listing)},
            f"{reference}: the download",
            "make room, or set HF_HOME to a folder on another disk",
        )
        _fetch(listing, missing, progress)
        try:
            check_complete(snapshot, set(listing.files), listing.components)
        except Incomplete as error:
            raise HubError(f"{reference} cannot be used: {error}") from None
    if listing.is_current:
        remember_commit(reference, listing.commit)
    return snapshot / listing.entry


def fetch_documents(listing: Listing) -> Path:
    """Fetch all files of a listing except the weights: configs, tokenizers and the like.

    Returns: the snapshot folder. Raises: as for `resolve`.
    """
    documents = {n: f for n, f in missing_files(listing).items() if not n.endswith(WEIGHT_SUFFIXES)}
    if not is_offline():  # offline, `fetch` raises the error
        _fetch(listing, documents, None)
    return snapshot_folder(listing.reference, listing.commit)


def _fetch(listing: Listing, missing: Mapping[str, File], progress: Progress | None) -> None:
    total = listing.size
    done = total - sum(file.size for file in missing.values())
    for name, file in missing.items():

        def tell(size: int, name: str = name, done: int = done) -> None:
            if progress is not None:
                progress(min(done + size, total), total, name)

        if not file.digest:
            raise HubError(
                f"{listing.reference}: the hub gives no size and digest for {name}, so it cannot "
                f"be checked; use another mirror (HF_ENDPOINT, now {_endpoint() or 'not set'})"
            )
        try:
            # A file that arrives damaged gets a second try.
            if not (_download(listing, name, file, tell) or _download(listing, name, file, tell)):
                raise HubError(
                    f"{listing.reference}: {name} arrived damaged twice (its size or digest "
                    "differs from the hub's); try again later"
                )
        except MlxdiffError:
            raise
        except Exception as error:
            lacking = "its copy in the cache is not whole"
            raise _explained(error, listing.reference, lacking) from error
        tell(file.size)
        done += file.size


def _is_sound(path: Path, file: File) -> bool:
    """Return True if a file has the size and the digest that the hub gives."""
    source, place = SourceFile(path), 0
    if source.size != file.size:
        return False
    digest = hashlib.sha256()
    if len(file.digest) == 40:  # git's hash of a blob
        digest = hashlib.sha1(f"blob {source.size}\0".encode(), usedforsecurity=False)
    while place < source.size:
        piece = source.read(place, min(1 << 22, source.size - place))
        digest.update(piece)
        place += len(piece)
    return digest.hexdigest() == file.digest


def _download(listing: Listing, name: str, file: File, tell: Callable[[int], None]) -> bool:
    """Fetch one file into the cache, in huggingface_hub's layout: a blob and a link to it.

    Returns: False if it arrived damaged; then nothing of it is kept.
    """
    folder = repo_folder(listing.reference.name)
    blob = folder / "blobs" / file.digest
    lock = cache_folder() / ".locks" / folder.name / f"{file.digest}.mlxdiff.lock"
    blob.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"{name}: another process (%s) is fetching this file; waiting for it"
    with exclusive(lock, lambda pid: logger.warning(waiting, pid)):
        if not _is_there(blob, file) and not _download_blob(listing, name, file, blob, tell):
            return False
        _link(snapshot_folder(listing.reference, listing.commit) / name, blob)
        return True


def _is_there(blob: Path, file: File) -> bool:
    """Return True if the cache holds a blob. A large one was checked when it was fetched."""
    if not blob.is_file() or blob.stat().st_size != file.size:
        return False
    return len(file.digest) == 64 or _is_sound(blob, file)


def _download_blob(
    listing: Listing, name: str, file: File, blob: Path, tell: Callable[[int], None]
) -> bool:
    """Fetch a blob. Continue an interrupted download."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        build_hf_headers,
        disable_progress_bars,
        enable_progress_bars,
    )

    reference = listing.reference
    partial = blob.with_name(f"{file.digest}.mlxdiff.incomplete")
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with open(open_own(partial, os.O_RDWR | os.O_CREAT), "r+b") as opened:
            if opened.seek(0, os.SEEK_END) > file.size:
                opened.truncate(opened.seek(0))
            tell(opened.tell())
            http_get(
                hf_hub_url(reference.name, name, revision=listing.commit, endpoint=_endpoint()),
                _Body(opened, file.size, tell),  # type: ignore[arg-type]
                resume_size=opened.tell(),
                headers={**build_hf_headers(library_name="mlxdiff"), "Accept-Encoding": "identity"},
                expected_size=file.size,
            )
    except _TooLong:
        partial.unlink()
        return False
    finally:
        if not disabled:
            enable_progress_bars()
    if not _is_sound(partial, file):
        partial.unlink()
        return False
    partial.replace(blob)
    return True


def _link(name: Path, blob: Path) -> None:
    """Give a blob its name in a snapshot: a relative link, or a copy where there are no links."""
    name.parent.mkdir(parents=True, exist_ok=True)
    new = name.with_name(f".{uuid.uuid4().hex[:8]}.mlxdiff")
    try:
        try:
            new.symlink_to(os.path.relpath(blob, name.parent))
        except OSError:
            shutil.copyfile(blob, new)
        new.replace(name)
    finally:
        new.unlink(missing_ok=True)


class _TooLong(Exception):
    """The hub sends more bytes than its listing says."""


class _Body:
    """The file that a body is written to. It reports its position, and ends at the listed size."""

    def __init__(self, file: Any, size: int, tell: Callable[[int], None]) -> None:
        self._file, self._size, self._tell = file, size, tell

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._size:
            raise _TooLong
        written: int = self._file.write(data)
        self._tell(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _explained(error: Exception, reference: Reference, lacking: str) -> HubError:
    """Turn an error of huggingface_hub into a HubError with the way out.

    Args:
        error: the original error.
        reference: the requested model.
        lacking: what the cache lacks, or "".
    """
    from huggingface_hub import errors, get_token

    name, revision = reference.name, reference.revision
    if isinstance(error, errors.GatedRepoError):  # first: a subclass of RepositoryNotFoundError
        return HubError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{name}: the hub has no such model, or the model is private; check the spelling, or "
            "log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{name} has no revision {revision!r}; its branches and tags: "
            f"https://huggingface.co/{name}/tree/main"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and get_token() is not None:
        from_variable = any(os.environ.get(key) for key in _TOKEN_VARIABLES)
        place = "HF_TOKEN" if from_variable else "`hf auth login`"
        way_out = "unset HF_TOKEN" if from_variable else "`hf auth logout`"
        return HubError(
            f"{name}: the hub refuses your access token (of {place}): it is expired or wrong; make "
            f"a new one at https://huggingface.co/settings/tokens, or use none ({way_out}): public "
            "models need none"
        )
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return HubError(
            f"{name}: the hub answered with an error ({status}); try again later; "
            "fetched files are kept"
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return HubError(
            f"{name}: cannot write to the cache {cache_folder()} ({error.strerror}); "
            "make room, or set HF_HOME to another folder"
        )
    also = f", and {lacking}" if lacking else ""
    return HubError(
        f"{name}: cannot be fetched ({one_line(error)}){also}; check the network and run "
        "the command again; fetched files are kept. A folder or file of yours needs no network"
    )
