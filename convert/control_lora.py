"""Control-LoRA: a ControlNet stored as its difference to the model's own U-Net.

A ControlNet begins as a copy of the U-Net's first half. The file holds the control picture's
layers, the zero convolutions and the vectors whole, and of each matrix the factors of a low-rank
difference: W = W_unet + up @ down. What it lacks is the U-Net's.

Source: stabilityai/control-lora; the formula is that of ComfyUI's comfy/controlnet.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.convert.checkpoint import all_finite
from mlxdiff.convert.component import Component
from mlxdiff.convert.keymap import ldm_controlnet
from mlxdiff.convert.transforms import choose, oihw_to_ohwi
from mlxdiff.errors import CheckpointError
from mlxdiff.networks.config import ControlNetConfig, UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.weights.tensors import READABLE, LazyTensor, Shape, raise_faults

MARK = "lora_controlnet"
"""Name of a tensor that only a Control-LoRA has."""

Tensors = Mapping[str, LazyTensor]
_HINT = re.compile(r"input_hint_block\.(\d{1,3})\.weight")


def open_control_lora(
    path: Path,
    tensors: Tensors,
    unet: UNet2DConditionConfig,
    unet_tensors: Callable[[], Tensors],
    provenance: dict[str, Any],
) -> Component:
    """Open a Control-LoRA for a model.

    Args:
        path: the file, for messages.
        tensors: its tensors.
        unet: config of the model's U-Net.
        unet_tensors: returns the U-Net's tensors, in our names and layout.
        provenance: of the file.
    Raises: CheckpointError.
    """
    config = _config(path, tensors, unet)
    base = unet_tensors()
    shapes = expected_parameters(config)
    found: dict[str, LazyTensor] = {}
    used, missing, misshapen = {MARK}, [], []
    for name, (piece,) in (ldm_controlnet(config).names or {}).items():
        target, stem = piece.target, name.removesuffix(".weight")
        shape = shapes[target]
        up, down = tensors.get(f"{stem}.up"), tensors.get(f"{stem}.down")
        own = base.get(target)
        if name in tensors:
            used.add(name)
            whole = _whole(tensors[name], shape, f"{path}: {name}")
            if whole is None:
                misshapen.append(f"{name} is {tensors[name].shape}")
            else:
                found[target] = whole
        elif up is not None and down is not None and own is not None:
            used |= {f"{stem}.up", f"{stem}.down"}
            if own.shape != shape or not _fits(up.shape, down.shape, shape):
                misshapen.append(f"{stem}.up and .down are {up.shape} and {down.shape}")
            else:
                found[target] = _sum(own, up, down, f"{path}: {stem}")
        elif own is not None and own.shape == shape:
            found[target] = LazyTensor(shape, "F32", own.read)
        else:
            missing.append(name)
    raise_faults(
        f"{path} (a Control-LoRA; use it with the kind of model that it was made for)",
        missing=missing,
        unknown=[name for name in tensors if name not in used],
        misshapen=misshapen,
        unsupported=[
            f"{n} is {tensors[n].dtype}" for n in used - {MARK} if not _readable(tensors[n])
        ],
    )
    return Component(config, lambda: {name: found[name] for name in shapes}, provenance)


def _config(path: Path, tensors: Tensors, unet: UNet2DConditionConfig) -> ControlNetConfig:
    """Derive the config: the U-Net's, and the widths of the control picture's layers."""
    row = {int(m[1]): t.shape for name, t in tensors.items() if (m := _HINT.fullmatch(name))}
    widths = tuple(row[i][0] for i in sorted(row)[:-1][::2] if len(row[i]) == 4)
    if 0 not in row or len(row[0]) != 4 or row[0][1] != 3 or len(widths) < 2:
        raise CheckpointError(
            f"{path}: is a Control-LoRA without the layers of a control picture "
            "(input_hint_block); download it again"
        )
    return ControlNetConfig(
        **vars(unet),
        conditioning_channels=3,
        conditioning_embedding_out_channels=widths,
        channel_order="rgb",
        global_pool_conditions=False,
        types=None,
    )


def _readable(tensor: LazyTensor) -> bool:
    return tensor.dtype in READABLE


def _fits(up: Shape, down: Shape, shape: Shape) -> bool:
    """Return True if up @ down has the size of a weight in our layout."""
    if len(up) < 2 or len(down) < 2 or int(np.prod(up[2:])) != 1 or up[1] != down[0]:
        return False
    return up[0] == shape[0] and int(np.prod(down[1:])) == int(np.prod(shape[1:]))


def _whole(tensor: LazyTensor, shape: Shape, where: str) -> LazyTensor | None:
    transform = choose(tensor.shape, shape)
    if transform is None:
        return None
    return LazyTensor(shape, "F32", lambda: transform.forward(_read(tensor, where)))


def _sum(own: LazyTensor, up: LazyTensor, down: LazyTensor, where: str) -> LazyTensor:
    """Return a weight of the U-Net with the difference added, in float32."""

    def read() -> np.ndarray:
        left, right = _read(up, where), _read(down, where)
        difference = left.reshape(len(left), -1) @ right.reshape(len(right), -1)
        weight = own.read().astype(np.float32)
        if weight.ndim == 4:
            out, height, width, inputs = weight.shape
            difference = difference.reshape(out, inputs, height, width)
            return weight + oihw_to_ohwi.forward(difference)
        return weight + difference

    return LazyTensor(own.shape, "F32", read)


def _read(tensor: LazyTensor, where: str) -> np.ndarray:
    values = tensor.read().astype(np.float32)
    if not all_finite(values):
        raise CheckpointError(f"{where}: holds values that are NaN or infinite; use another file")
    return values
