"""Prompt -> picture. Composes the parts of the library; the maths is in them.

The order of the work, the defaults and the draws of noise are those of diffusers'
StableDiffusionPipeline and StableDiffusionXLPipeline, so that the same seed gives the same picture.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mlxdiff
from mlxdiff.convert import open_source
from mlxdiff.errors import UsageError
from mlxdiff.metadata import Metadata
from mlxdiff.model import Model, PromptEmbeddings, draw_noise
from mlxdiff.noise import Generator
from mlxdiff.settings import Settings, make_plan, pick_seeds, resolve
from mlxdiff.weights import ModelSource

if TYPE_CHECKING:
    import PIL.Image

BUILTIN = Path(__file__).parent / "builtin"
BACKENDS = ("auto", "mlx", "numpy")
DTYPES = ("auto", "float32", "float16", "bfloat16")


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
        model: its networks, stage by stage.
    """

    def __init__(self, source: ModelSource, backend: Any) -> None:
        self.model = Model(source, backend)
        _check_drawable(self.model)

    @property
    def source(self) -> ModelSource:
        """The opened model."""
        return self.model.source

    @property
    def backend(self) -> Any:
        """What it computes on."""
        return self.model.backend

    def encode_prompt(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
    ) -> PromptEmbeddings:
        """See ``Model.encode_prompt``."""
        return self.model.encode_prompt(prompt, negative_prompt, prompt_2, negative_prompt_2)

    def encode_image(self, image: Any, seed: int | None = None) -> np.ndarray:
        """See ``Model.encode_image``."""
        return self.model.encode_image(image, seed)

    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """See ``Model.decode``."""
        return self.model.decode(latents)

    def settings(self, prompt: str, **arguments: Any) -> Settings:
        """Arguments of ``generate``, checked, with the defaults filled in. Raises: UsageError."""
        return resolve(self.model, prompt, **arguments)

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
        return self._draw(settings, self._starts(settings, seeds, noise), {})

    def _starts(
        self, settings: Settings, seeds: list[int], noise: np.ndarray | None
    ) -> Iterator[tuple[int, Generator, np.ndarray]]:
        """Seed, generator and first noise of each picture."""
        shape = self.model.latent_shape(settings.height, settings.width)
        if noise is not None:
            noise = np.asarray(noise, np.float32)
            if noise.shape != (len(seeds), *shape):
                raise UsageError(
                    f"noise has shape {noise.shape}; expected {(len(seeds), *shape)} "
                    "(pictures, H/f, W/f, C)"
                )
        generators = [Generator(seed) for seed in seeds]
        return (
            (seed, generator, draw_noise(generator, shape) if noise is None else noise[i][None])
            for i, (seed, generator) in enumerate(zip(seeds, generators, strict=True))
        )

    def _draw(
        self,
        settings: Settings,
        starts: Iterator[tuple[int, Generator, np.ndarray]],
        timings: dict[str, Any],
    ) -> Iterator[Step]:
        model, backend = self.model, self.backend
        loaded, start = model.load_seconds, time.perf_counter()
        text = model.encode_prompt(
            settings.prompt,
            settings.negative_prompt,
            settings.prompt_2,
            settings.negative_prompt_2,
            guided=model.is_guided(settings.guidance),
        )
        timings["text_encoder"] = time.perf_counter() - start - (model.load_seconds - loaded)
        predict = model.predictor(
            text, settings.guidance, settings.guidance_rescale, settings.time_ids
        )
        plan = make_plan(model, settings)
        seconds = timings["steps"] = []
        # One picture after the other: each is then exactly what it is when asked for alone.
        for picture, (seed, generator, noise) in enumerate(starts):
            fresh_noise = partial(_fresh_noise, backend, generator, noise.shape[1:])
            x = backend.asarray(noise * np.float32(plan.init_noise_sigma))
            state = plan.start()
            for index, t in enumerate(plan.timesteps):
                start = time.perf_counter()
                output = predict(plan.scale_model_input(x, state), t)
                x, state = plan.step(x, output, state, noise=fresh_noise)
                backend.evaluate(x)
                seconds.append(time.perf_counter() - start)
                yield Step(
                    index=index,
                    total=len(plan.timesteps),
                    picture=picture,
                    seed=seed,
                    seconds=seconds[-1],
                    latents=backend.to_numpy(x)[0],
                    _decode=model.decode,
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
        model = self.model
        settings = self.settings(prompt, **arguments)
        seeds = pick_seeds(seed, count)
        loaded = model.load_seconds
        timings: dict[str, Any] = {}
        final = []
        for step in self._draw(settings, self._starts(settings, seeds, noise), timings):
            if on_step is not None:
                on_step(step)
            if step.index == step.total - 1:
                final.append(step.latents)
        model.component("vae")
        start = time.perf_counter()
        images = self.decode(np.stack(final))
        timings["vae"] = time.perf_counter() - start
        timings["unet"] = sum(timings["steps"])
        timings["load"] = model.load_seconds - loaded
        return Result(
            images=images,
            latents=np.stack(final),
            seeds=seeds,
            settings=settings,
            metadata=[self._metadata(settings, one) for one in seeds],
            timings=timings,
            peak_memory=self.backend.peak_memory(),
        )

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


def _fresh_noise(backend: Any, generator: Generator, shape: tuple[int, ...]) -> Any:
    return backend.asarray(draw_noise(generator, shape))


def _check_drawable(model: Model) -> None:
    """Refuse models that draw on a given image, by name, until that is there."""
    unet, latent, path = model.unet_config, model.vae_config.latent_channels, model.source.path
    if unet.in_channels != latent:
        kinds = {9: "an inpainting model", 8: "an image-editing model"}
        raise UsageError(
            f"{path}: this is {kinds.get(unet.in_channels, 'a model')} (its U-Net takes "
            f"{unet.in_channels} channels, the latents have {latent}): it draws on a given image, "
            "which this version of mlxdiff cannot take yet; use a text-to-image model"
        )
    if model.source.family == "sdxl-refiner":
        raise UsageError(
            f"{path}: this is an SDXL refiner, which starts from a given image; this version of "
            "mlxdiff cannot take one yet; use an SDXL base model"
        )
