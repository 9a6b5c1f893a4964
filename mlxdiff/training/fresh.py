"""First weights of networks that are trained from scratch. NumPy only.

All depend on a seed and on the name of the tensor alone, so a network of any size starts the same
on every machine.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Mapping

import numpy as np

from mlxdiff.networks.config import ControlNetConfig, UNet2DConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.weights.tensors import Shape

# Layers whose output is added to their input, or is the network's: zero at first, so that every
# block starts as the identity (Ho et al. 2020: init_scale 0 of conv2, NIN and conv_out).
_ZERO_AT_FIRST = re.compile(r".*\.conv2|.*\.to_out\.0|conv_out")
_ZERO_CONVOLUTIONS = re.compile(r"controlnet_(down_blocks\.\d+|mid_block)")
_HINT = "controlnet_cond_embedding."


def unet_2d(config: UNet2DConfig, seed: int) -> dict[str, np.ndarray]:
    """Return first weights of a U-Net without text: name -> float32.

    Matrices and convolutions are uniform as torch draws them (Kaiming, gain 1 / sqrt(3)), the table
    of classes is normal.
    """
    shapes = expected_parameters(config)
    tables = {"class_embedding.weight"} if config.num_class_embeds is not None else set()
    return _made(shapes, shapes, seed, tables, _ZERO_AT_FIRST)


def controlnet(
    config: ControlNetConfig, unet: Mapping[str, np.ndarray], seed: int, edges: np.ndarray
) -> dict[str, np.ndarray]:
    """Return first weights of a ControlNet: the U-Net's own, and new layers (Zhang et al. 2023).

    The layers on the way into the U-Net are zero, so training starts with the model's own pictures.
    Those that see the control image pass it on at full strength (``_awaken``).

    Args:
        config: of the ControlNet.
        unet: the U-Net's weights.
        seed: of the new layers.
        edges: some control images, (N, H, W, 3) float32 in [0, 1].
    """
    shapes = expected_parameters(config)
    new = {name for name in shapes if name not in unet}
    weights = {name: np.asarray(unet[name], np.float32) for name in shapes if name not in new}
    weights |= _made(shapes, sorted(new), seed, set(), _ZERO_CONVOLUTIONS)
    _awaken(weights, edges, seed)
    return {name: weights[name] for name in shapes}


def _made(
    shapes: Mapping[str, Shape],
    names: Iterable[str],
    seed: int,
    tables: set[str],
    zero: re.Pattern[str],
) -> dict[str, np.ndarray]:
    made = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        shape = shapes[name]
        matrix = shapes.get(f"{layer}.weight", ())
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        if zero.fullmatch(layer):
            values = np.zeros(shape)
        elif name in tables:
            values = rng.standard_normal(shape)
        elif len(matrix) < 2:  # a norm
            values = np.full(shape, float(kind == "weight"))
        else:
            bound = 1 / math.sqrt(math.prod(matrix[1:]))
            values = rng.uniform(-bound, bound, shape)
        made[name] = values.astype(np.float32)
    return made


def _awaken(weights: dict[str, np.ndarray], images: np.ndarray, seed: int) -> None:
    """Give the layers that see the control image unit variance, one after the other.

    Control images are mostly black. With torch's first weights their signal fades at every layer,
    and the layer that joins it to the U-Net has nothing to learn from. So each layer is divided by
    the deviation of its output (Mishkin and Matas 2016).
    """
    layers = sorted(
        {name.rpartition(".")[0] for name in weights if name.startswith(_HINT)},
        key=lambda name: (not name.endswith("conv_in"), name.endswith("conv_out"), _number(name)),
    )
    x = images.astype(np.float32)
    for layer in layers:
        shape = weights[f"{layer}.weight"].shape
        rng = np.random.default_rng((seed, zlib.crc32(layer.encode())))
        kernel = rng.standard_normal(shape, np.float32)
        stride = 2 if layer.rpartition(".")[2] in _HALVING else 1
        y = _convolved(x, kernel, stride)
        kernel /= max(float(y.std()), 1e-6)
        weights[f"{layer}.weight"] = kernel
        weights[f"{layer}.bias"] = np.zeros(shape[0], np.float32)
        y = _convolved(x, kernel, stride)
        x = y / (1 + np.exp(-y))
    # What it is added to: the U-Net's first layer, on noise.
    first = weights["conv_in.weight"]
    noise = np.random.default_rng(seed).standard_normal((8, 16, 16, first.shape[-1]))
    weights[f"{layers[-1]}.weight"] *= np.float32(0.5 * _convolved(noise, first, 1).std())


_HALVING = {str(2 * i + 1) for i in range(16)}  # every second of the blocks


def _number(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdecimal() else 0


def _convolved(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Convolve (N, H, W, C) with a 3x3 kernel (out, 3, 3, C), padding 1."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    total = np.zeros((*x.shape[:1], -(-height // stride), -(-width // stride), len(kernel)))
    for dy in range(3):
        for dx in range(3):
            part = padded[:, dy : dy + height : stride, dx : dx + width : stride]
            total += part @ kernel[:, dy, dx].T
    return total.astype(np.float32)
