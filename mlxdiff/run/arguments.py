"""What ``generate`` is given for a model that draws from text, and what is refused of it.

Here stands what can be said from the arguments and the models alone; ``settings`` fills in the
defaults and opens the pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mlxdiff.errors import UsageError
from mlxdiff.run.model import Model
from mlxdiff.text import a1111
from mlxdiff.text.prompt import SYNTAXES

OF_SDXL = (
    "prompt_2",
    "negative_prompt_2",
    "original_size",
    "target_size",
    "crop",
    "denoising_start",
    "denoising_end",
    "aesthetic_score",
    "negative_aesthetic_score",
)


@dataclass(frozen=True)
class Arguments:
    """The arguments of ``Pipeline.generate`` as they are given, unchecked; None: the default."""

    prompt: str
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: Any = None
    feature_reuse: Any = None
    sampler: str = "auto"
    schedule: str = "auto"
    eta: float | None = None
    image: Any = None
    strength: float | None = None
    hires: float | None = None
    hires_upscaler: str | None = None
    hires_strength: float | None = None
    image_guidance: float | None = None
    noise_level: int | None = None
    mask: Any = None
    outpaint: Any = None
    paste_original: bool = False
    denoising_start: float | None = None
    denoising_end: float | None = None
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    prompt_syntax: str = "plain"
    clip_skip: int | None = None
    guess_mode: Any = None
    ip_image: Any = None
    ip_scale: Any = None
    control_image: Any = None
    control_scale: Any = None
    control_start: Any = None
    control_end: Any = None
    control_preprocess: Any = None

    @property
    def repaints(self) -> bool:
        """Whether a part of the image is to be painted anew."""
        return self.mask is not None or self.outpaint is not None

    def of(self, *names: str) -> dict[str, Any]:
        """Some of the arguments, by name."""
        return {name: getattr(self, name) for name in names}

    @property
    def control(self) -> dict[str, Any]:
        """Those of the ControlNets."""
        return self.of(
            "control_image", "control_scale", "control_start", "control_end", "control_preprocess"
        )


def check(model: Model, refiner: Model | None, asked: Arguments) -> None:
    """Refuse what is no value of its argument, and what the models have no part for.

    Raises: UsageError.
    """
    _check_texts(asked)
    model.texts.check_clip_skip(asked.clip_skip)
    check_numbers(
        math.inf,
        **asked.of("guidance", "image_guidance", "aesthetic_score", "negative_aesthetic_score"),
    )
    check_numbers(
        1.0,
        **asked.of(
            "guidance_rescale",
            "eta",
            "strength",
            "hires_strength",
            "denoising_start",
            "denoising_end",
        ),
    )
    _check_parts(model, refiner, asked)
    _check_task(model, refiner, asked)
    if asked.image_guidance is not None and not model.edits:
        raise UsageError(
            "image_guidance: only models that edit a picture by instruction have that "
            "(instruct-pix2pix, whose U-Net takes 8 channels); this model has not"
        )
    if asked.noise_level is not None and not model.upscales:
        raise UsageError(
            "noise_level: only models that enlarge a picture have that (the x4 upscaler); this "
            "model has not"
        )
    if asked.paste_original and not asked.repaints:
        raise UsageError("paste_original needs a mask (--mask) or borders (--outpaint)")
    if asked.hires is not None:
        _check_hires(model, refiner, asked)
    _check_split(refiner, asked)


def _check_texts(asked: Arguments) -> None:
    """Refuse what is no text, a syntax that does not exist, and what we do not have of A1111's."""
    texts = asked.of("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
    for name, text in texts.items():
        if not isinstance(text, str) and (text is not None or name == "prompt"):
            raise UsageError(f"{name} must be a text, not {type(text).__name__}")
    if asked.prompt_syntax not in SYNTAXES:
        raise UsageError(
            f"prompt_syntax {asked.prompt_syntax!r} does not exist; there are {', '.join(SYNTAXES)}"
        )
    if asked.prompt_syntax == "plain":
        return
    prompt, *others = (text or "" for text in texts.values())
    for text in (prompt, *others):
        a1111.weigh(text)
    for text in others:
        if found := a1111.networks(text)[1]:
            raise UsageError(
                f"<lora:{found[0].name}:...> stands in the negative or the second prompt; it "
                "changes the model for the whole picture: put it into the prompt"
            )
    for text in (prompt, asked.prompt_2 or ""):
        a1111.refuse_composition(text)


def checked_flag(name: str, value: Any) -> bool:
    """True or false; None is false."""
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; expected true or false")
    return bool(value)


def check_numbers(most: float, **numbers: Any) -> None:
    """Refuse what is not a number from 0 to ``most``."""
    for name, number in numbers.items():
        if number is None:
            continue
        known = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not known or not math.isfinite(number) or not 0.0 <= number <= most:
            expected = "at least 0" if most == math.inf else f"0 to {most:g}"
            raise UsageError(f"{name} is {number!r}; expected a number, {expected}")


def checked_interval(interval: Any) -> tuple[float, float] | None:
    """Two shares of a run; None where it is all of it."""
    if interval is None:
        return None
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise UsageError(f"guidance_interval is {interval!r}; expected two numbers, start and end")
    start, end = interval
    check_numbers(1.0, **{"start of guidance_interval": start, "end of guidance_interval": end})
    if start >= end:
        raise UsageError(f"guidance_interval is {start:g} to {end:g}; its start must be less")
    return None if (start, end) == (0, 1) else (float(start), float(end))


def checked_reuse(every: Any) -> int | None:
    """How many evaluations share deep features; None where each has its own."""
    if every is None:
        return None
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise UsageError(f"feature_reuse is {every!r}; expected a whole number, at least 1 (none)")
    return None if every == 1 else every


def _check_parts(model: Model, refiner: Model | None, asked: Arguments) -> None:
    """Refuse arguments that the models have no part for."""

    def refuse(names: tuple[str, ...], why: str) -> None:
        found = [name for name, value in asked.of(*names).items() if value is not None]
        if found:
            raise UsageError(f"{', '.join(found)}: {why}")

    if not model.is_sdxl:
        refuse(OF_SDXL, "only SDXL models have that; this model has not")
    if not model.takes_prompt_2:
        refuse(("prompt_2", "negative_prompt_2"), "this model has no second text encoder")
    if model.takes_aesthetic_score:
        refuse(("target_size",), "a refiner is told an aesthetic score instead")
    if not is_scored(model, refiner):
        refuse(
            ("aesthetic_score", "negative_aesthetic_score"),
            "only SDXL's refiner is told that; give one as refiner (--refiner)",
        )


def is_scored(model: Model, refiner: Model | None) -> bool:
    """Whether a model of the run is told an aesthetic score."""
    return any(m is not None and m.takes_aesthetic_score for m in (model, refiner))


def _check_task(model: Model, refiner: Model | None, asked: Arguments) -> None:
    """Refuse what the model cannot draw from what is given."""
    image, repaints, begins = asked.image, asked.repaints, {"strength": asked.strength}
    if refiner is None:  # else it says where the refiner begins
        begins["denoising_start"] = asked.denoising_start
    channels, latent = model.unet_config.in_channels, model.vae_config.latent_channels
    takes = f"its U-Net takes {channels} channels, the latents have {latent}"
    if model.inpaints and not (repaints and image is not None):
        raise UsageError(
            f"{model.source.path}: this is an inpainting model ({takes}): it needs an image "
            "(--image) and a mask (--mask), or borders to add to the image (--outpaint)"
        )
    if model.edits or model.upscales:
        does, keeps = "edits a picture by instruction", "image guidance (--image-guidance)"
        if model.upscales:
            does, keeps = "enlarges a picture", "noise level (--noise-level)"
        what = f"{model.source.path}: this is a model that {does} ({takes})"
        if repaints:
            raise UsageError(f"{what}; it has no part for a mask (--mask) or borders (--outpaint)")
        if model.controlnets:
            raise UsageError(f"{what}; it does not go together with a ControlNet (--controlnet)")
        if model.upscales and model.ip_adapters:
            raise UsageError(f"{what}; it does not go together with an IP-Adapter (--ip-adapter)")
        if image is None:
            raise UsageError(f"{what}: it needs one (--image)")
        for name, value in begins.items():
            if value is not None:
                raise UsageError(
                    f"{name}: {what}, and starts from noise; {keeps} says how closely it keeps to "
                    "the picture"
                )
    elif model.unet_config.num_class_embeds is not None:
        raise UsageError(
            f"{model.source.path}: its U-Net is told a class (num_class_embeds), and it is no x4 "
            f"upscaler ({takes}); this version of mlxdiff knows no such model"
        )
    elif channels != latent and not model.inpaints:
        raise UsageError(
            f"{model.source.path}: this is no text-to-image model ({takes}), and none that this "
            "version of mlxdiff knows"
        )
    if repaints and image is None:
        raise UsageError("a mask (--mask) or borders (--outpaint) need an image (--image)")
    if image is None:
        if model.takes_aesthetic_score:
            raise UsageError(
                f"{model.source.path}: this is an SDXL refiner, which starts from an image: give "
                "one (--image), or an SDXL base model with this one as its refiner (--refiner)"
            )
        for name, value in begins.items():
            if value is not None:
                raise UsageError(f"{name} needs an image to start from (--image)")


def _check_hires(model: Model, refiner: Model | None, asked: Arguments) -> None:
    """Refuse a hires pass where there is none."""
    other = {
        "a mask (--mask) or borders (--outpaint)": asked.repaints,
        "a model that edits a picture by instruction": model.edits,
        "a model that enlarges a picture": model.upscales,
        "a refiner (--refiner)": refiner is not None,
        "denoising_start (--denoising-start)": asked.denoising_start is not None,
        "denoising_end (--denoising-end)": asked.denoising_end is not None,
    }
    if found := [name for name, given in other.items() if given]:
        raise UsageError(
            f"hires does not go together with {found[0]}; draw that first, and start a hires run "
            "from the result (--image)"
        )


def _check_split(refiner: Model | None, asked: Arguments) -> None:
    """Refuse a part of the run that is none."""
    start, end = asked.denoising_start, asked.denoising_end
    if refiner is not None and start is None:  # it begins where the model ends
        start = end
    if start in (0.0, 1.0):
        raise UsageError(f"denoising_start is {start}; expected between 0 and 1")
    if refiner is None and start is not None and end is not None and start >= end:
        raise UsageError(f"denoising_start {start} must be less than denoising_end {end}")
