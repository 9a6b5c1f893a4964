"""Motion adapters (AnimateDiff): a diffusers folder, or one file in one of two namings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.convert import detect, recognise
from mlxdiff.convert.component import AddedNetwork, Component, open_added, open_mapped
from mlxdiff.convert.keymap import DIFFUSERS, MOTION_ORIGINAL, MOTION_POSITIONS
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.config import MotionAdapterConfig, UNet2DConditionConfig
from mlxdiff.store.folder import Progress
from mlxdiff.weights.pickles import open_tensors
from mlxdiff.weights.tensors import LazyTensor, Shape

_TABLES = ("state_dict",)
_MODULE = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.motion_modules\.(\d+)\.(?:temporal_transformer\.)?"
    r"(?:(norm\.weight)|transformer_blocks\.(\d+)\..+)"
)
_POSITIONS = re.compile(MOTION_POSITIONS)
_HEADS = 8  # of all published adapters; files do not say it
_LENGTH = 32
_CLOSE = {"F32": 1e-4, "F16": 2e-3, "BF16": 1e-2}


def _read(data: dict[str, Any], where: str) -> MotionAdapterConfig:
    """Read config.json. Raises: CheckpointError for PIA, whose class is a motion adapter's."""
    if data.get("conv_in_channels") is not None:
        raise CheckpointError(f"{where}: is {detect.PIA}, {recognise.use(detect.PIA)}")
    return MotionAdapterConfig.from_dict(data, where)


_KIND = AddedNetwork("motion_adapter", "motion adapter", ("MotionAdapter",), _read)


def open_motion_adapter(
    path: str | os.PathLike[str],
    unet: UNet2DConditionConfig,
    variant: str | None = None,
    progress: Progress | None = None,
) -> Component:
    """Open a motion adapter for a model.

    Args:
        path: a diffusers folder, one file (safetensors or PyTorch's format, in the original code's
            naming or in diffusers' naming), or a hub id of either.
        unet: config of the model's U-Net.
        variant: weights variant.
        progress: called while files are fetched.
    Raises: CheckpointError, ConfigError, HubError.
    """
    check = partial(_check_fit, unet, str(path))
    return open_added(_KIND, path, partial(_open_file, unet), check, variant, progress)


def _open_file(unet: UNet2DConditionConfig, path: Path, provenance: dict[str, Any]) -> Component:
    file = open_tensors(path, _TABLES)
    tensors = {name.removeprefix("module."): tensor for name, tensor in file.tensors.items()}
    kind = recognise.kind(tensors)
    if kind != "an AnimateDiff motion adapter":
        raise CheckpointError(
            f"{path}: {recognise.refusal(tensors)}; expected an AnimateDiff motion adapter"
        )
    config = _structure({n: t.shape for n, t in tensors.items()}, unet, path)
    _check_positions(tensors, path)
    original = any(".temporal_transformer." in name for name in tensors)
    layout = MOTION_ORIGINAL if original else DIFFUSERS["motion_adapter"]
    return open_mapped(file, tensors, layout, config, provenance)


def _structure(
    shapes: Mapping[str, Shape], unet: UNet2DConditionConfig, path: Path
) -> MotionAdapterConfig:
    """Derive the config from the shapes."""
    widths: dict[int, int] = {}
    modules: dict[int, set[int]] = {}
    depths: dict[int | str, set[int]] = {}
    length = 0
    for name, shape in shapes.items():
        if _POSITIONS.fullmatch(name) and len(shape) == 3:
            length = max(length, shape[1])
        if (match := _MODULE.fullmatch(name)) is None or match[1] == "up":
            continue
        level = "mid" if match[1] is None else int(match[2])
        if match[5] is not None:
            depths.setdefault(level, set()).add(int(match[5]))
        if isinstance(level, int):
            modules.setdefault(level, set()).add(int(match[3]))
            if match[4] and shape:
                widths[level] = shape[0]
    levels = sorted(widths)
    if not levels or levels != list(range(len(levels))) or set(depths) - {"mid"} != set(levels):
        raise CheckpointError(f"{path}: is not a whole motion adapter; download it again")
    return MotionAdapterConfig.from_dict(
        {
            "block_out_channels": [widths[level] for level in levels],
            "motion_layers_per_block": [len(modules[level]) for level in levels],
            "motion_transformer_layers_per_block": [len(depths[level]) for level in levels],
            "motion_transformer_layers_per_mid_block": len(depths.get("mid", {0})),
            "motion_num_attention_heads": _HEADS,
            "motion_norm_num_groups": unet.norm_num_groups,
            "motion_max_seq_length": length or _LENGTH,
            "use_motion_mid_block": "mid" in depths,
        },
        f"{path} (derived from its shapes)",
    )


def _check_positions(tensors: Mapping[str, LazyTensor], path: Path) -> None:
    """Refuse positions that are not the sines and cosines that the network computes."""
    for name, tensor in tensors.items():
        if not _POSITIONS.fullmatch(name):
            continue
        shape = tensor.shape
        if len(shape) != 3 or shape[0] != 1 or shape[1] > 1 << 12:
            raise CheckpointError(f"{path}: {name} is {shape}; expected (1, frames, channels)")
        values = np.asarray(tensor.read(), np.float32)[0]
        _, width = values.shape
        angles = np.arange(len(values))[:, None] * 1e4 ** (-np.arange(0, width, 2) / width)
        expected = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(len(values), -1)
        off = np.abs(values - expected[:, :width]).max(initial=0.0)
        if not off <= _CLOSE.get(tensor.dtype, 1e-4):
            raise CheckpointError(
                f"{path}: {name} holds positions of another kind than sines and cosines; this is "
                "no motion adapter that mlxdiff knows"
            )


def _check_fit(unet: UNet2DConditionConfig, where: str, config: MotionAdapterConfig) -> None:
    """Refuse a motion adapter for another kind of model."""
    for name, own in (("block_out_channels", "blocks"), ("layers_per_block", "layers of a block")):
        found = getattr(config, name if name.startswith("block") else f"motion_{name}")
        expected = getattr(unet, name)
        if found != expected:
            raise CheckpointError(
                f"{where}: this motion adapter is for {_kind(config)}: its {own} are "
                f"{_list(found)}, the model's {_list(expected)}; use one made for this model"
            )
    if unet.mid_block_type != "UNetMidBlock2DCrossAttn" and config.use_motion_mid_block:
        raise CheckpointError(
            f"{where}: this motion adapter has a module for the middle of the U-Net, and the "
            "model has no attention there; use one made for this model"
        )


def _kind(config: MotionAdapterConfig) -> str:
    known = {(320, 640, 1280, 1280): "Stable Diffusion 1.x", (320, 640, 1280): "SDXL"}
    return known.get(config.block_out_channels, "another kind of model")


def _list(values: Any) -> str:
    return ", ".join(map(str, values))
