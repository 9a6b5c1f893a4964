"""T2I-Adapters in either form: a diffusers folder, or one file in one of two namings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlxdiff.convert import recognise
from mlxdiff.convert.component import AddedNetwork, Component, open_added, open_mapped
from mlxdiff.convert.keymap import Layout, Piece
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.config import T2IAdapterConfig, UNet2DConditionConfig
from mlxdiff.store.folder import Progress
from mlxdiff.weights.pickles import open_tensors
from mlxdiff.weights.tensors import Shape

_KIND = AddedNetwork("t2i_adapter", "T2I-Adapter", ("T2IAdapter",), T2IAdapterConfig.from_dict)
_TABLES = ("adapter",)
_PREFIX = "adapter."
_FIRST = {64: (1, 8), 192: (3, 8), 256: (1, 16), 768: (3, 16)}
"""Channels that a first layer reads -> channels of the picture, and pixels along a side."""
_EARLY = re.compile(r"body\.\d+\.(?:skep|down_opt\.op)\..+")


def open_t2i_adapter(
    path: str | os.PathLike[str],
    unet: UNet2DConditionConfig,
    factor: int = 8,
    variant: str | None = None,
    progress: Progress | None = None,
) -> Component:
    """Open a T2I-Adapter for a model.

    Args:
        path: a diffusers folder, one file (safetensors or PyTorch's format, in the original code's
            naming or in diffusers' naming), or a hub id of either.
        unet: config of the model's U-Net.
        factor: pixels for each latent of the model, along a side.
        variant: weights variant.
        progress: called while files are fetched.
    Raises: CheckpointError, ConfigError, HubError.
    """
    check = partial(_check_fit, unet, factor, str(path))
    return open_added(_KIND, path, partial(_open_file, unet), check, variant, progress)


def _open_file(unet: UNet2DConditionConfig, path: Path, provenance: dict[str, Any]) -> Component:
    file = open_tensors(path, _TABLES)
    if recognise.kind(file.tensors) != "a T2I-Adapter":
        raise CheckpointError(f"{path}: {recognise.refusal(file.tensors)}; expected a T2I-Adapter")
    if any(_EARLY.fullmatch(name.removeprefix(_PREFIX)) for name in file.tensors):
        raise CheckpointError(
            f"{path}: is a T2I-Adapter of the first structure (skep, down_opt.op), which no "
            "published model has kept; use a later one (t2iadapter_*_sd14v1, _sd15v2)"
        )
    shapes = {name.removeprefix(_PREFIX): t.shape for name, t in file.tensors.items()}
    names = _diffusers_names(shapes, unet, path)
    config = _structure({names[name]: shape for name, shape in shapes.items()}, path)
    layout = Layout(
        names={name: (Piece(_PREFIX + names[name.removeprefix(_PREFIX)]),) for name in file.tensors}
    )
    return open_mapped(file, file.tensors, layout, config, provenance)


def _diffusers_names(
    shapes: Mapping[str, Shape], unet: UNet2DConditionConfig, path: Path
) -> dict[str, str]:
    """Return name -> diffusers' name, both without prefix.

    The original code has the blocks of all levels of a full adapter in one list.
    """
    names = {name: name for name in shapes}
    light = {name: re.fullmatch(r"body\.(\d+)\.body\.(\d+)\.(.+)", name) for name in shapes}
    if any(light.values()):
        return names | {
            name: f"body.{match[1]}.resnets.{match[2]}.{match[3]}"
            for name, match in light.items()
            if match
        }
    full = {
        name: match
        for name in shapes
        if (match := re.fullmatch(r"body\.(\d+)\.((block[12]|in_conv)\..+)", name))
    }
    if not any(match[3] != "in_conv" for match in full.values()):
        return names
    blocks = 1 + max(int(match[1]) for match in full.values())
    _, pixels = _first(shapes, path)
    levels = len(unet.down_blocks) + (pixels == 16)
    if blocks % levels:
        raise CheckpointError(
            f"{path}: this T2I-Adapter has {blocks} blocks, which do not divide into the {levels} "
            "levels of this model; use one made for it"
        )
    for name, match in full.items():
        level, block = divmod(int(match[1]), blocks // levels)
        inside = "" if match[3] == "in_conv" else f"resnets.{block}."
        names[name] = f"body.{level}.{inside}{match[2]}"
    return names


def _structure(shapes: Mapping[str, Shape], path: Path) -> T2IAdapterConfig:
    """Derive the config from the shapes, under diffusers' names without prefix."""
    channels, pixels = _first(shapes, path)
    light = "conv_in.weight" not in shapes
    last = "out_conv" if light else "resnets.0.block2"
    widths: list[int] = []
    while shape := shapes.get(f"body.{len(widths)}.{last}.weight"):
        widths.append(shape[0])
    depth = 0
    while f"body.0.resnets.{depth}.block1.weight" in shapes:
        depth += 1
    if not widths or not depth:
        raise CheckpointError(f"{path}: is not a whole T2I-Adapter; download it again")
    kind = "light_adapter" if light else "full_adapter" if pixels == 8 else "full_adapter_xl"
    return T2IAdapterConfig.from_dict(
        {
            "in_channels": channels,
            "channels": widths[:-1] if light else widths,
            "num_res_blocks": depth,
            "downscale_factor": pixels,
            "adapter_type": kind,
        },
        f"{path} (derived from its shapes)",
    )


def _first(shapes: Mapping[str, Shape], path: Path) -> tuple[int, int]:
    """Return channels of the picture, and pixels along a side for each place."""
    for name in ("conv_in.weight", "body.0.in_conv.weight"):
        shape = shapes.get(name, ())
        if len(shape) == 4 and shape[1] in _FIRST:
            return _FIRST[shape[1]]
        if shape:
            raise CheckpointError(
                f"{path}: {name} is {shape}, which is the first layer of no known T2I-Adapter"
            )
    raise CheckpointError(f"{path}: is not a whole T2I-Adapter; download it again")


def _check_fit(
    unet: UNet2DConditionConfig, factor: int, where: str, config: T2IAdapterConfig
) -> None:
    """Refuse an adapter for another kind of model. Its maps must fit the U-Net's blocks."""
    expected = []
    for level, block in enumerate(unet.down_blocks):
        # The map is added after the downsampler of a block without attention.
        after = block.resample and block.type == "DownBlock2D"
        expected.append((block.out_channels, factor * 2 ** (level + after)))
    if len(config.feature_channels) > len(expected) and unet.mid_block is not None:
        expected.append((unet.mid_block.out_channels, factor * 2 ** (len(unet.down_blocks) - 1)))
    found, pixels = [], config.downscale_factor
    for channels, halves in zip(config.feature_channels, config.halves, strict=True):
        pixels *= 1 + halves
        found.append((channels, pixels))
    if found != expected:
        raise CheckpointError(
            f"{where}: this T2I-Adapter is for another kind of model: its maps are "
            f"{_shown(found)}, those of the model's blocks {_shown(expected)}; use one made for it"
        )


def _shown(maps: list[tuple[int, int]]) -> str:
    return ", ".join(f"{channels} at 1/{pixels}" for channels, pixels in maps)
