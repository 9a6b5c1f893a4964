"""What a run takes of a model that draws latents from text, or from a picture in its place."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from mlxdiff import samplers
from mlxdiff.errors import UsageError, argument
from mlxdiff.pictures.canvas import (
    Borders,
    check_borders,
    crop_canvas,
    load_mask,
    make_canvas,
)
from mlxdiff.pictures.hires import Hires, resolve_hires
from mlxdiff.pictures.image import load_image, load_levels, resize
from mlxdiff.pictures.videos import is_video, load_video
from mlxdiff.run import image_led, video
from mlxdiff.run.additions.control import Control, resolve_controls
from mlxdiff.run.additions.ip_adapter import resolve_image_prompts
from mlxdiff.run.additions.map_maker import check_makers
from mlxdiff.run.habits import note_habits
from mlxdiff.run.model import Model
from mlxdiff.run.options import RunOptions
from mlxdiff.run.rules import check, checked_interval, is_scored, repaints
from mlxdiff.run.settings import Settings, filled, named
from mlxdiff.text import a1111

logger = logging.getLogger("mlxdiff")

IMAGE_GUIDANCE = 1.5  # for models that edit a picture; the default of diffusers' pipelines
NOISE_LEVEL = 20  # for upscalers; the default of diffusers' pipeline
DEFAULT_SPLIT = 0.8  # share of the run after which a refiner takes over; as in diffusers' guide
AESTHETIC_SCORES = 6.0, 2.5  # for the prompt and the negative prompt

# Values that have a meaning only beside a picture, or for SDXL, and are filled in with it.
_BESIDE: dict[str, Any] = dict.fromkeys(
    (
        "strength image_guidance noise_level outpaint only_masked original_size target_size crop "
        "aesthetic_score negative_aesthetic_score"
    ).split()
) | {"paste_original": False}


def resolve(model: Model, asked: RunOptions, refiner: Model | None) -> Settings:
    """See ``Model.resolve``."""
    if asked.prompt is None and not (model.lacks("prompt") or model.is_led):
        raise UsageError(
            'no prompt is given; say what to draw, such as "a red circle on a blue background"'
        )
    if asked.zoom_out is not None:
        asked = _zoomed_out(model, asked)
    check(model, refiner, asked)
    drawn, shown = _video(model, asked)
    pixels = shown[0] if shown else None
    outpaint = None if asked.outpaint is None else check_borders(asked.outpaint)
    height, width = _size(model, asked, pixels, outpaint)
    hires = _hires(model, asked, width, height)
    controls, larger_controls = _controls(model, asked, width, height, hires, drawn)
    start, end = asked.denoising_start, asked.denoising_end
    if refiner is not None:
        end = DEFAULT_SPLIT if end is None else end
        start = end if start is None else start
    settings = filled(
        asked,
        width=width,
        height=height,
        guidance_interval=checked_interval(asked.guidance_interval),
        feature_reuse=None if asked.feature_reuse == 1 else asked.feature_reuse,
        denoising_start=start,
        denoising_end=end,
        refined=refiner is not None,
        hires=hires,
        controls=controls,
        hires_controls=larger_controls,
        image_prompts=resolve_image_prompts(len(model.ip_adapters), asked.ip_image, asked.ip_scale),
        **({} if drawn is None else drawn._asdict()),
        **_BESIDE,
    )
    if pixels is not None:
        settings = _with_image(settings, model, asked, pixels, outpaint)
    if drawn is not None and shown:
        frames = [resize(one, width, height) for one in shown]
        frames = frames * drawn.frames if len(frames) == 1 else frames
        settings = replace(settings, video=np.stack(frames))
    if model.is_sdxl:
        settings = _with_conditioning(settings, model, refiner, asked)
    _check_editing(settings)
    _check_guider(settings, model)
    _check_reuse(settings, model)
    _note_unused_words(model, settings)
    _note_what_has_no_effect(model, settings, asked)
    note_habits(model, asked, height, width)
    return settings


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


def _video(model: Model, asked: RunOptions) -> tuple[video.Video | None, list[np.ndarray]]:
    """The numbers of the video that is drawn, and the pictures that the run starts from."""
    if not model.draws_video:
        if asked.image is not None and is_video(asked.image):
            model.require("video", argument("image"))
        return None, [] if asked.image is None else [load_image(asked.image)]
    shown = [] if asked.image is None else load_video(asked.image, asked.frames)
    return video.resolve(model, asked, len(shown) if len(shown) > 1 else None), shown


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


def _given_size(pixels: np.ndarray, outpaint: Borders | None) -> tuple[int, int]:
    """(height, width) of the image, borders included."""
    left, top, right, bottom = outpaint or (0, 0, 0, 0)
    return top + pixels.shape[0] + bottom, left + pixels.shape[1] + right


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


def _hires(model: Model, asked: RunOptions, width: int, height: int) -> Hires | None:
    """How the finished picture is enlarged, if it is."""
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
    return larger


def _controls(
    model: Model,
    asked: RunOptions,
    width: int,
    height: int,
    hires: Hires | None,
    drawn: video.Video | None,
) -> tuple[tuple[Control, ...], tuple[Control, ...]]:
    """The control pictures, and those of the enlarged picture."""
    if asked.guess_mode and not model.controlnets:
        raise UsageError(
            f"{argument('guess_mode')}: there is no ControlNet; give one "
            f"({argument('controlnets')})"
        )
    sizes = [(width, height), *([] if hires is None else [(hires.width, hires.height)])]
    own, *larger = resolve_controls(
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
    check_makers(model, [control.preprocess for control in own])
    if drawn is not None:
        video.check_controls([one.image for one in own], drawn.frames)
    return own, larger[0] if larger else ()


def _with_image(
    settings: Settings,
    model: Model,
    asked: RunOptions,
    pixels: np.ndarray,
    outpaint: Borders | None,
) -> Settings:
    """Add the picture that the run starts from, and how far to go from it."""
    width, height = settings.width, settings.height
    settings = replace(settings, image_name=named(asked.image))
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
            mask_name=None if asked.mask is None else named(asked.mask),
            outpaint=outpaint,
            paste_original=asked.paste_original,
            only_masked=asked.only_masked,
        )
    else:
        settings = replace(settings, image=_resized(model, pixels, width, height))
    if asked.depth_image is not None:
        depth = _depth_map(asked.depth_image)
        settings = replace(settings, depth=depth, depth_name=named(asked.depth_image))
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
