"""Models of the Hugging Face hub: which files of a repo, at which revision, from which cache.

A commit that the cache holds whole is used as it is, without a look at the network. A branch is
looked up once a day; where that cannot be, the copy in the cache serves, with a note. What is
missing is fetched, and nothing beside it, into the cache that huggingface_hub shares with other
programs: checked against the hub's digests, and resumed where a fetch broke off.

Source: huggingface.co/docs/huggingface_hub, "Understand caching" (the layout
`models--org--name/refs`, `blobs`, `snapshots/<commit>`) and "Environment variables"; diffusers'
file names for variants and shards.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxdiff.errors import HubError
from mlxdiff.machine.disk import exclusive, require_space

logger = logging.getLogger("mlxdiff")

COMPONENTS = (
    "scheduler",
    "low_res_scheduler",
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
    "unet",
    "vae",
)
"""The folders of a diffusers repo that mlxdiff reads."""

PREFERRED_VARIANT = "fp16"

CHECK_SECONDS = 24 * 60 * 60
"""How long a branch is taken to stand where it was last seen."""

_INDEX = "model_index.json"
_WITHOUT_WEIGHTS: dict[str, tuple[set[str], ...]] = {
    "scheduler": ({"scheduler_config.json"},),
    "low_res_scheduler": ({"scheduler_config.json"},),
    "tokenizer": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
    "tokenizer_2": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
}
"""Component -> the sets of files of which one must be there."""
_MAY_HELP = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<a>\w+))?"
    r"(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<b>\w+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>(?:\.(?P<c>\w+))?\.index(?:\.(?P<d>\w+))?\.json)?"
)
_SINGLE = (".safetensors", ".ckpt")
_FILES = (*_SINGLE, ".bin", ".pt", ".pth")
_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REPO_ID = re.compile(
    rf"(?P<name>{_NAME}/{_NAME})(?P<file>(?:/[\w.()+ -]+)+\.(?:safetensors|ckpt|bin|pth?))?"
    r"(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?",
    re.ASCII,
)
_URL = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>{_NAME}/{_NAME})/?"
    r"(?:(?:blob|resolve|tree)/(?P<revision>[\w.%-]+)(?:/(?P<file>[^?#]+))?)?(?:[?#].*)?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the file that is being fetched."""


# What is asked for


@dataclass(frozen=True)
class Reference:
    """A model on the hub: `org/name[/FILE][@revision]`.

    Attributes:
        name: `org/name`.
        revision: branch, tag or commit.
        file: path of a single-file checkpoint in the repo; "" for the repo itself.
    """

    name: str
    revision: str = "main"
    file: str = ""

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.name}{file}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None


def parse(text: str, revision: str | None = None) -> Reference | None:
    """What a text asks for; None where it is not of the form, nor a page of huggingface.co.

    Args:
        text: `org/name[/FILE.safetensors][@revision]` or the address of a repo or of a file in it.
        revision: given beside the text.
    Raises: HubError where text and revision contradict each other.
    """
    match = _REPO_ID.fullmatch(text) or _URL.fullmatch(text)
    if match is None or ".." in text or "--" in match["name"] or match["name"].endswith(_FILES):
        return None
    at, file = match["revision"], (match["file"] or "").strip("/")
    if match.re is _URL:
        at = at and at.replace("%2F", "/")
        file = file.replace("%20", " ")
        if file and not file.endswith(_FILES):
            return None
    if at and revision and at != revision:
        raise HubError(f"{text}: asks for revision {at!r} and for {revision!r}")
    return Reference(match["name"], at or revision or "main", file)


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a `Reference`. A file or folder may be called so, too."""
    return parse(text) is not None


@dataclass(frozen=True)
class File:
    """A file of a repo.

    Attributes:
        size: bytes.
        digest: sha256 of a large file, git's sha1 of a small one, both in hex; "" where unknown.
    """

    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """The files of a model that are needed, at one commit; fetched or not.

    Attributes:
        reference: what was asked for.
        commit: where it stands.
        files: path in the repo -> File.
        entry: the part of the repo that is the model: "" for its root, a folder, or a file.
        components: parts that must be there if model_index.json names them.
        is_current: whether this comes from the hub itself, or from a copy that needs no look.
    """

    reference: Reference
    commit: str
    files: Mapping[str, File]
    entry: str = ""
    components: tuple[str, ...] = ()
    is_current: bool = True

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stand for the files' contents, whatever commit they are of."""
        lines = [
            f"{name} {file.digest or f'{self.reference.name} {self.commit}'}\n"
            for name, file in sorted(self.files.items())
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def resolve(
    repo: str,
    variant: str | None = None,
    *,
    components: Sequence[str] = COMPONENTS,
    progress: Progress | None = None,
) -> Path:
    """The local copy of a hub model, fetched where the cache does not hold it yet.

    Args:
        repo: see `parse`.
        variant: of the weights. None: fp16 where a component has it, else the plain files (half the
            bytes). "": the plain files. Another: that one where a component has it, else the plain
            files. Safetensors files come before pickles.
        components: the parts that are needed, of those that the model has.
        progress: told how far a fetch is.

    Returns: the snapshot folder in the cache, whose name is the commit; for a single-file
        checkpoint, the file in it.

    Raises:
        HubError: not a repo id, no such repo or revision, gated, not a model, no network, or
            offline and not in the cache.
        UsageError: not enough room on the disk.
    """
    return fetch(find(repo, variant, components=components), progress)


def resolve_component(
    repo: str,
    component: str = "vae",
    variant: str | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """The folder (config.json and weights) of one component: `component/` of a model's repo, or a
    repo that holds nothing but such a component.

    Args, Raises: as for `resolve`.
    """

    def select(files: set[str], whole: bool) -> tuple[set[str], str]:
        folder = component if f"{component}/config.json" in files else ""
        names = {f.rpartition("/")[2] for f in files if f.rpartition("/")[0] == folder}
        if "config.json" not in names:
            raise _Unusable(f"it holds no {component}/config.json, nor a config.json alone")
        chosen = {"config.json"} | _pick(_weights_by_variant(names), variant, folder or "it", whole)
        return {f"{folder}/{name}" if folder else name for name in chosen}, folder

    return fetch(_find(_parsed(repo), select), progress)


def fetch_files(repo: str, files: Sequence[str], *, progress: Progress | None = None) -> Path:
    """The snapshot folder of a repo with these files in it. What the cache has is not looked up.

    Args, Raises: as for `resolve`.
    """

    def select(there: set[str], whole: bool) -> tuple[set[str], str]:
        if missing := [file for file in files if file not in there]:
            raise _Incomplete(f"it has no {' and no '.join(missing)}")
        return set(files), ""

    try:
        return fetch(_cached(_parsed(repo), select, ()))
    except _Incomplete:
        return fetch(_find(_parsed(repo), select), progress)


def find(
    repo: str | Reference, variant: str | None = None, *, components: Sequence[str] = COMPONENTS
) -> Listing:
    """Which files a model needs, and at which commit. Nothing is fetched.

    Args, Raises: as for `resolve`.
    """
    reference = _parsed(repo) if isinstance(repo, str) else repo

    def select(files: set[str], whole: bool) -> tuple[set[str], str]:
        if reference.file:
            if reference.file not in files:
                raise _Incomplete(f"{reference.file} is missing")
            return {reference.file}, reference.file
        if _INDEX not in files:
            single = _single_file(files, reference.name)
            return {single}, single
        return set(_select(files, variant, components, whole)), ""

    return _find(reference, select, tuple(components))


def _parsed(repo: str) -> Reference:
    reference = parse(repo)
    if reference is None:
        raise HubError(f"{repo!r} is no model of the hub; expected org/name[@revision]")
    return reference


def cache_folder() -> Path:
    """Where huggingface_hub keeps models, by the same environment variables."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(key):
            return Path(os.path.expandvars(os.environ[key])).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def cached_bytes(name: str) -> int:
    """What the cache holds of the repo `org/name`, in bytes."""
    blobs = _repo_folder(Reference(name)) / "blobs"
    return sum(blob.stat().st_size for blob in blobs.glob("*") if blob.is_file())


# Which files


class _Incomplete(Exception):
    """A folder or listing does not hold a whole model; the text says what is missing."""


class _Unusable(Exception):
    """What is there cannot be used, and fetching more would not help; the text says why."""


_Select = Callable[[set[str], bool], tuple[set[str], str]]
"""Files, and whether the repo has no others -> those that are needed, entry of `Listing`."""


def needed_files(
    files: Iterable[str], variant: str | None = None, components: Sequence[str] = COMPONENTS
) -> list[str]:
    """The files of a diffusers repo that mlxdiff needs, out of all.

    Never those beside them: other variants, ONNX, Flax, OpenVINO, pickles where there are
    safetensors files, single-file checkpoints, the safety checker.

    Args:
        files: paths in the repo, with "/".
        variant, components: as in `resolve`.

    Raises:
        HubError: the listing is not that of a diffusers model, or has no weights that can be read.
    """
    try:
        return _select(set(files), variant, components)
    except (_Incomplete, _Unusable) as error:
        raise HubError(f"the repo cannot be used: {error}") from None


def _select(
    files: set[str], variant: str | None, components: Sequence[str], whole: bool = True
) -> list[str]:
    if _INDEX not in files:
        raise _Unusable(f"it holds no {_INDEX}, so it is not a model in diffusers' format")
    folders: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.partition("/")
        if folder in components and name and "/" not in name:
            folders.setdefault(folder, set()).add(name)
    wanted = {_INDEX, "mlxdiff.json"} & files
    if "unet" in components and "unet" not in folders and "config.json" in files:
        # Pixel-space models of the first days: the U-Net and the scheduler stand in the root.
        folders[""] = {file for file in files if "/" not in file}
        wanted |= {"scheduler_config.json"} & files
    variants = set()
    for folder, names in sorted(folders.items()):
        if folder in _WITHOUT_WEIGHTS:
            choices = _WITHOUT_WEIGHTS[folder]
            if not any(choice <= names for choice in choices):
                missing = " or ".join(" and ".join(sorted(choice)) for choice in choices)
                raise _Incomplete(f"{folder}/ has no {missing}")
            chosen = names & _MAY_HELP.union(*choices)
        else:
            if "config.json" not in names:
                raise _Incomplete(f"{folder}/ has no config.json")
            weights = _weights_by_variant(names)
            variants |= {name for _, name in weights}
            chosen = {"config.json"} | _pick(weights, variant, folder or "unet", whole)
        wanted |= {f"{folder}/{name}" if folder else name for name in chosen}
    if variant and variant not in variants:
        known = ", ".join(sorted(filter(None, variants))) or "none"
        raise _Unusable(f"it has no variant {variant!r} (variants there: {known})")
    return sorted(wanted)


def _single_file(files: set[str], name: str) -> str:
    """The checkpoint of a repo that has no diffusers folder."""
    there = sorted(
        file
        for file in files
        if file.endswith(_SINGLE)
        and not ("config.json" in files and _WEIGHTS.fullmatch(file.rpartition("/")[2]))
    )
    there = [file for file in there if "/" not in file]
    candidates = [f for f in there if f.endswith(".safetensors")] or there
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        listed = ", ".join(f"{name}/{file}" for file in candidates[:6])
        more = f" and {len(candidates) - 6} more" if len(candidates) > 6 else ""
        raise _Unusable(f"it holds {len(candidates)} checkpoint files; name one: {listed}{more}")
    if "config.json" in files:
        raise _Unusable(
            f"it holds no {_INDEX}, but one component alone; a VAE, ControlNet or adapter goes "
            "with a model, with the option of its name (--vae, ...)"
        )
    raise _Unusable(f"it holds neither a {_INDEX} nor a checkpoint file, so it is no model")


_Weights = dict[tuple[str, str], set[str]]
"""(kind of file, variant or "" for none) -> its file, or its index and shards."""


def _weights_by_variant(names: set[str]) -> _Weights:
    whole: _Weights = {}
    shards: _Weights = {}
    indexed = set()
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match is None:
            continue
        key = match["kind"], next((match[group] for group in "abcd" if match[group]), "")
        if match["index"]:
            indexed.add(key)
        elif not match["shard"]:
            whole[key] = {name}
            continue
        shards.setdefault(key, set()).add(name)
    return {key: found for key, found in shards.items() if key in indexed} | whole


def _pick(weights: _Weights, variant: str | None, folder: str, whole: bool) -> set[str]:
    """The files of the variant that is wanted most; a repo that has but one gives that."""
    kinds, order = ("safetensors", "bin"), (variant or "", "")
    if variant is None:
        order = (PREFERRED_VARIANT, "")
        choices = [(kind, name) for kind in kinds for name in order]
    else:
        choices = [(kind, name) for name in order for kind in kinds]
    for choice in choices:
        if choice in weights:
            return weights[choice]
    if whole and len(weights) == 1 and not variant:
        return next(iter(weights.values()))
    others = ", ".join(sorted({name for _, name in weights}))
    has = f" (only the variants {others})" if weights else ""
    raise _Incomplete(f"{folder}/ has no safetensors weights and no .bin{has}")


# The cache


def _repo_folder(reference: Reference) -> Path:
    return cache_folder() / f"models--{reference.name.replace('/', '--')}"


def _snapshot(reference: Reference, commit: str) -> Path:
    return _repo_folder(reference) / "snapshots" / commit


def _ref_file(reference: Reference) -> Path:
    return _repo_folder(reference) / "refs" / reference.revision


def _cached_commit(reference: Reference) -> str | None:
    """The commit that a revision stood at when it was last seen."""
    if reference.is_pinned:
        return reference.revision
    try:
        commit = _ref_file(reference).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _was_seen_lately(reference: Reference) -> bool:
    if reference.is_pinned:
        return True
    try:
        age = time.time() - _ref_file(reference).stat().st_mtime
    except OSError:
        return False
    return 0 <= age < CHECK_SECONDS


def _remember(reference: Reference, commit: str) -> None:
    """Note at which commit a branch or tag stands now."""
    if reference.is_pinned:
        return
    file = _ref_file(reference)
    try:
        if _cached_commit(reference) == commit:
            os.utime(file)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name(f".{file.name}.{os.getpid()}")
            new.write_text(commit, encoding="utf-8")
            new.replace(file)
    except OSError:
        pass  # a cache that cannot be written: it is looked up again next time


def _cached(reference: Reference, select: _Select, components: tuple[str, ...]) -> Listing:
    """What the cache holds of a model. Raises _Incomplete where that is not a whole one."""
    commit = _cached_commit(reference)
    if commit is None or not _snapshot(reference, commit).is_dir():
        raise _Incomplete("it is not in the cache")
    snapshot = _snapshot(reference, commit)
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    present = {path.relative_to(snapshot).as_posix() for path in paths}
    try:
        files, entry = select(present, is_offline())
        if entry.endswith(_SINGLE) and not reference.file and not is_offline():
            # The cache cannot tell whether this is the only checkpoint of the repo.
            raise _Incomplete(f"{_INDEX} is missing, {entry} is there")
        _check_whole(snapshot, files, components)
    except (_Incomplete, _Unusable) as error:
        raise _Incomplete(f"its copy in the cache is incomplete ({error})") from None
    listed = {file: _file_of(snapshot / file) for file in files}
    return Listing(reference, commit, listed, entry, components, _was_seen_lately(reference))


def _file_of(path: Path) -> File:
    """A file of the cache; the link to its blob tells its digest."""
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    digest = blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else ""
    return File(path.stat().st_size, digest)


def _check_whole(snapshot: Path, files: set[str], components: tuple[str, ...]) -> None:
    """Raises _Incomplete where a part that the files name is not among them, or not there."""
    folders = {file.partition("/")[0] for file in files}
    if "config.json" in folders:  # the U-Net and the scheduler of a pixel-space model
        folders |= {"unet", "scheduler"}
    if _INDEX in files:
        for part in _components_of(snapshot / _INDEX):
            if part in components and part not in folders:
                raise _Incomplete(f"{part}/ is missing")
    for file in files:
        if re.search(r"\.(safetensors|bin)\b.*\.json$", file):
            folder = file.rpartition("/")[0]
            for shard in sorted(_shards_of(snapshot / file)):
                if not (snapshot / folder / shard).is_file():
                    raise _Incomplete(f"{folder}/{shard} is missing")


def _components_of(index: Path) -> list[str]:
    """Components that a model_index.json names; [null, null] stands for one left out."""
    return [
        key
        for key, value in _read_object(index).items()
        if isinstance(value, list) and value and value[0] is not None
    ]


def _shards_of(index: Path) -> set[str]:
    shards = _read_object(index).get("weight_map")
    if not isinstance(shards, dict):
        raise _Incomplete(f"{index.name} names no shards")
    return {str(shard) for shard in shards.values()}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _Incomplete(f"{file.name} cannot be read ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise _Incomplete(f"{file.name} is not a JSON object")
    return value


# The network

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def is_offline() -> bool:
    """Whether the environment says that there is no network."""
    return any(
        os.environ.get(key, "").upper() in {"1", "ON", "YES", "TRUE"}
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def reach(seconds: float = 10.0) -> None:
    """Ask the hub for its front page's headers. Raises: HubError where it does not answer."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    address = _endpoint() or "https://huggingface.co"
    try:
        urlopen(Request(address, method="HEAD"), timeout=seconds).close()
    except HTTPError:
        return  # it answered, whatever it thinks of the question
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise HubError(f"{address} does not answer ({_one_line(reason)})") from None


def _find(reference: Reference, select: _Select, components: tuple[str, ...] = ()) -> Listing:
    """What the cache holds, where that is whole and was seen lately; else what the hub says."""
    cached, lacking = None, ""
    try:
        cached = _cached(reference, select, components)
        if cached.is_current or is_offline():
            return cached
    except _Incomplete as error:
        lacking = str(error)
    if is_offline():
        raise HubError(
            f"{reference}: offline (HF_HUB_OFFLINE), and {lacking}; fetch it once with a network, "
            f"or set HF_HOME to the cache that has it (now {cache_folder()})"
        )
    try:
        commit, there = _ask(reference, lacking)
        if cached is not None and _is_unchanged(cached, commit, there):
            _remember(reference, cached.commit)
            return replace(cached, is_current=True)
        try:
            files, entry = select(set(there), True)
        except (_Unusable, _Incomplete) as error:
            raise HubError(f"{reference} cannot be used: {error}") from None
    except HubError as error:
        if cached is None:
            raise
        why = str(error).removeprefix(f"{reference.name}: ")
        logger.warning(
            "%s: the copy in the cache is used, there may be a newer one: %s", reference, why
        )
        return cached
    if cached is not None:
        logger.warning(
            "%s has changed on the hub; the old one is %s@%s",
            reference,
            reference.name,
            cached.commit,
        )
    listed = {file: there[file] for file in sorted(files)}
    return Listing(reference, commit, listed, entry, components)


def _is_unchanged(cached: Listing, commit: str, there: Mapping[str, File]) -> bool:
    """Whether the files that a model needs are the same at another commit."""
    same = all(file.digest and there.get(name) == file for name, file in cached.files.items())
    return same or commit == cached.commit


def _ask(reference: Reference, lacking: str) -> tuple[str, dict[str, File]]:
    """The commit that a revision stands at, and all its files, by the hub."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint(), library_name="mlxdiff").model_info(
            reference.name, revision=reference.revision, files_metadata=True, timeout=15
        )
    except Exception as error:
        raise _explained(error, reference, lacking) from error
    return str(info.sha), {
        file.rfilename: File(
            int(file.size or 0), str(getattr(file.lfs, "sha256", None) or file.blob_id or "")
        )
        for file in info.siblings or ()
    }


def fetch(listing: Listing, progress: Progress | None = None) -> Path:
    """Bring the files of a listing into the cache, those that are not there yet.

    Args:
        listing: by `find`.
        progress: told how far the fetch is.

    Returns: the snapshot folder, or what `Listing.entry` names in it.

    Raises: as `resolve`.
    """
    reference = listing.reference
    snapshot = _snapshot(reference, listing.commit)
    if missing := _missing(listing):
        if is_offline():
            raise HubError(f"{reference}: offline (HF_HUB_OFFLINE), and not whole in the cache")
        require_space(
            {snapshot: missing_bytes(listing)},
            f"{reference}: the download",
            "make room, or set HF_HOME to a folder on another disk",
        )
        _fetch(listing, missing, progress)
        try:
            _check_whole(snapshot, set(listing.files), listing.components)
        except _Incomplete as error:
            raise HubError(f"{reference} cannot be used: {error}") from None
    if listing.is_current:
        _remember(reference, listing.commit)
    return snapshot / listing.entry


def fetch_documents(listing: Listing) -> Path:
    """Bring all files of a listing but the weights into the cache: what a model says of itself.

    Returns: the snapshot folder. Raises: as `resolve`.
    """
    documents = {n: f for n, f in _missing(listing).items() if not n.endswith(_FILES)}
    if not is_offline():  # then `fetch` says what is missing
        _fetch(listing, documents, None)
    return _snapshot(listing.reference, listing.commit)


def missing_bytes(listing: Listing) -> int:
    """Bytes of a listing that the cache does not hold yet, under any commit."""
    blobs = _repo_folder(listing.reference) / "blobs"
    missing = _missing(listing).values()
    return sum(f.size for f in missing if not f.digest or not (blobs / f.digest).exists())


def _missing(listing: Listing) -> dict[str, File]:
    snapshot = _snapshot(listing.reference, listing.commit)
    return {n: file for n, file in listing.files.items() if not _is_there(snapshot / n, file)}


def _is_there(path: Path, file: File) -> bool:
    try:
        return path.stat().st_size == file.size or not file.digest
    except OSError:
        return False


def _fetch(listing: Listing, missing: Mapping[str, File], progress: Progress | None) -> None:
    total = listing.size
    done = total - sum(file.size for file in missing.values())
    for name, file in missing.items():

        def tell(size: int, name: str = name, done: int = done) -> None:
            if progress is not None:
                progress(min(done + size, total), total, name)

        try:
            # Twice: what arrives damaged is fetched anew.
            if not (_download(listing, name, file, tell) or _download(listing, name, file, tell)):
                raise HubError(
                    f"{listing.reference}: {name} arrived damaged twice (its digest is not the "
                    "hub's); try again later"
                )
        except HubError:
            raise
        except Exception as error:
            raise _explained(error, listing.reference, "it is not whole in the cache") from error
        tell(file.size)
        done += file.size


def _is_sound(path: Path, file: File) -> bool:
    """Whether a file is what the hub says it is, by size and digest."""
    if not file.digest:
        return True
    size = path.stat().st_size
    if size != file.size:
        return False
    digest = hashlib.sha256()
    if len(file.digest) == 40:  # git's name of a blob
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as opened:
        while piece := opened.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest() == file.digest


def _download(listing: Listing, name: str, file: File, tell: Callable[[int], None]) -> bool:
    """Bring one file into the cache; False where it arrived damaged, it is then not there.

    Large ones first come by themselves, for huggingface_hub 2 begins anew where a download broke
    off; it then finds the blob in its place and links to it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    is_large = len(file.digest) == 64
    try:
        if is_large and not _download_blob(listing, name, file, tell):
            return False
        path = Path(
            hf_hub_download(
                listing.reference.name,
                name,
                revision=listing.commit,
                cache_dir=cache_folder(),
                endpoint=_endpoint(),
                library_name="mlxdiff",
            )
        )
    finally:
        if not disabled:
            enable_progress_bars()
    if is_large or _is_sound(path, file):
        return True
    if path.is_symlink():
        (path.parent / os.readlink(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return False


def _download_blob(listing: Listing, name: str, file: File, tell: Callable[[int], None]) -> bool:
    """Fetch a large file to its place in the cache, from where an earlier try broke off."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    reference = listing.reference
    blob = _repo_folder(reference) / "blobs" / file.digest
    partial = blob.with_name(f"{file.digest}.mlxdiff.incomplete")
    lock = cache_folder() / ".locks" / blob.parent.parent.name / f"{file.digest}.mlxdiff.lock"
    blob.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"{name} is being fetched by another process (%s); waiting for it"
    with exclusive(lock, lambda pid: logger.warning(waiting, pid)):
        if blob.exists():
            if blob.stat().st_size == file.size:
                return True
            blob.unlink()
        with partial.open("ab") as opened:
            if opened.tell() > file.size:
                opened.truncate(0)
            tell(opened.tell())
            http_get(
                hf_hub_url(reference.name, name, revision=listing.commit, endpoint=_endpoint()),
                _Counted(opened, tell),  # type: ignore[arg-type]
                resume_size=opened.tell(),
                headers={**build_hf_headers(library_name="mlxdiff"), "Accept-Encoding": "identity"},
                expected_size=file.size,
            )
        if not _is_sound(partial, file):
            partial.unlink()
            return False
        partial.replace(blob)
        return True


class _Counted:
    """A file that tells how far it has come."""

    def __init__(self, file: Any, tell: Callable[[int], None]) -> None:
        self._file, self._tell = file, tell

    def write(self, data: bytes) -> int:
        written: int = self._file.write(data)
        self._tell(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _explained(error: Exception, reference: Reference, lacking: str) -> HubError:
    """What went wrong in words of the user's, with the way out."""
    from huggingface_hub import errors

    name, revision = reference.name, reference.revision
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError: first
        return HubError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{name}: the hub has no such model, or it is private; check the spelling, or log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{name} has no revision {revision!r}; its branches and tags: "
            f"https://huggingface.co/{name}/tree/main"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return HubError(
            f"{name}: the hub answered with an error ({status}); try again later, "
            "what has arrived is kept"
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return HubError(
            f"{name}: cannot be written to the cache {cache_folder()} ({error.strerror}); "
            "make room, or set HF_HOME to another folder"
        )
    also = f", and {lacking}" if lacking else ""
    return HubError(
        f"{name}: cannot be fetched ({_one_line(error)}){also}; check the network and run "
        "the command again, what has arrived is kept"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
