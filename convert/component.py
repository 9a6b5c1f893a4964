"""Networks that come without a model: in their own folder, or in the folder of another model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlxdiff.convert import recognise
from mlxdiff.convert.checkpoint import find_weights, map_component, open_component
from mlxdiff.convert.keymap import Layout
from mlxdiff.convert.sources import open_source
from mlxdiff.convert.vae_file import open_vae_file
from mlxdiff.errors import CheckpointError
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import ComponentConfig, read_vae
from mlxdiff.store import catalogue, hub
from mlxdiff.store.cache import snapshot_of
from mlxdiff.store.folder import Progress
from mlxdiff.store.reference import parse
from mlxdiff.weights.pickles import PickleFile
from mlxdiff.weights.tensors import LazyTensor, TensorFile

VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Component:
    """A network that can be loaded.

    Attributes:
        config: its config, from mlxdiff.networks.config.
        tensors: returns its tensors in our names and layout, complete and checked. The caller may
            change the dict.
        provenance: source and, from the hub, revision.
    """

    config: Any
    tensors: Callable[[], dict[str, LazyTensor]] = field(repr=False)
    provenance: dict[str, Any]


def open_vae(
    path: str | os.PathLike[str],
    variant: str | None = None,
    progress: Progress | None = None,
    own: Component | None = None,
) -> Component:
    """Open a VAE.

    Args:
        path: an AutoencoderKL or AutoencoderTiny (folder with config.json and weights, hub id or
            short name), one file with a VAE (``vae_file``), or a whole model, whose VAE is used.
        variant: weights variant.
        progress: called while files are fetched.
        own: the VAE that it replaces. A file without a config takes the scale of the latents from
            it, and must be trained from it.
    Raises: CheckpointError, ConfigError, HubError; UsageError for a VAE of another family.
    """
    folder, provenance = find_component(path, "vae", variant, progress)
    if folder.is_file():
        config, tensors = open_vae_file(
            folder, None if own is None else own.config, None if own is None else own.tensors
        )
        return Component(config, tensors, provenance)
    if not (folder / "config.json").is_file():
        model = open_source(path, variant=variant, progress=progress)
        return Component(model.config("vae"), lambda: model.tensors("vae"), model.provenance)
    data = read_component_config(folder, VAE_CLASSES, "VAE")
    config = read_vae(data, str(folder / "config.json"))
    return open_folder_of("vae", folder, config, provenance, variant)


def find_component(
    path: str | os.PathLike[str],
    component: str,
    variant: str | None = None,
    progress: Progress | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Return the path of a network's files, fetched if necessary, and its provenance.

    Args:
        path: a folder or file, a short name, or a hub id (of the network, of one file, or of a
            model with a folder of this name).
        component: name of the folder in a whole model.
    """
    path = catalogue.expand(path)
    folder = snapshot_of(Path(path))
    reference = None if os.path.exists(folder) else parse(str(path))
    if reference is None:
        return folder, {"source": folder.resolve().name}
    if reference.file:
        listing = hub.find(reference)
        source = {"source": f"{reference.name}/{listing.entry}", "revision": listing.commit}
        return hub.fetch(listing, progress), source
    folder = hub.resolve_component(str(path), component, variant, progress=progress)
    inside = folder.as_posix().endswith(f"/{component}")
    commit = folder.parents[component.count("/")].name if inside else folder.name
    return folder, {"source": reference.name, "revision": commit}


def read_component_config(folder: Path, classes: tuple[str, ...], what: str) -> dict[str, Any]:
    """Read a network's config.json. Raises: CheckpointError if it has none of these classes."""
    data = read_json(folder / "config.json")
    found = data.get("_class_name") or (data.get("architectures") or ["component"])[0]
    if found not in classes:
        words = recognise.CLASSES.get(found)
        way = f"expected {' or '.join(classes)}" if words is None else recognise.use(words)
        raise CheckpointError(f"{folder}: is a {found}, not a {what}; {way}")
    return data


def open_folder_of(
    component: str,
    folder: Path,
    config: ComponentConfig,
    provenance: dict[str, Any],
    variant: str | None = None,
) -> Component:
    """Open a network in diffusers' form: a folder with config.json and weights."""
    whole = folder.resolve()
    entries, _ = find_weights(whole.parent, {whole.name: whole}, variant, ("", "fp16"))
    files = open_component(entries[whole.name], component, config)
    return Component(config, lambda: files.read(config), provenance)


class AddedNetwork(NamedTuple):
    """A kind of network that is added to a model.

    Attributes:
        component: its name among the components.
        word: the word for it in messages.
        classes: its class names in config.json.
        read: makes its config of the content of config.json, and of the place for messages.
    """

    component: str
    word: str
    classes: tuple[str, ...]
    read: Callable[[dict[str, Any], str], ComponentConfig]


def open_added(
    kind: AddedNetwork,
    path: str | os.PathLike[str],
    open_file: Callable[[Path, dict[str, Any]], Component],
    check: Callable[[Any], None],
    variant: str | None,
    progress: Progress | None,
) -> Component:
    """Open a network that is added to a model: one file, or a folder in diffusers' form.

    Args:
        path: the file or folder, or a hub id of either.
        open_file: opens one file; takes its path and the provenance.
        check: refuses a config that does not fit the model.
        variant, progress: as of ``find_component``.
    Raises: CheckpointError, ConfigError, HubError.
    """
    place, provenance = find_component(path, kind.component, variant, progress)
    if os.path.isfile(place):
        found = open_file(place, provenance)
        check(found.config)
        return found
    if not os.path.exists(place):
        raise CheckpointError(
            f"{place}: no such file or folder, and not a hub id (org/name); give a {kind.word}: a "
            "folder with config.json, one file, or a hub id"
        )
    if not os.path.isfile(place / "config.json"):
        whole = os.path.isfile(place / "model_index.json")
        raise CheckpointError(
            f"{place}: {'is a whole model' if whole else 'has no config.json'}; give a "
            f"{kind.word}: a folder with config.json and weights, or one file"
        )
    data = read_component_config(place, kind.classes, kind.word)
    config = kind.read(data, str(place / "config.json"))
    check(config)
    return open_folder_of(kind.component, place, config, provenance, variant)


def open_mapped(
    file: PickleFile | TensorFile,
    tensors: dict[str, LazyTensor],
    layout: Layout,
    config: ComponentConfig,
    provenance: dict[str, Any],
) -> Component:
    """Open a network that is a file of its own.

    Args:
        file: the file, opened.
        tensors: of the network, by the names that the layout spells.
    Raises: CheckpointError.
    """
    refused = file.refused if isinstance(file, PickleFile) else {}
    files = map_component(file.path, tensors, layout, config, str(file.path), refused)
    return Component(config, lambda: files.read(config), provenance)
