"""A VAE that does not come with its model: a folder of its own, or that of another model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxdiff import hub, known
from mlxdiff.config import VAEConfig, read_json, read_vae
from mlxdiff.convert.checkpoint import find_weights, open_component
from mlxdiff.convert.sources import open_source
from mlxdiff.errors import CheckpointError
from mlxdiff.weights import LazyTensor, Progress

VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Component:
    """A network that can be loaded.

    Attributes:
        config: what it is.
        tensors: gives its tensors, with our names and layout, complete and checked; the caller's to
            pop.
        provenance: source and, from the hub, revision.
    """

    config: VAEConfig
    tensors: Callable[[], dict[str, LazyTensor]] = field(repr=False)
    provenance: dict[str, Any]


def open_vae(
    path: str | os.PathLike[str],
    variant: str | None = None,
    progress: Progress | None = None,
) -> Component:
    """Open a VAE.

    Args:
        path: an AutoencoderKL or AutoencoderTiny (folder with config.json and weights, hub id or
            short name), or a whole model, whose VAE is taken.
        variant: weights variant.
        progress: called while files are fetched.
    Raises: CheckpointError, ConfigError, HubError.
    """
    path = known.expand(path)
    folder, provenance = Path(path), {"source": Path(path).resolve().name}
    if not folder.exists() and (reference := hub.parse(str(path))) and not reference.file:
        folder = hub.resolve_component(str(path), "vae", variant, progress=progress)
        commit = folder.parent.name if folder.name == "vae" else folder.name
        provenance = {"source": reference.name, "revision": commit}
    if not (folder / "config.json").is_file():
        model = open_source(path, variant=variant, progress=progress)
        return Component(model.config("vae"), lambda: model.tensors("vae"), model.provenance)
    data = read_json(folder / "config.json")
    found = data.get("_class_name") or (data.get("architectures") or ["component"])[0]
    if found not in VAE_CLASSES:
        raise CheckpointError(
            f"{folder}: is a {found}, not a VAE; expected {' or '.join(VAE_CLASSES)}"
        )
    config = read_vae(data, str(folder / "config.json"))
    whole = folder.resolve()
    entries, _ = find_weights(whole.parent, {whole.name: whole}, variant, ("", "fp16"))
    files = open_component(entries[whole.name], "vae", config)
    return Component(config, lambda: files.read(config), provenance)
