"""Inputs that tests/golden/make_guider_goldens.py and test_guiders.py share."""

from __future__ import annotations

from typing import Any

import numpy as np

MODELS = ("sd15", "sdxl")
LAYERS = {"sd15": ("mid", "up_blocks.1"), "sdxl": ("mid", "down_blocks.1")}


def inputs(name: str, config: Any) -> dict[str, Any]:
    """One evaluation of a U-Net, NHWC, and latents for its VAE; square, as diffusers' SEG needs."""
    draw = np.random.default_rng(MODELS.index(name))
    get = config.get if hasattr(config, "get") else lambda key: getattr(config, key)
    width = get("cross_attention_dim")
    width = width[0] if isinstance(width, (tuple, list)) else width

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    made: dict[str, Any] = {
        "sample": normal(1, 16, 16, get("in_channels")),
        "timestep": 601.0,
        "text": normal(1, 7, width),
        "latents": normal(1, 4, 6, 4),
    }
    embed_in, ids = get("projection_class_embeddings_input_dim"), get("addition_time_embed_dim")
    if embed_in is not None and ids is not None:
        made["pooled"] = normal(1, embed_in - 6 * ids)
        made["ids"] = np.array([[64, 64, 0, 0, 64, 64]], np.float32)
    return made


def predictions() -> list[tuple[np.ndarray, np.ndarray]]:
    """Three pairs of predictions without and with the prompt."""
    draw = np.random.default_rng(9)
    pairs = draw.standard_normal((3, 2, 1, 5, 6, 4)).astype(np.float32)
    return [(uncond, uncond + 0.5 * other) for uncond, other in pairs]
