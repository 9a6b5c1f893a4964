"""A model's networks on a backend, by stages: text, pixels and latents, prediction.

What each stage does beside running its network is what diffusers' StableDiffusionPipeline and
StableDiffusionXLPipeline do: which layer of which text encoder is read, how latents are scaled,
what a U-Net is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxdiff.config import AutoencoderKLConfig, UNet2DConditionConfig
from mlxdiff.errors import UsageError
from mlxdiff.image import load_image, to_model, to_pil
from mlxdiff.noise import Generator
from mlxdiff.samplers.guidance import guidance_scale_embedding, guide, is_guided
from mlxdiff.weights import ModelSource

if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger("mlxdiff")


class PromptEmbeddings(NamedTuple):
    """What the U-Net is told of the prompts; float32. The pooled ones are None where it takes none.

    Attributes:
        prompt_embeds: (1, 77, D).
        negative_prompt_embeds: (1, 77, D); None where there is no guidance.
        pooled_prompt_embeds: (1, P).
        negative_pooled_prompt_embeds: (1, P).
    """

    prompt_embeds: np.ndarray
    negative_prompt_embeds: np.ndarray | None = None
    pooled_prompt_embeds: np.ndarray | None = None
    negative_pooled_prompt_embeds: np.ndarray | None = None


class Model:
    """The networks of a model, loaded when first needed and kept.

    Attributes:
        source: the opened model.
        backend: what it computes on (reference.backend.Backend or models.backend.Backend).
        unet_config, vae_config: their configs.
        load_seconds: time spent on reading weights so far.
    """

    def __init__(self, source: ModelSource, backend: Any) -> None:
        self.source = source
        self.backend = backend
        self.unet_config: UNet2DConditionConfig = source.config("unet")
        self.vae_config: AutoencoderKLConfig = source.config("vae")
        self.load_seconds = 0.0
        self._text_encoders = [c for c in source.components if c.startswith("text_encoder")]
        self._loaded: dict[str, Any] = {}

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net takes pooled text and sizes beside the prompt."""
        return self.unet_config.addition_embed_type == "text_time"

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
        """The guidance scale of the reference pipeline for this kind of model."""
        if self.unet_config.time_cond_proj_dim is not None:
            return 8.5
        return 5.0 if self.is_sdxl else 7.5

    def is_guided(self, scale: float) -> bool:
        """Whether this scale takes two predictions a step."""
        # A distilled model is told the scale instead (Meng et al. 2023).
        return is_guided(scale) and self.unet_config.time_cond_proj_dim is None

    def component(self, name: str) -> Any:
        """A network of the model: "unet", "vae", "text_encoder" or "text_encoder_2"."""
        if name not in self._loaded:
            start = time.perf_counter()
            config = self.source.config(name)
            dtype = "float32" if name == "vae" and config.force_upcast else None
            self._loaded[name] = self.backend.load(config, self.source.tensors(name), dtype)
            self.load_seconds += time.perf_counter() - start
        return self._loaded[name]

    def encode_prompt(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        *,
        guided: bool = True,
    ) -> PromptEmbeddings:
        """Run the text encoders.

        Args:
            prompt, negative_prompt: plain text; what is beyond 77 tokens is cut, with a warning. An
                absent negative prompt is the empty text, or zeros where the model's
                ``force_zeros_for_empty_prompt`` says so.
            prompt_2, negative_prompt_2: for SDXL's second encoder; absent: the same as the first.
            guided: whether the negative prompt is wanted.
        Returns: PromptEmbeddings.
        """
        positive = self._encode(prompt, prompt_2 or prompt)
        if not guided:
            return PromptEmbeddings(positive[0], None, positive[1], None)
        if negative_prompt is None and self.zeros_for_empty_prompt:
            negative = tuple(p if p is None else np.zeros_like(p) for p in positive)
        else:
            first = negative_prompt or ""
            negative = self._encode(first, negative_prompt_2 or first)
        return PromptEmbeddings(positive[0], negative[0], positive[1], negative[1])

    def _encode(self, prompt: str, prompt_2: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Embeddings (1, 77, D) and pooled (1, P) of a text, given once for each encoder."""
        embeds, pooled = [], None
        for name, text in zip(self._text_encoders, (prompt, prompt_2), strict=False):
            tokenizer = self.source.tokenizer(name.replace("text_encoder", "tokenizer"))
            ids = tokenizer.encode(text)
            if cut := tokenizer.truncated(text):
                logger.warning(
                    "the prompt is longer than %d tokens; this part is cut: %r", len(ids), cut
                )
            out = self.component(name)(self.backend.asarray(np.array([ids], np.int32)))
            # SDXL reads the layer before the last, without the final norm.
            embeds.append(out.hidden_states[-2] if self.is_sdxl else out.last_hidden_state)
            if self.is_sdxl:
                pooled = out.text_embeds
        arrays = [self.backend.to_numpy(e) for e in embeds]
        return (
            np.concatenate(arrays, axis=-1),
            None if pooled is None else self.backend.to_numpy(pooled),
        )

    def encode_image(self, image: Any, seed: int | None = None) -> np.ndarray:
        """Latents of an image, as the U-Net sees them.

        Args:
            image: path, PIL image or uint8 array (H, W, 3); its sides must be multiples of the
                VAE factor.
            seed: draws a sample of the encoder's distribution; None takes its mean.
        Returns: (1, H/f, W/f, C) float32.
        """
        pixels = to_model(load_image(image))
        self.check_size(width=pixels.shape[2], height=pixels.shape[1])
        moments = self.component("vae").encode(self.backend.asarray(pixels))
        mean, logvar = map(self.backend.to_numpy, moments)
        if seed is not None:
            noise = draw_noise(Generator(seed), mean.shape[1:])
            mean = mean + np.exp(0.5 * logvar) * noise
        scale, shift = self._latent_scale()
        return ((mean - shift) * scale).astype(np.float32)

    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """Pictures of latents (B, H/f, W/f, C) as the U-Net sees them."""
        scale, shift = self._latent_scale()
        vae, images = self.component("vae"), []
        for one in np.asarray(latents, np.float32):
            z = self.backend.asarray((one / scale + shift)[None].astype(np.float32))
            images.append(to_pil(self.backend.to_numpy(vae.decode(z))[0]))
        return images

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

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of a picture of this size in pixels."""
        f = self.vae_config.factor
        return height // f, width // f, self.vae_config.latent_channels

    def predictor(
        self,
        text: PromptEmbeddings,
        guidance: float,
        guidance_rescale: float = 0.0,
        time_ids: tuple[int, ...] | None = None,
    ) -> Callable[[Any, float], Any]:
        """What the sampler asks at each step: (x_t, t) -> the model's output, after guidance.

        Args:
            text: both prompts, embedded.
            guidance, guidance_rescale: see ``samplers.guidance``.
            time_ids: SDXL's original size, crop and target size.
        Returns: a function of arrays of the backend, (1, h, w, C) float32 -> the same.
        """
        backend, unet = self.backend, self.component("unet")
        guided = self.is_guided(guidance)

        def both(negative: np.ndarray | None, positive: np.ndarray | None) -> Any:
            if positive is None:
                return None
            if guided and negative is not None:
                positive = np.concatenate([negative, positive])
            return backend.asarray(positive)

        conditions: dict[str, Any] = {
            "encoder_hidden_states": both(text.negative_prompt_embeds, text.prompt_embeds)
        }
        if self.is_sdxl:
            ids = np.array([time_ids], np.float32)
            conditions["text_embeds"] = both(
                text.negative_pooled_prompt_embeds, text.pooled_prompt_embeds
            )
            conditions["time_ids"] = both(ids, ids)
        if (dim := self.unet_config.time_cond_proj_dim) is not None:
            embedding = guidance_scale_embedding(guidance, dim)
            conditions["timestep_cond"] = backend.asarray(embedding)

        def predict(x: Any, t: float) -> Any:
            sample = backend.concatenate([x, x], 0) if guided else x
            out = unet(sample, t, **conditions)
            if not guided:
                return out
            return guide(out[:1], out[1:], guidance, guidance_rescale)

        return predict


def draw_noise(generator: Generator, shape: tuple[int, ...]) -> np.ndarray:
    """The next noise of a picture: (1, H, W, C), drawn in the reference's order (1, C, H, W)."""
    h, w, c = shape
    return np.ascontiguousarray(generator.randn((1, c, h, w)).transpose(0, 2, 3, 1))
