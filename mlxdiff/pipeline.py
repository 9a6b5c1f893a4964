"""Prompt -> picture. Composes the parts of the library; the maths is in them.

The order of the work, the defaults and the draws of noise are those of diffusers'
StableDiffusionPipeline and StableDiffusionXLPipeline, so that the same seed gives the same picture.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import mlxdiff
from mlxdiff import samplers
from mlxdiff.config import AutoencoderKLConfig, UNet2DConditionConfig
from mlxdiff.convert import open_source
from mlxdiff.errors import UsageError
from mlxdiff.image import load_image, to_model, to_pil
from mlxdiff.metadata import Metadata
from mlxdiff.noise import Generator
from mlxdiff.samplers.guidance import guidance_scale_embedding, guide, is_guided
from mlxdiff.weights import ModelSource

if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger("mlxdiff")

BUILTIN = Path(__file__).parent / "builtin"
BACKENDS = ("auto", "mlx", "numpy")
DTYPES = ("auto", "float32", "float16", "bfloat16")
DEFAULT_STEPS = 20


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


@dataclass(frozen=True)
class Step:
    """One finished evaluation of the U-Net.

    Attributes:
        index: 0 for the first step of a picture.
        total: evaluations for each picture.
        picture: which picture of the run, from 0.
        seed: its seed.
        seconds: how long this evaluation took.
        latents: (H/f, W/f, C) float32, after the step.
    """

    index: int
    total: int
    picture: int
    seed: int
    seconds: float
    latents: np.ndarray
    _decode: Callable[[np.ndarray], list[PIL.Image.Image]] = field(repr=False)

    def preview(self) -> PIL.Image.Image:
        """The latents as they are after this step, decoded: noisy until the last steps."""
        return self._decode(self.latents[None])[0]


@dataclass(frozen=True)
class Result:
    """Finished pictures.

    Attributes:
        images: one for each seed.
        latents: (B, H/f, W/f, C) float32, as the U-Net left them (scaled, as it sees them).
        seeds: seed of each picture.
        settings: what was drawn, with every default filled in.
        metadata: what a PNG of each picture says of itself (``chunks()`` gives its text chunks).
        timings: seconds by stage: load, text_encoder, unet, vae; and steps, the seconds of each
            evaluation.
        peak_memory: bytes, as the backend counts them.
    """

    images: list[PIL.Image.Image]
    latents: np.ndarray
    seeds: list[int]
    settings: Settings
    metadata: list[Metadata]
    timings: dict[str, Any]
    peak_memory: int


def make_backend(name: str = "auto", dtype: str | None = None) -> Any:
    """The backend of this name; auto is MLX where it has a GPU, else NumPy (faster there)."""
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} does not exist; there are {', '.join(BACKENDS)}")
    if dtype not in (None, *DTYPES):
        raise UsageError(f"dtype {dtype!r} does not exist; there are {', '.join(DTYPES)}")
    chosen = _backend_class(name)
    return chosen(chosen.default_dtype() if dtype in (None, "auto") else dtype)


def _backend_class(name: str) -> Any:
    if name != "numpy":
        try:
            from mlxdiff.models.backend import Backend as MLXBackend
        except UsageError:  # no MLX on this machine
            if name == "mlx":
                raise
        else:
            if name == "mlx" or MLXBackend.has_gpu():
                return MLXBackend
    from mlxdiff.reference.backend import Backend

    return Backend


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    progress: Callable[..., None] | None = None,
) -> Pipeline:
    """Open a model for drawing.

    Args:
        model: a converted folder, a diffusers folder, a hub id ``org/name[@revision]``, or None for
            the built-in model.
        backend: "mlx", "numpy" or "auto".
        dtype: what the U-Net and the text encoders compute in; None or "auto": float16 on a
            GPU, else float32. The VAE keeps to float32 where its config says ``force_upcast``.
        revision, variant: for a hub id: branch, tag or commit; for either: "fp16" and such.
        progress: called while files are fetched, as ``mlxdiff.hub.resolve`` does.
    Returns: a Pipeline; its weights are read when they are first needed.
    Raises: UsageError, ConfigError, CheckpointError, HubError.
    """
    source = open_source(
        BUILTIN if model is None else model, revision=revision, variant=variant, progress=progress
    )
    return Pipeline(source, make_backend(backend, dtype))


class Pipeline:
    """A model, ready to draw; keeps its weights between calls.

    Attributes:
        source: the opened model (ModelSource).
        backend: what it computes on.
    """

    def __init__(self, source: ModelSource, backend: Any) -> None:
        self.source = source
        self.backend = backend
        self.unet_config: UNet2DConditionConfig = source.config("unet")
        self.vae_config: AutoencoderKLConfig = source.config("vae")
        self._text_encoders = [c for c in source.components if c.startswith("text_encoder")]
        self._loaded: dict[str, Any] = {}
        self._load_seconds = 0.0
        self._check()

    def _check(self) -> None:
        unet, latent = self.unet_config, self.vae_config.latent_channels
        if unet.in_channels != latent:
            kind = {9: "an inpainting model", 8: "an image-editing model"}.get(
                unet.in_channels, "a model"
            )
            raise UsageError(
                f"{self.source.path}: this is {kind} (its U-Net takes {unet.in_channels} channels, "
                f"the latents have {latent}): it draws on a given image, which this version of "
                "mlxdiff cannot take yet; use a text-to-image model"
            )
        if self._text_encoders[:1] == ["text_encoder_2"]:
            raise UsageError(
                f"{self.source.path}: this is an SDXL refiner, which starts from a given image; "
                "this version of mlxdiff cannot take one yet; use an SDXL base model"
            )

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net takes pooled text and sizes beside the prompt."""
        return self.unet_config.addition_embed_type == "text_time"

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

    def component(self, name: str) -> Any:
        """A network of the model ("unet", "vae", "text_encoder", "text_encoder_2"), loaded once."""
        if name not in self._loaded:
            start = time.perf_counter()
            config = self.source.config(name)
            dtype = "float32" if name == "vae" and config.force_upcast else None
            self._loaded[name] = self.backend.load(config, self.source.tensors(name), dtype)
            self._load_seconds += time.perf_counter() - start
        return self._loaded[name]

    # ---------------------------------------------------------------------------------- text

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
        zeros = self.is_sdxl and self.source.model_index.get("force_zeros_for_empty_prompt", True)
        if negative_prompt is None and zeros:
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

    # ---------------------------------------------------------------------------------- pixels

    def encode_image(self, image: Any, seed: int | None = None) -> np.ndarray:
        """Latents of an image, as the U-Net sees them.

        Args:
            image: path, PIL image or uint8 array (H, W, 3); its sides must be multiples of the
                VAE factor.
            seed: draws a sample of the encoder's distribution; None takes its mean.
        Returns: (1, H/f, W/f, C) float32.
        """
        pixels = to_model(load_image(image))
        self._check_size(width=pixels.shape[2], height=pixels.shape[1])
        moments = self.component("vae").encode(self.backend.asarray(pixels))
        mean, logvar = map(self.backend.to_numpy, moments)
        if seed is not None:
            noise = _draw(Generator(seed), mean.shape[1:])
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

    # ---------------------------------------------------------------------------------- drawing

    def settings(
        self,
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
            size = self.default_size
            height = size[0] if height is None else height
            width = size[1] if width is None else width
        self._check_size(width=width, height=height)
        only_sdxl = {
            "prompt_2": prompt_2,
            "negative_prompt_2": negative_prompt_2,
            "original_size": original_size,
            "target_size": target_size,
            "crop": crop,
        }
        given = [name for name, value in only_sdxl.items() if value is not None]
        if given and not self.is_sdxl:
            raise UsageError(f"{', '.join(given)}: only SDXL models have that; this model has not")
        guidance = self.default_guidance if guidance is None else guidance
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
        if self.is_sdxl:
            settings = replace(
                settings,
                original_size=original_size or (height, width),
                target_size=target_size or (height, width),
                crop=crop or (0, 0),
            )
        self._note_what_has_no_effect(settings)
        plan = self._plan(settings)
        return replace(settings, sampler=plan.sampler, schedule=plan.schedule)

    def _note_what_has_no_effect(self, settings: Settings) -> None:
        without_guidance = {
            "negative_prompt": settings.negative_prompt,
            "negative_prompt_2": settings.negative_prompt_2,
            "guidance_rescale": settings.guidance_rescale or None,
        }
        given = [name for name, value in without_guidance.items() if value is not None]
        if given and not self._is_guided(settings):
            logger.warning(
                "%s has no effect: there is no guidance at %g",
                " and ".join(given),
                settings.guidance,
            )
        if settings.negative_prompt is None and settings.negative_prompt_2 is not None:
            if self.source.model_index.get("force_zeros_for_empty_prompt", True):
                logger.warning("negative_prompt_2 has no effect without negative_prompt")

    def _check_size(self, *, width: int, height: int) -> None:
        factor = self.vae_config.factor
        for name, value in (("width", width), ("height", height)):
            if value < factor or value % factor:
                below = max(value // factor, 1) * factor
                near = f"{below}" if value < factor else f"{below} or {below + factor}"
                raise UsageError(
                    f"{name} {value} is not a multiple of {factor}, which this model needs; "
                    f"nearest: {near}"
                )

    def _is_guided(self, settings: Settings) -> bool:
        # A distilled model is told the scale instead (Meng et al. 2023).
        return is_guided(settings.guidance) and self.unet_config.time_cond_proj_dim is None

    def _plan(self, settings: Settings) -> samplers.Plan:
        return samplers.plan(
            self.source.scheduler_config,
            settings.sampler,
            settings.schedule,
            settings.steps,
            family=self.source.family,
        )

    def _predictor(self, settings: Settings, text: PromptEmbeddings) -> Callable[[Any, Any], Any]:
        """The function (x_t, t) -> guided model output; both (1, h, w, C) float32."""
        backend, unet = self.backend, self.component("unet")
        guided = self._is_guided(settings)

        def both(negative: np.ndarray | None, positive: np.ndarray | None) -> Any:
            if positive is None or negative is None:
                return None
            rows = np.concatenate([negative, positive]) if guided else positive
            return backend.asarray(rows)

        conditions: dict[str, Any] = {
            "encoder_hidden_states": both(text.negative_prompt_embeds, text.prompt_embeds)
        }
        if self.is_sdxl:
            sizes = (settings.original_size, settings.crop, settings.target_size)
            ids = np.array([[n for size in sizes for n in size or ()]], np.float32)
            conditions["text_embeds"] = both(
                text.negative_pooled_prompt_embeds, text.pooled_prompt_embeds
            )
            conditions["time_ids"] = both(ids, ids)
        if (dim := self.unet_config.time_cond_proj_dim) is not None:
            embedding = guidance_scale_embedding(settings.guidance, dim)
            conditions["timestep_cond"] = backend.asarray(embedding)

        def predict(x: Any, t: float) -> Any:
            sample = backend.concatenate([x, x], 0) if guided else x
            out = unet(sample, t, **conditions)
            if not guided:
                return out
            return guide(out[:1], out[1:], settings.guidance, settings.guidance_rescale)

        return predict

    def _noise(self, settings: Settings, noise: np.ndarray | None, count: int) -> Any:
        """Checked noise of the caller, or None."""
        f = self.vae_config.factor
        shape = (count, settings.height // f, settings.width // f, self.vae_config.latent_channels)
        if noise is not None:
            noise = np.asarray(noise, np.float32)
            if noise.shape != shape:
                raise UsageError(
                    f"noise has shape {noise.shape}; expected {shape} (B, H/f, W/f, C)"
                )
        return noise

    def stream(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        count: int = 1,
        noise: np.ndarray | None = None,
        **arguments: Any,
    ) -> Iterator[Step]:
        """Draw step by step; arguments as for ``generate``.

        Yields: a Step after each evaluation of the U-Net; the latents of a picture's last step are
            its final ones.
        """
        settings = self.settings(prompt, **arguments)
        seeds = pick_seeds(seed, count)
        return self._draw(settings, seeds, self._noise(settings, noise, count), {})

    def _draw(
        self,
        settings: Settings,
        seeds: list[int],
        noise: np.ndarray | None,
        timings: dict[str, Any],
    ) -> Iterator[Step]:
        loading = self._load_seconds
        start = time.perf_counter()
        text = self.encode_prompt(
            settings.prompt,
            settings.negative_prompt,
            settings.prompt_2,
            settings.negative_prompt_2,
            guided=self._is_guided(settings),
        )
        timings["text_encoder"] = time.perf_counter() - start - (self._load_seconds - loading)
        predict = self._predictor(settings, text)
        plan = self._plan(settings)
        f, backend = self.vae_config.factor, self.backend
        shape = (settings.height // f, settings.width // f, self.vae_config.latent_channels)
        # One picture after the other: each is then exactly what it is when asked for alone.
        for picture, seed in enumerate(seeds):
            generator = Generator(seed)
            first = _draw(generator, shape) if noise is None else noise[picture][None]
            x = backend.asarray(first * np.float32(plan.init_noise_sigma))
            state = plan.start()
            for index, t in enumerate(plan.timesteps):
                start = time.perf_counter()
                output = predict(plan.scale_model_input(x, state), t)
                x, state = plan.step(
                    x,
                    output,
                    state,
                    noise=lambda: backend.asarray(_draw(generator, shape)),  # noqa: B023
                )
                backend.evaluate(x)
                seconds = time.perf_counter() - start
                timings.setdefault("steps", []).append(seconds)
                yield Step(
                    index,
                    len(plan.timesteps),
                    picture,
                    seed,
                    seconds,
                    backend.to_numpy(x)[0],
                    self.decode,
                )

    def generate(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        count: int = 1,
        noise: np.ndarray | None = None,
        on_step: Callable[[Step], None] | None = None,
        **arguments: Any,
    ) -> Result:
        """Draw pictures.

        Args:
            prompt: what to draw; may be empty.
            seed: as torch takes it; None: random. Picture i has seed + i.
            count: how many pictures.
            noise: (count, H/f, W/f, C) float32, standard normal, instead of the seeded first noise.
            on_step: called with each Step.
            negative_prompt: what not to draw.
            prompt_2, negative_prompt_2: for SDXL's second text encoder.
            width, height: pixels, multiples of the VAE factor; None: the model's own.
            steps: evaluations of the U-Net.
            guidance: scale of classifier-free guidance; no guidance at 1 and below. None: the
                reference pipeline's default.
            guidance_rescale: 0 to 1 (Lin et al. 2023, section 3.4).
            sampler, schedule: see ``mlxdiff.samplers``.
            original_size, target_size, crop: (height, width), (height, width), (y, x): SDXL's
                micro-conditioning.
        Returns: Result.
        Raises: UsageError where an argument cannot be honoured.
        """
        settings = self.settings(prompt, **arguments)
        seeds = pick_seeds(seed, count)
        noise = self._noise(settings, noise, count)
        loaded_before = self._load_seconds
        timings: dict[str, Any] = {}
        final = []
        for step in self._draw(settings, seeds, noise, timings):
            if on_step is not None:
                on_step(step)
            if step.index == step.total - 1:
                final.append(step.latents)
        latents = np.stack(final)
        timings["unet"] = sum(timings["steps"])
        self.component("vae")
        start = time.perf_counter()
        images = self.decode(latents)
        timings["vae"] = time.perf_counter() - start
        timings["load"] = self._load_seconds - loaded_before
        metadata = [self._metadata(settings, one) for one in seeds]
        memory = self.backend.peak_memory()
        return Result(images, latents, seeds, settings, metadata, timings, memory)

    def _metadata(self, settings: Settings, seed: int) -> Metadata:
        values = asdict(settings)
        sizes = {name: values.pop(name) for name in ("original_size", "target_size", "crop")}
        provenance = self.source.provenance
        return Metadata(
            **values,
            seed=seed,
            model=provenance.get("source"),
            revision=provenance.get("revision"),
            dtype=self.backend.dtype,
            backend=self.backend.name,
            version=mlxdiff.__version__,
            extra={name: list(size) for name, size in sizes.items() if size is not None},
        )


def pick_seeds(seed: int | None, count: int) -> list[int]:
    """The seeds of a run: seed, seed + 1, ...; a random first one where none is given."""
    if count < 1:
        raise UsageError(f"count is {count}; expected at least 1")
    first = secrets.randbits(32) if seed is None else seed
    return [first + i for i in range(count)]


def _draw(generator: Generator, shape: tuple[int, ...]) -> np.ndarray:
    """The next noise of a picture: (1, H, W, C), drawn in the reference's order (1, C, H, W)."""
    h, w, c = shape
    return np.ascontiguousarray(generator.randn((1, c, h, w)).transpose(0, 2, 3, 1))
