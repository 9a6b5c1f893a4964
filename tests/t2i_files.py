"""Tiny T2I-Adapters with random weights, the same wherever they are made: nothing is stored."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from folders import stored, write_json
from golden_data import checkpoint
from safetensors.numpy import save_file

from mlxdiff.networks.config import T2IAdapterConfig
from mlxdiff.networks.params import expected_parameters

# Which adapters stand in cases.json: seed, and the config beside the channels of the model.
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (1, {"adapter_type": "full_adapter"}),
    "second": (2, {"adapter_type": "full_adapter", "num_res_blocks": 1}),
    "grey": (3, {"adapter_type": "full_adapter", "in_channels": 1}),
    "light": (4, {"adapter_type": "light_adapter", "num_res_blocks": 3}),
    "xl": (5, {"adapter_type": "full_adapter_xl", "downscale_factor": 16}),
    "xl-second": (
        6,
        {"adapter_type": "full_adapter_xl", "downscale_factor": 16, "num_res_blocks": 1},
    ),
}


def t2i_config(name: str, model: str, **changes: Any) -> dict[str, Any]:
    """config.json of an adapter for one of the golden models."""
    unet = json.loads((checkpoint(model) / "unet/config.json").read_text())
    channels = list(unet["block_out_channels"])
    kind = ADAPTERS[name][1]["adapter_type"]
    if kind == "light_adapter":
        channels = channels[:-1]
    elif kind == "full_adapter_xl":
        channels.append(channels[-1])
    own = {"_class_name": "T2IAdapter", "channels": channels, "in_channels": 3}
    return own | {"num_res_blocks": 2, "downscale_factor": 8} | ADAPTERS[name][1] | changes


def t2i_tensors(name: str, model: str, **changes: Any) -> dict[str, np.ndarray]:
    """Its tensors as diffusers names and shapes them, float32 of float16's values."""
    config = T2IAdapterConfig.from_dict(t2i_config(name, model, **changes))
    tensors = {}
    for key, shape in expected_parameters(config).items():
        random = np.random.RandomState(zlib.crc32(f"{ADAPTERS[name][0]} {key}".encode()))
        values = random.standard_normal(stored(shape))
        values *= 0.1 if len(shape) == 1 else 1.5 / np.sqrt(np.prod(shape[1:]))
        tensors[key] = values.astype(np.float16).astype(np.float32)
    return tensors


def write_t2i_adapter(folder: Path, name: str, model: str, **changes: Any) -> Path:
    """A folder as diffusers writes it, float16."""
    write_json(folder / "config.json", t2i_config(name, model, **changes))
    tensors = {n: a.astype(np.float16) for n, a in t2i_tensors(name, model, **changes).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def original_names(name: str, model: str) -> dict[str, np.ndarray]:
    """Its tensors under the names of the original code."""
    depth = t2i_config(name, model)["num_res_blocks"]
    light = t2i_config(name, model)["adapter_type"] == "light_adapter"
    result = {}
    for key, array in t2i_tensors(name, model).items():
        key = key.removeprefix("adapter.")
        if light:
            key = key.replace(".resnets.", ".body.")
        elif match := re.fullmatch(r"body\.(\d+)\.resnets\.(\d+)\.(.+)", key):
            key = f"body.{int(match[1]) * depth + int(match[2])}.{match[3]}"
        elif match := re.fullmatch(r"body\.(\d+)\.(in_conv.+)", key):
            key = f"body.{int(match[1]) * depth}.{match[2]}"
        result[key] = array
    return result
