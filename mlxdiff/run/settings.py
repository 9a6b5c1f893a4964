"""The settings of a picture: the options of a run, with the model's defaults filled in."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxdiff import samplers
from mlxdiff.errors import UsageError, argument, quoted
from mlxdiff.noise import SEEDS
from mlxdiff.pictures.canvas import (
    Borders,
    Canvas,
    check_borders,
    crop_canvas,
    load_mask,
    make_canvas,
)
from mlxdiff.pictures.hires import Hires, resolve_hires
from mlxdiff.pictures.image import load_image, load_levels, resize
from mlxdiff.pictures.metadata import FIELDS as METADATA_FIELDS
from mlxdiff.pictures.videos import is_video, load_video
from mlxdiff.run import animation, composition, image_led, video
from mlxdiff.run.additions.control import Control, resolve_controls
from mlxdiff.run.additions.ip_adapter import ImagePrompt, resolve_image_prompts
from mlxdiff.run.additions.judge import judge_of
from mlxdiff.run.additions.lora import few_step_of
from mlxdiff.run.additions.map_maker import check_makers
from mlxdiff.run.additions.motion import SCHEDULE, motion_of
from mlxdiff.run.aspect import with_aspect
from mlxdiff.run.habits import note_habits, note_seed
from mlxdiff.run.model import Model
from mlxdiff.run.options import RunOptions, ValueOptions
from mlxdiff.run.rules import (
    check,
    check_map,
    check_parts,
    check_upscaler,
    checked_interval,
    is_scored,
    repaints,
)
from mlxdiff.run.table import entries
from mlxdiff.run.values import listed
from mlxdiff.samplers import guiders
from mlxdiff.samplers.guidance import guided_evaluations
from mlxdiff.store.folder import ModelSource
from mlxdiff.text import a1111

logger = logging.getLogger("mlxdiff")

IMAGE_GUIDANCE = 1.5  # for models that edit a picture; the default of diffusers' pipelines
NOISE_LEVEL = 20  # for upscalers; the default of diffusers' pipeline
DEFAULT_SPLIT = 0.8  # share of the run after which a refiner takes over; as in diffusers' guide
NO_THRESHOLD = 1e5  # as large as no prediction is
AESTHETIC_SCORES = 6.0, 2.5  # for the prompt and the negative prompt


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

    def latent_shape(self, model: Model) -> tuple[int, int, int]:
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

    def guides(self, model: Model) -> bool:
        """Return True if a model of the run takes several predictions an evaluation."""
        return model.is_guided(self.guidance, self.image_guidance if model.edits else None)

    def batch(self, model: Model) -> int:
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

    def time_ids(self, model: Model) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Micro-conditioning of the U-Net, for the negative and for the positive prompt."""
        if model.animates:
            return animation.numbers_of(self), animation.numbers_of(self)
        if self.original_size is None or self.crop is None:
            return None
        shared = (*self.original_size, *self.crop)
        if model.takes_aesthetic_score:
            high, low = self.aesthetic_score or 0.0, self.negative_aesthetic_score or 0.0
            return (*shared, low), (*shared, high)
        target = self.target_size or (self.height, self.width)
        return (*shared, *target), (*shared, *target)


class PlannedRun(NamedTuple):
    """A run that can be drawn: checked, and planned.

    Attributes:
        model: the model, with all that is added to it for this run.
        settings: of the run.
        plans: the sampler's plan for the model, and for what comes after (``make_plans``).
        seeds: seed of each picture that is drawn.
        noise: (pictures, H/f, W/f, C) float32 in place of the first noise; None: as the seeds give.
    """

    model: Model
    settings: Settings
    plans: tuple[samplers.Plan, ...]
    seeds: list[int]
    noise: np.ndarray | None = None


def resolve(
    model: Model, refiner: Model | None = None, asked: RunOptions | None = None
) -> PlannedRun:
    """Check the options of a run, fill in the defaults, and plan it. Raises: UsageError."""
    asked = RunOptions() if asked is None else asked
    sampler, schedule = samplers.resolve(asked.sampler, asked.schedule)
    asked = replace(asked, sampler=sampler, schedule=schedule)
    note_seed(asked.seed)
    if asked.best_of > 1 and judge_of(model) is None:
        model.require("judge", "best_of")
        raise UsageError(
            f"{argument('best_of')}: there is no judge; give one ({argument('judge')})"
        )
    asked = _with_variations(model, asked)
    group = asked.best_of * asked.ensemble
    seeds = pick_seeds(asked.seed, asked.count * group, asked.vary)
    asked = with_aspect(model, asked)
    if model.maps is not None:
        settings, plans = _resolve_map(model, asked)
    elif model.animates:
        settings, plans = _resolve_animation(model, asked)
    elif model.lacks("text"):
        settings, plans = _resolve_pixels(model, asked)
    else:
        settings, plans = _resolve_text(model, refiner, asked)
    settings = replace(
        settings,
        sampler=plans[0].sampler,
        schedule=plans[0].schedule,
        best_of=asked.best_of,
    )
    _check_first_noise(settings, asked, model)
    noise = _check_noise(settings, asked.noise, len(seeds), model)
    return PlannedRun(model, settings, plans, seeds, noise)


def _resolve_pixels(model: Model, asked: RunOptions) -> tuple[Settings, tuple[samplers.Plan, ...]]:
    """Settings of a model without text and VAE."""
    # The metadata of a picture may hold what means nothing: an empty prompt, no guidance.
    guidance = None if (asked.guidance or 0.0) <= 1.0 else asked.guidance
    asked = replace(asked, prompt=asked.prompt or None, guidance=guidance)
    check_parts(model, None, asked)
    check_upscaler(model, asked)
    model.check_label(asked.label)
    width, height = asked.width, asked.height
    if width is None or height is None:
        own_height, own_width = model.default_size
        width = own_width if width is None else width
        height = own_height if height is None else height
    model.check_size(width=width, height=height)
    sampler = model.default_sampler if asked.sampler == "auto" else asked.sampler
    settings = _settings(
        asked,
        prompt="",
        width=width,
        height=height,
        steps=model.default_steps(sampler) if asked.steps is None else asked.steps,
        guidance=1.0,
        sampler=sampler,
    )
    return settings, make_plans(settings, model)


def _resolve_map(model: Any, asked: RunOptions) -> tuple[Settings, tuple[samplers.Plan, ...]]:
    """Settings of a model that makes maps (``run.map_model``)."""
    # As for a model that draws pixels.
    guidance = None if (asked.guidance or 0.0) <= 1.0 else asked.guidance
    asked = replace(asked, prompt=asked.prompt or None, guidance=guidance)
    check_parts(model, None, asked)
    check_map(model, asked)
    pixels = load_image(asked.image)
    rows, columns = pixels.shape[:2]
    width = columns if asked.width is None else asked.width
    height = rows if asked.height is None else asked.height
    model.check_size(width=width, height=height)
    resolution = asked.processing_resolution
    resolution = model.default_resolution if resolution is None else resolution
    sampler = model.default_sampler if asked.sampler == "auto" else asked.sampler
    depth_as = asked.depth_as or "grey" if model.maps == "depth" else None
    settings = _settings(
        asked,
        prompt="",
        width=width,
        height=height,
        steps=model.default_steps(sampler) if asked.steps is None else asked.steps,
        guidance=1.0,
        sampler=sampler,
        image=pixels,
        image_name=_named(asked.image),
        processing_resolution=resolution,
        processed=model.processed_size(rows, columns, resolution),
        depth_as=depth_as,
    )
    plans = make_plans(settings, model)
    _check_step_noise(settings, plans)
    return settings, plans


def _resolve_animation(
    model: Model, asked: RunOptions
) -> tuple[Settings, tuple[samplers.Plan, ...]]:
    """Settings of a model that lets a picture move (``run.animation``)."""
    asked = replace(asked, prompt=asked.prompt or None)
    check_parts(model, None, asked)
    animation.check(model, asked)
    pixels = load_image(asked.image)
    own_height, own_width = model.default_size
    width = own_width if asked.width is None else asked.width
    height = own_height if asked.height is None else asked.height
    model.check_size(width=width, height=height)
    guidance = model.default_guidance if asked.guidance is None else asked.guidance
    low = asked.min_guidance
    frames = model.unet_config.num_frames if asked.frames is None else asked.frames
    added = asked.noise_augmentation
    settings = _settings(
        asked,
        prompt="",
        width=width,
        height=height,
        steps=model.default_steps(asked.sampler) if asked.steps is None else asked.steps,
        guidance=guidance,
        min_guidance=animation.LEAST_GUIDANCE if low is None else low,
        frames=frames,
        fps=animation.FPS if asked.fps is None else asked.fps,
        motion_bucket=animation.MOTION if asked.motion_bucket is None else asked.motion_bucket,
        noise_augmentation=animation.AUGMENTATION if added is None else added,
        decode_chunk=frames if asked.decode_chunk is None else min(asked.decode_chunk, frames),
        image=resize(pixels, width, height),
        leading=pixels,
        image_name=_named(asked.image),
    )
    plans = make_plans(settings, model)
    return settings, plans


def _resolve_text(
    model: Model, refiner: Model | None, asked: RunOptions
) -> tuple[Settings, tuple[samplers.Plan, ...]]:
    """Settings of a model that draws from text."""
    asked = _in_motion(model, _in_few_steps(model, asked))
    if model.lacks("prompt"):
        asked = replace(asked, prompt=asked.prompt or None)  # "" in metadata means none
    elif asked.prompt is None and not model.is_led:
        raise UsageError(
            'no prompt is given; say what to draw, such as "a red circle on a blue background"'
        )
    if asked.zoom_out is not None:
        asked = _zoomed_out(model, asked)
    check(model, refiner, asked)
    drawn, footage = _video(model, asked)
    interval = checked_interval(asked.guidance_interval)
    pixels: np.ndarray | None = None
    if footage is not None:
        pixels = footage[0]
    elif asked.image is not None:
        pixels = load_image(asked.image)
    outpaint = None if asked.outpaint is None else check_borders(asked.outpaint)
    height, width = _size(model, asked, pixels, outpaint)
    larger = resolve_hires(
        asked.hires,
        asked.hires_upscaler,
        asked.hires_strength,
        asked.hires_steps,
        width=width,
        height=height,
        factor=model.vae_config.factor,
    )
    if larger is not None:
        model.check_size(width=larger.width, height=larger.height)
    sizes = (
        [(width, height)] if larger is None else [(width, height), (larger.width, larger.height)]
    )
    controls = resolve_controls(
        model.controlled,
        sizes,
        control_image=asked.control_image,
        control_scale=asked.control_scale,
        control_start=asked.control_start,
        control_end=asked.control_end,
        control_preprocess=asked.control_preprocess,
        control_mode=asked.control_mode,
        frames=None if drawn is None else drawn.frames,
    )
    check_makers(model, [control.preprocess for control in controls[0]])
    if drawn is not None:
        video.check_controls([one.image for one in controls[0]], drawn.frames)
    start, end = asked.denoising_start, asked.denoising_end
    if refiner is not None:
        end = DEFAULT_SPLIT if end is None else end
        start = end if start is None else start
    settings = _settings(
        asked,
        prompt=asked.prompt or "",
        width=width,
        height=height,
        steps=_steps(model, asked),
        guidance=model.default_guidance if asked.guidance is None else asked.guidance,
        guidance_interval=interval,
        feature_reuse=None if asked.feature_reuse == 1 else asked.feature_reuse,
        denoising_start=start,
        denoising_end=end,
        refined=refiner is not None,
        hires=larger,
        controls=controls[0],
        hires_controls=() if larger is None else controls[1],
        **(drawn._asdict() if drawn is not None else {}),
        image_prompts=resolve_image_prompts(len(model.ip_adapters), asked.ip_image, asked.ip_scale),
        # What has a meaning only beside a picture is filled in with it.
        strength=None,
        image_guidance=None,
        noise_level=None,
        outpaint=None,
        paste_original=False,
        only_masked=None,
        original_size=None,
        target_size=None,
        crop=None,
        aesthetic_score=None,
        negative_aesthetic_score=None,
    )
    if settings.guess_mode and not model.controlnets:
        raise UsageError(
            f"{argument('guess_mode')}: there is no ControlNet; give one "
            f"({argument('controlnets')})"
        )
    if pixels is not None:
        settings = _with_image(settings, model, asked, pixels, outpaint)
    if footage is not None and settings.frames is not None:
        shown = [resize(one, width, height) for one in footage]
        shown = shown * settings.frames if len(shown) == 1 else shown
        settings = replace(settings, video=np.stack(shown))
    if model.is_sdxl:
        settings = _with_conditioning(settings, model, refiner, asked)
    _check_editing(settings)
    _note_unused_words(model, settings)
    _note_what_has_no_effect(model, settings, asked)
    note_habits(model, asked, height, width)
    plans = make_plans(settings, model, refiner)
    _check_some_guidance(settings, plans)
    _check_step_noise(settings, plans)
    _check_guider(settings, model)
    _check_reuse(settings, model)
    return settings, plans


def _with_variations(model: Model, asked: RunOptions) -> RunOptions:
    """The same with what says how many pictures to draw said once. Raises: UsageError."""
    if asked.variations is None:
        return asked
    model.require("variations", argument("variations"))
    if asked.count != asked.variations:
        raise UsageError(
            f"{argument('variations')} and {argument('count')} both say how many pictures to draw; "
            "give one of them"
        )
    return replace(asked, variations=None)


def _video(model: Model, asked: RunOptions) -> tuple[video.Video | None, list[np.ndarray] | None]:
    """The numbers of the video that is drawn, and the frames that it starts from."""
    if not model.draws_video:
        if asked.image is not None and is_video(asked.image):
            model.require("video", argument("image"))
        return None, None
    footage = None if asked.image is None else load_video(asked.image, asked.frames)
    given = None if footage is None or len(footage) == 1 else len(footage)
    return video.resolve(model, asked, given), footage


def _zoomed_out(model: Model, asked: RunOptions) -> RunOptions:
    """The same with the borders that make the picture smaller, at the size of the image."""
    if asked.image is None or asked.zoom_out is None:
        raise UsageError(f"{argument('zoom_out')} needs an image ({argument('image')})")
    if asked.outpaint is not None:
        raise UsageError(
            f"{argument('zoom_out')} and {argument('outpaint')} both say what to add; give one of "
            "them"
        )
    model.require("mask", "zoom_out")
    rows, columns = load_image(asked.image).shape[:2]
    factor = model.vae_config.factor
    high, wide = (round((asked.zoom_out - 1) * side) for side in (rows, columns))
    return replace(
        asked,
        zoom_out=None,
        outpaint=(wide // 2, high // 2, wide - wide // 2, high - high // 2),
        width=max(columns // factor, 1) * factor if asked.width is None else asked.width,
        height=max(rows // factor, 1) * factor if asked.height is None else asked.height,
    )


def _in_few_steps(model: Model, asked: RunOptions) -> RunOptions:
    """Fill in what the model's few-step LoRA asks for, where nothing else is given."""
    way = few_step_of(model.additions)
    if way is None:
        return asked
    asked = replace(
        asked,
        steps=way.steps if asked.steps is None else asked.steps,
        guidance=way.guidance if asked.guidance is None else asked.guidance,
    )
    if (asked.sampler, asked.schedule) != ("auto", "auto"):
        return asked
    eta = way.eta if asked.eta is None else asked.eta
    return replace(asked, sampler=way.sampler, schedule=way.schedule, eta=eta)


def _in_motion(model: Model, asked: RunOptions) -> RunOptions:
    """Fill in how the model's motion adapter is used, where nothing else is given."""
    motion = motion_of(model.additions)
    if motion is None:
        return asked
    way = motion.way
    asked = replace(
        asked,
        steps=way.steps if asked.steps is None else asked.steps,
        guidance=way.guidance if asked.guidance is None else asked.guidance,
    )
    if (asked.sampler, asked.schedule) != ("auto", "auto"):
        return asked
    return replace(asked, sampler=way.sampler, schedule=way.schedule)


def _settings(asked: RunOptions, **resolved: Any) -> Settings:
    """Settings with the values that are asked for, but for those that are resolved."""
    kept = {name: getattr(asked, name) for name in entries(ValueOptions)}
    return Settings(**kept | resolved)


def _steps(model: Model, asked: RunOptions) -> int:
    """Number of steps: what is asked for, else that of the listed sigmas, else the model's own."""
    listed = None if asked.sigmas is None else [sigma for sigma in asked.sigmas if sigma > 0.0]
    if listed is None:
        return model.default_steps(asked.sampler) if asked.steps is None else asked.steps
    if asked.steps not in (None, len(listed)):
        raise UsageError(
            f"sigmas: they are {len(listed)} steps, and steps is {asked.steps}; leave steps out"
        )
    return max(len(listed), 1)


def _check_guider(settings: Settings, model: Model) -> None:
    """Refuse a guider where its predictions do not exist."""
    if settings.guider is None:
        return
    if model.edits:
        raise UsageError(
            f"guider {settings.guiding.name}: this model has a guidance of its own, of a picture "
            "and a prompt; leave the guider out"
        )
    if settings.guiding.weakens and settings.reuses:
        raise UsageError(
            f"guider {settings.guiding.name} with feature_reuse: the features of the whole network "
            "are not those of the weakened one; leave out one of the two"
        )


def _check_reuse(settings: Settings, model: Model) -> None:
    """Refuse reuse within an error where it cannot be measured."""
    if settings.feature_reuse_error is None:
        return
    if settings.feature_reuse is not None:
        raise UsageError(
            "feature_reuse and feature_reuse_error: a fixed and a measured reuse; leave out one"
        )
    if samplers.distilled_for(model.source.scheduler_config) is not None:
        raise UsageError(
            "feature_reuse_error: this model needs few steps, and each of them is too different "
            "from the last; leave it out"
        )
    if settings.region is not None or len(settings.prompts) > 1:
        raise UsageError(
            "feature_reuse_error: the picture has several prompts, whose errors add up; leave out "
            "one of the two, or take feature_reuse"
        )


def _check_step_noise(settings: Settings, plans: tuple[samplers.Plan, ...]) -> None:
    """Refuse a Brownian motion for steps that belong to no interval; note what has no effect."""
    if settings.step_noise is None:
        return
    for plan in plans:
        if not plan.draws:
            logger.warning("step_noise has no effect: sampler %s draws no noise", plan.sampler)
        elif settings.step_noise == "brownian" and any(
            row.noise and not row.between for row in plan.rows
        ):
            raise UsageError(
                f"step_noise brownian: sampler {plan.sampler} draws independent noise; "
                "dpmpp-sde, dpmpp-2m-sde and dpmpp-3m-sde can take a Brownian motion"
            )


def _check_noise(
    settings: Settings, noise: np.ndarray | None, count: int, model: Model
) -> np.ndarray | None:
    """The noise that was given, if it fits the run."""
    if noise is None:
        return None
    expected: tuple[int, ...] = count, *model.latent_shape(*settings.drawn)
    if settings.frames is not None:
        expected = count, settings.frames, *expected[1:]
    try:
        noise = np.asarray(noise, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"noise is {quoted(noise)}; expected an array of numbers") from None
    if noise.shape != expected:
        form = "pictures, H/f, W/f, C" if settings.frames is None else "videos, F, H/f, W/f, C"
        raise UsageError(f"noise has shape {noise.shape}; expected {expected} ({form})")
    return noise.reshape(count, *settings.latent_shape(model))


def _check_first_noise(settings: Settings, asked: RunOptions, model: Model) -> None:
    """Refuse what changes the first noise where it is given, or where there is none."""
    if asked.noise_size is not None:
        height, width = asked.noise_size
        try:
            model.check_size(width=width, height=height)
        except UsageError as error:
            raise UsageError(f"{argument('noise_size')}: {error}") from None
    changes = {"vary": asked.vary, "noise_size": asked.noise_size}
    for name, value in (changes | {"noise": asked.noise}).items():
        if value is not None and not settings.adds_noise:
            raise UsageError(
                f"{argument(name)}: this run begins without any noise "
                f"({argument('denoising_start')})"
            )
    for name, value in changes.items():
        if value is not None and asked.noise is not None:
            raise UsageError(
                f"{argument(name)} and {argument('noise')} are both given; give one of them"
            )


def _size(
    model: Model, asked: RunOptions, pixels: np.ndarray | None, outpaint: Borders | None
) -> tuple[int, int]:
    """(height, width): what is asked for, else the image's, else the model's own."""
    if pixels is None or model.is_led or (asked.mask is not None and outpaint is None):
        given = None
    else:
        given = _given_size(pixels, outpaint)
    default_height, default_width = _default_size(model, given, asked.width, asked.height)
    width = default_width if asked.width is None else asked.width
    height = default_height if asked.height is None else asked.height
    model.check_size(width=width, height=height)
    return height, width


def _with_image(
    settings: Settings,
    model: Model,
    asked: RunOptions,
    pixels: np.ndarray,
    outpaint: Borders | None,
) -> Settings:
    """Add the picture that the run starts from, and how far to go from it."""
    width, height = settings.width, settings.height
    settings = replace(settings, image_name=_named(asked.image))
    if model.is_led:
        return image_led.with_picture(settings, model, asked, pixels)
    if repaints(asked):
        greys = None if asked.mask is None else load_mask(asked.mask)
        factor = model.vae_config.factor
        if asked.only_masked is not None and greys is not None:
            canvas = crop_canvas(pixels, greys, width, height, factor, asked.only_masked)
        else:
            canvas = make_canvas(pixels, greys, width, height, factor, outpaint)
        _note_other_shape(pixels, greys)
        settings = replace(
            settings,
            canvas=canvas,
            image=canvas.image,
            mask_name=None if asked.mask is None else _named(asked.mask),
            outpaint=outpaint,
            paste_original=asked.paste_original,
            only_masked=asked.only_masked,
        )
    else:
        settings = replace(settings, image=_resized(model, pixels, width, height))
    if asked.depth_image is not None:
        depth = _depth_map(asked.depth_image)
        settings = replace(settings, depth=depth, depth_name=_named(asked.depth_image))
    if model.upscales:
        level = NOISE_LEVEL if asked.noise_level is None else asked.noise_level
        model.check_noise_level(level)
        return replace(settings, noise_level=level)
    if model.edits:
        scale = IMAGE_GUIDANCE if asked.image_guidance is None else asked.image_guidance
        return replace(settings, image_guidance=scale)
    if settings.adds_noise:
        default = 1.0 if repaints(asked) else model.default_strength
        return replace(settings, strength=default if asked.strength is None else asked.strength)
    if asked.strength is not None:
        logger.warning(
            "%s has no effect: %s says where the run begins",
            argument("strength"),
            argument("denoising_start"),
        )
    return settings


def _with_conditioning(
    settings: Settings, model: Model, refiner: Model | None, asked: RunOptions
) -> Settings:
    """Add SDXL's micro-conditioning."""
    size = settings.height, settings.width
    settings = replace(
        settings, original_size=asked.original_size or size, crop=asked.crop or (0, 0)
    )
    if not model.takes_aesthetic_score:
        settings = replace(settings, target_size=asked.target_size or size)
    if not is_scored(model, refiner):
        return settings
    high, low = AESTHETIC_SCORES
    if asked.aesthetic_score is not None:
        high = asked.aesthetic_score
    if asked.negative_aesthetic_score is not None:
        low = asked.negative_aesthetic_score
    return replace(settings, aesthetic_score=high, negative_aesthetic_score=low)


def make_plans(
    settings: Settings, model: Model, refiner: Model | None = None
) -> tuple[samplers.Plan, ...]:
    """Plan the sampler for the model, and for what follows: a refiner, or a hires pass."""
    source = model.source
    own_strength = (
        model.is_latent_consistency
        and settings.canvas is None  # its pipelines do not inpaint; the general one does
        and samplers.takes_distilled_strength(source.scheduler_config, settings.sampler)
    )
    process = SCHEDULE if model.draws_video else {}
    plan = samplers.plan(
        source.scheduler_config | process | _thresholding(settings),
        settings.sampler,
        settings.schedule,
        settings.steps,
        eta=settings.eta,
        family=source.family,
        strength=None if own_strength else settings.strength,
        distilled_strength=settings.strength if own_strength else None,
        denoising_start=None if settings.refined else settings.denoising_start,
        denoising_end=settings.denoising_end,
        guidance=settings.guidance,
        altered=settings.altered,
        sigmas=settings.sigmas,
    )
    if settings.dynamic_threshold is not None and not _thresholds(plan):
        raise _cannot_threshold(settings, source)
    if (enlarged := settings.enlarged) is not None:
        enlarged = replace(enlarged, sampler=plan.sampler, schedule=plan.schedule)
        try:
            return plan, *make_plans(enlarged, model)
        except UsageError as error:
            raise UsageError(f"{argument('hires')}: {error}") from None
    if refiner is None:
        return (plan,)
    second = samplers.plan(
        refiner.source.scheduler_config,
        plan.sampler,
        plan.schedule,
        settings.steps,
        eta=settings.eta,
        family=source.family,
        denoising_start=settings.denoising_start,
        sigmas=settings.sigmas,
    )
    return plan, second


def _thresholding(settings: Settings) -> dict[str, Any]:
    """Arguments of a scheduler for the dynamic thresholding that is asked for."""
    if settings.dynamic_threshold is None:
        if settings.threshold_max is not None:
            raise UsageError(
                f"{argument('threshold_max')} has no effect without {argument('dynamic_threshold')}"
            )
        return {}
    most = NO_THRESHOLD if settings.threshold_max is None else settings.threshold_max
    return {
        "thresholding": True,
        "dynamic_thresholding_ratio": settings.dynamic_threshold,
        "sample_max_value": most,
    }


def _thresholds(plan: samplers.Plan) -> bool:
    """Return True if a run brings its predictions within dynamic bounds."""
    return any(row.limit is not None and row.limit.quantile is not None for row in plan.rows)


def _cannot_threshold(settings: Settings, source: ModelSource) -> UsageError:
    """Say which samplers threshold their predictions on this model."""
    config, able = source.scheduler_config | _thresholding(settings), []
    for name in samplers.SAMPLERS:
        with contextlib.suppress(UsageError):
            if _thresholds(samplers.plan(config, name, steps=4, family=source.family)):
                able.append(name)
    return UsageError(
        f"{argument('dynamic_threshold')}: sampler {settings.sampler} does not threshold its "
        f"predictions; {', '.join(able)} do"
    )


def _check_editing(settings: Settings) -> None:
    """Refuse feature reuse together with a prompt that changes from step to step."""
    if settings.prompt_syntax == "plain" or not settings.reuses:
        return
    texts = (
        settings.prompt,
        settings.prompt_2,
        settings.negative_prompt,
        settings.negative_prompt_2,
    )
    if any(text and len(a1111.edits(text, settings.evaluations)) > 1 for text in texts):
        raise UsageError(
            f"{argument('feature_reuse')}: the prompt changes from step to step ([from:to:when] or "
            "[a|b]), and features of one prompt are not those of another; leave out one of the two"
        )


def _check_some_guidance(settings: Settings, plans: tuple[samplers.Plan, ...]) -> None:
    """Refuse a guidance interval that no evaluation lies in."""
    if settings.guidance_interval is None:
        return
    for plan in plans:
        first, end = guided_evaluations(settings.guidance_interval, len(plan))
        if first >= end:
            start, stop = settings.guidance_interval
            raise UsageError(
                f"{argument('guidance_interval')} {start:g} to {stop:g} holds none of the run's "
                f"{len(plan)} evaluations; take a wider one, or guidance 1 for none"
            )


def _named(picture: Any) -> str:
    """Name of a picture in metadata."""
    if isinstance(picture, list):
        return f"({len(picture)} frames)"
    return Path(picture).name if isinstance(picture, (str, os.PathLike)) else "(pixels)"


def _given_size(pixels: np.ndarray, outpaint: Borders | None) -> tuple[int, int]:
    """(height, width) of the image, borders included."""
    left, top, right, bottom = outpaint or (0, 0, 0, 0)
    return top + pixels.shape[0] + bottom, left + pixels.shape[1] + right


def _note_other_shape(pixels: np.ndarray, mask: np.ndarray | None) -> None:
    """Warn if a mask has another shape than its image."""
    if mask is None:
        return
    (rows, columns), (mask_rows, mask_columns) = pixels.shape[:2], mask.shape[:2]
    ratio = rows * mask_columns / (columns * mask_rows)
    if not 0.98 < ratio < 1.02:
        logger.warning(
            "the mask is %dx%d pixels and the image %dx%d, another shape: the mask is stretched "
            "to lie on the image",
            mask_columns,
            mask_rows,
            columns,
            rows,
        )


def _default_size(
    model: Model, given: tuple[int, int] | None, width: int | None, height: int | None
) -> tuple[int, int]:
    """(height, width): the given one, rounded down to what the model can draw, else the model's."""
    if width is not None and height is not None:
        return height, width
    if given is None:
        return model.default_size
    factor = model.vae_config.factor
    rows, columns = given
    if min(rows, columns) < factor:
        raise UsageError(
            f"the image is {columns}x{rows} pixels, too small for this model; give width and height"
        )
    # An upscaler's picture has the size of the latents, and is rounded down all the same, as in the
    # reference.
    scale = factor if model.upscales else 1
    return rows // factor * factor * scale, columns // factor * factor * scale


def _resized(model: Model, pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture as the model takes it for a result of this size."""
    if not model.upscales:
        return resize(pixels, width, height)
    rows, columns, _ = model.latent_shape(height, width)
    return resize(pixels, columns, rows, bicubic=True)


def _depth_map(source: Any) -> np.ndarray:
    """Open a depth map. Raises: UsageError if it shows no depth."""
    depth = load_levels(source)
    if depth.min() == depth.max():
        raise UsageError(
            f"{argument('depth_image')}: the map has the same depth everywhere; the model sees "
            "differences of depth"
        )
    return depth


def _note_unused_words(model: Model, settings: Settings) -> None:
    """Warn of embeddings whose word is not in the prompts."""
    first, negative = settings.prompt, settings.negative_prompt or ""
    texts = [
        [first, negative],
        [settings.prompt_2 or first, settings.negative_prompt_2 or negative],
    ]
    for word in model.texts.unused(texts, settings.prompt_syntax):
        logger.warning("an embedding has no effect: its word %r is not in the prompt", word)


def _note_what_has_no_effect(model: Model, settings: Settings, asked: RunOptions) -> None:
    """Warn of arguments that change nothing at the values of others."""
    image_guidance = asked.image_guidance
    without_guidance = {
        "negative_prompt": settings.negative_prompt,
        "negative_prompt_2": settings.negative_prompt_2,
        "negative_aesthetic_score": asked.negative_aesthetic_score,
        "guidance_rescale": settings.guidance_rescale or None,
        "guidance_interval": settings.guidance_interval,
        "guider": None if settings.guiding.weakens else settings.guider,
        "image_guidance": image_guidance,
    }
    off = image_guidance is not None and image_guidance < 1.0 < settings.guidance
    if off:
        without_guidance |= {"image_guidance": None, "guidance": settings.guidance}
    given = [name for name, value in without_guidance.items() if value is not None]
    if given and not settings.guides(model):
        why = f"there is no guidance at {settings.guidance:g}"
        if off:
            why = f"image guidance {image_guidance:g} is below 1, which means no guidance at all"
        if model.unet_config.time_cond_proj_dim is not None:
            why = "this model takes the guidance scale as an input and makes one prediction"
        logger.warning("%s has no effect: %s", " and ".join(map(argument, given)), why)
    if settings.negative_prompt is None and settings.negative_prompt_2 is not None:
        if model.zeros_for_empty_prompt:
            names = argument("negative_prompt_2"), argument("negative_prompt")
            logger.warning("%s has no effect without %s", *names)


def pick_seeds(seed: int | None, count: int, vary: tuple[int, float] | None = None) -> list[int]:
    """The seeds of a run: seed, seed + 1, ...; the first is random if none is given.

    With a variation all pictures have the same seed: the seed of the variation counts on.
    """
    if count < 1:
        raise UsageError(f"{argument('count')} is {count}; expected at least 1")
    first = secrets.randbits(32) if seed is None else seed
    if first + count > SEEDS.stop:
        raise UsageError(
            f"{argument('seed')} {first}: with {argument('count')} {count} the last seed is "
            f"{first + count - 1}; torch takes at most 2**64 - 1"
        )
    return [first + (i if vary is None else 0) for i in range(count)]


def variation(vary: tuple[int, float] | None, index: int) -> tuple[int, float] | None:
    """The variation of picture ``index`` of a run."""
    return None if vary is None else (vary[0] + index, vary[1])
