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
