"""ControlNet-LLLite in one file, as kohya's sd-scripts writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdiff.convert.checkpoint import map_component
from mlxdiff.convert.component import Component
from mlxdiff.convert.keymap import Layout, Piece, ldm_unet
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.config import LLLiteConfig, LLLiteModuleConfig, UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.weights.tensors import LazyTensor, Shape

PREFIX = "lllite_unet_"
_TARGET = re.compile(r".+\.(?:attn1\.to_[qkv]|attn2\.to_q)")


def open_lllite(
    path: Path,
    tensors: dict[str, LazyTensor],
    unet: UNet2DConditionConfig,
    factor: int,
    provenance: dict[str, Any],
) -> Component:
    """Open a ControlNet-LLLite for a model.

    Args:
        path: the file.
        tensors: its tensors.
        unet: config of the model's U-Net.
        factor: pixels for each latent of the model, along a side.
        provenance: of the file.
    Raises: CheckpointError if it changes layers that this U-Net does not have.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    places = _places(unet)
    names = dict.fromkeys(name.partition(".")[0] for name in shapes)
    if unknown := [name for name in names if name not in places]:
        raise CheckpointError(
            f"{path}: this ControlNet-LLLite changes {len(unknown)} layers that it cannot change "
            f"in this model ({unknown[0]}, for example); use one made for this kind of model, "
            "which changes its attention"
        )
    modules = tuple(_module(name, places[name], shapes, path) for name in names)
    for module in modules:
        width, pixels = _input(unet, module.target, factor)
        if (module.in_dim, module.factor) != (width, pixels):
            raise CheckpointError(
                f"{path}: this ControlNet-LLLite is for another kind of model: it reads "
                f"{module.in_dim} channels at 1/{module.factor} of the picture in {module.target}, "
                f"the model has {width} at 1/{pixels}; use one made for it"
            )
    config = LLLiteConfig(modules)
    expected = expected_parameters(config)
    numbers = {name: i for i, name in enumerate(names)}
    table = {}
    for source in shapes:
        name, _, parameter = source.partition(".")
        if (target := f"lllites.{numbers[name]}.{parameter}") in expected:
            table[source] = (Piece(target),)
    files = map_component(path, tensors, Layout(names=table), config, str(path))
    return Component(config, lambda: files.read(config), provenance)


def _places(unet: UNet2DConditionConfig) -> dict[str, str]:
    """Return the name of each module that may exist -> the layer that it changes."""
    result = {}
    for source, pieces in (ldm_unet(unet).names or {}).items():
        target = pieces[0].target.removesuffix(".weight")
        if _TARGET.fullmatch(target):
            result[PREFIX + source.removesuffix(".weight").replace(".", "_")] = target
    return result


def _module(name: str, target: str, shapes: Mapping[str, Shape], path: Path) -> LLLiteModuleConfig:
    def shape(part: str, dimensions: int) -> Shape:
        found = shapes.get(f"{name}.{part}.weight", ())
        if len(found) != dimensions or 0 in found:
            raise CheckpointError(
                f"{path}: {name}.{part}.weight is {found or 'missing'}; the file is not a whole "
                "ControlNet-LLLite; download it again"
            )
        return found

    first, second = shape("conditioning1.0", 4), shape("conditioning1.2", 4)
    deep = f"{name}.conditioning1.4.weight" in shapes
    mlp_dim, in_dim = shape("down.0", 2)
    depth = 3 if deep else 2 if second[-1] == 4 else 1
    return LLLiteModuleConfig(target, in_dim, mlp_dim, 2 * first[0], depth)


def _input(unet: UNet2DConditionConfig, target: str, factor: int) -> tuple[int, int]:
    """Return the width of a layer's input, and pixels for each of its places along a side."""
    where, _, rest = target.partition(".")
    levels = len(unet.down_blocks)
    if where == "mid_block":
        return unet.block_out_channels[-1], factor * 2 ** (levels - 1)
    level = int(rest.partition(".")[0])
    if where == "up_blocks":
        level = levels - 1 - level
    return unet.block_out_channels[level], factor * int(2**level)
