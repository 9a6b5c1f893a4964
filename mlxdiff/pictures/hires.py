"""Hires fix: draw a picture at the model's native size, enlarge it, and draw over it.

A model draws well near its training size and repeats itself at larger sizes. So the first pass
draws the composition at the native size. Then the picture (Pillow's Lanczos filter) or its latents
are enlarged, noised and denoised again. The result equals that of diffusers' text-to-image and
image-to-image pipelines in sequence, with one noise generator. Idea and name: AUTOMATIC1111.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError, argument

UPSCALERS = ("lanczos", "latent-nearest", "latent-bilinear")
"""lanczos enlarges the picture (decoded and encoded again); the others enlarge the latents."""
STRENGTH = 0.5  # 0.8, the default of image to image, would draw a different picture


@dataclass(frozen=True)
class Hires:
    """Settings of the second pass.

    Attributes:
        scale: the requested scale.
        upscaler: one of UPSCALERS, or the file of a network.
        strength: strength of the image-to-image pass.
        width, height: size of the result in pixels: multiples of the VAE factor, nearest to scale.
        steps: of the second pass; None: the run's steps times the strength.
    """

    scale: float
    upscaler: str
    strength: float
    width: int
    height: int
    steps: int | None = None

    def schedule(self, steps: int) -> tuple[int, float]:
        """Return (steps, strength) of an image-to-image run that is the second pass.

        With ``steps`` of its own the schedule is as fine as needed for them, so that the strength
        still says where the pass begins. As in A1111.

        Args:
            steps: of the run.
        """
        if self.steps is None or self.strength == 0.0:
            return steps, self.strength
        whole = max(int(self.steps / min(self.strength, 0.999)), self.steps)
        # Half a step more: rounding down then gives exactly these steps.
        return whole, min((self.steps + 0.5) / whole, 1.0)

    @property
    def network(self) -> str | None:
        """The file of the network that enlarges; None: another way."""
        return None if self.upscaler in UPSCALERS else self.upscaler

    def describe(self) -> dict[str, Any]:
        """Return the metadata entries: the arguments of ``generate``, and the size."""
        return {
            "hires": self.scale,
            "hires_upscaler": self.upscaler,
            "hires_strength": self.strength,
            **({} if self.steps is None else {"hires_steps": self.steps}),
            "hires_size": [self.height, self.width],
        }


def resolve_hires(
    scale: float | None,
    upscaler: str | os.PathLike[str] | None,
    strength: float | None,
    steps: int | None = None,
    *,
    width: int,
    height: int,
    factor: int,
) -> Hires | None:
    """Check the arguments of ``generate`` and fill in the defaults.

    Args:
        scale, upscaler: as given; not checked yet.
        strength: already checked to be a number from 0 to 1.
        steps: already checked to be a whole number of at least 1.
        width, height: size of the first pass, in pixels.
        factor: pixels per latent along a side.
    Returns: the settings, or None if ``scale`` is None.
    Raises: UsageError.
    """
    if scale is None:
        others = {"hires_upscaler": upscaler, "hires_strength": strength, "hires_steps": steps}
        for name, value in others.items():
            if value is not None:
                raise UsageError(
                    f"{argument(name)} has no effect without {argument('hires')}; add "
                    f"{argument('hires', 2)}, for example"
                )
        return None
    known = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not known or not math.isfinite(scale) or scale <= 1.0:
        raise UsageError(f"{argument('hires')} is {scale!r}; expected a number above 1, such as 2")
    upscaler = UPSCALERS[0] if upscaler is None else os.fspath(upscaler)
    if upscaler not in UPSCALERS and not re.search(r"[./\\]", upscaler):
        raise UsageError(
            f"{argument('hires_upscaler')} is {upscaler!r}; expected one of "
            f"{', '.join(UPSCALERS)}, or the file of a network (ESRGAN, Real-ESRGAN)"
        )
    larger = [int(side * scale / factor + 0.5) * factor for side in (width, height)]
    if larger == [width, height]:
        raise UsageError(
            f"{argument('hires')} is {scale:g}; it does not enlarge {width}x{height} pixels to "
            f"the next multiple of {factor}, so it has no effect; give a larger value"
        )
    strength = STRENGTH if strength is None else strength
    new_width, new_height = larger
    return Hires(float(scale), upscaler, float(strength), new_width, new_height, steps)


def enlarge_latents(latents: np.ndarray, height: int, width: int, upscaler: str) -> np.ndarray:
    """Enlarge latents (B, h, w, C) float32.

    Args:
        latents: the latents.
        height, width: new size, in latents.
        upscaler: "latent-nearest" or "latent-bilinear", as in torch's interpolate (no antialias,
            corners not aligned).
    Returns: float32 (B, height, width, C).
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
