"""Preview a picture while it is drawn: map the predicted x_0 latents to colours linearly.

The mean colour of the pixels under a latent is nearly a linear function of that latent. The map is
fitted once to the model's own VAE by least squares: encode a chart of colours, then fit the mean
colour of each latent's pixels to its C values and a constant. So no table of published numbers is
needed, and the map suits any VAE.
"""

from __future__ import annotations

import numpy as np

PATCHES = 8  # patches along a side of the chart; each covers 2 x 2 latents


def chart(factor: int) -> np.ndarray:
    """Make a chart of 64 colours in shaded patches: uint8 (16 factor, 16 factor, 3).

    Args:
        factor: pixels per latent along a side.
    """
    levels = np.array([0, 85, 170, 255], np.float32)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    # Permute the colours so that neighbours differ (29 and 64 are coprime).
    colours = colours[np.arange(len(colours)) * 29 % len(colours)]
    side = 2 * factor
    plain = colours.reshape(PATCHES, PATCHES, 3).repeat(side, axis=0).repeat(side, axis=1)
    ramp = np.linspace(-20, 20, side, dtype=np.float32)
    shade = np.tile(ramp[:, None] + ramp, (PATCHES, PATCHES))
    return np.clip(plain + shade[..., None], 0, 255).astype(np.uint8)


def fit(latents: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Fit the linear map from latents to colours.

    Args:
        latents: (h, w, C), the picture's latents in the U-Net's scale.
        pixels: the picture, uint8 (h f, w f, 3).
    Returns: float32 (C + 1, 3); [latents, 1] times this matrix gives colours in [-1, 1].
    """
    h, w, _ = latents.shape
    f = pixels.shape[0] // h
    colours = pixels.astype(np.float32).reshape(h, f, w, f, 3).mean(axis=(1, 3)) / 127.5 - 1
    found, *_ = np.linalg.lstsq(_with_one(latents), colours.reshape(h * w, 3), rcond=None)
    return found.astype(np.float32)


def colours(linear: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Map latents (h, w, C) to colours (h, w, 3), about in [-1, 1]."""
    h, w, _ = latents.shape
    return (_with_one(latents) @ linear).reshape(h, w, 3)


def _with_one(latents: np.ndarray) -> np.ndarray:
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float32)
    return np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1)
