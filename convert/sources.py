"""Whatever a model is given as, opened: folder, converted folder, single file or hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from mlxdiff.convert import detect
from mlxdiff.convert.checkpoint import DiffusersFolder
from mlxdiff.convert.singlefile import SingleFile
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.machine.disk import read_json
from mlxdiff.store import catalogue, hub
from mlxdiff.store.folder import MANIFEST, ConvertedFolder, ModelFolder, Progress, open_folder
from mlxdiff.store.reference import parse
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
    ema: bool = False,
) -> Model:
    """Open a model as people have it.

    Args:
        path: a diffusers folder, a converted folder, a single file, a hub id
            ``org/name[/FILE][@revision]`` or a short name (``mlxdiff.store.catalogue``).
        revision: for a hub id, the branch, tag or commit.
        variant: weights variant, "fp16" for example, "" for the plain files; default: of a folder
            the plain files, of the hub fp16 (half the bytes), each where there are any.
        progress: called while files are fetched from the hub.
        config, prediction_type, ema: for a single file, as ``SingleFile`` takes them.
    Returns: the model, everything checked that can be without reading the weights.
    Raises: CheckpointError, ConfigError, HubError, UsageError.
    """
    path = catalogue.expand(path)
    folder = Path(path)
    if isinstance(path, str) and not folder.exists() and (reference := parse(path, revision)):
        listing = hub.find(reference, variant)
        if listing.entry not in listing.files:
            _only_single_files(path, config, prediction_type, ema)
            return _open_hub(listing, variant, progress)
        single = SingleFile(
            hub.fetch(listing, progress),
            config=config,
            prediction_type=prediction_type,
            ema=ema,
            progress=progress,
        )
        name = f"{reference.name}/{listing.entry}"
        single.provenance |= {"source": name, "revision": listing.commit}
        return single
    if revision is not None:
        raise UsageError(f"{path} is no hub id (org/name), so it has no revision {revision!r}")
    if folder.is_file() and detect.is_weights(folder):
        if variant:
            raise UsageError(f"{path} is a single file, so it has no variant {variant!r}")
        return SingleFile(
            folder, config=config, prediction_type=prediction_type, ema=ema, progress=progress
        )
    _only_single_files(path, config, prediction_type, ema)
    if (folder / MANIFEST).is_file():
        if variant:
            raise UsageError(f"{path} is a converted folder, so it has no variant {variant!r}")
        return open_folder(folder)
    return DiffusersFolder(folder, variant=variant or None)


def _only_single_files(
    path: str | os.PathLike[str], config: object, prediction_type: object, ema: bool
) -> None:
    given = {"--config": config, "--prediction-type": prediction_type, "--ema": ema or None}
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{path} is no single file; {name} is for single files only")


def _open_hub(
    listing: Listing, variant: str | None, progress: Progress | None
) -> DiffusersFolder | ConvertedFolder:
    """A folder of the hub: what ``hub.find`` chose is opened, whatever else is cached."""
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
    """Refuse a model of the hub that we cannot open, before its weights are fetched.

    A single file cannot be told from outside. Raises: CheckpointError, ConfigError, HubError.
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
        # Nobody knows a model by its folder in the cache.
        said = str(error).replace(str(folder), str(listing.reference))
        raise type(error)(said) from None
