"""The arguments of a run: checked, and with the model's defaults filled in."""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import dataclass, replace

from mlxdiff import samplers
from mlxdiff.errors import UsageError
from mlxdiff.model import Model

logger = logging.getLogger("mlxdiff")

DEFAULT_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """All that decides a picture beside model and seed, with every default filled in.

    Sizes are (height, width) in pixels, ``crop`` is (y, x): SDXL's micro-conditioning, else None.
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
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    @property
    def time_ids(self) -> tuple[int, ...] | None:
        """What an SDXL U-Net is told of sizes: original size, crop, target size; else None."""
        if self.original_size is None or self.crop is None or self.target_size is None:
            return None
        return (*self.original_size, *self.crop, *self.target_size)


def resolve(
    model: Model,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    prompt_2: str | None = None,
    negative_prompt_2: str | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_rescale: float = 0.0,
    sampler: str = "auto",
    schedule: str = "auto",
    original_size: tuple[int, int] | None = None,
    target_size: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
) -> Settings:
    """Check the arguments of ``generate`` and fill in the defaults. Raises: UsageError."""
    if width is None or height is None:
        size = model.default_size
        height = size[0] if height is None else height
        width = size[1] if width is None else width
    model.check_size(width=width, height=height)
    only_sdxl = {
        "prompt_2": prompt_2,
        "negative_prompt_2": negative_prompt_2,
        "original_size": original_size,
        "target_size": target_size,
        "crop": crop,
    }
    given = [name for name, value in only_sdxl.items() if value is not None]
    if given and not model.is_sdxl:
        raise UsageError(f"{', '.join(given)}: only SDXL models have that; this model has not")
    guidance = model.default_guidance if guidance is None else guidance
    for name, number, least in (
        ("guidance", guidance, 0.0),
        ("guidance_rescale", guidance_rescale, 0.0),
    ):
        if not math.isfinite(number) or number < least:
            raise UsageError(f"{name} is {number}; expected a number of at least {least:g}")
    if guidance_rescale > 1.0:
        raise UsageError(f"guidance_rescale is {guidance_rescale}; expected 0 to 1")
    settings = Settings(
        prompt=prompt,
        negative_prompt=negative_prompt,
        prompt_2=prompt_2,
        negative_prompt_2=negative_prompt_2,
        width=width,
        height=height,
        steps=DEFAULT_STEPS if steps is None else steps,
        guidance=float(guidance),
        guidance_rescale=float(guidance_rescale),
        sampler=sampler,
        schedule=schedule,
    )
    if model.is_sdxl:
        settings = replace(
            settings,
            original_size=original_size or (height, width),
            target_size=target_size or (height, width),
            crop=crop or (0, 0),
        )
    _note_what_has_no_effect(model, settings)
    plan = make_plan(model, settings)
    return replace(settings, sampler=plan.sampler, schedule=plan.schedule)


def _note_what_has_no_effect(model: Model, settings: Settings) -> None:
    without_guidance = {
        "negative_prompt": settings.negative_prompt,
        "negative_prompt_2": settings.negative_prompt_2,
        "guidance_rescale": settings.guidance_rescale or None,
    }
    given = [name for name, value in without_guidance.items() if value is not None]
    if given and not model.is_guided(settings.guidance):
        logger.warning(
            "%s has no effect: there is no guidance at %g",
            " and ".join(given),
            settings.guidance,
        )
    if settings.negative_prompt is None and settings.negative_prompt_2 is not None:
        if model.zeros_for_empty_prompt:
            logger.warning("negative_prompt_2 has no effect without negative_prompt")


def make_plan(model: Model, settings: Settings) -> samplers.Plan:
    """The sampler's plan for these settings."""
    return samplers.plan(
        model.source.scheduler_config,
        settings.sampler,
        settings.schedule,
        settings.steps,
        family=model.source.family,
    )


def pick_seeds(seed: int | None, count: int) -> list[int]:
    """The seeds of a run: seed, seed + 1, ...; a random first one where none is given."""
    if count < 1:
        raise UsageError(f"count is {count}; expected at least 1")
    first = secrets.randbits(32) if seed is None else seed
    return [first + i for i in range(count)]
