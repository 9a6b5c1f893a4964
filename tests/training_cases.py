"""What the goldens of training and their tests share: inputs, probes and cases; NumPy only."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

PROBES = 8
STEPS = 12  # of the golden LoRA run in the usual tests; the slow ones have 200
RATE = 1e-3
RANK = 4
BATCH = 2


def summary(name: str, values: np.ndarray) -> np.ndarray:
    """The norm of a tensor in the files' (PyTorch's) layout, and its products with random signs.

    The root mean square of the products of a difference estimates the difference's norm.
    """
    name = name.removeprefix("text_model.")
    random = np.random.default_rng(zlib.crc32(name.encode()))
    signs = random.integers(0, 2, (PROBES, values.size), dtype=np.int8) * 2 - 1
    flat = values.reshape(-1).astype(np.float64)
    return np.array([np.sqrt(np.square(flat).sum()), *(signs @ flat)])


def distance(name: str, values: np.ndarray, golden: np.ndarray) -> float:
    """The distance of a tensor from the one that a summary is of, relative to the norm of that."""
    found = summary(name, values)
    return float(np.sqrt(np.mean(np.square(found[1:] - golden[1:]))) / max(golden[0], 1e-30))


def unet_inputs(kind: str, width: int, pooled: int | None) -> dict[str, np.ndarray]:
    """Inputs of a U-Net in our layout: batch 2, 8x8 latents, and a gradient for its output."""
    random = np.random.default_rng(zlib.crc32(kind.encode()))
    found: dict[str, np.ndarray] = {
        "sample": random.standard_normal((2, 8, 8, 4), np.float32),
        "timesteps": np.array([871, 33], np.int64),
        "text": random.standard_normal((2, 77, width), np.float32),
        "cotangent": random.standard_normal((2, 8, 8, 4), np.float32),
    }
    if pooled is not None:
        found["text_embeds"] = random.standard_normal((2, pooled), np.float32)
        found["time_ids"] = np.array([[64, 64, 0, 0, 64, 64], [96, 64, 4, 0, 64, 64]], np.float32)
    return found


def lora_batches(count: int, width: int) -> list[dict[str, np.ndarray]]:
    """The batches of the golden LoRA run: four fixed examples in turn, other noise each time."""
    random = np.random.default_rng(5)
    latents = random.standard_normal((4, 8, 8, 4), np.float32) * np.float32(0.8)
    text = random.standard_normal((4, 77, width), np.float32)
    found = []
    for index in range(count):
        rows = [(BATCH * index + i) % 4 for i in range(BATCH)]
        own = np.random.default_rng([6, index])
        found.append(
            {
                "latents": latents[rows],
                "text": text[rows],
                "noise": own.standard_normal((BATCH, 8, 8, 4), np.float32),
                "timesteps": own.integers(0, 1000, BATCH),
            }
        )
    return found


def first_factor(module: str, shape: tuple[int, ...]) -> np.ndarray:
    """The first lora_A of the golden run, in our layout."""
    random = np.random.default_rng(zlib.crc32(module.encode()))
    return (random.standard_normal(shape) / shape[0]).astype(np.float32)


def optimizer_problem(steps: int = 12) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Parameters, and gradients of some steps."""
    random = np.random.default_rng(9)
    shapes: dict[str, tuple[int, ...]] = {"matrix": (6, 5), "vector": (7,)}
    first = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    gradients = [
        {n: (0.1 * random.standard_normal(s) + 0.05).astype(np.float32) for n, s in shapes.items()}
        for _ in range(steps)
    ]
    return first, gradients


PROCESSES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled-linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero-snr": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    },
}
TIMESTEPS = np.array([0, 1, 250, 601, 998, 999])


def packed(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same in few arrays: the summaries of a part are one table, with their names."""
    parts: dict[str, list[str]] = {}
    others = {}
    for name, values in found.items():
        part, _, own = name.partition("/")
        if values.shape == (1 + PROBES,):
            parts.setdefault(part, []).append(own)
        else:
            others[name] = values
    for part, names in parts.items():
        others[f"{part}//names"] = np.array("\n".join(names))
        table = [found[f"{part}/{name}"] for name in names]
        others[f"{part}//table"] = np.array(table, np.float32)
    return others


def unpacked(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undo ``packed``."""
    found = {name: values for name, values in stored.items() if "//" not in name}
    for name, names in stored.items():
        part, _, what = name.partition("//")
        if what == "names":
            for own, row in zip(str(names).split("\n"), stored[f"{part}//table"], strict=True):
                found[f"{part}/{own}"] = row
    return found
