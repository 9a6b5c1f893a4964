"""What a picture starts from, and what it is held to on the way.

The order of the draws from a picture's generator is that of diffusers' pipelines: the VAE's sample
of the image, the noise, the VAE's sample of the masked image. A model that edits takes the mean of
the image instead, and starts from noise alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdiff.image import to_model
from mlxdiff.model import ImageLatents, Model
from mlxdiff.pixels import PixelModel
from mlxdiff.samplers import Plan
from mlxdiff.settings import Settings

Draw = Callable[[], np.ndarray]
"""The next noise of a picture, (1, h, w, C)."""


@dataclass(frozen=True)
class Kept:
    """Puts back, after each step, what a plain model must not repaint.

    Attributes:
        mask: (1, h, w, 1), 1 where it is repainted.
        clean: the given picture, (1, h, w, C).
        noise: what the forward process adds to it.
    """

    mask: np.ndarray
    clean: np.ndarray
    noise: np.ndarray

    def on(self, backend: Any) -> Kept:
        """The same with arrays of the backend."""
        return Kept(*map(backend.asarray, (self.mask, self.clean, self.noise)))

    def __call__(self, x: Any, plan: Plan, index: int) -> Any:
        """`x` at a row of the plan, its kept part as the forward process has it there."""
        known = plan.add_noise(self.clean, self.noise, index)
        return (1.0 - self.mask) * known + self.mask * x


@dataclass(frozen=True)
class Start:
    """What one picture starts from.

    Attributes:
        x: (1, h, w, C).
        beside: what the U-Net sees beside it, or None.
        kept: what is put back after each step, or None.
    """

    x: np.ndarray
    beside: np.ndarray | None = None
    kept: Kept | None = None


class Inputs:
    """The given picture, encoded once for all pictures of a run.

    Args:
        model: whose VAE encodes.
        settings: of the run.
    """

    def __init__(self, model: Model | PixelModel, settings: Settings) -> None:
        self.settings = settings
        self.image: ImageLatents | None = None
        self.masked: ImageLatents | None = None
        self.mask: np.ndarray | None = None
        self.edited: np.ndarray | None = None
        self.blends = False
        if not isinstance(model, Model) or settings.image is None:
            return
        if model.edits:
            scaled = model.takes_scaled_picture
            self.edited = model.encode_pixels(to_model(settings.image), scaled=scaled).mean
            return
        canvas = settings.canvas
        if canvas is not None:
            self.blends = not model.inpaints
            self.mask = canvas.latent_mask(model.vae_config.factor)
        if canvas is None or self.blends or settings.strength != 1.0:
            self.image = model.image_latents(settings.image)
        if canvas is not None:
            # A plain model does not see it; the reference encodes and samples it all the same.
            self.masked = self.image if self.blends else model.encode_pixels(canvas.masked_image)

    def begin(self, plan: Plan, draw: Draw, noise: np.ndarray | None = None) -> Start:
        """What a picture starts from.

        Args:
            plan: of the model that begins.
            draw: noise of the picture's own generator.
            noise: takes the place of the first noise.
        """
        settings, repaints = self.settings, self.mask is not None
        clean = None if self.image is None else self.image.draw(draw)
        if clean is not None and not settings.adds_noise and not repaints:
            return Start(clean)
        noise = draw() if noise is None else noise
        if clean is None or (repaints and settings.strength == 1.0):
            x = noise * plan.init_noise_sigma
        else:
            x = plan.add_noise(clean, noise) if settings.adds_noise else clean
        x = np.asarray(x, np.float32)
        if self.mask is None or self.masked is None:
            return Start(x, beside=self.edited)
        masked = self.masked.draw(draw)
        if clean is not None and self.blends:
            return Start(x, kept=Kept(self.mask, clean, noise))
        return Start(x, beside=np.concatenate([self.mask, masked], axis=-1))

    def refine(self, start: Start, draw: Draw) -> Start:
        """What is different where a refiner goes on: new noise for what is kept, nothing beside."""
        if start.kept is None:
            return Start(start.x)
        return Start(start.x, kept=Kept(start.kept.mask, start.kept.clean, draw()))
