"""A quick look at a picture in the making: what the model takes it for, by a linear map to colours.

A latent says the mean colour of its pixels nearly by itself, and nearly linearly. The map is fitted
to the model's own VAE, once, by least squares: a chart of colours is encoded, and the mean colour
of the pixels under each latent is what its C numbers (and 1) are to give. So no table of published
numbers is needed, and a fine-tuned or foreign VAE gets its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxdiff.samplers.plan import Plan
from mlxdiff.samplers.scheduler import to_x0

PATCHES = 8  # along a side of the chart; 2 x 2 latents each


def chart(factor: int) -> np.ndarray:
    """A picture of 64 colours in patches, each shaded: uint8 (16 factor, 16 factor, 3).

    Args:
        factor: pixels to a latent along a side.
    """
    levels = np.array([0, 85, 170, 255], np.float32)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    # Neighbours that differ: 29 and 64 have no common divisor.
    colours = colours[np.arange(len(colours)) * 29 % len(colours)]
    side = 2 * factor
    plain = colours.reshape(PATCHES, PATCHES, 3).repeat(side, axis=0).repeat(side, axis=1)
    ramp = np.linspace(-20, 20, side, dtype=np.float32)
    shade = np.tile(ramp[:, None] + ramp, (PATCHES, PATCHES))
    return np.clip(plain + shade[..., None], 0, 255).astype(np.uint8)


def fit(latents: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The linear map from latents to colours.

    Args:
        latents: (h, w, C) of a picture, as the U-Net sees them.
        pixels: the picture, uint8 (h f, w f, 3).
    Returns: (C + 1, 3): colours in [-1, 1] are [latents, 1] times this.
    """
    h, w, _ = latents.shape
    f = pixels.shape[0] // h
    colours = pixels.astype(np.float32).reshape(h, f, w, f, 3).mean(axis=(1, 3)) / 127.5 - 1
    found, *_ = np.linalg.lstsq(_with_one(latents), colours.reshape(h * w, 3), rcond=None)
    return found.astype(np.float32)


def colours(linear: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Colours (h, w, 3) in [-1, 1], or somewhat beyond, of latents (h, w, C)."""
    h, w, _ = latents.shape
    return (_with_one(latents) @ linear).reshape(h, w, 3)


def _with_one(latents: np.ndarray) -> np.ndarray:
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float32)
    return np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1)


def denoised(plan: Plan, index: int, prediction: str, x: Any, output: Any) -> Any:
    """What the network takes x for: its x_0.

    Args:
        plan, index: of the sampler; the row at which the network was asked.
        prediction: what it predicts, as the scheduler's config says.
        x, output: the sample before the row, and what the network said of it.
    """
    signal, noise = plan.rows[index].level
    size = float(np.hypot(signal, noise))
    if prediction == "epsilon" and signal < 1e-3 * size:
        return x  # nothing of x_0 is in it
    of_x, of_output = to_x0(prediction, signal / size, noise / size)
    return of_x / size * x + of_output * output
