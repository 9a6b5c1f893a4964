"""Classifier-free guidance, on arrays of either backend.

Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6 (with w + 1 as ``scale``,
the convention of Stable Diffusion). The rescale is Lin et al. 2023, "Common Diffusion Noise
Schedules and Sample Steps are Flawed", eqs. 15 and 16. The interval is Kynkäänniemi et al. 2024,
"Applying Guidance in a Limited Interval", counted as diffusers' guiders do. The embedding of the
scale is Meng et al. 2023, "On Distillation of Guided Diffusion Models", as in Latent Consistency
Models.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # np.ndarray or mx.array


def is_guided(scale: float) -> bool:
    """Return True if a scale needs the unconditional prediction: only above 1, as in diffusers."""
    return scale > 1.0


def guide(uncond: Array, cond: Array, scale: float, rescale: float = 0.0) -> Array:
    """Combine the predictions without and with the prompt.

    Args:
        uncond: prediction for the negative prompt, (B, H, W, C), float32.
        cond: prediction for the prompt, same shape.
        scale: guidance scale; 1 gives ``cond``.
        rescale: share (0 to 1) of the result that gets the standard deviation of ``cond``, for each
            picture.
    Returns: the guided prediction, (B, H, W, C), float32.
    """
    return rescaled(uncond + scale * (cond - uncond), cond, rescale)


def guided_evaluations(interval: tuple[float, float], total: int) -> tuple[int, int]:
    """Return (first, one past the last) of the evaluations between two shares of a run, 0 to 1."""
    start, end = interval
    return int(start * total), int(end * total)


def guide_edit(
    uncond: Array, image: Array, cond: Array, scale: float, image_scale: float, rescale: float = 0.0
) -> Array:
    """Combine the predictions without, with the picture, and with picture and prompt.

    Args:
        uncond, image, cond: (B, H, W, C), float32.
        scale, image_scale: guidance scales of the prompt and of the picture; 1 and 1 give ``cond``.
        rescale: as in ``guide``.
    Returns: the guided prediction, (B, H, W, C), float32.
    Source: Brooks et al. 2022, "InstructPix2Pix", equation 3.
    """
    guided = uncond + scale * (cond - image) + image_scale * (image - uncond)
    return rescaled(guided, cond, rescale)


def rescaled(guided: Array, cond: Array, rescale: float) -> Array:
    """Give a share of a guided prediction the standard deviation of ``cond``; as in ``guide``."""
    if rescale == 0.0:
        return guided
    ratio = _variance(cond) / _variance(guided)
    return rescale * (guided * ratio**0.5) + (1.0 - rescale) * guided


def _variance(x: Array) -> Array:
    # One value for each picture. The divisor, n or n - 1, cancels in the ratio.
    return x.var(axis=(1, 2, 3), keepdims=True)


def guidance_scale_embedding(scale: float, dim: int) -> np.ndarray:
    """Return the guidance scale's embedding, an input of models with ``time_cond_proj_dim``.

    Args:
        scale: the guidance scale.
        dim: the model's time_cond_proj_dim.
    Returns: (1, dim) float32: sines, then cosines, of 1000 (scale - 1) at ``dim // 2`` frequencies.
    """
    half = dim // 2
    frequencies = np.exp(
        np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1))
    )
    angles = np.float32((scale - 1.0) * 1000.0) * frequencies
    embedding = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(dim % 2, np.float32)])
    return embedding[None].astype(np.float32)
