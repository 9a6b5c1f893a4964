"""The settings of a picture: the options of a run, with the model's defaults filled in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff import samplers
from mlxdiff.pictures.canvas import Canvas
from mlxdiff.pictures.hires import Hires
from mlxdiff.pictures.metadata import FIELDS as METADATA_FIELDS
from mlxdiff.run import composition
from mlxdiff.run.additions.control import Control
from mlxdiff.run.additions.ip_adapter import ImagePrompt
from mlxdiff.run.kind import Kind
from mlxdiff.run.options import RunOptions, ValueOptions
from mlxdiff.run.table import entries
from mlxdiff.run.values import listed
from mlxdiff.samplers import guiders
from mlxdiff.text import a1111


@dataclass(frozen=True, kw_only=True)
class Settings(ValueOptions):
    """Everything that defines a picture except models and seed, with every default filled in.

    The plain values keep their names and meanings (``run.options``). Sizes are (height, width) in
    pixels; SDXL's micro-conditioning is None for other models, as is what a run has no use for.

    Attributes:
        image: the picture to start from, uint8 (height, width, 3); else None.
        leading: the picture whose embedding leads the U-Net, uint8 (H, W, 3); else None.
        image_name: the name of its file, or "(pixels)".
        canvas: the picture and what of it is repainted; else None.
        mask_name: the name of the mask's file, or "(pixels)".
        depth: the depth map that a model sees, float32 (H, W) of any size; else None.
        depth_name: the name of its file, or "(pixels)".
        hires: how to enlarge the finished picture, and the controls at its larger size.
        controls: the picture and the numbers of each ControlNet, then of each T2I-Adapter.
        image_prompts: the pictures of each IP-Adapter.
        refined: whether there is a refiner.
        best_of: pictures that are drawn for each one that is kept.
        processed: (height, width) in which a model that makes maps looks at the image; else None.
        video: the video to start from, uint8 (frames, height, width, 3); else None.
    """

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    image: np.ndarray | None = field(default=None, repr=False, compare=False)
    leading: np.ndarray | None = field(default=None, repr=False, compare=False)
    image_name: str | None = None
    canvas: Canvas | None = field(default=None, repr=False, compare=False)
    mask_name: str | None = None
    depth: np.ndarray | None = field(default=None, repr=False, compare=False)
    depth_name: str | None = None
    hires: Hires | None = None
    hires_controls: tuple[Control, ...] = ()
    controls: tuple[Control, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    refined: bool = False
    best_of: int = 1
    processed: tuple[int, int] | None = None
    video: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def drawn(self) -> tuple[int, int]:
        """(height, width) in pixels of what the U-Net draws."""
        return self.processed or (self.height, self.width)

    @property
    def group(self) -> int:
        """Pictures that are drawn for each one of the result: of the best, or joined."""
        return self.best_of * self.ensemble

    @property
    def evaluations(self) -> int:
        """Evaluations of a whole run by A1111's count, on which prompt editing is based."""
        return self.steps * samplers.evaluations_per_step(self.sampler)

    def latent_shape(self, model: Kind) -> tuple[int, int, int]:
        """(rows, columns, channels) of what is drawn; the frames of a video below each other."""
        height, width, channels = model.latent_shape(*self.drawn)
        return (self.frames or 1) * height, width, channels

    @property
    def encodes(self) -> bool:
        """Return True if the VAE encodes the image; an upscaler sees it as it is."""
        return self.image is not None and self.noise_level is None

    @property
    def adds_noise(self) -> bool:
        """Return True if the run begins with noise: alone, or added to the image."""
        return self.refined or self.denoising_start is None

    @property
    def enlarged(self) -> Settings | None:
        """Settings of the second pass of a hires run; None if there is none."""
        if self.hires is None:
            return None
        size, larger = (self.height, self.width), (self.hires.height, self.hires.width)
        steps, strength = self.hires.schedule(self.steps)
        return replace(
            self,
            width=self.hires.width,
            height=self.hires.height,
            steps=steps,
            strength=strength,
            # A size that was the picture's own stays so.
            original_size=larger if self.original_size == size else self.original_size,
            target_size=larger if self.target_size == size else self.target_size,
            controls=self.hires_controls,
            hires=None,
            image=None,
        )

    def describe(self) -> dict[str, Any]:
        """Describe the run for the metadata of a picture: values by key; defaults go without saying
        where the metadata have no field for them."""
        said: dict[str, Any] = {}
        for name, entry in entries(ValueOptions).items():
            value = getattr(self, name)
            if entry.key is not None and (entry.key in METADATA_FIELDS or value != entry.default):
                said[entry.key] = value
        if self.region is not None:
            said["region"] = [one.named.text for one in self.regions]
        if self.hires is not None:
            said |= self.hires.describe()
        names = {"image": self.image_name, "mask": self.mask_name, "depth_image": self.depth_name}
        return said | names

    def is_brownian(self, plan: samplers.Plan) -> bool:
        """Return True if the noise of the steps is that of one Brownian motion."""
        return plan.brownian if self.step_noise is None else self.step_noise == "brownian"

    @property
    def regions(self) -> tuple[composition.Region, ...]:
        """The parts of the picture with prompts of their own."""
        return tuple(map(composition.parse, listed(self.region)))

    @property
    def prompts(self) -> list[tuple[str, float]]:
        """The prompts that make up the picture everywhere, each with its weight (A1111's AND)."""
        if self.prompt_syntax == "plain":
            return [(self.prompt, 1.0)]
        return a1111.composition(self.prompt)

    @property
    def other_prompts(self) -> list[str]:
        """The prompts of the picture beside the first: of its regions, or joined by AND."""
        regions = [region.prompt for region in self.regions]
        return regions + [prompt for prompt, _ in self.prompts[1:]]

    @property
    def reuses(self) -> bool:
        """True if some evaluations use deep features of others."""
        return self.feature_reuse is not None or self.feature_reuse_error is not None

    @property
    def guiding(self) -> guiders.Guider:
        """How the predictions of an evaluation are combined."""
        return guiders.CFG if self.guider is None else guiders.parse(self.guider)

    def guides(self, model: Kind) -> bool:
        """Return True if a model of the run takes several predictions an evaluation."""
        return model.is_guided(self.guidance, self.image_guidance if model.edits else None)

    def batch(self, model: Kind) -> int:
        """Predictions of an evaluation, guidance included."""
        return 1 if not self.guides(model) else 3 if model.edits else 2

    @property
    def altered(self) -> bool:
        """True if some steps lack guidance or the whole network, or if a second pass follows."""
        parts = (
            self.guidance_interval,
            self.feature_reuse,
            self.feature_reuse_error,
            self.hires,
            self.guider,
            self.freeu,
            self.seamless,
            self.region,
            None if len(self.prompts) == 1 else self.prompts,
        )
        return any(part is not None for part in parts)

    @property
    def motion_numbers(self) -> tuple[float, float, float]:
        """The three numbers that Stable Video Diffusion takes. It was trained on frames a second
        less one."""
        fps, motion, augmentation = self.fps, self.motion_bucket, self.noise_augmentation
        assert fps is not None and motion is not None and augmentation is not None
        return fps - 1, float(motion), augmentation

    def time_ids(self, model: Kind) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Micro-conditioning of the U-Net, for the negative and for the positive prompt."""
        if model.animates:
            return self.motion_numbers, self.motion_numbers
        if self.original_size is None or self.crop is None:
            return None
        shared = (*self.original_size, *self.crop)
        if model.takes_aesthetic_score:
            high, low = self.aesthetic_score or 0.0, self.negative_aesthetic_score or 0.0
            return (*shared, low), (*shared, high)
        target = self.target_size or (self.height, self.width)
        return (*shared, *target), (*shared, *target)


def filled(asked: RunOptions, **resolved: Any) -> Settings:
    """Return settings with the values that are asked for, but for those that are resolved."""
    kept = {name: getattr(asked, name) for name in entries(ValueOptions)}
    return Settings(**kept | {"prompt": asked.prompt or ""} | resolved)


def named(picture: Any) -> str:
    """Return the name of a picture in metadata."""
    if isinstance(picture, list):
        return f"({len(picture)} frames)"
    return Path(picture).name if isinstance(picture, (str, os.PathLike)) else "(pixels)"
