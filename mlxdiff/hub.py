"""Models of the Hugging Face hub: which files of a repo, at which revision, from which cache.

A model that the cache holds complete is used as it is, without a look at the network: the same
command gives the same picture, offline too. Else the files that are needed, and no others, are
fetched with `huggingface_hub` (resumed where a fetch broke off) into its cache, shared with other
programs.

Source: huggingface.co/docs/huggingface_hub, "Understand caching" (the layout
`models--org--name/refs`, `snapshots/<commit>`) and "Environment variables"; diffusers' file names
for variants and shards.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import HubError

COMPONENTS = (
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
    "unet",
    "vae",
)
"""The folders of a diffusers repo that mlxdiff reads."""

PREFERRED_VARIANT = "fp16"

_INDEX = "model_index.json"
_WITHOUT_WEIGHTS: dict[str, tuple[set[str], ...]] = {
    "scheduler": ({"scheduler_config.json"},),
    "tokenizer": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
    "tokenizer_2": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
}
"""Component -> the sets of files of which one must be there."""
_MAY_HELP = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<a>\w+))?(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<b>\w+))?"
    r"\.safetensors(?P<index>(?:\.(?P<c>\w+))?\.index(?:\.(?P<d>\w+))?\.json)?"
)
_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REPO_ID = re.compile(rf"(?P<id>{_NAME}/{_NAME})(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the file that is being fetched."""


def is_repo_id(text: str) -> bool:
    """Whether a text has the form `org/name[@revision]`. A folder may be called so, too."""
    match = _REPO_ID.fullmatch(text)
    return match is not None and ".." not in text and "--" not in match["id"]


def resolve(
    repo: str,
    variant: str | None = None,
    *,
    components: Sequence[str] = COMPONENTS,
    progress: Progress | None = None,
) -> Path:
    """The local folder of a hub model, fetched where the cache does not hold it yet.

    Args:
        repo: `org/name`, with `@branch`, `@tag` or `@commit` where it is not `main`.
        variant: of the weights. None: fp16 where a component has it, else the plain files (half the
            bytes). "": the plain files. Another: that one where a component has it, else the plain
            files.
        components: the parts that are needed, of those that the model has.
        progress: told how far a fetch is.

    Returns: the snapshot folder in the cache; its name is the commit.

    Raises:
        HubError: not a repo id, no such repo or revision, gated, not a diffusers model, no network,
            or offline and not in the cache.
    """
    match = _REPO_ID.fullmatch(repo)
    if match is None or not is_repo_id(repo):
        raise HubError(f"{repo!r} is no model of the hub; expected org/name[@revision]")
    name, revision = match["id"], match["revision"] or "main"
    cached = _cached(name, revision)
    lacking = "it is not in the cache"
    if cached is not None:
        try:
            _check_complete(cached, variant, components)
            return cached
        except _Incomplete as error:
            lacking = f"its copy in the cache is incomplete ({error})"
    if _offline():
        raise HubError(
            f"{repo}: offline (HF_HUB_OFFLINE), and {lacking}; fetch it once with a network, "
            f"or set HF_HOME to the cache that has it (now {cache_folder()})"
        )
    return _fetch(name, revision, variant, components, progress, lacking)


def cache_folder() -> Path:
    """Where huggingface_hub keeps models, by the same environment variables."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(key):
            return Path(os.path.expandvars(os.environ[key])).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.path.expandvars(home)).expanduser() / "hub"


# Which files


class _Incomplete(Exception):
    """A folder or listing does not hold a whole model; the text says what is missing."""


class _Unusable(Exception):
    """What is there cannot be used, and fetching more would not help; the text says why."""


def needed_files(
    files: Iterable[str], variant: str | None = None, components: Sequence[str] = COMPONENTS
) -> list[str]:
    """The files of a diffusers repo that mlxdiff needs, out of all.

    Never those beside them: other variants, pickles, ONNX, Flax, OpenVINO, single-file checkpoints,
    the safety checker.

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


def _select(files: set[str], variant: str | None, components: Sequence[str]) -> list[str]:
    if _INDEX not in files:
        single = sorted(f for f in files if "/" not in f and f.endswith((".safetensors", ".ckpt")))
        hint = f"; {single[0]} is a single-file checkpoint" if single else ""
        raise _Unusable(f"it holds no {_INDEX}, so it is not a model in diffusers' format{hint}")
    folders: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.partition("/")
        if folder in components and name and "/" not in name:
            folders.setdefault(folder, set()).add(name)
    wanted = {_INDEX, "mlxdiff.json"} & files
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
            variants |= set(weights)
            chosen = {"config.json"} | _pick(weights, variant, folder, names)
        wanted |= {f"{folder}/{name}" for name in chosen}
    if variant and variant not in variants:
        known = ", ".join(sorted(filter(None, variants))) or "none"
        raise _Unusable(f"it has no variant {variant!r} (variants there: {known})")
    return sorted(wanted)


def _weights_by_variant(names: set[str]) -> dict[str, set[str]]:
    """Variant ("" for none) -> its file, or its index and shards."""
    whole: dict[str, set[str]] = {}
    shards: dict[str, set[str]] = {}
    indexed = set()
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match is None:
            continue
        variant = next((match[group] for group in "abcd" if match[group]), "")
        if match["index"]:
            indexed.add(variant)
        elif not match["shard"]:
            whole[variant] = {name}
            continue
        shards.setdefault(variant, set()).add(name)
    return {variant: found for variant, found in shards.items() if variant in indexed} | whole


def _pick(
    weights: dict[str, set[str]], variant: str | None, folder: str, names: set[str]
) -> set[str]:
    order = (PREFERRED_VARIANT, "") if variant is None else (variant, "")
    for choice in order:
        if choice in weights:
            return weights[choice]
    if len(weights) == 1 and variant is None:
        return next(iter(weights.values()))
    if any(name.endswith((".bin", ".ckpt", ".pt", ".pth")) for name in names):
        raise _Unusable(
            f"{folder}/ has its weights only as a pickle, which is not supported; try another "
            "revision (@refs/pr/1 often holds the safetensors files) or another repo of the model"
        )
    has = f" (only the variants {', '.join(sorted(weights))})" if weights else ""
    raise _Incomplete(f"{folder}/ has no safetensors weights{has}")


# The cache


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot folder of a revision, whole or not; None where there is none."""
    repo = cache_folder() / f"models--{name.replace('/', '--')}"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (repo / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    snapshot = repo / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _check_complete(snapshot: Path, variant: str | None, components: Sequence[str]) -> None:
    """Raises _Incomplete where a file of a model is not there; a link to nothing is not there."""
    paths = [*snapshot.glob("*"), *snapshot.glob("*/*")]
    present = {path.relative_to(snapshot).as_posix() for path in paths if path.is_file()}
    if _INDEX not in present:
        raise _Incomplete(f"{_INDEX} is missing")
    for folder in _components_of(snapshot / _INDEX):
        if folder in components and not any(file.startswith(f"{folder}/") for file in present):
            raise _Incomplete(f"{folder}/ is missing")
    try:
        files = _select(present, variant, components)
    except _Unusable as error:
        raise _Incomplete(str(error)) from None
    for file in files:
        if ".safetensors" in file and file.endswith(".json"):
            for shard in _shards_of(snapshot / file):
                if f"{file.partition('/')[0]}/{shard}" not in present:
                    raise _Incomplete(f"{file.partition('/')[0]}/{shard} is missing")


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
    except (OSError, ValueError) as error:
        raise _Incomplete(f"{file.name} cannot be read ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise _Incomplete(f"{file.name} is not a JSON object")
    return value


# The network

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def _offline() -> bool:
    return any(
        os.environ.get(key, "").upper() in {"1", "ON", "YES", "TRUE"}
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _fetch(
    name: str,
    revision: str,
    variant: str | None,
    components: Sequence[str],
    progress: Progress | None,
    lacking: str,
) -> Path:
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        info = HfApi(endpoint=endpoint).model_info(name, revision=revision, files_metadata=True)
        commit = str(info.sha)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        files = _select(set(sizes), variant, components)
        # The index first and under its branch's name: huggingface_hub then notes which commit the
        # branch stands at; the rest by that commit, so that a branch which moves cannot mix two.
        files.sort(key=lambda file: file != _INDEX)
        total, done = sum(sizes[file] for file in files), 0
        for file in files:
            at = revision if file == _INDEX else commit
            _download(name, file, at, endpoint, _from(done, total, file, progress))
            done += sizes[file]
            if progress is not None:
                progress(done, total, file)
    except (_Unusable, _Incomplete) as error:
        raise HubError(f"{name}@{revision} cannot be used: {error}") from None
    except Exception as error:
        raise _explained(error, name, revision, lacking) from error
    snapshot = _cached(name, commit)
    try:
        if snapshot is None:
            raise _Incomplete("it did not arrive in the cache")
        _check_complete(snapshot, variant, components)
    except _Incomplete as error:
        raise HubError(
            f"{name}@{revision} is not whole after the fetch: {error}; run the command again"
        ) from None
    return snapshot


def _from(
    start: int, total: int, file: str, progress: Progress | None
) -> Callable[[int], None] | None:
    """Turns bytes done of one file into bytes done of all."""
    if progress is None:
        return None
    return lambda done: progress(min(start + done, total), total, file)


def _download(
    name: str,
    file: str,
    revision: str,
    endpoint: str | None,
    progress: Callable[[int], None] | None,
) -> None:
    import inspect

    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        tqdm,
    )

    class Counter(tqdm):
        """huggingface_hub's progress bar, with our caller in the place of the terminal."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.done = kwargs.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self.done += n or 0
            if progress is not None:
                progress(int(self.done))

    more: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # since huggingface_hub 1.0
        more["tqdm_class"] = Counter
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        hf_hub_download(
            name,
            file,
            revision=revision,
            cache_dir=cache_folder(),
            endpoint=endpoint,
            library_name="mlxdiff",
            **more,
        )
    finally:
        if not disabled:
            enable_progress_bars()


def _explained(error: Exception, name: str, revision: str, lacking: str) -> HubError:
    """What went wrong in words of the user's, with the way out."""
    from huggingface_hub import errors

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
    return HubError(
        f"{name}: cannot be fetched ({_one_line(error)}), and {lacking}; check the network and run "
        "the command again, what has arrived is kept"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
