"""Tiny IP-Adapters and a CLIP image encoder with random weights, the same wherever they are made.

The adapters have the names of the published files (github.com/tencent-ailab/IP-Adapter).
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from folders import stored, write_json
from safetensors.numpy import save_file

from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import CLIPVisionConfig, UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters

ENCODER: dict[str, Any] = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "hidden_act": "gelu",
}
HIDDEN, INNER, DEPTH, QUERIES = 40, 128, 4, 6  # of the resampler; diffusers knows depth 4 alone


def random_values(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Variance 1/fan_in; biases and norms random around their usual values; float16's values."""
    random = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
    values = random.standard_normal(shape)
    if len(shape) == 1:
        is_norm = "norm" in name or name.endswith("1.0.weight")
        values = 0.1 * values + (is_norm and name.endswith("weight"))
    elif "embedding" not in name or len(shape) == 4:
        values /= np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float16).astype(np.float32)


def encoder_tensors() -> dict[str, np.ndarray]:
    """Under transformers' names, in PyTorch's layout."""
    shapes = expected_parameters(CLIPVisionConfig.from_dict(ENCODER))
    return {name: random_values(1, name, stored(shape)) for name, shape in shapes.items()}


def write_encoder(folder: Path) -> Path:
    write_json(folder / "config.json", ENCODER)
    tensors: dict[str, Any] = encoder_tensors()
    positions = {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    save_file(tensors | positions, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapter_shapes(kind: str, text: int, widths: list[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file.

    Args:
        kind: "image", "plus" or "full".
        text: width of the text states.
        widths: of the U-Net's layers that attend to the text.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"image_proj.{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"image_proj.{name}.bias"] = (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"image_proj.{name}.weight"] = shapes[f"image_proj.{name}.bias"] = (width,)

    if kind == "image":
        linear("proj", ENCODER["projection_dim"], 4 * text)
        norm("norm", text)
    elif kind == "full":
        linear("proj.0", ENCODER["hidden_size"], ENCODER["hidden_size"])
        linear("proj.2", ENCODER["hidden_size"], text)
        norm("proj.3", text)
    else:
        shapes["image_proj.latents"] = (1, QUERIES, HIDDEN)
        linear("proj_in", ENCODER["hidden_size"], HIDDEN)
        linear("proj_out", HIDDEN, text)
        norm("norm_out", text)
        for i in range(DEPTH):
            norm(f"layers.{i}.0.norm1", HIDDEN)
            norm(f"layers.{i}.0.norm2", HIDDEN)
            linear(f"layers.{i}.0.to_q", HIDDEN, INNER, False)
            linear(f"layers.{i}.0.to_kv", HIDDEN, 2 * INNER, False)
            linear(f"layers.{i}.0.to_out", INNER, HIDDEN, False)
            norm(f"layers.{i}.1.0", HIDDEN)
            linear(f"layers.{i}.1.1", HIDDEN, 4 * HIDDEN, False)
            linear(f"layers.{i}.1.3", 4 * HIDDEN, HIDDEN, False)
    for i, width in enumerate(widths):
        for part in ("to_k_ip", "to_v_ip"):
            shapes[f"ip_adapter.{2 * i + 1}.{part}.weight"] = (width, text)
    return shapes


def adapter_tensors(kind: str, model: Path, seed: int) -> dict[str, np.ndarray]:
    """An adapter for the model in a diffusers folder."""
    unet = UNet2DConditionConfig.from_dict(read_json(model / "unet/config.json"))
    layers = unet.cross_attentions
    shapes = adapter_shapes(
        kind, layers[0].cross_attention_dim, [block.out_channels for block in layers]
    )
    return {name: random_values(seed, name, shape) for name, shape in shapes.items()}


def write_adapter(path: Path, kind: str, model: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = adapter_tensors(kind, model, seed)
    save_file({name: array.astype(np.float16) for name, array in tensors.items()}, path)
    return path


# The adapters that cases.json names: kind and seed.
ADAPTERS = {"image": ("image", 11), "plus": ("plus", 12), "full": ("full", 13)}
