"""Tiny ControlNets with random weights, the same wherever they are made: nothing is stored.

Their zero convolutions are not zero, so that all of them counts.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from folders import stored, write_json
from golden_data import checkpoint
from safetensors.numpy import save_file

from mlxdiff.networks.config import ControlNetConfig
from mlxdiff.networks.params import expected_parameters

# What a ControlNet's config has of the U-Net's.
_SHARED = """in_channels flip_sin_to_cos freq_shift down_block_types block_out_channels
    layers_per_block downsample_padding norm_num_groups norm_eps cross_attention_dim
    transformer_layers_per_block attention_head_dim use_linear_projection addition_embed_type
    addition_time_embed_dim projection_class_embeddings_input_dim upcast_attention""".split()


def controlnet_config(model: str, **changes: Any) -> dict[str, Any]:
    """config.json of a ControlNet for one of the golden models."""
    unet = json.loads((checkpoint(model) / "unet/config.json").read_text())
    shared = {name: unet[name] for name in _SHARED if name in unet}
    own = {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [4, 8, 8, 12]}
    return own | shared | {"in_channels": 4} | changes  # of the latents, whatever the U-Net takes


def controlnet_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Its tensors as diffusers names and shapes them, float32 of float16's values."""
    tensors = {}
    for name, shape in expected_parameters(ControlNetConfig.from_dict(config)).items():
        random = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
        values = random.standard_normal(stored(shape))
        if len(shape) == 1:
            values = 0.1 * values + ("norm" in name and name.endswith("weight"))
        else:
            zero = name.startswith(("controlnet_down_blocks", "controlnet_mid_block"))
            values *= (0.5 if zero else 1.0) / np.sqrt(np.prod(shape[1:]))
        tensors[name] = values.astype(np.float16).astype(np.float32)
    return tensors


def write_controlnet(folder: Path, model: str, seed: int = 0, **changes: Any) -> Path:
    """A folder as diffusers writes it, float16."""
    config = controlnet_config(model, **changes)
    write_json(folder / "config.json", config)
    tensors = {n: a.astype(np.float16) for n, a in controlnet_tensors(config, seed).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


# Which ControlNets stand in cases.json, by the names that it uses: seed, and changes of the config.
NETS: dict[str, tuple[int, dict[str, Any]]] = {
    "first": (1, {}),
    "second": (2, {}),
    "bgr": (3, {"controlnet_conditioning_channel_order": "bgr"}),
    "pooled": (4, {"global_pool_conditions": True}),
}


# ------------------------------------------------------------------------------------------- Union

UNION_MODES = (0, 3, 7)
"""The types of control image in control/union.npz."""


def union_config(**changes: Any) -> dict[str, Any]:
    """config.json of a ControlNet-Union for the tiny SDXL, with ProMax's eight types."""
    config = controlnet_config("sdxl", _class_name="ControlNetUnionModel", **changes)
    width = config["block_out_channels"][0]
    own = {"num_control_type": 8, "num_trans_channel": width, "num_trans_head": 4}
    return config | own | {"num_trans_layer": 2, "num_proj_channel": width} | changes


def write_union(folder: Path, seed: int = 7, **changes: Any) -> Path:
    """A folder as diffusers writes it, float32."""
    config = union_config(**changes)
    write_json(folder / "config.json", config)
    tensors = {
        name.replace("attn.in_proj.", "attn.in_proj_"): array
        for name, array in controlnet_tensors(config, seed).items()
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def union_inputs() -> dict[str, np.ndarray]:
    """Inputs of one evaluation, one row each; arrays are NHWC."""
    config = ControlNetConfig.from_dict(union_config())
    random = np.random.RandomState(3)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    pooled = (config.projection_class_embeddings_input_dim or 0) - 6 * (
        config.addition_time_embed_dim or 0
    )
    return {
        "sample": normal(1, 8, 6, config.in_channels),
        "timesteps": np.array([321.0], np.float32),
        "text": normal(1, 7, config.cross_attention_dim[0]),
        "image": random.uniform(size=(1, 8 * config.factor, 6 * config.factor, 3)).astype(
            np.float32
        ),
        "text_embeds": normal(1, pooled),
        "time_ids": np.array([[64, 48, 0, 0, 64, 48]], np.float32),
    }
