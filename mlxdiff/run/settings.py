"""What decides a picture: the arguments of a run, with the model's defaults filled in."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff import samplers
from mlxdiff.errors import UsageError
from mlxdiff.pictures.canvas import Borders, Canvas, check_borders, load_mask, make_canvas
from mlxdiff.pictures.hires import Hires, resolve_hires
from mlxdiff.pictures.image import load_image, resize
from mlxdiff.run.additions.controlnet import Control, resolve_controls
from mlxdiff.run.additions.ip_adapter import ImagePrompt, resolve_image_prompts
from mlxdiff.run.arguments import (
    Arguments,
    check,
    check_numbers,
    checked_flag,
    checked_interval,
    checked_reuse,
    is_scored,
)
from mlxdiff.run.model import Model
from mlxdiff.samplers.guidance import guided_evaluations
from mlxdiff.text import a1111

logger = logging.getLogger("mlxdiff")

IMAGE_GUIDANCE = 1.5  # of models that edit a picture, as diffusers' pipelines have it
NOISE_LEVEL = 20  # of the picture that is enlarged, as diffusers' pipeline has it
DEFAULT_SPLIT = 0.8  # of the way, where a refiner takes over; as diffusers' guide to SDXL has it
AESTHETIC_SCORES = 6.0, 2.5  # for the prompt and the negative prompt


@dataclass(frozen=True)
class Settings:
    """All that decides a picture beside models and seed, with every default filled in.

    Sizes are (height, width) in pixels, ``crop`` is (y, x): SDXL's micro-conditioning, else None.

    Attributes:
        image: the picture to start from, uint8 (height, width, 3); else None.
        image_name: the name of its file, or what it was given as.
        strength: how far from it; None where it does not count.
        canvas: the picture and what of it is repainted; else None.
        hires: what is done to the picture when it is drawn, and the controls at its larger size.
        image_guidance: how closely a model that edits keeps to its picture; else None.
        noise_level: how much noise an upscaler's picture gets first; else None.
        mask_name: of the mask, as ``image_name`` is of the image.
        outpaint: pixels that were added to the left, top, right and bottom of the image.
        paste_original: whether what is not repainted is put back, to the bit, in the end.
        denoising_start: with a refiner, where that begins; else where the run begins, on an image
            that is taken for a picture half made.
        denoising_end: where the run ends or, with a refiner, where that takes over.
        guidance_interval: the shares of the run, 0 to 1, between which there is guidance; None:
            all of it.
        feature_reuse: every so many evaluations the whole U-Net runs, and its deep features are
            kept for those between; None: always.
        label: the class to draw, for models that have classes in place of a prompt.
        refined: whether there is a refiner.
        prompt_syntax: how the prompts are read, one of prompt.SYNTAXES.
        clip_skip: layers left out at the end of the text encoders; None: none.
        controls: what each ControlNet is shown and told.
        guess_mode: whether ControlNets follow their picture more than the prompt, and under
            guidance act on the prediction for the prompt alone.
        image_prompts: what each IP-Adapter is shown.
    """

    prompt: str
    negative_prompt: str | None
    prompt_2: str | None
    negative_prompt_2: str | None
    width: int
    height: int
    steps: int
    guidance: float
    guidance_rescale: float
    sampler: str
    schedule: str
    eta: float | None = None
    strength: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    guidance_interval: tuple[float, float] | None = None
    feature_reuse: int | None = None
    label: int | None = None
    image_name: str | None = None
    image: np.ndarray | None = field(default=None, repr=False, compare=False)
    refined: bool = False
    prompt_syntax: str = "plain"
    clip_skip: int | None = None
    hires: Hires | None = None
    hires_controls: tuple[Control, ...] = ()
    image_guidance: float | None = None
    noise_level: int | None = None
    mask_name: str | None = None
    outpaint: Borders | None = None
    paste_original: bool = False
    canvas: Canvas | None = field(default=None, repr=False, compare=False)
    controls: tuple[Control, ...] = ()
    guess_mode: bool = False
    image_prompts: tuple[ImagePrompt, ...] = ()

    @property
    def evaluations(self) -> int:
        """Evaluations of a whole run by A1111's count, on which prompt editing is based."""
        return self.steps * samplers.evaluations_per_step(self.sampler)

    @property
    def encodes(self) -> bool:
        """Whether the VAE encodes the image; an upscaler sees it as it is."""
        return self.image is not None and self.noise_level is None

    @property
    def adds_noise(self) -> bool:
        """Whether the run begins with noise: alone, or added to the image."""
        return self.refined or self.denoising_start is None

    @property
    def enlarged(self) -> Settings | None:
        """Those of the second pass of a hires run; None where there is none."""
        if self.hires is None:
            return None
        size, larger = (self.height, self.width), (self.hires.height, self.hires.width)
        return replace(
            self,
            width=self.hires.width,
            height=self.hires.height,
            strength=self.hires.strength,
            # What was the picture's size is its size again.
            original_size=larger if self.original_size == size else self.original_size,
            target_size=larger if self.target_size == size else self.target_size,
            controls=self.hires_controls,
            hires=None,
            image=None,
        )

    def guides(self, model: Model) -> bool:
        """Whether a model of the run takes several predictions an evaluation."""
        return model.is_guided(self.guidance, self.image_guidance if model.edits else None)

    def batch(self, model: Model) -> int:
        """Predictions of an evaluation, guidance included."""
        return 1 if not self.guides(model) else 3 if model.edits else 2

    @property
    def altered(self) -> bool:
        """Whether it is not one whole run of the whole network, guided in all steps."""
        parts = self.guidance_interval, self.feature_reuse, self.hires
        return any(part is not None for part in parts)

    def time_ids(self, model: Model) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The numbers that an SDXL U-Net is told beside the negative and the positive prompt."""
        if self.original_size is None or self.crop is None:
            return None
        shared = (*self.original_size, *self.crop)
        if model.takes_aesthetic_score:
            high, low = self.aesthetic_score or 0.0, self.negative_aesthetic_score or 0.0
            return (*shared, low), (*shared, high)
        target = self.target_size or (self.height, self.width)
        return (*shared, *target), (*shared, *target)


def resolve(
    model: Model,
    refiner: Model | None,
    prompt: str | None = None,
    *,
    label: int | None = None,
    **arguments: Any,
) -> Settings:
    """Check the arguments of ``generate`` and fill in the defaults. Raises: UsageError."""
    if model.lacks("text"):
        return _resolve_pixels(model, prompt, label, **arguments)
    if label is not None:
        raise UsageError(f"label {label}: this model draws from a prompt, it has no classes")
    if prompt is None:
        raise UsageError(
            'no prompt is given; for example: mlxdiff generate "a red circle on a blue background"'
        )
    return _resolve_text(model, refiner, Arguments(prompt, **arguments))


def _resolve_pixels(
    model: Model,
    prompt: str | None,
    label: int | None,
    *,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    sampler: str = "auto",
    schedule: str = "auto",
    eta: float | None = None,
    **others: Any,
) -> Settings:
    """Settings of a model without text and VAE."""
    # A picture's metadata may say what says nothing: an empty prompt, no guidance.
    others = {"prompt": prompt or None, **others}
    for name, most in (("guidance", 1.0), ("guidance_rescale", 0.0)):
        value = others.get(name)
        if isinstance(value, (int, float)) and value <= most:
            del others[name]
    if given := [name for name, value in others.items() if value is not None]:
        raise UsageError(
            f"{', '.join(given)}: this model draws from noise alone; it has no part for that"
        )
    check_numbers(1.0, eta=eta)
    model.check_label(label)
    if width is None or height is None:
        own_height, own_width = model.default_size
        width = own_width if width is None else width
        height = own_height if height is None else height
    model.check_size(width=width, height=height)
    sampler = model.default_sampler if sampler == "auto" else sampler
    settings = Settings(
        prompt="",
        negative_prompt=None,
        prompt_2=None,
        negative_prompt_2=None,
        width=width,
        height=height,
        steps=model.default_steps(sampler) if steps is None else steps,
        guidance=1.0,
        guidance_rescale=0.0,
        sampler=sampler,
        schedule=schedule,
        eta=eta,
        label=label,
    )
    plan = make_plans(settings, model)[0]
    return replace(settings, sampler=plan.sampler, schedule=plan.schedule)


def _resolve_text(model: Model, refiner: Model | None, asked: Arguments) -> Settings:
    """Settings of a model that draws from text."""
    check(model, refiner, asked)
    interval = checked_interval(asked.guidance_interval)
    reuse = checked_reuse(asked.feature_reuse)
    guess_mode = checked_flag("guess_mode", asked.guess_mode)
    pixels = None if asked.image is None else load_image(asked.image)
    outpaint = None if asked.outpaint is None else check_borders(asked.outpaint)
    height, width = _size(model, asked, pixels, outpaint)
    factor, nets = model.vae_config.factor, len(model.controlnets)
    larger = resolve_hires(
        asked.hires,
        asked.hires_upscaler,
        asked.hires_strength,
        width=width,
        height=height,
        factor=factor,
    )
    hires_controls: tuple[Control, ...] = ()
    if larger is not None:
        hires_controls = resolve_controls(nets, larger.width, larger.height, **asked.control)
    start, end = asked.denoising_start, asked.denoising_end
    if refiner is not None:
        end = DEFAULT_SPLIT if end is None else end
        start = end if start is None else start
    guidance = model.default_guidance if asked.guidance is None else asked.guidance
    settings = Settings(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        prompt_2=asked.prompt_2,
        negative_prompt_2=asked.negative_prompt_2,
        width=width,
        height=height,
        steps=model.default_steps(asked.sampler) if asked.steps is None else asked.steps,
        guidance=float(guidance),
        guidance_rescale=float(asked.guidance_rescale),
        guidance_interval=interval,
        feature_reuse=reuse,
        sampler=asked.sampler,
        schedule=asked.schedule,
        eta=asked.eta,
        denoising_start=start,
        denoising_end=end,
        refined=refiner is not None,
        prompt_syntax=asked.prompt_syntax,
        clip_skip=asked.clip_skip,
        controls=resolve_controls(nets, width, height, **asked.control),
        hires=larger,
        hires_controls=hires_controls,
        guess_mode=guess_mode,
        image_prompts=resolve_image_prompts(len(model.ip_adapters), asked.ip_image, asked.ip_scale),
    )
    if settings.guess_mode and not settings.controls:
        raise UsageError("guess_mode: there is no ControlNet; give one (--controlnet)")
    if pixels is not None:
        settings = _with_image(settings, model, asked, pixels, outpaint)
    if model.is_sdxl:
        settings = _with_conditioning(settings, model, refiner, asked)
    _check_editing(settings)
    _note_unused_words(model, settings)
    _note_what_has_no_effect(model, settings, asked)
    plans = make_plans(settings, model, refiner)
    _check_some_guidance(settings, plans)
    plan = plans[0]
    return replace(settings, sampler=plan.sampler, schedule=plan.schedule)


def _size(
    model: Model, asked: Arguments, pixels: np.ndarray | None, outpaint: Borders | None
) -> tuple[int, int]:
    """(height, width): what is asked for, else the image's, else the model's own."""
    if pixels is None or (asked.mask is not None and outpaint is None):
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
    asked: Arguments,
    pixels: np.ndarray,
    outpaint: Borders | None,
) -> Settings:
    """With the picture that the run starts from, and how far from it."""
    width, height = settings.width, settings.height
    settings = replace(settings, image_name=_named(asked.image))
    if asked.repaints:
        greys = None if asked.mask is None else load_mask(asked.mask)
        canvas = make_canvas(pixels, greys, width, height, model.vae_config.factor, outpaint)
        _note_other_shape(pixels, greys)
        settings = replace(
            settings,
            canvas=canvas,
            image=canvas.image,
            mask_name=None if asked.mask is None else _named(asked.mask),
            outpaint=outpaint,
            paste_original=asked.paste_original,
        )
    else:
        settings = replace(settings, image=_resized(model, pixels, width, height))
    if model.upscales:
        level = NOISE_LEVEL if asked.noise_level is None else asked.noise_level
        model.check_noise_level(level)
        return replace(settings, noise_level=level)
    if model.edits:
        scale = IMAGE_GUIDANCE if asked.image_guidance is None else asked.image_guidance
        return replace(settings, image_guidance=scale)
    if settings.adds_noise:
        default = 1.0 if asked.repaints else model.default_strength
        return replace(settings, strength=default if asked.strength is None else asked.strength)
    if asked.strength is not None:
        logger.warning("strength has no effect: denoising_start says where the run begins")
    return settings


def _with_conditioning(
    settings: Settings, model: Model, refiner: Model | None, asked: Arguments
) -> Settings:
    """With the numbers that SDXL's U-Nets are told beside the prompt."""
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
    """The sampler's plan for the model, and for what comes after: a refiner, or a hires pass."""
    source = model.source
    own_strength = (
        model.is_latent_consistency
        and settings.canvas is None  # its pipelines do not inpaint; the general one does
        and samplers.takes_distilled_strength(source.scheduler_config, settings.sampler)
    )
    plan = samplers.plan(
        source.scheduler_config,
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
    )
    if (enlarged := settings.enlarged) is not None:
        enlarged = replace(enlarged, sampler=plan.sampler, schedule=plan.schedule)
        try:
            return plan, *make_plans(enlarged, model)
        except UsageError as error:
            raise UsageError(f"hires: {error}") from None
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
    )
    return plan, second


def _check_editing(settings: Settings) -> None:
    """Refuse a prompt that changes from step to step together with what holds on to one."""
    if settings.prompt_syntax == "plain" or settings.feature_reuse is None:
        return
    texts = (
        settings.prompt,
        settings.prompt_2,
        settings.negative_prompt,
        settings.negative_prompt_2,
    )
    if any(text and len(a1111.edits(text, settings.evaluations)) > 1 for text in texts):
        raise UsageError(
            "feature_reuse: the prompt changes from step to step ([from:to:when] or [a|b]), and "
            "features of one prompt are not those of another; leave out one of the two"
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
                f"guidance_interval {start:g} to {stop:g} holds none of the run's {len(plan)} "
                "evaluations; take a wider one, or guidance 1 for none"
            )


def _named(picture: Any) -> str:
    """What the metadata call a picture that was given."""
    return Path(picture).name if isinstance(picture, (str, os.PathLike)) else "(pixels)"


def _given_size(pixels: np.ndarray, outpaint: Borders | None) -> tuple[int, int]:
    """(height, width) of the image, with what is added around it."""
    left, top, right, bottom = outpaint or (0, 0, 0, 0)
    return top + pixels.shape[0] + bottom, left + pixels.shape[1] + right


def _note_other_shape(pixels: np.ndarray, mask: np.ndarray | None) -> None:
    """Say so where a mask must be squeezed to lie on its image."""
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
    """(height, width): as given, rounded down to what the model can draw, else the model's."""
    if width is not None and height is not None:
        return height, width
    if given is None:
        return model.default_size
    factor = model.vae_config.factor
    rows, columns = given
    if min(rows, columns) < factor:
        raise UsageError(
            f"the image is {columns}x{rows} pixels, too small for this model; say width and height"
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


def _note_unused_words(model: Model, settings: Settings) -> None:
    """Warn of embeddings whose word is not in the prompts."""
    first, negative = settings.prompt, settings.negative_prompt or ""
    texts = [
        [first, negative],
        [settings.prompt_2 or first, settings.negative_prompt_2 or negative],
    ]
    for word in model.texts.unused(texts, settings.prompt_syntax):
        logger.warning("an embedding has no effect: its word %r is not in the prompt", word)


def _note_what_has_no_effect(model: Model, settings: Settings, asked: Arguments) -> None:
    """Warn of arguments that change nothing at the values of others."""
    image_guidance = asked.image_guidance
    without_guidance = {
        "negative_prompt": settings.negative_prompt,
        "negative_prompt_2": settings.negative_prompt_2,
        "negative_aesthetic_score": asked.negative_aesthetic_score,
        "guidance_rescale": settings.guidance_rescale or None,
        "guidance_interval": settings.guidance_interval,
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
            why = "this model is told the guidance scale and makes one prediction"
        logger.warning("%s has no effect: %s", " and ".join(given), why)
    if settings.negative_prompt is None and settings.negative_prompt_2 is not None:
        if model.zeros_for_empty_prompt:
            logger.warning("negative_prompt_2 has no effect without negative_prompt")


def pick_seeds(seed: int | None, count: int) -> list[int]:
    """The seeds of a run: seed, seed + 1, ...; a random first one where none is given."""
    if count < 1:
        raise UsageError(f"count is {count}; expected at least 1")
    first = secrets.randbits(32) if seed is None else seed
    return [first + i for i in range(count)]
