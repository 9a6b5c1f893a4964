"""Rules that join several options of a run, or an option and the models.

Here is what can be said from options and models alone; ``settings`` fills in the defaults and opens
the pictures. What a single value may be is said in ``options``.
"""

from __future__ import annotations

from mlxdiff.errors import UsageError, argument
from mlxdiff.run import image_led, video
from mlxdiff.run.additions.upscaler import OPTIONS as UPSCALER_OPTIONS
from mlxdiff.run.additions.upscaler import upscaler_of
from mlxdiff.run.kind import Kind
from mlxdiff.run.model import Model
from mlxdiff.run.options import RunOptions
from mlxdiff.run.table import entries
from mlxdiff.text import a1111


def check(model: Model, refiner: Model | None, asked: RunOptions) -> None:
    """Refuse options of a latent model that contradict each other. Raises: UsageError."""
    _check_texts(asked)
    model.texts.check_clip_skip(asked.clip_skip)
    if model.draws_video:
        video.check(model, refiner, asked)
    _check_task(model, refiner, asked)
    if asked.paste_original and not repaints(asked):
        raise UsageError(f"{argument('paste_original')} needs {_area()}")
    if asked.only_masked is not None:
        _check_only_masked(model, asked)
    if asked.hires is not None:
        _check_hires(refiner, asked)
    _check_split(refiner, asked)


def check_parts(model: Kind, refiner: Kind | None, asked: RunOptions) -> None:
    """Refuse options that the models have no part for. Raises: UsageError."""
    refused: dict[str, list[str]] = {}
    for name, entry in entries(RunOptions).items():
        value = getattr(asked, name)
        if (
            not entry.part
            or value is None
            or (entry.default is not None and value == entry.default)
        ):
            continue
        reason = model.lacks(entry.part)
        # SDXL's base model hands the scores on to its refiner.
        if reason is not None and entry.part == "aesthetic_score" and refiner is not None:
            reason = refiner.lacks(entry.part)
        if reason is not None:
            refused.setdefault(reason, []).append(name)
    for reason, names in refused.items():
        raise UsageError(f"{', '.join(map(argument, names))}: {reason}")


def repaints(asked: RunOptions) -> bool:
    """Return True if a part of the image is to be painted again."""
    return asked.mask is not None or asked.outpaint is not None


def is_scored(model: Model, refiner: Model | None) -> bool:
    """Return True if a model of the run takes an aesthetic score."""
    return any(m is not None and m.takes_aesthetic_score for m in (model, refiner))


def checked_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Two shares of a run; None where they are all of it. Raises: UsageError."""
    if interval is None:
        return None
    start, end = interval
    if start >= end:
        raise UsageError(
            f"{argument('guidance_interval')} is {start:g} to {end:g}; its start must be less"
        )
    return None if interval == (0.0, 1.0) else interval


def _area() -> str:
    """What says which part of an image to repaint."""
    return f"{argument('mask')} or {argument('outpaint')}"


def _check_texts(asked: RunOptions) -> None:
    """Refuse what mlxdiff does not have of A1111's syntax."""
    if asked.prompt_syntax == "plain":
        return
    prompt = asked.prompt or ""
    others = [
        text or "" for text in (asked.negative_prompt, asked.prompt_2, asked.negative_prompt_2)
    ]
    for text in (prompt, *others):
        a1111.weigh(text)
    for text in others:
        if found := a1111.networks(text)[1]:
            raise UsageError(
                f"<lora:{found[0].name}:...> stands in the negative or the second prompt; it "
                "changes the model for the whole picture: put it into the prompt"
            )
    for text in others:
        a1111.refuse_composition(text)
    if len(a1111.composition(prompt)) > 1 and asked.region is not None:
        raise UsageError("region: the prompt joins others with AND; leave out one of the two")


def _check_task(model: Model, refiner: Model | None, asked: RunOptions) -> None:
    """Refuse what the model cannot draw from what is given."""
    image, begins = asked.image, {"strength": asked.strength}
    if refiner is None:  # else it says where the refiner begins
        begins["denoising_start"] = asked.denoising_start
    channels, latent = model.unet_config.in_channels, model.vae_config.latent_channels
    takes = f"its U-Net takes {channels} channels, the latents have {latent}"
    if model.inpaints and not (repaints(asked) and image is not None):
        raise UsageError(
            f"{model.source.path}: {model.description}: it needs "
            f"{argument('image')}, and {argument('mask')} (what to repaint) or "
            f"{argument('outpaint')} (borders to add)"
        )
    if model.is_led:
        image_led.check_task(model, asked)
    elif model.edits or model.upscales:
        keeps = argument("noise_level" if model.upscales else "image_guidance")
        if image is None:
            raise UsageError(
                f"{model.source.path}: {model.description}: it needs one ({argument('image')})"
            )
        for name, value in begins.items():
            if value is not None:
                raise UsageError(
                    f"{argument(name)}: {model.description}; it starts from noise, and {keeps} "
                    "says how closely it keeps to the picture"
                )
    elif model.unet_config.num_class_embeds is not None:
        raise UsageError(
            f"{model.source.path}: its U-Net takes a class (num_class_embeds), and it is no x4 "
            f"upscaler ({takes}); this version of mlxdiff knows no such model"
        )
    elif model.takes_depth:
        _check_depth(model, asked)
    elif channels != latent and not model.inpaints:
        raise UsageError(
            f"{model.source.path}: this is no text-to-image model ({takes}), and none that this "
            "version of mlxdiff knows"
        )
    if repaints(asked) and image is None:
        raise UsageError(f"{_area()} needs an image to paint on ({argument('image')})")
    if image is None:
        if model.takes_aesthetic_score:
            raise UsageError(
                f"{model.source.path}: this is an SDXL refiner, which starts from an image: give "
                f"one ({argument('image')}), or an SDXL base model with this one as its refiner "
                f"({argument('refiner')})"
            )
        for name, value in begins.items():
            if value is not None:
                raise UsageError(
                    f"{argument(name)} needs an image to start from ({argument('image')})"
                )


def _check_depth(model: Model, asked: RunOptions) -> None:
    """Refuse a model that sees a depth map without the picture or its map."""
    given = {"image": asked.image, "depth_image": asked.depth_image}
    if missing := [argument(name) for name, value in given.items() if value is None]:
        raise UsageError(
            f"{model.source.path}: {model.description}: give {' and '.join(missing)}; a Marigold "
            "model makes the depth map of a picture (docs/depth.md), and so does any other depth "
            "estimator"
        )


def _check_only_masked(model: Model, asked: RunOptions) -> None:
    """Refuse to draw a part of a picture where no mask says which, or another picture is whole."""
    if asked.only_masked is not None and asked.only_masked < 0:
        raise UsageError(
            f"{argument('only_masked')} is {asked.only_masked}; expected pixels, 0 or more"
        )
    if asked.mask is None:
        raise UsageError(f"{argument('only_masked')} needs a mask ({argument('mask')})")
    if asked.outpaint is not None:
        raise UsageError(
            f"{argument('only_masked')} cannot be combined with borders ({argument('outpaint')}), "
            "which are as wide as the picture; leave out one of the two"
        )
    if model.controlled:
        raise UsageError(
            f"{argument('only_masked')} cannot be combined with a ControlNet or a T2I-Adapter, "
            "whose picture shows the whole; crop both pictures first"
        )


def _check_hires(refiner: Model | None, asked: RunOptions) -> None:
    """Refuse a hires pass after a run that does not end in a whole picture."""
    other = {
        _area(): repaints(asked),
        f"a refiner ({argument('refiner')})": refiner is not None,
        argument("denoising_start"): asked.denoising_start is not None,
        argument("denoising_end"): asked.denoising_end is not None,
    }
    if found := [name for name, given in other.items() if given]:
        raise UsageError(
            f"{argument('hires')} cannot be combined with {found[0]}; draw that first, and start a "
            f"hires run from the result ({argument('image')})"
        )


def check_upscaler(model: Model, asked: RunOptions) -> None:
    """Refuse options of an upscaler that is not there, or that is a network. Raises: UsageError."""
    given = [name for name in UPSCALER_OPTIONS if getattr(asked, name) is not None]
    upscaler = upscaler_of(model)
    if given and upscaler is None:
        raise UsageError(
            f"{argument(given[0])}: there is no upscaler; give one ({argument('upscaler')})"
        )
    if given and upscaler is not None and upscaler.model is None:
        raise UsageError(
            f"{argument(given[0])}: the upscaler is a network, which enlarges at once; only a "
            "model that enlarges (the x4 upscaler) takes that"
        )


def _check_split(refiner: Model | None, asked: RunOptions) -> None:
    """Refuse shares of the run between which there is nothing."""
    start, end = asked.denoising_start, asked.denoising_end
    if refiner is not None and start is None:  # it begins where the model ends
        start = end
    if start in (0.0, 1.0):
        raise UsageError(f"{argument('denoising_start')} is {start}; expected between 0 and 1")
    if refiner is None and start is not None and end is not None and start >= end:
        raise UsageError(
            f"{argument('denoising_start')} {start} must be less than "
            f"{argument('denoising_end')} {end}"
        )
