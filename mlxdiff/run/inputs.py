"""The starting latents of a picture, and what must stay of a given picture.

A picture's generator is drawn from in the order of diffusers' pipelines: the VAE's sample of the
image, the noise, the VAE's sample of the masked image. A model that edits takes the mean of the
image, and starts from noise alone. An upscaler starts from noise alone, too: it sees the image
itself, and the noise that is added to the image is drawn first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mlxdiff.noise import add_noise
from mlxdiff.pictures.hires import Hires, enlarge_latents
from mlxdiff.pictures.image import resize_values, to_model
from mlxdiff.pictures.resampling import resample
from mlxdiff.run import animation, image_led, video
from mlxdiff.run.additions.upscaler import enlarged_for_hires
from mlxdiff.run.model import ImageLatents, Model
from mlxdiff.run.seeds import Draws, Shape
from mlxdiff.run.settings import Settings
from mlxdiff.samplers import Plan


@dataclass(frozen=True)
class Kept:
    """Puts the part of a picture back, after each step, that a plain model must not repaint.

    Attributes:
        mask: (1, h, w, 1), 1 where the picture is repainted.
        clean: latents of the given picture, (1, h, w, C).
        noise: the noise that the forward process adds to them.
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
    """The start of one picture.

    Attributes:
        x: the latents, (1, h, w, C).
        beside: further input channels of the U-Net, or None.
        labels: the vector that the U-Net takes beside the timestep, (1, D), or None.
        kept: puts a part back after each step, or None.
    """

    x: np.ndarray
    beside: np.ndarray | None = None
    kept: Kept | None = None
    labels: np.ndarray | None = None


class Stage(NamedTuple):
    """A part of a run: a model on a plan.

    Attributes:
        model, settings, plan: of this part.
        before: number of evaluations that another model makes before.
    """

    model: Model
    settings: Settings
    plan: Plan
    before: int = 0


def make_stages(
    settings: Settings, plans: Sequence[Plan], model: Model, refiner: Model | None = None
) -> list[Stage]:
    """The parts of a run: the model's, then that of a refiner or of a hires pass.

    Args:
        plans: of each part, as ``planning.make_plans`` gives them.
    """
    first, *others = plans
    stages = [Stage(model, settings, first)]
    for plan in others:
        if settings.enlarged is not None:
            stages.append(Stage(model, settings.enlarged, plan))
        elif refiner is not None:
            stages.append(Stage(refiner, settings, plan, len(first)))
    return stages


def depth_latents(depth: np.ndarray, height: int, width: int) -> np.ndarray:
    """A depth map as a U-Net sees it: (H, W) of any numbers -> (1, height, width, 1), -1 to 1.

    Source: diffusers StableDiffusionDepth2ImgPipeline.prepare_depth_map.
    """
    small = resample(depth[..., None], height, width, "bicubic")
    low, high = small.min(), small.max()
    # The whole map differs somewhere, but a few places of it may not.
    span = np.float32(1) if low == high else high - low
    return (2 * (small - low) / span - 1)[None]


class Inputs:
    """The given picture, encoded once for all pictures of a run.

    Args:
        model: whose VAE encodes.
        settings: of the run.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self.settings = settings
        self.image: ImageLatents | None = None
        self.masked: ImageLatents | None = None
        self.mask: np.ndarray | None = None
        self.edited: np.ndarray | None = None
        self.small: np.ndarray | None = None
        self.depth: np.ndarray | None = None
        self.leading: image_led.Leading | None = None
        self.animates = model if model.animates else None
        self.frames: list[ImageLatents] = []
        self.signal = 1.0
        self.blends = False
        if model.unclips and settings.leading is not None:
            self.leading = image_led.Leading(model, settings)
        if settings.image is None or model.animates:
            return
        if settings.video is not None:
            self.frames = [model.image_latents(frame) for frame in settings.video]
            return
        if settings.noise_level is not None:
            self.small = to_model(settings.image)
            self.signal = float(model.image_noise_process[settings.noise_level])
            return
        if model.maps is not None:
            looking: Any = model
            self.edited = looking.seen(settings.image, settings.processing_resolution)
            return
        if model.edits or model.turns:
            scaled = model.takes_scaled_picture
            self.edited = model.encode_pixels(to_model(settings.image), scaled=scaled).mean
            return
        if settings.depth is not None:
            shape = model.latent_shape(settings.height, settings.width)
            self.depth = depth_latents(settings.depth, *shape[:2])
        canvas = settings.canvas
        if canvas is not None:
            self.blends = not model.inpaints
            self.mask = canvas.latent_mask(model.vae_config.factor)
        if canvas is None or self.blends or settings.strength != 1.0:
            self.image = model.image_latents(settings.image)
        if canvas is not None:
            # A plain model does not see it; the reference encodes and samples it all the same.
            self.masked = self.image if self.blends else model.encode_pixels(canvas.masked_image)

    def begin(
        self, plan: Plan, draws: Draws, shape: Shape, noise: np.ndarray | None = None
    ) -> Start:
        """Return the start of a picture.

        Args:
            plan: of the model that begins.
            draws: the picture's noise.
            shape: (h, w, C) of the latents.
            noise: takes the place of the first noise.
        """
        settings, repaints = self.settings, self.mask is not None
        if self.animates is not None:
            beside = animation.noised_latents(self.animates, settings, draws)
            noise = animation.first_noise(settings, draws, shape) if noise is None else noise
            return Start(np.asarray(noise * plan.init_noise_sigma, np.float32), beside=beside)
        if self.leading is not None:
            labels = self.leading.noised(draws)
            noise = draws.first(shape) if noise is None else noise
            return Start(np.asarray(noise * plan.init_noise_sigma, np.float32), labels=labels)
        if self.frames:
            return self._begin_video(plan, draws, noise)
        if self.small is not None:
            small = add_noise(self.small, draws.next(shape, self.small.shape[-1]), self.signal)
            noise = draws.first(shape) if noise is None else noise
            noise = np.asarray(noise * plan.init_noise_sigma, np.float32)
            return Start(noise, beside=np.asarray(small, np.float32))
        clean = None if self.image is None else draws.sample(self.image)
        if clean is not None and not settings.adds_noise and not repaints:
            return Start(clean)
        noise = draws.first(shape) if noise is None else noise
        if clean is None or (repaints and settings.strength == 1.0):
            x = noise * plan.init_noise_sigma
        else:
            x = plan.add_noise(clean, noise) if settings.adds_noise else clean
        x = np.asarray(x, np.float32)
        if self.mask is None or self.masked is None:
            return Start(x, beside=self.edited if self.depth is None else self.depth)
        masked = draws.sample(self.masked)
        if clean is not None and self.blends:
            return Start(x, kept=Kept(self.mask, clean, noise))
        return Start(x, beside=np.concatenate([self.mask, masked], axis=-1))

    def _begin_video(self, plan: Plan, draws: Draws, noise: np.ndarray | None) -> Start:
        """The start of a video, drawn as diffusers draws it: (1, F, C, h, w) where a picture that
        starts from noise alone has (1, C, F, h, w)."""
        clean = video.stacked(draws.sample_frames(self.frames))
        if noise is None:
            shape = self.frames[0].mean.shape
            noise = video.stacked(draws.frames(len(self.frames), shape[1:]))
        return Start(np.asarray(plan.add_noise(clean, noise), np.float32))

    def go_on(
        self, stage: Stage, start: Start, latents: np.ndarray, draws: Draws, shape: Shape
    ) -> Start:
        """Return the start of the next part of a run.

        Args:
            stage: the next part.
            start: the start of the part before.
            latents: the result of the part before, (1, h, w, C).
            draws: the picture's noise.
            shape: (h, w, C) of the latents of the next part.
        """
        if self.settings.hires is not None:
            larger = self._enlarge(stage, self.settings.hires, latents, draws, shape)
            return replace(larger, labels=start.labels)
        if start.kept is None:
            return Start(latents)
        # A refiner keeps the same picture with new noise.
        return Start(latents, kept=Kept(start.kept.mask, start.kept.clean, draws.next(shape)))

    def _enlarge(
        self, stage: Stage, hires: Hires, latents: np.ndarray, draws: Draws, shape: Shape
    ) -> Start:
        model = stage.model
        if hires.network is not None:
            picture = np.clip(model.decode_pixels(latents[0]), -1.0, 1.0)
            pixels = enlarged_for_hires(model, hires, picture)[None]
            clean = draws.sample(model.encode_pixels(pixels))
        elif hires.upscaler == "lanczos":
            # Not rounded to 8 bits: the second pass would amplify the last bit.
            picture = np.clip(model.decode_pixels(latents[0]), -1.0, 1.0)
            pixels = resize_values(picture, hires.width, hires.height)[None]
            clean = draws.sample(model.encode_pixels(pixels))
        else:
            clean = enlarge_latents(latents, shape[0], shape[1], hires.upscaler)
        noisy = stage.plan.add_noise(clean, draws.second(shape))
        return Start(np.asarray(noisy, np.float32))
