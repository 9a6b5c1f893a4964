"""IP-Adapters, and the CLIP image encoders that they were trained with."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdiff.convert import recognise
from mlxdiff.convert.component import (
    Component,
    find_component,
    open_folder_of,
    open_mapped,
    read_component_config,
)
from mlxdiff.convert.keymap import ip_adapter
from mlxdiff.errors import CheckpointError, UsageError, argument
from mlxdiff.networks.config import CLIPVisionConfig, IPAdapterConfig, UNet2DConditionConfig
from mlxdiff.store.folder import Progress
from mlxdiff.store.reference import Reference, parse
from mlxdiff.weights.pickles import open_tensors
from mlxdiff.weights.tensors import Shape

ENCODER = "image_encoder"
_TABLES = ("image_proj", "ip_adapter")
_LAYER = re.compile(r"image_proj\.layers\.(\d{1,3})\.")
_COLLECTION = "h94/IP-Adapter"  # the authors' repo, which has two image encoders
_LARGE = {("image", 1280), ("plus", 1664), ("full", 1664)}  # kind and features with ViT-bigG


def open_ip_adapter(
    path: str | os.PathLike[str],
    unet: UNet2DConditionConfig,
    image_encoder: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
) -> tuple[Component, Component]:
    """Open an IP-Adapter for a model, and its image encoder.

    Args:
        path: one file (safetensors or PyTorch's format) or its hub id
            (``h94/IP-Adapter/models/ip-adapter_sd15.safetensors``).
        unet: config of the model's U-Net.
        image_encoder: a CLIPVisionModelWithProjection: a folder with config.json, or a hub id.
            None: the folder ``image_encoder`` beside the file.
        variant: weights variant of the image encoder.
        progress: called while files are fetched.
    Returns: the adapter and the image encoder.
    Raises: CheckpointError, ConfigError, HubError, UsageError.
    """
    place, provenance = find_component(path, ENCODER, variant, progress)
    if not os.path.isfile(place):
        raise _not_an_adapter(place)
    file = open_tensors(place, _TABLES)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if face := recognise.face_adapter(file.tensors):
        raise CheckpointError(f"{place}: {recognise.FACE.format(face)}")
    config = _structure(shapes, place)
    _check_fit(config, unet, str(path))
    adapter = open_mapped(file, file.tensors, ip_adapter(config), config, provenance)
    encoder = _open_encoder(image_encoder, str(path), place, config, variant, progress)
    found = encoder.config.projection_dim if config.kind == "image" else encoder.config.hidden_size
    if found != config.feature_dim:
        raise UsageError(
            f"{path}: was trained with an image encoder of {config.feature_dim} features, but "
            f"{encoder.provenance['source']} has {found}; give the right image encoder "
            f"({argument('image_encoder')})"
        )
    return adapter, encoder


def _structure(shapes: Mapping[str, Shape], path: Path) -> IPAdapterConfig:
    """Derive the config from the shapes.

    Raises: CheckpointError if they are not the shapes of a known IP-Adapter.
    """
    if not any(name.startswith("image_proj.") for name in shapes):
        lazy = open_tensors(path, _TABLES).tensors
        raise CheckpointError(
            f"{path}: {recognise.refusal(lazy)}; expected an IP-Adapter (image_proj.* and "
            "ip_adapter.*)"
        )

    def shape(name: str, dimensions: int) -> Shape:
        found = shapes.get(name)
        if found is None or len(found) != dimensions or 0 in found:
            said = "is missing" if found is None else f"is {found}"
            raise CheckpointError(
                f"{path}: {name} {said}; the file is not a whole IP-Adapter; download it again"
            )
        return found

    def named(pattern: str) -> str:
        return next((name for name in shapes if re.fullmatch(pattern, name)), pattern)

    layers = sorted(
        int(match[1])
        for name in shapes
        if (match := re.fullmatch(r"ip_adapter\.(\d{1,4})\.to_k_ip\.weight", name))
    )
    if not layers or layers != list(range(1, 2 * len(layers), 2)):
        raise CheckpointError(f"{path}: its layers are numbered {layers}; expected 1, 3, 5, ...")
    keys = [shape(f"ip_adapter.{i}.to_k_ip.weight", 2) for i in layers]
    common: dict[str, Any] = {
        "cross_attention_dim": keys[0][1],
        "layer_widths": tuple(key[0] for key in keys),
    }
    if "image_proj.proj.3.weight" in shapes:
        features = shape("image_proj.proj.0.weight", 2)[1]
        return IPAdapterConfig("full", features, num_tokens=0, **common)
    if "image_proj.latents" in shapes:
        _, tokens, hidden = shape("image_proj.latents", 3)
        first = r"image_proj\.layers\.0\."
        config = IPAdapterConfig(
            "plus",
            shape("image_proj.proj_in.weight", 2)[1],
            num_tokens=tokens,
            hidden_dim=hidden,
            inner_dim=shape(named(first + r"(?:0|attn)\.to_q\.weight"), 2)[0],
            ff_dim=shape(named(first + r"(?:1\.1|ff\.1\.net\.0\.proj)\.weight"), 2)[0],
            depth=len({m[1] for n in shapes if (m := _LAYER.match(n))}),
            **common,
        )
        if config.inner_dim % 64:
            raise CheckpointError(
                f"{path}: its resampler has a width of {config.inner_dim}; expected a multiple of "
                "64, the width of a head"
            )
        return config
    out, features = shape(named(r"image_proj\.(?:proj|image_embeds)\.weight"), 2)
    tokens = max(1, out // shape("image_proj.norm.weight", 1)[0])
    return IPAdapterConfig("image", features, num_tokens=tokens, **common)


def _check_fit(config: IPAdapterConfig, unet: UNet2DConditionConfig, where: str) -> None:
    """Refuse an IP-Adapter for another kind of model."""
    layers = unet.cross_attentions
    widths = tuple(block.out_channels for block in layers)
    text = {block.cross_attention_dim for block in layers}
    if config.layer_widths == widths and text == {config.cross_attention_dim}:
        return
    raise UsageError(
        f"{where}: this IP-Adapter is for another kind of model: it has {len(config.layer_widths)} "
        f"layers for a text {config.cross_attention_dim} wide, the model has {len(widths)} and a "
        f"text {' and '.join(map(str, sorted(text)))} wide"
        + ("" if len(widths) != len(config.layer_widths) else ", of other widths")
        + "; use one made for it"
    )


def _open_encoder(
    path: str | os.PathLike[str] | None,
    adapter: str,
    place: Path,
    config: IPAdapterConfig,
    variant: str | None,
    progress: Progress | None,
) -> Component:
    if path is not None:
        folder, provenance = find_component(path, ENCODER, variant, progress)
    elif not os.path.exists(adapter) and (reference := parse(adapter)) is not None:
        parent = reference.file.rpartition("/")[0]
        if reference.name == _COLLECTION:
            large = (config.kind, config.feature_dim) in _LARGE
            parent = "sdxl_models" if large else "models"
        repo = Reference(reference.name, reference.revision)
        component = f"{parent}/{ENCODER}" if parent else ENCODER
        folder, provenance = find_component(str(repo), component, variant, progress)
    else:
        folder, provenance = place.parent / ENCODER, {"source": ENCODER}
        if not folder.is_dir():
            raise UsageError(
                f"{adapter}: there is no folder {ENCODER} beside it; give its CLIP image encoder "
                f"({argument('image_encoder')})"
            )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has no config.json; give the folder of a CLIP image encoder "
            "(CLIPVisionModelWithProjection)"
        )
    data = read_component_config(folder, ("CLIPVisionModelWithProjection",), "CLIP image encoder")
    vision = CLIPVisionConfig.from_dict(data, str(folder / "config.json"))
    return open_folder_of(ENCODER, folder, vision, provenance, variant)


def _not_an_adapter(path: Path) -> CheckpointError:
    if not os.path.exists(path):
        return CheckpointError(
            f"{path}: no such file, and not the hub id of a file (org/name/FILE.safetensors); give "
            "the file of an IP-Adapter"
        )
    files = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    there = f", for example {', '.join(files[:10])}" if files else ""
    return CheckpointError(f"{path}: is a folder; give the file of an IP-Adapter{there}")
