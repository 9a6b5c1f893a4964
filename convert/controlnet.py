"""ControlNets in either form: a diffusers folder, or one file in one of two namings."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlxdiff.convert import detect, lllite, recognise
from mlxdiff.convert.component import AddedNetwork, Component, open_added, open_mapped
from mlxdiff.convert.control_lora import MARK, open_control_lora
from mlxdiff.convert.families import Unrepresentable, controlnet_structure
from mlxdiff.convert.keymap import DIFFUSERS, ldm_controlnet
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.config import ControlNetConfig, LLLiteConfig, UNet2DConditionConfig
from mlxdiff.store.folder import Progress
from mlxdiff.weights.pickles import open_tensors
from mlxdiff.weights.tensors import LazyTensor, Shape

logger = logging.getLogger("mlxdiff")

_PREFIX = "control_model."
_KIND = AddedNetwork(
    "controlnet",
    "ControlNet",
    ("ControlNetModel", "ControlNetUnionModel"),
    ControlNetConfig.from_dict,
)


def open_controlnet(
    path: str | os.PathLike[str],
    unet: UNet2DConditionConfig,
    variant: str | None = None,
    progress: Progress | None = None,
    unet_tensors: Callable[[], Mapping[str, LazyTensor]] | None = None,
    factor: int = 8,
) -> Component:
    """Open a ControlNet for a model.

    Args:
        path: a diffusers folder, one file (safetensors or PyTorch's format; in the original code's
            naming, alone or in a whole model, or in diffusers' naming), or a hub id of either.
        unet: config of the model's U-Net. A single file does not give the number of heads, so it
            comes from the model.
        variant: weights variant.
        progress: called while files are fetched.
        unet_tensors: returns the tensors of the model's U-Net, to which a Control-LoRA is a
            difference; None: a Control-LoRA is an error.
        factor: pixels for each latent of the model, along a side.
    Returns: a network with a ControlNetConfig, or with an LLLiteConfig.
    Raises: CheckpointError, ConfigError, HubError.
    """
    open_file = partial(_open_file, unet, unet_tensors, factor)
    check = partial(_check_fit, unet, str(path))
    return open_added(_KIND, path, open_file, check, variant, progress)


def _open_file(
    unet: UNet2DConditionConfig,
    unet_tensors: Callable[[], Mapping[str, LazyTensor]] | None,
    factor: int,
    path: Path,
    provenance: dict[str, Any],
) -> Component:
    file = open_tensors(path)
    if any(name.startswith(lllite.PREFIX) for name in file.tensors):
        return lllite.open_lllite(path, file.tensors, unet, factor, provenance)
    if MARK in file.tensors:
        if unet_tensors is None:
            raise CheckpointError(
                f"{path}: is a Control-LoRA, a difference to the U-Net of a model; give the "
                "tensors of the model's U-Net, too"
            )
        return open_control_lora(path, file.tensors, unet, unet_tensors, provenance)
    if recognise.kind(file.tensors) == detect.SPARSE_CONTROL:
        raise CheckpointError(f"{path}: {recognise.refusal(file.tensors)}")
    tensors = _section(file.tensors)
    ldm = "input_hint_block.0.weight" in tensors
    if not ldm and "controlnet_cond_embedding.conv_in.weight" not in tensors:
        raise CheckpointError(f"{path}: {recognise.refusal(file.tensors)}; expected a ControlNet")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        structure = controlnet_structure(shapes) | _types(shapes)
    except Unrepresentable as error:
        raise CheckpointError(
            f"{path}: is a ControlNet of an unknown structure ({error}); use a diffusers folder"
        ) from None
    config = _config_of(structure, unet, path)
    layout = ldm_controlnet(config) if ldm else DIFFUSERS["controlnet"]
    return open_mapped(file, tensors, layout, config, provenance)


def _types(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return what the config of a ControlNet-Union has beside a ControlNet's; else nothing."""
    table = shapes.get("task_embedding", ())
    if len(table) != 2:
        return {}
    layers = {m[1] for name in shapes if (m := re.match(r"transformer_layes\.(\d+)\.", name))}
    return {
        "_class_name": "ControlNetUnionModel",
        "num_control_type": table[0],
        "num_trans_channel": table[1],
        "num_trans_layer": len(layers),
    }


def _section(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the ControlNet's tensors without their prefix. The file may hold a whole model."""
    inside = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(_PREFIX)
    }
    return inside or dict(tensors)


def _config_of(
    structure: dict[str, Any], unet: UNet2DConditionConfig, path: Path
) -> ControlNetConfig:
    """Combine the structure from the shapes with the model's heads."""
    if tuple(structure["block_out_channels"]) != unet.block_out_channels:
        raise _other_family(str(path), structure["block_out_channels"], unet.block_out_channels)
    heads = list(unet.num_attention_heads)
    config = ControlNetConfig.from_dict(
        structure
        | {
            "num_attention_heads": heads,
            "norm_num_groups": unet.norm_num_groups,
            "norm_eps": unet.norm_eps,
            "addition_embed_type": unet.addition_embed_type,
            "addition_time_embed_dim": unet.addition_time_embed_dim,
            "projection_class_embeddings_input_dim": structure.get(
                "projection_class_embeddings_input_dim",
                unet.projection_class_embeddings_input_dim,
            ),
        },
        str(path),
    )
    same = {name: getattr(unet, name) for name in ("flip_sin_to_cos", "freq_shift")}
    # The shapes do not show this. The published model (control_v11e_sd15_shuffle) has the name.
    pooled = "shuffle" in path.name.lower()
    if pooled:
        logger.warning(
            "%s: its name says shuffle, so it is used as a shuffle ControlNet (global average)",
            path.name,
        )
    return replace(config, **same, global_pool_conditions=pooled)


def _check_fit(
    unet: UNet2DConditionConfig, where: str, config: ControlNetConfig | LLLiteConfig
) -> None:
    """Refuse a ControlNet for another kind of model. Its outputs must fit the U-Net."""
    if isinstance(config, LLLiteConfig):  # it is opened for the model
        return
    for name in ("block_out_channels", "layers_per_block"):
        if getattr(config, name) != getattr(unet, name):
            raise _other_family(where, getattr(config, name), getattr(unet, name))
    if config.addition_embed_type != unet.addition_embed_type:
        sdxl, none = "an SDXL model", "a model without pooled text (SD 1 or 2)"
        ours, theirs = (sdxl, none) if unet.addition_embed_type is None else (none, sdxl)
        raise CheckpointError(
            f"{where}: this ControlNet is for {ours}, the model is {theirs}; use one made for it"
        )
    width = "projection_class_embeddings_input_dim"
    for name, what in (("cross_attention_dim", "text"), (width, "pooled text and sizes")):
        found, expected = getattr(config, name), getattr(unet, name)
        if found != expected:
            raise CheckpointError(
                f"{where}: this ControlNet is for another kind of model: its {what} is "
                f"{_number(found)} wide, the model's {_number(expected)}; use one made for it"
            )


def _other_family(where: str, found: Any, expected: Any) -> CheckpointError:
    return CheckpointError(
        f"{where}: this ControlNet is for another kind of model: its blocks are {_list(found)}, "
        f"the model's {_list(expected)}; use one made for it"
    )


def _number(value: Any) -> str:
    return str(value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value)


def _list(values: Any) -> str:
    return ", ".join(map(str, values))
