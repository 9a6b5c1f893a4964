"""Open a model of any form: diffusers folder, converted folder, single file or hub id."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from mlxdiff.convert import detect, original_config
from mlxdiff.convert.checkpoint import DiffusersFolder
from mlxdiff.convert.singlefile import TOKENIZER, SingleFile
from mlxdiff.errors import CheckpointError, ConfigError, UsageError, argument
from mlxdiff.machine.disk import identity, read_json
from mlxdiff.store import catalogue, hub
from mlxdiff.store.cache import snapshot_of
from mlxdiff.store.folder import MANIFEST, ConvertedFolder, ModelFolder, Progress, open_folder
from mlxdiff.store.reference import is_address, parse
from mlxdiff.store.selection import PREFERRED_VARIANT, Listing

Model: TypeAlias = DiffusersFolder | SingleFile | ConvertedFolder


def open_source(
    path: str | os.PathLike[str],
    revision: str | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    ema: bool = False,
) -> Model:
    """Open a model of any form.

    Args:
        path: a diffusers folder, a converted folder, a single file, a hub id
            ``org/name[/FILE][@revision]`` or a short name (``mlxdiff.store.catalogue``).
        revision: branch, tag or commit of a hub id.
        variant: weights variant, for example "fp16"; "" for the plain files. Default: the plain
            files of a folder, the fp16 files of a hub model (half the bytes); each only if present.
        progress: called while files are fetched from the hub.
        config, prediction_type, zero_snr, ema: for a single file, see ``SingleFile``.
    Returns: the model, after all checks that do not read the weights.
    Raises: CheckpointError, ConfigError, HubError, UsageError.
    """
    options: dict[str, Any] = {
        "config": config,
        "prediction_type": prediction_type,
        "zero_snr": zero_snr,
        "ema": ema,
    }
    path = catalogue.expand(path)
    folder = snapshot_of(Path(path))
    if (
        isinstance(path, str)
        and not os.path.exists(folder)
        and (reference := parse(path, revision))
    ):
        listing = hub.find(reference, variant)
        if listing.entry not in listing.files:
            _only_single_files(path, options)
            return _open_hub(listing, variant, progress)
        single = SingleFile(
            hub.fetch(listing, progress),
            progress=progress,
            **options,
        )
        name = f"{reference.name}/{listing.entry}"
        single.provenance |= {"source": name, "revision": listing.commit}
        return single
    if is_address(path):
        raise UsageError(
            f"{path}: only addresses of models on huggingface.co are fetched; download the file, "
            "and give its path"
        )
    if revision is not None:
        raise UsageError(
            f"{path} is not a hub id (org/name), so it has no revision {revision!r}; leave the "
            "revision out"
        )
    if os.path.isfile(folder) and detect.is_weights(folder):
        if variant:
            raise UsageError(
                f"{path} is a single file, so it has no variant {variant!r}; leave the variant out"
            )
        return SingleFile(folder, progress=progress, **options)
    _only_single_files(path, options)
    if os.path.isfile(folder / MANIFEST):
        if variant:
            raise UsageError(
                f"{path} is a converted folder, so it has no variant {variant!r}; leave the "
                "variant out"
            )
        return open_folder(folder)
    return DiffusersFolder(folder, variant=variant or None)


# A source that changes while it is read would give a mixture of two models.

Identity: TypeAlias = tuple[int, ...]
"""Numbers that change when a file is replaced or written to."""


def identities(*places: str | os.PathLike[str] | None) -> dict[Path, Identity]:
    """Return the identity of these files, and of the files in these folders and their folders.

    A single file brings what may be read beside it: a tokenizer, a .yaml. A place that is not on
    this disk (a hub id) has none.
    """
    found: dict[Path, Identity] = {}
    for place in places:
        path = Path() if place is None else Path(place)
        if place is None or not path.exists():
            continue
        if path.is_file():
            files = [path, *path.parent.glob(f"{TOKENIZER}/*"), *original_config.places(path)]
        else:
            files = [*path.glob("*"), *path.glob("*/*")]
        found |= {file: identity(file) for file in files if file.is_file()}
    return found


def used_files(model: Model, tokenizer: bool = True) -> dict[str, Path]:
    """Return every file that a model is read from: name -> path.

    Args:
        tokenizer: whether the tokenizer is read, too.
    """
    base = model.base if isinstance(model, SingleFile) else model
    files = {} if isinstance(model, ConvertedFolder) else model.source_files()
    if isinstance(model, SingleFile):
        files |= model.beside_files(tokenizer)
    if isinstance(base, ModelFolder):
        files |= {f"{base.path}/{name}": path for name, path in base.document_paths().items()}
    if isinstance(base, ConvertedFolder):
        files |= {f"{base.path}/{name}": base.path / name for name in base.manifest["files"]}
    return files


def require_unchanged(files: Iterable[Path], seen: Mapping[Path, Identity]) -> None:
    """Raise CheckpointError if a file is not the one that it was."""
    for path in files:
        try:
            same = path not in seen or identity(path) == seen[path]
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{path}: changed while it was converted; wait until it is complete, then run the "
                "command again"
            )


def _only_single_files(path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Refuse options that are for single files. Raises: UsageError."""
    for name, value in options.items():
        if value is not None and not (name == "ema" and not value):
            raise UsageError(
                f"{path} is not a single file; {argument(name)} is for single files only"
            )


def _open_hub(
    listing: Listing, variant: str | None, progress: Progress | None
) -> DiffusersFolder | ConvertedFolder:
    """Open a folder of the hub. Only the files that ``hub.find`` selected are used."""
    check_published(listing)
    folder = hub.fetch(listing, progress)
    if (folder / MANIFEST).is_file():
        return open_folder(folder)
    prefer = (PREFERRED_VARIANT, "") if variant is None else ("", PREFERRED_VARIANT)
    return DiffusersFolder(
        folder,
        name=listing.reference.name,
        revision=listing.commit,
        variant=variant or None,
        prefer=prefer,
    )


def check_published(listing: Listing) -> None:
    """Refuse an unsupported hub model before its weights are fetched.

    A single file cannot be checked from outside. Raises: CheckpointError, ConfigError, HubError.
    """
    if listing.entry in listing.files or MANIFEST in listing.files:
        return
    folder = hub.fetch_documents(listing)
    index = folder / "model_index.json"
    if not index.is_file():
        return
    try:
        detect.check_model_index(read_json(index), folder)
        ModelFolder(folder)  # reads the configs
    except (CheckpointError, ConfigError) as error:
        # Users know a model by its reference, not by its folder in the cache.
        text = str(error).replace(str(folder), str(listing.reference))
        raise type(error)(text) from None
