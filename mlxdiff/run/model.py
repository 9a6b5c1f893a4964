"""A model's networks on a backend, by stages: text, pixels and latents, prediction.

What each stage does beside running its network is what diffusers' pipelines for Stable Diffusion,
SDXL and latent consistency models do: which layer of which text encoder is read, how latents are
scaled, what a U-Net is told.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxdiff import samplers
from mlxdiff.adapters import lora
from mlxdiff.convert import Component
from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.networks import tiling
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    UNet2DConditionConfig,
    VAEConfig,
)
from mlxdiff.noise import Generator
from mlxdiff.pictures import preview
from mlxdiff.pictures.image import load_image, to_model, to_pil
from mlxdiff.samplers.guidance import is_guided
from mlxdiff.store.folder import ModelSource
from mlxdiff.text.encoders import TextEncoders, merged

if TYPE_CHECKING:
    import PIL.Image


logger = logging.getLogger("mlxdiff")

UPSCALER_SCALE = 0.08333
"""scaling_factor of an upscaler's VAE, whatever its config says (as in diffusers' pipeline)."""
MAX_NOISE_LEVEL = 350
"""Of an upscaler whose model_index.json gives none."""

TILE_PIXELS = 256 * 256
"""A picture of more pixels is decoded in bands."""


class PromptEmbeddings(NamedTuple):
    """What the U-Net is told of the prompts; float32. The pooled ones are None where it takes none.

    Attributes:
        prompt_embeds: (1, T, D); T is 77, or a multiple of it for a long prompt in a1111 syntax.
        negative_prompt_embeds: (1, T, D); None where there is no guidance.
        pooled_prompt_embeds: (1, P).
        negative_pooled_prompt_embeds: (1, P).
    """

    prompt_embeds: np.ndarray
    negative_prompt_embeds: np.ndarray | None = None
    pooled_prompt_embeds: np.ndarray | None = None
    negative_pooled_prompt_embeds: np.ndarray | None = None


class ImageLatents(NamedTuple):
    """What a VAE makes of a picture, as the U-Net sees it: (1, H/f, W/f, C) float32.

    Attributes:
        mean: the latents.
        std: of the distribution around them; None where the VAE gives none (TAESD).
    """

    mean: np.ndarray
    std: np.ndarray | None

    def draw(self, noise: Callable[[], np.ndarray]) -> np.ndarray:
        """A sample; asks for noise only where there is a distribution."""
        return self.mean if self.std is None else self.mean + self.std * noise()


class Networks:
    """The networks of a model, loaded when first needed and kept.

    Attributes:
        source: the opened model.
        backend: what it computes on (reference.backend.Backend or models.backend.Backend).
        vae: where its VAE comes from, if from elsewhere.
        added: networks beside the model's own, by name.
        loras: what its weights are changed by.
        load_seconds: time spent on reading weights so far.
        low_memory: keep one stage's networks at a time (one text encoder, too), and their weights
            as they are stored.
        vae_tiling: decode in bands of rows; None: pictures of more than 256 x 256 pixels, and all
            with low_memory.
    """

    def __init__(self, source: ModelSource, backend: Any, vae: Component | None = None) -> None:
        self.source = source
        self.backend = backend
        self.vae = vae
        self.added: dict[str, Component] = {}
        self.loras: tuple[lora.Lora, ...] = ()
        self.load_seconds = 0.0
        self.low_memory = False
        self.vae_tiling: bool | None = None
        self._loaded: dict[str, Any] = {}

    def component(self, name: str) -> Any:
        """A network of the model ("unet", "vae", "text_encoder" or "text_encoder_2"), or one that
        was added."""
        if self.low_memory:
            self._release_stages_before(name)
        if name not in self._loaded:
            start = time.perf_counter()
            other = self.vae if name == "vae" else self.added.get(name)
            if other is not None:
                config, tensors = other.config, other.tensors()
            else:
                config, tensors = self.source.config(name), self.source.tensors(name)
            tensors = lora.changed(self.loras, name, tensors)
            dtype = "float32" if name == "vae" and config.force_upcast else None
            stored = True if self.low_memory else None
            self._loaded[name] = self.backend.load(config, tensors, dtype, stored)
            self.load_seconds += time.perf_counter() - start
        return self._loaded[name]

    def add(self, kind: str, components: Sequence[Component]) -> None:
        """Networks beside the model's own, ``KIND_0``, ``KIND_1``, ..., in place of those of this
        kind that were added before."""
        for name in [name for name in self.added if name.rpartition("_")[0] == kind]:
            del self.added[name]
            self._loaded.pop(name, None)
        self.added |= {f"{kind}_{i}": one for i, one in enumerate(components)}

    def take(self, name: str) -> Any:
        """The same; with low_memory it is the caller's alone, and leaves memory with the caller."""
        network = self.component(name)
        return self._loaded.pop(name) if self.low_memory else network

    def save_memory(self, low_memory: bool, vae_tiling: bool | None = None) -> None:
        """Set ``low_memory`` and ``vae_tiling``; what is loaded otherwise leaves memory."""
        if low_memory != self.low_memory:
            self._loaded.clear()
            self.backend.clear_cache()
        self.low_memory, self.vae_tiling = low_memory, vae_tiling

    def _release_stages_before(self, name: str) -> None:
        """Let go of all networks that are not needed at the same time as this one."""
        alone = name.startswith(("text_encoder", "vae"))
        for other in list(self._loaded):
            if other != name and (alone or other.startswith(("text_encoder", "vae"))):
                del self._loaded[other]
        gc.collect()  # what a run has left behind may hold its U-Net in a circle of references
        self.backend.clear_cache()


class Model(Networks):
    """A model that draws latents of a VAE from text: Stable Diffusion and its kin.

    Args:
        vae: another VAE than the model's own.
    Attributes:
        unet_config, vae_config: configs of its networks.
        texts: its text encoders.
    """

    def __init__(self, source: ModelSource, backend: Any, vae: Component | None = None) -> None:
        super().__init__(source, backend, vae)
        self.unet_config: UNet2DConditionConfig = source.config("unet")
        self.vae_config: VAEConfig = source.config("vae") if vae is None else vae.config
        self.texts = TextEncoders(source, self.component, backend, penultimate=self.is_sdxl)
        self._linear: np.ndarray | None = None  # from latents to colours
        own = source.config("vae")
        for name in ("latent_channels", "factor"):
            expected, found = getattr(own, name), getattr(self.vae_config, name)
            if vae is not None and found != expected:
                raise UsageError(
                    f"{vae.provenance['source']}: this VAE has {name.replace('_', ' ')} {found}, "
                    f"the model's own {expected}; use one made for this model"
                )
        if self.upscales and self.vae_config.scaling_factor != UPSCALER_SCALE:
            logger.warning(
                "%s: scaling_factor of the VAE is taken for %g, not %g, as the reference does for "
                "upscalers",
                source.path,
                UPSCALER_SCALE,
                self.vae_config.scaling_factor,
            )
            self.vae_config = replace(self.vae_config, scaling_factor=UPSCALER_SCALE)

    @property
    def controlnets(self) -> list[str]:
        """Names of the ControlNets that were added."""
        return [name for name in self.added if name.startswith("controlnet_")]

    @property
    def ip_adapters(self) -> list[str]:
        """Names of the IP-Adapters that were added."""
        return [name for name in self.added if name.startswith("ip_adapter_")]

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net takes pooled text and sizes beside the prompt."""
        return self.unet_config.addition_embed_type == "text_time"

    @property
    def takes_prompt_2(self) -> bool:
        """Whether there is a second text encoder beside the first."""
        return len(self.texts.names) > 1

    @property
    def takes_aesthetic_score(self) -> bool:
        """Whether the U-Net is told an aesthetic score (SDXL's refiner) in place of a target size.

        Raises: ConfigError where its config fits neither.
        """
        if not self.is_sdxl:
            return False
        unet = self.unet_config
        pooled = self.source.config(self.texts.names[-1]).projection_dim
        # How many numbers fit into what its embedding takes (the reference has a flag beside it).
        numbers = ((unet.projection_class_embeddings_input_dim or 0) - pooled) / (
            unet.addition_time_embed_dim or 1
        )
        if numbers not in (5, 6):
            raise ConfigError(
                f"{self.source.path}: projection_class_embeddings_input_dim of the U-Net is "
                f"{unet.projection_class_embeddings_input_dim}; expected the text encoder's "
                f"projection_dim {pooled} and 5 or 6 times {unet.addition_time_embed_dim}"
            )
        return numbers == 5

    @property
    def is_latent_consistency(self) -> bool:
        """Whether it is a LatentConsistencyModelPipeline, which counts strength its own way."""
        name = str(self.source.model_index.get("_class_name"))
        return name.startswith("LatentConsistencyModel")

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether an absent negative prompt means zeros (SDXL) instead of the empty text."""
        return self.is_sdxl and bool(
            self.source.model_index.get("force_zeros_for_empty_prompt", True)
        )

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained for."""
        if self.unet_config.sample_size is None:
            raise UsageError("this model's config gives no sample_size: say width and height")
        h, w = self.unet_config.sample_size
        return h * self.vae_config.factor, w * self.vae_config.factor

    @property
    def default_guidance(self) -> float:
        """The guidance scale of the reference pipeline for this kind of model; Turbo takes none."""
        if self.unet_config.time_cond_proj_dim is not None:
            return 8.5
        if samplers.distilled_for(self.source.scheduler_config) in ("euler", "euler-a"):
            return 0.0
        if self.upscales:
            return 9.0
        return 5.0 if self.is_sdxl else 7.5

    @property
    def default_steps(self) -> int:
        """4 for models that were distilled to need few steps, else 20."""
        return 20 if samplers.distilled_for(self.source.scheduler_config) is None else 4

    @property
    def default_strength(self) -> float:
        """How far from a given image the reference pipeline goes."""
        return 0.3 if self.is_sdxl else 0.8

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net sees a mask and a masked picture beside the latents."""
        latent = self.vae_config.latent_channels
        return self.unet_config.in_channels == 2 * latent + 1

    @property
    def edits(self) -> bool:
        """Whether the U-Net sees a picture beside the latents: InstructPix2Pix."""
        unet, latent = self.unet_config, self.vae_config.latent_channels
        return unet.in_channels == 2 * latent and unet.num_class_embeds is None

    @property
    def upscales(self) -> bool:
        """Whether the U-Net sees a small picture, noised, and is told how much: the x4 upscaler."""
        unet, latent = self.unet_config, self.vae_config.latent_channels
        return unet.in_channels == latent + 3 and unet.num_class_embeds is not None

    def check_noise_level(self, noise_level: Any) -> None:
        """Raise UsageError unless an upscaler's small picture can be noised so much."""
        most = min(
            self.source.model_index.get("max_noise_level", MAX_NOISE_LEVEL),
            (self.unet_config.num_class_embeds or 0) - 1,
            len(self.low_res_process) - 1,
        )
        whole = isinstance(noise_level, int) and not isinstance(noise_level, bool)
        if not whole or not 0 <= noise_level <= most:
            raise UsageError(
                f"noise_level is {noise_level!r}; expected a whole number, 0 to {most} (how much "
                "noise is added to the picture before it is enlarged)"
            )

    @property
    def low_res_process(self) -> np.ndarray:
        """alphas_cumprod by which an upscaler's small picture is noised, by noise level.

        Raises: ConfigError.
        """
        try:
            return samplers.forward_process(self.source.low_res_scheduler_config)
        except ConfigError as error:
            raise ConfigError(f"{self.source.path}/low_res_scheduler: {error}") from None

    @property
    def takes_scaled_picture(self) -> bool:
        """Whether a model that edits sees the picture's latents scaled, as CosXL Edit does."""
        return bool(self.source.model_index.get("is_cosxl_edit", False))

    def set_loras(self, loras: Iterable[lora.Given]) -> None:
        """Let the weights be changed by these LoRAs, and by no others.

        Networks that they or those before change are read again when next needed, so that every bit
        of what is removed is gone.

        Raises: UsageError, CheckpointError; nothing is changed then.
        """
        names = [name for name in self.source.components if name != "vae"]
        configs = {name: self.source.config(name) for name in names}
        opened = lora.open_all(loras, configs, self.source.family)
        for one in (*self.loras, *opened):
            for name, deltas in one.deltas.items():
                if deltas:
                    self._loaded.pop(name, None)
        self.loras = opened

    def is_guided(self, scale: float, image_scale: float | None = None) -> bool:
        """Whether this scale takes several predictions a step.

        Args:
            image_scale: image guidance of a model that edits; below 1 it has no guidance at all.
        """
        if image_scale is not None and image_scale < 1.0:
            return False
        # A distilled model is told the scale instead (Meng et al. 2023).
        return is_guided(scale) and self.unet_config.time_cond_proj_dim is None

    def encode_prompt(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        *,
        guided: bool = True,
        clip_skip: int | None = None,
        prompt_syntax: str = "plain",
    ) -> PromptEmbeddings:
        """Run the text encoders.

        Args:
            prompt, negative_prompt: text in the given syntax. An absent negative prompt is the
                empty text, or zeros where the model's ``force_zeros_for_empty_prompt`` says so.
            prompt_2, negative_prompt_2: for SDXL's second encoder; absent: the same as the first.
            guided: whether the negative prompt is wanted.
            clip_skip: layers left out at the encoders' end. As in the reference tools, in plain
                syntax of the prompt alone, in a1111 syntax of the negative prompt as well.
            prompt_syntax: "plain" (what is beyond 77 tokens is cut, with a warning) or "a1111".
        Returns: PromptEmbeddings.
        Raises: UsageError where the prompt changes from step to step.
        """
        timeline = self.prompt_timeline(
            prompt,
            negative_prompt,
            prompt_2,
            negative_prompt_2,
            guided=guided,
            clip_skip=clip_skip,
            prompt_syntax=prompt_syntax,
        )
        if len(timeline) > 1:
            raise UsageError("the prompt changes from step to step; it has no one embedding")
        return timeline[0][1]

    def prompt_timeline(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        *,
        guided: bool = True,
        clip_skip: int | None = None,
        prompt_syntax: str = "plain",
        steps: int = 1000,
    ) -> list[tuple[int, PromptEmbeddings]]:
        """Run the text encoders on all that the prompts are in the course of a run.

        Args: as of ``encode_prompt``, and
            steps: of the run, for prompts that change (a1111 syntax).
        Returns: (last, embeddings) in order: they count for every step, from 0, up to and with
            ``last``; the last of them for the rest.
        """
        self.texts.check_clip_skip(clip_skip)
        encode = partial(self.texts.timeline, syntax=prompt_syntax, steps=steps)
        positive = encode((prompt, prompt_2 or prompt), clip_skip)
        if not guided:
            return [(last, PromptEmbeddings(e.embeds, None, e.pooled)) for last, e in positive]
        if negative_prompt is None and self.zeros_for_empty_prompt:
            negative = [(last, e.zeros()) for last, e in positive]
        else:
            first = negative_prompt or ""
            skip = None if prompt_syntax == "plain" else clip_skip
            negative = encode((first, negative_prompt_2 or first), skip)
            longest = max(e.embeds.shape[1] for _, e in (*positive, *negative))
            positive, negative = (
                [(last, self.texts.lengthen(e, longest, clip_skip)) for last, e in timeline]
                for timeline in (positive, negative)
            )
        return [
            (last, PromptEmbeddings(p.embeds, n.embeds, p.pooled, n.pooled))
            for last, (p, n) in merged([positive, negative])
        ]

    def encode_image(self, image: Any, seed: int | None = None) -> np.ndarray:
        """Latents of an image, as the U-Net sees them.

        Args:
            image: path, PIL image or uint8 array (H, W, 3); its sides must be multiples of the
                VAE factor.
            seed: draws a sample of the encoder's distribution, if it has one; None takes its mean.
        Returns: (1, H/f, W/f, C) float32.
        """
        latents = self.image_latents(load_image(image))
        if seed is None:
            return latents.mean
        return latents.draw(lambda: draw_noise(Generator(seed), latents.mean.shape[1:]))

    def image_latents(self, pixels: np.ndarray) -> ImageLatents:
        """What the VAE makes of a picture (H, W, 3) uint8 whose sides it divides."""
        return self.encode_pixels(to_model(pixels))

    def encode_pixels(self, pixels: np.ndarray, *, scaled: bool = True) -> ImageLatents:
        """What the VAE makes of a picture (1, H, W, 3) float32 in [-1, 1].

        Args:
            scaled: as the U-Net sees latents; False: as the VAE gives them.
        Raises: UsageError unless it divides the sides.
        """
        self.check_size(width=pixels.shape[2], height=pixels.shape[1])
        mean, logvar = self.component("vae").encode(self.backend.asarray(pixels))
        scale, shift = self._latent_scale() if scaled else (np.float32(1), np.float32(0))
        std = None
        if logvar is not None:
            std = (np.exp(0.5 * self.backend.to_numpy(logvar)) * scale).astype(np.float32)
        mean = ((self.backend.to_numpy(mean) - shift) * scale).astype(np.float32)
        return ImageLatents(mean, std)

    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """Pictures of latents (B, H/f, W/f, C) as the U-Net sees them."""
        return [to_pil(self.decode_pixels(one)) for one in np.asarray(latents, np.float32)]

    def decode_pixels(self, latents: np.ndarray) -> np.ndarray:
        """What the VAE makes of latents (H/f, W/f, C): (H, W, 3) float32, about [-1, 1]."""
        scale, shift = self._latent_scale()
        z = self.backend.asarray((latents / scale + shift)[None].astype(np.float32))
        vae, factor = self.component("vae"), self.vae_config.factor
        if self.tiles(factor * len(latents), factor * len(latents[0]), self.low_memory):
            pixels = tiling.decode(vae, z)
        else:
            pixels = vae.decode(z)
        found: np.ndarray = self.backend.to_numpy(pixels)[0]
        return found

    def tiles(self, height: int, width: int, low_memory: bool) -> bool:
        """Whether a picture of this size is decoded in bands."""
        if not isinstance(self.vae_config, AutoencoderKLConfig):
            return False  # a TAESD's features are small
        if self.vae_tiling is not None:
            return self.vae_tiling
        return low_memory or height * width > TILE_PIXELS

    def sketch(self, latents: np.ndarray) -> PIL.Image.Image:
        """A quick picture of latents (H/f, W/f, C): by the VAE where that is a TAESD, else a small
        one, of a pixel each, by a linear map (``preview``).

        The first call fits the map to the VAE.
        """
        if isinstance(self.vae_config, AutoencoderTinyConfig):
            pixels = self.decode_pixels(np.asarray(latents, np.float32))
        else:
            if self._linear is None:
                chart = preview.chart(self.vae_config.factor)
                self._linear = preview.fit(self.image_latents(chart).mean[0], chart)
            pixels = preview.colours(self._linear, latents)
        if self.low_memory:
            self._loaded.pop("vae", None)
        return to_pil(pixels)

    def _latent_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """``scale, shift`` with latents of the U-Net = (latents of the VAE - shift) * scale."""
        c = self.vae_config
        std = np.ones(1) if c.latents_std is None else np.array(c.latents_std)
        shift = c.shift_factor or 0.0 if c.latents_mean is None else np.array(c.latents_mean)
        return np.float32(c.scaling_factor / std), np.float32(shift)

    def check_size(self, *, width: int, height: int) -> None:
        """Raise UsageError unless the VAE divides both sides."""
        factor = self.vae_config.factor
        for name, value in (("width", width), ("height", height)):
            if value < factor or value % factor:
                below = max(value // factor, 1) * factor
                near = f"{below}" if value < factor else f"{below} or {below + factor}"
                raise UsageError(
                    f"{name} {value} is not a multiple of {factor}, which this model needs; "
                    f"nearest: {near}"
                )

    def check_latents_of(self, controlnet: Any, path: Any) -> None:
        """Raise UsageError unless a ControlNet's config has the latents of this model."""
        vae = self.vae_config
        for name, found, expected in (
            ("latent channels", controlnet.in_channels, vae.latent_channels),
            ("pixels for each latent", controlnet.factor, vae.factor),
        ):
            if found != expected:
                raise UsageError(
                    f"{path}: this ControlNet is for models with {found} {name}, this model has "
                    f"{expected}; use one made for it"
                )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of a picture of this size in pixels."""
        f = self.vae_config.factor
        return height // f, width // f, self.vae_config.latent_channels


def draw_noise(
    generator: Generator, shape: tuple[int, ...], channels: int | None = None
) -> np.ndarray:
    """The next noise of a picture: (1, H, W, C), drawn in the reference's order (1, C, H, W).

    Args:
        shape: (H, W, C).
        channels: in place of C.
    """
    h, w, c = shape
    c = c if channels is None else channels
    return np.ascontiguousarray(generator.randn((1, c, h, w)).transpose(0, 2, 3, 1))
