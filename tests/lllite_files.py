"""A tiny ControlNet-LLLite with random weights, under the names of kohya's sd-scripts."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
from lora_files import modules
from safetensors.numpy import save_file

EMBEDDED, WIDTH = 8, 4


def places(model: str) -> dict[str, tuple[str, int]]:
    """Layer of diffusers' U-Net -> the module's name in a file, and its depth.

    kohya changes the queries, keys and values of attn1 and the queries of attn2, on the way down
    and in the middle. The depth follows from the number of the block in Stability's code.
    """
    result = {}
    for layer in modules(model)["unet"]:
        match = re.fullmatch(
            r"(?:down_blocks\.(\d)\.attentions\.(\d)|mid_block\.attentions\.0)"
            r"\.(transformer_blocks\.\d+\.(?:attn1\.to_[qkv]|attn2\.to_q))",
            layer,
        )
        if match is None:
            continue
        block, depth = "middle_block_1", 3
        if match[1] is not None:
            number = 1 + 3 * int(match[1]) + int(match[2])
            block = f"input_blocks_{number}_1"
            depth = 1 if number <= 2 else 2 if number <= 5 else 3
        result[layer] = f"lllite_unet_{block}_{match[3].replace('.', '_')}", depth
    return result


def lllite_tensors(model: str, seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors of a file, float32 of float16's values; the last layers are not zero."""
    shapes = modules(model)["unet"]
    tensors = {}
    for layer, (name, depth) in places(model).items():
        width, half = shapes[layer][1], EMBEDDED // 2
        sides = {
            "conditioning1.0": (half, 3, 4, 4),
            "down.0": (WIDTH, width),
            "mid.0": (WIDTH, WIDTH + EMBEDDED),
            "up.0": (width, WIDTH),
        }
        if depth == 3:
            sides |= {"conditioning1.2": (half, half, 4, 4),
                      "conditioning1.4": (EMBEDDED, half, 2, 2)}  # fmt: skip
        else:
            sides["conditioning1.2"] = (EMBEDDED, half, 2 * depth, 2 * depth)
        for part, shape in sides.items():
            random = np.random.RandomState(zlib.crc32(f"{seed} {name} {part}".encode()))
            weight = 1.5 * random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            tensors[f"{name}.{part}.weight"] = weight
            tensors[f"{name}.{part}.bias"] = 0.1 * random.standard_normal(shape[0])
    return {name: a.astype(np.float16).astype(np.float32) for name, a in tensors.items()}


def write_lllite(path: Path, model: str, seed: int = 0) -> Path:
    """A file as kohya writes it, float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: array.astype(np.float16) for name, array in lllite_tensors(model, seed).items()
    }
    save_file(tensors, path)
    return path
