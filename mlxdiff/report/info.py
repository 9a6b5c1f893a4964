"""Describe any path, for ``mlxdiff info``: a picture, a model, or a file that is added to one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlxdiff import library
from mlxdiff.adapters import lora, textual_inversion
from mlxdiff.convert import describe as describe_model
from mlxdiff.convert import open_source, recognise
from mlxdiff.convert.checkpoint import find_weights
from mlxdiff.convert.upscaler import structure
from mlxdiff.errors import CheckpointError, ConfigError, UsageError, argument
from mlxdiff.loading import BUILTIN
from mlxdiff.machine.disk import read_json
from mlxdiff.pictures import videos
from mlxdiff.report.bench import expected_memory
from mlxdiff.store.folder import MANIFEST, open_folder
from mlxdiff.weights.files import open_file

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", *videos.FILMS)
# Class in config.json -> kind, in the words of ``recognise``.
_CLASSES = {
    "AutoencoderKL": "a VAE, alone",
    "AutoencoderTiny": "a tiny VAE (TAESD)",
    "CLIPTextModel": "a text encoder, alone",
    "CLIPTextModelWithProjection": "a text encoder, alone",
    "CLIPVisionModelWithProjection": "a CLIP image encoder",
    "ControlNetModel": "a ControlNet",
    "ControlNetUnionModel": "a ControlNet-Union",
    "MotionAdapter": "an AnimateDiff motion adapter",
    "T2IAdapter": "a T2I-Adapter",
    "UNet2DConditionModel": "a U-Net in diffusers naming, alone",
}


def describe(
    path: str | None = None, config: str | None = None, verify: bool = False
) -> dict[str, Any]:
    """Describe a path as plain JSON values.

    Args:
        path: a picture, a weight file, a folder, a hub id or a short name. None: the built-in
            model.
        config: for a single file, see ``convert.convert``.
        verify: compare the files of a converted folder with their hashes.
    Returns: kind, use and more, by the kind.
    Raises: UsageError, CheckpointError, ConfigError, HubError.
    """
    if verify:
        return _model(path, config) | {"verified": _verified(path)}
    here = None if path is None else Path(path)
    if here is not None and os.path.isfile(here) and _is_picture(here):
        if textual_inversion.is_embedding(here):
            return textual_inversion.describe(here)
        return videos.describe(here)
    if here is not None and os.path.exists(here):
        if lora.is_lora(here):
            return lora.describe(here)
        if textual_inversion.is_embedding(here):
            return textual_inversion.describe(here)
        if here.is_file():
            return _file(here, config)
        if not (here / "model_index.json").is_file() and (files := lora.files_of(here)):
            return recognise.describe(files[0]) | {"path": str(here)}
        if (here / "config.json").is_file() and not (here / "model_index.json").is_file():
            return _component(here)
    return _model(path, config)


def _is_picture(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4)
    return head in _MAGIC or head[:3] in _MAGIC or path.suffix.lower() in _SUFFIXES


def _file(path: Path, config: str | None) -> dict[str, Any]:
    """Describe a weight file: as a model if it can be opened as one, else by its tensors."""
    facts = recognise.describe(path)
    if (upscaler := structure(path, open_file(path).tensors)) is not None:
        return facts | {"architecture": upscaler.description, "scale": upscaler.scale}
    try:
        model = _model(str(path), config)
    except (CheckpointError, ConfigError, UsageError) as error:
        if config is not None:
            raise
        if facts["kind"].startswith(("a whole model", "a U-Net")):
            facts["notes"] = [str(error).removeprefix(f"{path}: ")]
        return facts
    return model | {"use": recognise.use("a whole model"), "written": facts["written"]}


def _component(folder: Path) -> dict[str, Any]:
    """Describe a folder that holds one network."""
    data = read_json(folder / "config.json")
    name = data.get("_class_name") or (data.get("architectures") or ["a network of no class"])[0]
    whole = folder.resolve()
    entries, _ = find_weights(whole.parent, {whole.name: whole}, None, ("", "fp16"))
    facts = recognise.describe(entries[whole.name])
    words = _CLASSES.get(name, name)
    return facts | {"kind": words, "path": str(folder), "use": recognise.use(words)}


def _model(path: str | None, config: str | None) -> dict[str, Any]:
    place = BUILTIN if path is None else library.local_path(path) or path
    facts = describe_model(place, config)
    memory = expected_memory(open_source(place, config=config))
    return facts | ({} if memory is None else {"memory": memory})


def _verified(path: str | None) -> str:
    folder = Path(BUILTIN if path is None else library.local_path(path) or path)
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{path}: is not a converted folder, so there are no hashes to compare; leave "
            f"{argument('verify')} out, or convert it (mlxdiff convert)"
        )
    model = open_folder(folder)
    model.verify()
    return f"{len(model.manifest['files'])} files have the hashes of {MANIFEST}"
