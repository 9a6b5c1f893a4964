"""Tiny motion adapters with random weights, the same wherever they are made: nothing is stored."""

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

from mlxdiff.networks.config import MotionAdapterConfig
from mlxdiff.networks.params import expected_parameters

# Name -> seed, and what its config has beside that of the model.
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "v1": (1, {"use_motion_mid_block": False, "motion_max_seq_length": 24}),
    "v2": (2, {}),
    "xl": (3, {"use_motion_mid_block": False}),
}


def motion_config(name: str, model: str, **changes: Any) -> dict[str, Any]:
    """config.json of an adapter for one of the golden models."""
    unet = json.loads((checkpoint(model) / "unet/config.json").read_text())
    own = {
        "_class_name": "MotionAdapter",
        "block_out_channels": unet["block_out_channels"],
        "motion_layers_per_block": unet["layers_per_block"],
        "motion_norm_num_groups": unet["norm_num_groups"],
        "motion_max_seq_length": 32,
        "motion_num_attention_heads": 8,
        "use_motion_mid_block": True,
    }
    return own | ADAPTERS[name][1] | changes


def motion_tensors(name: str, model: str, **changes: Any) -> dict[str, np.ndarray]:
    """Its tensors as diffusers names and shapes them, float32 of float16's values."""
    config = MotionAdapterConfig.from_dict(motion_config(name, model, **changes))
    tensors = {}
    for key, shape in expected_parameters(config).items():
        random = np.random.RandomState(zlib.crc32(f"{ADAPTERS[name][0]} {key}".encode()))
        values = random.standard_normal(stored(shape))
        if len(shape) > 1:
            values *= 0.7 / np.sqrt(np.prod(shape[1:]))
        else:
            values = 0.1 * values + ("norm" in key and key.endswith("weight"))
        tensors[key] = values.astype(np.float16).astype(np.float32)
    return tensors


def positions(length: int, width: int) -> np.ndarray:
    """The table that files have beside the weights: (1, length, width)."""
    angles = np.arange(length)[:, None] * np.exp(-np.log(1e4) * np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(1, length, width)


def with_positions(name: str, model: str) -> dict[str, np.ndarray]:
    """All that diffusers writes."""
    length = motion_config(name, model)["motion_max_seq_length"]
    found = {}
    for key, array in motion_tensors(name, model).items():
        found[key] = array
        if key.endswith(".norm1.weight"):
            place = key.removesuffix("norm1.weight")
            found[f"{place}pos_embed.pe"] = positions(length, len(array)).astype(np.float32)
    return found


def write_motion(folder: Path, name: str, model: str) -> Path:
    """A folder as diffusers writes it, float16."""
    write_json(folder / "config.json", motion_config(name, model))
    tensors = {n: a.astype(np.float16) for n, a in with_positions(name, model).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


ORIGINAL = {
    "attn1": "attention_blocks.0",
    "attn2": "attention_blocks.1",
    "norm1": "norms.0",
    "norm2": "norms.1",
    "norm3": "ff_norm",
}


def original_names(name: str, model: str) -> dict[str, np.ndarray]:
    """Its tensors under the names of the original code."""
    result = {}
    for key, array in with_positions(name, model).items():
        place, inside = re.fullmatch(r"(.+?\.motion_modules\.\d+)\.(.+)", key).groups()
        key = f"{place}.temporal_transformer.{inside}"
        if ".pos_embed." in key:
            for i in range(2):
                result[key.replace("pos_embed", f"attention_blocks.{i}.pos_encoder")] = array
            continue
        for new, old in ORIGINAL.items():
            key = key.replace(f".{new}.", f".{old}.")
        result[key] = array
    return result


def motion_lora(name: str, model: str, *, original: bool = False) -> dict[str, np.ndarray]:
    """A MotionLoRA for an adapter, in the names that diffusers or the original code gives it."""
    result = {}
    for key, array in motion_tensors(name, model).items():
        match = re.fullmatch(
            r"(.+\.motion_modules\.\d+)\.(.+)\.attn([12])\.(to_[qkv]|to_out)(?:\.0)?\.weight", key
        )
        if match is None:
            continue
        place, block, number, layer = match.groups()
        inside = f"unet.{place}.{block}.attn{number}"
        if original:
            inside = f"{place}.temporal_transformer.{block}.attention_blocks.{int(number) - 1}"
        for part, shape in (("down", (2, array.shape[1])), ("up", (len(array), 2))):
            random = np.random.RandomState(zlib.crc32(f"{part} {key}".encode()))
            values = (0.4 * random.standard_normal(shape)).astype(np.float32)
            result[f"{inside}.processor.{layer}_lora.{part}.weight"] = values
    return result
