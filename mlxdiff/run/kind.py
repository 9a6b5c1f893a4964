"""Facts about a model: what it draws, what it has parts for, and its defaults.

A kind is worked out from a model's configs alone; no network is loaded. The defaults are those of
diffusers' pipeline for the same kind of model.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mlxdiff import samplers
from mlxdiff.errors import ConfigError, UsageError, argument, quoted
from mlxdiff.networks.config import (
    UNet2DConditionConfig,
    UNet2DConfig,
    UNetSpatioTemporalConfig,
    VAEConfig,
)
from mlxdiff.run import image_led
from mlxdiff.samplers.guidance import is_guided
from mlxdiff.store.folder import (
    CC_PROJECTION,
    IMAGE_ENCODER,
    IMAGE_NOISING_SCHEDULER,
    IMAGE_NORMALIZER,
    LOW_RES_SCHEDULER,
    ModelSource,
)

logger = logging.getLogger("mlxdiff")

UPSCALER_SCALE = 0.08333
"""scaling_factor of an upscaler's VAE, whatever its config says (as in diffusers' pipeline)."""
MAX_NOISE_LEVEL = 350
"""Largest noise level of an upscaler whose model_index.json gives none."""

DDPM_STEPS = 1000
OTHER_STEPS = 50
MOST_PIXELS = (
    1 << 16
)  # of a side, so that no count of bytes overflows; memory refuses far smaller ones

Reason = str | None
"""Why a model lacks a part, and the way out; None if it has the part."""


class Network(NamedTuple):
    """The name of a network in a model.

    Attributes:
        name: "unet", "vae", "text_encoder", "text_encoder_2", or the name of a kind that was added.
        position: of one that was added, among those of its name; None: the model's own.
    """

    name: str
    position: int | None = None

    def __str__(self) -> str:
        return self.name if self.position is None else f"{self.name}_{self.position}"


class Kind(ABC):
    """Facts about a model, whichever it is. What only some models have is off here.

    Attributes:
        source: the opened model.
        unet_config: config of its U-Net.
        vae_config: config of the VAE that encodes and decodes; None: there is none.
        is_sdxl: the U-Net takes pooled text and sizes beside the prompt.
        is_latent_consistency: a LatentConsistencyModelPipeline, which counts strength its own way.
        takes_prompt_2: there is a second text encoder.
        takes_aesthetic_score: the U-Net takes an aesthetic score (SDXL's refiner) in place of a
            target size.
        takes_label: the U-Net takes a class.
        zeros_for_empty_prompt: an absent negative prompt means zeros (SDXL), not the empty text.
        inpaints: the U-Net sees a mask and a masked picture beside the latents.
        edits: the U-Net sees a picture beside the latents (InstructPix2Pix).
        upscales: the U-Net sees a small, noised picture and takes its noise level (x4 upscaler).
        takes_depth: the U-Net sees a depth map beside the latents (stable-diffusion-2-depth).
        maps: what it makes of a picture, in place of another picture: "depth" or "normals".
        takes_scaled_picture: a model that edits sees the picture's latents scaled (CosXL Edit).
        draws_video: the U-Net has motion modules.
        varies: the U-Net reads CLIP's embedding of a picture in place of a prompt (image
            variations).
        turns: it reads that and a camera, and sees the picture beside the latents (Zero-1-to-3).
        unclips: the U-Net takes CLIP's embedding of a picture, noised, beside the prompt (Stable
            unCLIP).
        animates: the U-Net lets a picture move (Stable Video Diffusion).
        tells_elevation: a model that turns reads the elevation of the picture's camera in place of
            a change of distance (Stable Zero123).
    """

    source: ModelSource
    unet_config: Any
    vae_config: Any = None

    is_sdxl: bool = False
    is_latent_consistency: bool = False
    takes_prompt_2: bool = False
    takes_aesthetic_score: bool = False
    takes_label: bool = False
    zeros_for_empty_prompt: bool = False
    inpaints: bool = False
    edits: bool = False
    upscales: bool = False
    takes_depth: bool = False
    takes_scaled_picture: bool = False
    maps: str | None = None
    draws_video: bool = False
    varies: bool = False
    turns: bool = False
    unclips: bool = False
    animates: bool = False
    tells_elevation: bool = False

    @property
    def is_led(self) -> bool:
        """Return True if the embedding of a picture leads the U-Net: it needs one, and starts from
        noise."""
        return self.varies or self.turns or self.unclips

    @abstractmethod
    def lacks(self, part: str) -> Reason:
        """Return why this model has no such part, with the way out; None if it has the part.

        Args:
            part: "text" (guidance by a prompt, or by a picture in its place), "prompt", "prompt_2",
                "sdxl", "target_size", "aesthetic_score", "image", "mask", "edits", "upscales",
                "depth", "maps", "animation", "noised", "camera", "variations", "threshold",
                "label", "hires", "video", or an addition: "controlnet", "t2i_adapter",
                "ip_adapter", "lora", "embedding", "vae", "refiner", "upscaler", "judge", "motion".
        Raises: KeyError for another word.
        """

    def require(self, part: str, subject: str | None = None) -> None:
        """Raise UsageError if the model lacks a part.

        Args:
            subject: what the message starts with; None: the model's path.
        """
        if (reason := self.lacks(part)) is not None:
            raise UsageError(f"{self.source.path if subject is None else subject}: {reason}")

    @property
    @abstractmethod
    def description(self) -> str:
        """The kind of model and its evidence, for messages."""

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained for. Raises: UsageError."""

    @property
    @abstractmethod
    def default_guidance(self) -> float:
        """Guidance scale."""

    @property
    def default_sampler(self) -> str:
        """Sampler that "auto" stands for; "auto" where the checkpoint decides."""
        return "auto"

    @abstractmethod
    def default_steps(self, sampler: str) -> int:
        """Number of steps of a sampler."""

    @property
    def default_strength(self) -> float:
        """Default strength of a run from an image, 0 to 1."""
        return 1.0

    @abstractmethod
    def check_size(self, *, width: int, height: int) -> None:
        """Raise UsageError unless the model can draw a picture of this size."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (h, w, C) of the latents of a picture of this size in pixels."""

    def is_guided(self, scale: float, image_scale: float | None = None) -> bool:
        """Return True if this guidance scale takes several predictions a step.

        Args:
            image_scale: image guidance of a model that edits; below 1 there is no guidance.
        """
        return False

    def check_noise_level(self, noise_level: Any) -> None:
        """Raise UsageError unless a given picture can be noised this much."""
        self.require("noised", "noise_level")

    @property
    def image_noise_process(self) -> np.ndarray:
        """alphas_cumprod, by noise level, for noising a given picture.

        Raises: ConfigError; UsageError if the model noises none.
        """
        self.require("noised", "noise_level")
        raise NotImplementedError

    def check_label(self, label: Any) -> None:
        """Raise UsageError unless the model takes this label, or None."""
        if label is not None:
            self.require("label", f"label {label}")


class LatentKind(Kind):
    """A model that draws latents of a VAE from text: Stable Diffusion and its kin.

    Args:
        vae: config of an added VAE; None: the model's own.
        unet: config of the U-Net with the layers that were added; None: as the model has it.
    Attributes:
        vae_config: config of the VAE that decodes.
        text_encoders: names of the text encoders, in order.
    Raises: ConfigError if the U-Net fits none of its kind.
    """

    unet_config: UNet2DConditionConfig

    def __init__(
        self,
        source: ModelSource,
        vae: VAEConfig | None = None,
        unet: UNet2DConditionConfig | None = None,
    ) -> None:
        self.source = source
        self.unet_config = unet = source.config("unet") if unet is None else unet
        self.vae_config: VAEConfig = source.config("vae") if vae is None else vae
        self.text_encoders = tuple(c for c in source.components if c.startswith("text_encoder"))
        index = source.model_index
        latent = self.vae_config.latent_channels
        self.is_sdxl = unet.addition_embed_type == "text_time"
        self.is_latent_consistency = str(index.get("_class_name")).startswith(
            "LatentConsistencyModel"
        )
        self.takes_prompt_2 = len(self.text_encoders) > 1
        self.takes_aesthetic_score = self.is_sdxl and self._size_numbers() == 5
        self.zeros_for_empty_prompt = self.is_sdxl and bool(
            index.get("force_zeros_for_empty_prompt", True)
        )
        self.inpaints = unet.in_channels == 2 * latent + 1
        self.turns = CC_PROJECTION in source.components
        self.animates = isinstance(unet, UNetSpatioTemporalConfig)
        self.varies = not (self.text_encoders or self.turns or self.animates)
        self.unclips = unet.class_embed_type == "projection"
        self.tells_elevation = self.turns and image_led.is_stable_zero123(source)
        self.edits = (
            unet.in_channels == 2 * latent and unet.num_class_embeds is None and not self.turns
        )
        self.upscales = unet.in_channels == latent + 3 and unet.num_class_embeds is not None
        self.takes_depth = unet.in_channels == latent + 1 and not self.is_sdxl
        self.takes_scaled_picture = bool(index.get("is_cosxl_edit", False))
        self.draws_video = unet.motion is not None
        if self.upscales:
            self.vae_config = replace(self.vae_config, scaling_factor=UPSCALER_SCALE)
        self._check()

    def _check(self) -> None:
        """Refuse networks that do not fit each other; read what only this kind of model has.

        Raises: ConfigError.
        """
        if self.is_led:
            image_led.check(self.source)

    def _size_numbers(self) -> int:
        """How many numbers the U-Net takes beside the pooled text: 6, or 5 with a score.

        They follow from the width of its embedding (the reference has a flag beside it).
        """
        unet = self.unet_config
        pooled = self.source.config(self.text_encoders[-1]).projection_dim
        numbers = ((unet.projection_class_embeddings_input_dim or 0) - pooled) / (
            unet.addition_time_embed_dim or 1
        )
        if numbers not in (5, 6):
            raise ConfigError(
                f"{self.source.path}: projection_class_embeddings_input_dim of the U-Net is "
                f"{unet.projection_class_embeddings_input_dim}; expected the text encoder's "
                f"projection_dim {pooled} and 5 or 6 times {unet.addition_time_embed_dim}"
            )
        return int(numbers)

    def lacks(self, part: str) -> Reason:
        """See ``Kind.lacks``."""
        has, reason = _LATENT_PARTS[part]
        return None if has(self) else reason.format_map(_Words(this=self.description))

    @property
    def description(self) -> str:
        """See ``Kind.description``."""
        if self.inpaints:
            does = "an inpainting model"
        elif self.edits:
            does = "a model that edits a picture by instruction"
        elif self.upscales:
            does = "a model that enlarges a picture"
        elif self.takes_depth:
            does = "a model that draws from a picture and its depth map"
        elif self.is_led:
            return image_led.describe(self.turns, self.unclips)
        else:
            does = "a model that draws from text"
        channels, latent = self.unet_config.in_channels, self.vae_config.latent_channels
        return f"this is {does} (its U-Net takes {channels} channels, the latents have {latent})"

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained for. Raises: UsageError."""
        height, width = _sample_size(self.unet_config.sample_size)
        return height * self.vae_config.factor, width * self.vae_config.factor

    @property
    def default_guidance(self) -> float:
        """Guidance scale that the model advises, else that of the reference pipeline for its kind;
        0 for Turbo."""
        advised = samplers.advised_guidance(self.source.scheduler_config)
        if advised is not None:
            return advised
        if self.unet_config.time_cond_proj_dim is not None:
            return 8.5
        if samplers.is_turbo(self.source.scheduler_config):
            return 0.0
        if self.upscales:
            return 9.0
        if self.unclips or self.turns:
            return 10.0 if self.unclips else 3.0
        return 5.0 if self.is_sdxl else 7.5

    def default_steps(self, sampler: str) -> int:
        """4 for models that were distilled to need few steps, else 20."""
        return 20 if samplers.distilled_for(self.source.scheduler_config) is None else 4

    @property
    def default_strength(self) -> float:
        """Default strength of the reference pipeline."""
        return 0.3 if self.is_sdxl else 0.8

    def check_noise_level(self, noise_level: Any) -> None:
        """Raise UsageError unless a given picture can be noised this much."""
        most = len(self.image_noise_process) - 1
        if self.upscales:
            stated = self.source.model_index.get("max_noise_level", MAX_NOISE_LEVEL)
            most = min(stated, (self.unet_config.num_class_embeds or 0) - 1, most)
        whole = isinstance(noise_level, int) and not isinstance(noise_level, bool)
        if not whole or not 0 <= noise_level <= most:
            raise UsageError(
                f"{argument('noise_level')} is {noise_level!r}; expected a whole number, 0 to "
                f"{most} (how much noise is added to the picture before the model sees it)"
            )

    @property
    def image_noise_process(self) -> np.ndarray:
        """See ``Kind.image_noise_process``."""
        part = IMAGE_NOISING_SCHEDULER if self.unclips else LOW_RES_SCHEDULER
        try:
            return samplers.forward_process(self.source.image_noise_config)
        except ConfigError as error:
            raise ConfigError(f"{self.source.path}/{part}: {error}") from None

    def is_guided(self, scale: float, image_scale: float | None = None) -> bool:
        """See ``Kind.is_guided``."""
        if image_scale is not None and image_scale < 1.0:
            return False
        # A distilled model takes the scale as an input instead (Meng et al. 2023).
        return is_guided(scale) and self.unet_config.time_cond_proj_dim is None

    def check_size(self, *, width: int, height: int) -> None:
        """Raise UsageError unless the VAE's factor divides both sides."""
        factor = self.vae_config.factor
        for name, value in (("width", width), ("height", height)):
            if value > MOST_PIXELS:
                raise UsageError(
                    f"{argument(name)} {quoted(value, 30)} is too large; at most {MOST_PIXELS}"
                )
            if value < factor or value % factor:
                below = max(value // factor, 1) * factor
                near = f"{below}" if value < factor else f"{below} or {below + factor}"
                raise UsageError(
                    f"{name} {value} is not a multiple of {factor}, which this model needs; "
                    f"nearest: {near}"
                )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See ``Kind.latent_shape``."""
        f = self.vae_config.factor
        return height // f, width // f, self.vae_config.latent_channels


class PixelKind(Kind):
    """A model that draws pixels, without text encoder and VAE: a UNet2DModel (Ho et al. 2020).

    The defaults are those of diffusers' DDPMPipeline and DDIMPipeline.

    Raises: UsageError if what it draws is no picture.
    """

    unet_config: UNet2DConfig

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.unet_config = source.config("unet")
        self.takes_label = self.unet_config.takes_label
        channels = self.unet_config.in_channels, self.unet_config.out_channels
        if channels not in ((1, 1), (3, 3)):
            raise UsageError(
                f"{source.path}: its U-Net takes {channels[0]} channels and gives {channels[1]}; "
                "a picture has 1 or 3"
            )

    def lacks(self, part: str) -> Reason:
        """See ``Kind.lacks``."""
        what = _PIXEL_PARTS[part]
        if part in ("upscaler", "threshold"):
            return None
        if part == "label":
            return None if self.takes_label else "this model has no classes"
        return f"{self.description}; it has no part for {what}"

    @property
    def description(self) -> str:
        """See ``Kind.description``."""
        return "this model draws from noise alone"

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of all pictures of this model. Raises: UsageError."""
        return _sample_size(self.unet_config.sample_size)

    @property
    def default_guidance(self) -> float:
        """1: there is no guidance."""
        return 1.0

    @property
    def default_sampler(self) -> str:
        """The sampler of the model's pipeline class."""
        name = self.source.scheduler_config.get("_class_name")
        if self.source.model_index.get("_class_name") == "DDIMPipeline":
            name = "DDIMScheduler"
        return samplers.of_class(name) or "checkpoint"

    def default_steps(self, sampler: str) -> int:
        """1000 for ``ddpm``, else 50; never more than the model was trained with."""
        config = self.source.scheduler_config
        trained = config.get("num_train_timesteps", DDPM_STEPS)
        ddpm = samplers.reference_class(config, sampler) == "DDPMScheduler"
        steps = DDPM_STEPS if ddpm else OTHER_STEPS
        return min(steps, trained) if isinstance(trained, int) and trained > 0 else steps

    def check_size(self, *, width: int, height: int) -> None:
        """Raise UsageError unless it is the model's own size, if the model has one."""
        if not 1 <= min(width, height) <= max(
            width, height
        ) <= MOST_PIXELS or self.unet_config.sample_size not in (None, (height, width)):
            own_height, own_width = self.default_size
            raise UsageError(
                f"{width}x{height} pixels: this model draws {own_width}x{own_height} only"
            )

    def check_label(self, label: Any) -> None:
        """Raise UsageError unless the model takes this label, or None."""
        config = self.unet_config
        if not config.takes_label:
            super().check_label(label)
        elif config.class_embed_type == "identity":
            raise UsageError(
                "the classes of this model are vectors (class_embed_type identity), which have no "
                "number; call its U-Net with class_labels (pipe.model.component('unet'))"
            )
        else:
            count = config.num_class_embeds if config.class_embed_type is None else None
            known = "a whole number of at least 0" if count is None else f"0 to {count - 1}"
            if label is None:
                raise UsageError(
                    f"this model needs a label ({argument('label')}), the class to draw: {known}"
                )
            sound = isinstance(label, int) and not isinstance(label, bool) and label >= 0
            if not sound or (count is not None and label >= count):
                raise UsageError(f"{argument('label')} is {label!r}; expected {known}")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return height, width, self.unet_config.in_channels


def stage_of(network: Network | str) -> str:
    """The stage of a run that a network works in: text_encoder, unet, vae, upscaler or judge.

    Args:
        network: a network, or the name of one of the model's own.
    """
    if isinstance(network, str):
        network = Network(network)
    stages = _STAGES if network.position is None else _STAGES_OF_ADDED
    return stages.get(network.name, "unet")


# What is not named here works beside the U-Net.
_STAGES = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "vae": "vae",
    IMAGE_ENCODER: "text_encoder",
    IMAGE_NORMALIZER: "text_encoder",
    CC_PROJECTION: "text_encoder",
}
_STAGES_OF_ADDED = {
    "upscaler": "upscaler",
    "hires_upscaler": "upscaler",
    "judge_text": "judge",
    "judge_image": "judge",
}


def _sample_size(size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise UsageError("this model's config gives no sample_size: say width and height")
    return size


def _always(kind: LatentKind) -> bool:
    return True


def _is_plain(kind: LatentKind) -> bool:
    """Return True if the U-Net sees latents alone, or is an inpainting model."""
    return not (kind.edits or kind.upscales or kind.takes_depth or kind.is_led)


def _reads_text(kind: LatentKind) -> bool:
    return bool(kind.text_encoders)


class _Words(dict[str, str]):
    """What stands in braces in a reason: ``this``, or the Python name of an option."""

    def __missing__(self, name: str) -> str:
        return argument(name)


# Part -> whether a latent model has it, and the reason if not (with words of ``_Words``).
_LATENT_PARTS: dict[str, tuple[Callable[[LatentKind], bool], str]] = {
    "text": (_always, ""),
    "prompt": (_reads_text, "{this}; it reads no text"),
    "image": (_always, ""),
    "lora": (_reads_text, "{this}; it reads no text, and LoRAs are trained with text"),
    "embedding": (_reads_text, "{this}; it reads no text"),
    "vae": (_always, ""),
    "upscaler": (_always, ""),
    "judge": (_reads_text, "{this}; it has no prompt that a judge could compare a picture with"),
    "threshold": (
        lambda kind: False,
        "only models that draw pixels take that: latents have no bounds to keep",
    ),
    "label": (lambda kind: False, "this model draws from a prompt; it has no classes"),
    "sdxl": (lambda kind: kind.is_sdxl, "only SDXL models take that; this model is not one"),
    "prompt_2": (lambda kind: kind.takes_prompt_2, "this model has no second text encoder"),
    "target_size": (
        lambda kind: kind.is_sdxl and not kind.takes_aesthetic_score,
        "only SDXL base models take that; a refiner takes an aesthetic score instead",
    ),
    "aesthetic_score": (
        lambda kind: kind.takes_aesthetic_score,
        "only SDXL's refiner takes that; give one with {refiner}",
    ),
    "refiner": (
        lambda kind: kind.is_sdxl,
        "this is no SDXL model; a refiner is one, and works on one",
    ),
    "mask": (
        _is_plain,
        "{this}; it has no part for {mask} or {outpaint}",
    ),
    "edits": (
        lambda kind: kind.edits,
        "only models that edit a picture by instruction take that (instruct-pix2pix, whose U-Net "
        "takes 8 channels); this model is not one",
    ),
    "depth": (
        lambda kind: kind.takes_depth,
        "only models that see a depth map take that (stable-diffusion-2-depth, whose U-Net takes 5 "
        "channels); for this model give a depth ControlNet ({controlnets}) the map as "
        "{control_image}",
    ),
    "animation": (
        lambda kind: kind.animates,
        "only models that let a picture move take that (Stable Video Diffusion); this model is "
        "not one",
    ),
    "maps": (
        lambda kind: kind.maps is not None,
        "only models that make a map of a picture take that (Marigold); this model is not one",
    ),
    "upscales": (
        lambda kind: kind.upscales,
        "only models that enlarge a picture take that (the x4 upscaler); this model is not one",
    ),
    "noised": (
        lambda kind: kind.upscales or kind.unclips,
        "only models that enlarge a picture (the x4 upscaler) or read its noised embedding (Stable "
        "unCLIP) take that; this model is not one",
    ),
    "camera": (
        lambda kind: kind.turns,
        "only models that show a picture's object from another side take that (Zero-1-to-3, "
        "Stable Zero123); this model is not one",
    ),
    "variations": (
        lambda kind: kind.varies or kind.unclips,
        "only models that a picture leads take that (image variations, Stable unCLIP); with this "
        "one, follow a picture with an IP-Adapter ({ip_adapters}), or start from it ({image}, "
        "{strength}) and ask for several pictures ({count})",
    ),
    "hires": (
        lambda kind: not (kind.edits or kind.upscales or kind.takes_depth or kind.turns),
        "{this}; draw with it first, and start a hires run of another model from the result "
        "({image})",
    ),
    "motion": (
        lambda kind: not (kind.inpaints or kind.takes_aesthetic_score) and _is_plain(kind),
        "{this}; it cannot be combined with a motion adapter ({motion_adapter})",
    ),
    "video": (
        lambda kind: kind.draws_video,
        "this model draws pictures; to draw videos give a motion adapter ({motion_adapter})",
    ),
    "controlnet": (
        _is_plain,
        "{this}; it cannot be combined with a ControlNet ({controlnets})",
    ),
    "t2i_adapter": (
        _is_plain,
        "{this}; it cannot be combined with a T2I-Adapter ({t2i_adapters})",
    ),
    "ip_adapter": (
        lambda kind: not (kind.upscales or kind.takes_depth or kind.is_led),
        "{this}; it cannot be combined with an IP-Adapter ({ip_adapters})",
    ),
}

# Part -> the words for it.
_PIXEL_PARTS = dict.fromkeys(_LATENT_PARTS, "that") | {
    "controlnet": "a ControlNet",
    "t2i_adapter": "a T2I-Adapter",
    "ip_adapter": "an IP-Adapter",
    "lora": "a LoRA",
    "embedding": "an embedding",
    "vae": "a VAE",
    "refiner": "a refiner",
    "motion": "a motion adapter",
    "video": "videos",
    "judge": "a judge, which compares a picture with a prompt",
}

PARTS = tuple(_LATENT_PARTS)
"""The parts that a model may lack: arguments of ``Kind.lacks``."""
