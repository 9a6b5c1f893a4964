"""Hires fix: a picture drawn at the model's own size, enlarged, and drawn over at that size.

A model draws well at about the size that it was trained for, and repeats itself beyond it. So the
composition is drawn there; then the picture (Pillow's Lanczos filter) or its latents are enlarged,
noised, and denoised again. Equal to diffusers' text-to-image and image-to-image pipelines one after
the other, with one generator of noise; the idea and the word are AUTOMATIC1111's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError

UPSCALERS = ("lanczos", "latent-nearest", "latent-bilinear")
"""Of the picture, which goes through the VAE both ways, or of the latents."""
STRENGTH = 0.5  # image to image's 0.8 would draw another picture


@dataclass(frozen=True)
class Hires:
    """The second half of a run.

    Attributes:
        scale: as it was asked for.
        upscaler: one of UPSCALERS.
        strength: of the image-to-image pass.
        width, height: of the result, in pixels: the multiples of the VAE factor nearest to scale.
    """

    scale: float
    upscaler: str
    strength: float
    width: int
    height: int

    def describe(self) -> dict[str, Any]:
        """What a picture's metadata say of it: arguments of ``generate``, and the size."""
        return {
            "hires": self.scale,
            "hires_upscaler": self.upscaler,
            "hires_strength": self.strength,
            "hires_size": [self.height, self.width],
        }


def resolve_hires(
    scale: float | None,
    upscaler: str | None,
    strength: float | None,
    *,
    width: int,
    height: int,
    factor: int,
) -> Hires | None:
    """Check the arguments of ``generate`` and fill in the defaults; None where it is not asked for.

    Args:
        strength: checked already to be a number from 0 to 1.
        width, height: of the first pass.
        factor: pixels to a latent.
    Raises: UsageError.
    """
    if scale is None:
        for name, value in (("hires_upscaler", upscaler), ("hires_strength", strength)):
            if value is not None:
                raise UsageError(f"{name} has no effect without hires: say how much (--hires 2)")
        return None
    known = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not known or not math.isfinite(scale) or scale <= 1.0:
        raise UsageError(f"hires is {scale!r}; expected a number above 1, such as 2")
    upscaler = UPSCALERS[0] if upscaler is None else upscaler
    if upscaler not in UPSCALERS:
        raise UsageError(f"hires_upscaler {upscaler!r}: there are {', '.join(UPSCALERS)}")
    larger = [int(side * scale / factor + 0.5) * factor for side in (width, height)]
    if larger == [width, height]:
        raise UsageError(
            f"hires {scale:g}: {width}x{height} pixels times that is no larger size that the model "
            f"can draw (a multiple of {factor}); take more"
        )
    strength = STRENGTH if strength is None else strength
    return Hires(float(scale), upscaler, float(strength), *larger)


def enlarge_latents(latents: np.ndarray, height: int, width: int, upscaler: str) -> np.ndarray:
    """Latents (B, h, w, C) float32 at (height, width) latents.

    Args:
        upscaler: "latent-nearest" or "latent-bilinear", as torch's interpolate has them (without
            antialias, corners not aligned).
    """
    for axis, size in ((1, height), (2, width)):
        length = latents.shape[axis]
        scale = np.float32(length) / np.float32(size)
        if upscaler == "latent-nearest":
            places = np.floor(np.arange(size, dtype=np.float32) * scale).astype(int)
            latents = latents.take(np.minimum(places, length - 1), axis=axis)
            continue
        places = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
        places = np.maximum(places, np.float32(0))
        low = np.minimum(places.astype(int), length - 1)
        share = (places - low).astype(np.float32).reshape(-1, *[1] * (latents.ndim - 1 - axis))
        high = np.minimum(low + 1, length - 1)
        latents = latents.take(low, axis) * (1 - share) + latents.take(high, axis) * share
    return np.ascontiguousarray(latents)
