"""A model that draws latents of a VAE from text: Stable Diffusion and its kin, by stages.

What each stage does beside running its network is what diffusers' pipelines for Stable Diffusion,
SDXL and latent consistency models do: which layer of which text encoder is read, how latents are
scaled, what the U-Net takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.networks import tiling
from mlxdiff.networks.config import AutoencoderTinyConfig
from mlxdiff.networks.layers import wraps_rows
from mlxdiff.noise import Generator
from mlxdiff.pictures import preview
from mlxdiff.pictures.image import load_image, to_model, to_pil
from mlxdiff.run import latent_settings
from mlxdiff.run.additions.word_vectors import WordVectors
from mlxdiff.run.kind import LatentKind, Network
from mlxdiff.run.memory import Device, band_bytes
from mlxdiff.run.model import ImageLatents, Model, PromptEmbeddings, draw_noise
from mlxdiff.run.options import RunOptions
from mlxdiff.run.settings import Settings
from mlxdiff.text.encoders import TextEncoders, merged

if TYPE_CHECKING:
    import PIL.Image


class LatentModel(Model, LatentKind):
    """A model that draws latents of a VAE from text. For the arguments see ``Model``.

    Attributes:
        texts: its text encoders.
    Raises: UsageError if an addition does not fit.
    """

    def _set_up(self) -> None:
        source = self.source
        configs = (self.component_of(Network(name)).config for name in ("vae", "unet"))
        LatentKind.__init__(self, source, *configs)
        self.texts = TextEncoders(source, self.component, self.backend, penultimate=self.is_sdxl)
        if words := self.additions.of(WordVectors):
            self.texts.set_embeddings([word.embedding for word in words])
        if self.upscales:
            # As in the reference: it overflows in float16, whatever its config says.
            self.cache.widen(Network("vae"), self.additions)

    def resolve(self, asked: RunOptions, refiner: Model | None) -> Settings:
        """See ``Model.resolve``."""
        return latent_settings.resolve(self, asked, refiner)

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
        """See ``Model.encode_prompt``."""
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
        """See ``Model.prompt_timeline``."""
        self.require("prompt", "a prompt")
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
        """See ``Model.encode_image``."""
        latents = self.image_latents(load_image(image))
        if seed is None:
            return latents.mean
        return latents.draw(lambda: draw_noise(Generator(seed), latents.mean.shape[1:]))

    def image_latents(self, pixels: np.ndarray) -> ImageLatents:
        """See ``Model.image_latents``."""
        return self.encode_pixels(to_model(pixels))

    def encode_pixels(self, pixels: np.ndarray, *, scaled: bool = True) -> ImageLatents:
        """See ``Model.encode_pixels``."""
        self.check_size(width=pixels.shape[2], height=pixels.shape[1])
        x = self.backend.asarray(pixels)
        mean, logvar = self._run_vae(lambda vae: vae.encode(x))
        scale, shift = self._latent_scale() if scaled else (np.float32(1), np.float32(0))
        std = None
        if logvar is not None:
            std = (np.exp(0.5 * logvar) * scale).astype(np.float32)
        mean = ((mean - shift) * scale).astype(np.float32)
        return ImageLatents(mean, std)

    def load_decoder(self) -> None:
        """Load the VAE."""
        self.component("vae")

    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """See ``Model.decode``."""
        return [to_pil(self.decode_pixels(one)) for one in np.asarray(latents, np.float32)]

    def decode_pixels(self, latents: np.ndarray) -> np.ndarray:
        """See ``Model.decode_pixels``."""
        scale, shift = self._latent_scale()
        z = self.backend.asarray((latents / scale + shift)[None].astype(np.float32))
        factor = self.vae_config.factor
        bands = self.band_bytes(factor * len(latents), factor * len(latents[0]), self.low_memory)

        def decode(vae: Any) -> tuple[Any]:
            whole = bands is None or wraps_rows()  # a band does not see the opposite edge
            return (vae.decode(z) if whole else tiling.decode(vae, z, bands),)

        (pixels,) = self._run_vae(decode)
        found: np.ndarray = pixels[0]
        return found

    def _run_vae(self, run: Callable[[Any], tuple[Any, ...]]) -> list[Any]:
        """Results of the VAE as NumPy's arrays (or None); in float32 where float16 overflows."""

        def results() -> list[Any]:
            made = run(self.component("vae"))
            return [None if one is None else self.backend.to_numpy(one) for one in made]

        found = results()
        if all(one is None or np.isfinite(one).all() for one in found):
            return found
        return results() if self.cache.widen(Network("vae"), self.additions) else found

    def band_bytes(self, height: int, width: int, low_memory: bool) -> int | None:
        """See ``Model.band_bytes``."""
        factor, backend = self.vae_config.factor, self.backend
        return band_bytes(
            self.vae_config,
            Device(backend.name, backend.has_gpu(), backend.dtype),
            height // factor,
            width // factor,
            memory=backend.memory_size(),
            low_memory=low_memory,
            tiling=self.vae_tiling,
        )

    def sketch(self, latents: np.ndarray) -> PIL.Image.Image:
        """A quick picture of latents (H/f, W/f, C): by the VAE where that is a TAESD, else a small
        one, of a pixel each, by a linear map (``preview``).

        The first call fits the map to the VAE.
        """
        if isinstance(self.vae_config, AutoencoderTinyConfig):
            pixels = self.decode_pixels(np.asarray(latents, np.float32))
        else:
            linear = self.cache.derived(
                "colours of latents", Network("vae"), self.additions, self._fit_colours
            )
            pixels = preview.colours(linear, latents)
        if self.low_memory:
            self.cache.release(Network("vae"))
        return to_pil(pixels)

    def _fit_colours(self) -> np.ndarray:
        """Fit the linear map from latents to colours to the VAE."""
        chart = preview.chart(self.vae_config.factor)
        return preview.fit(self.image_latents(chart).mean[0], chart)

    def _latent_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """``scale, shift`` with latents of the U-Net = (latents of the VAE - shift) * scale."""
        c = self.vae_config
        std = np.ones(1) if c.latents_std is None else np.array(c.latents_std)
        shift = c.shift_factor or 0.0 if c.latents_mean is None else np.array(c.latents_mean)
        return np.float32(c.scaling_factor / std), np.float32(shift)
