"""Prompt -> picture. Composes the parts of the library; the maths is in them.

The order of the work, the defaults and the draws of noise are those of diffusers' pipelines (Stable
Diffusion, SDXL and latent consistency models, text to image and image to image), so that the same
seed gives the same picture.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff import library, samplers
from mlxdiff._version import __version__
from mlxdiff.adapters import lora, textual_inversion
from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.noise import Generator
from mlxdiff.pictures.metadata import FIELDS as METADATA_FIELDS
from mlxdiff.pictures.metadata import Metadata
from mlxdiff.run.additions import AdditionT, Fetch
from mlxdiff.run.additions.controlnet import ControlNet
from mlxdiff.run.additions.embedding import Embedding
from mlxdiff.run.additions.ip_adapter import IPAdapter
from mlxdiff.run.additions.lora import LoRA, asked_for
from mlxdiff.run.additions.refiner import Refiner, refiner_of
from mlxdiff.run.additions.vae import AnotherVAE
from mlxdiff.run.denoiser import Evaluation, make_denoiser
from mlxdiff.run.inputs import Inputs, Stage, Start, make_stages
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.run.memory import Device, Estimate, estimate, require
from mlxdiff.run.model import Model, PromptEmbeddings, draw_noise
from mlxdiff.run.options import GenerateOptions, RunOptions
from mlxdiff.run.pixel_model import PixelModel
from mlxdiff.run.settings import Run, Settings, resolve
from mlxdiff.run.table import takes
from mlxdiff.store.folder import ModelSource, Progress
from mlxdiff.store.recipes import find_recipe, recipe_of

if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger("mlxdiff")

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Step:
    """One finished evaluation of the U-Net.

    Attributes:
        index: 0 for the first step of a picture.
        total: evaluations for each picture, a refiner's included.
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
    _sketch: Callable[[np.ndarray], PIL.Image.Image] = field(repr=False)
    _denoised: Callable[[], np.ndarray] = field(repr=False)

    @property
    def denoised(self) -> np.ndarray:
        """The model's estimate of the latents without noise: (H/f, W/f, C) float32."""
        return self._denoised()

    def sketch(self) -> PIL.Image.Image:
        """A quick estimate of the finished picture: decoded if the VAE is a TAESD, else by a linear
        map, one pixel for each latent."""
        return self._sketch(self.denoised)

    def preview(self) -> PIL.Image.Image:
        """The latents after this step, decoded: noisy until the last steps."""
        return self._decode(self.latents[None])[0]


@dataclass(frozen=True)
class Result:
    """Finished pictures.

    Attributes:
        images: one for each seed.
        latents: (B, H/f, W/f, C) float32, the final ones, scaled as the U-Net takes them.
        seeds: seed of each picture.
        settings: of the run, with every default filled in.
        metadata: of each picture (``chunks()`` gives the text chunks of a PNG).
        timings: seconds by stage: load, text_encoder, image (encoding the given one), hires
            (enlarging), unet, vae; and steps, the seconds of each evaluation.
        peak_memory: bytes, as the backend counts them.
    """

    images: list[PIL.Image.Image]
    latents: np.ndarray
    seeds: list[int]
    settings: Settings
    metadata: list[Metadata]
    timings: dict[str, Any]
    peak_memory: int


class Pipeline:
    """A model, ready to draw; keeps its weights between calls.

    Attributes:
        model: its networks, stage by stage, with all that is added to it.
        lora_folder: where the LoRAs lie that a prompt calls by name.
        memory_limit: gigabytes that a run may take; None: as much as the machine has. What is
            expected to take more is refused (``mlxdiff.run.memory``).
        exact: whether a GPU computes as exactly as the type allows.
    """

    def __init__(self, source: ModelSource, backend: Any) -> None:
        self.model = _open_model(source, backend)
        self.memory_limit: float | None = None
        self.exact = False
        self.lora_folder = Path()
        self._prompt_loras: dict[Any, tuple[LoRA, ...]] = {}

    def limit_memory(self, gigabytes: float | None) -> None:
        """Refuse runs that are expected to take more than this. Raises: UsageError."""
        number = isinstance(gigabytes, (int, float)) and not isinstance(gigabytes, bool)
        if gigabytes is not None and not (number and 0 < gigabytes < 1e6):
            raise UsageError(f"memory_limit is {gigabytes!r}; expected gigabytes, such as 4 or 6.5")
        self.memory_limit = gigabytes
        self.backend.limit_memory(None if gigabytes is None else int(gigabytes * 1e9))

    def save_memory(self, low_memory: bool = True, vae_tiling: bool | None = None) -> None:
        """Trade time for memory, from the next picture on; see ``load``."""
        for model in (self.model, self.refiner):
            if model is not None:
                model.save_memory(low_memory, vae_tiling)
        self.backend.limit_cache(low_memory)

    # Additions. Each of these replaces the additions of its kind; a failure changes nothing.

    def set_vae(self, vae: AnyPath | None, *, progress: Progress | None = None) -> None:
        """Encode and decode with another VAE; None: with the model's own.

        Args:
            vae, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        fetch = Fetch(progress=progress)
        self._set(AnotherVAE, [] if vae is None else [vae], partial(AnotherVAE.open, fetch=fetch))

    def set_controlnets(
        self,
        controlnets: AnyPath | Iterable[AnyPath],
        *,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Let these ControlNets, and no others, decide what stands where.

        Args:
            controlnets, variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        fetch = Fetch(variant, progress)
        self._set(ControlNet, _several(controlnets), partial(ControlNet.open, fetch=fetch))

    def set_ip_adapters(
        self,
        ip_adapters: AnyPath | Iterable[AnyPath],
        *,
        image_encoder: AnyPath | None = None,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Let pictures be prompts, through these IP-Adapters and no others.

        Args:
            ip_adapters, image_encoder, variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        paths = _several(ip_adapters)
        if not paths and image_encoder is not None:
            raise UsageError("image_encoder: there is no IP-Adapter; give one (--ip-adapter)")
        fetch = Fetch(variant, progress)
        self._set(
            IPAdapter, paths, partial(IPAdapter.open, image_encoder=image_encoder, fetch=fetch)
        )

    def set_loras(self, loras: Iterable[lora.Given]) -> None:
        """Change the model's weights by these LoRAs, and by no others.

        Args:
            loras: each a path or (path, scale), or one of ``Pipeline.loras``.
        Raises: UsageError, CheckpointError.
        """
        self._set(LoRA, loras, LoRA.open)

    def set_embeddings(self, embeddings: Iterable[textual_inversion.Given]) -> None:
        """Let these words, and no others, stand for vectors of their own (textual inversion).

        Args:
            embeddings: each a file or (file, word), or one of ``Pipeline.embeddings``.
        Raises: UsageError, CheckpointError.
        """
        self._set(Embedding, embeddings, Embedding.open)

    def set_refiner(
        self,
        refiner: AnyPath | Pipeline | None,
        *,
        dtype: str | None = None,
        quantize: int | str | None = None,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Let another model do the last part of the way (SDXL's refiner); None: none.

        Args:
            refiner, dtype, quantize, variant, progress: as ``load`` takes them.
        Raises: UsageError if the two do not fit; CheckpointError, ConfigError, HubError.
        """

        def open_refiners(given: Iterable[AnyPath | Pipeline], model: Model) -> Iterator[Refiner]:
            for one in given:
                if not isinstance(one, Pipeline):
                    source = library.open_model(
                        one,
                        dtype=dtype,
                        quantize=quantize,
                        variant=variant,
                        progress=progress,
                    )
                    one = Pipeline(source, self.backend)
                yield Refiner.open(one.model, model)

        self._set(Refiner, [] if refiner is None else [refiner], open_refiners)

    def _set(
        self,
        kind: type[AdditionT],
        given: Iterable[Any],
        open_all: Callable[..., Iterable[AdditionT]],
    ) -> None:
        """Replace the additions of a kind.

        Args:
            given: what is to be added, as people give it.
            open_all: opens these, and matches them to the model.
        Raises: UsageError if the model has no part for them, or one does not fit.
        """
        if not isinstance(given, (str, bytes, os.PathLike)):  # else open_all says what is wrong
            given = list(given)
        if given:
            self.model.require(kind.part)
        additions = self.model.additions.replaced(kind, open_all(given, self.model))
        words = additions.of(Embedding)
        refiners = [one.with_words(words) for one in additions.of(Refiner)]
        self.model = self.model.with_additions(additions.replaced(Refiner, refiners))
        self.model.cache.release_others(self.model.additions)

    def control_with(self, *controlnets: AnyPath, **how: Any) -> None:
        """Deprecated: call ``set_controlnets``."""
        _warn_renamed("control_with(...)", "set_controlnets([...])")
        self.set_controlnets(controlnets, **how)

    def show_with(self, *ip_adapters: AnyPath, **how: Any) -> None:
        """Deprecated: call ``set_ip_adapters``."""
        _warn_renamed("show_with(...)", "set_ip_adapters([...])")
        self.set_ip_adapters(ip_adapters, **how)

    def refine_with(self, refiner: Pipeline | None) -> None:
        """Deprecated: call ``set_refiner``."""
        _warn_renamed("refine_with(...)", "set_refiner(...)")
        self.set_refiner(refiner)

    @property
    def embeddings(self) -> tuple[textual_inversion.Embedding, ...]:
        """Words with vectors of their own."""
        return tuple(one.embedding for one in self.model.additions.of(Embedding))

    @property
    def loras(self) -> tuple[lora.Lora, ...]:
        """The LoRAs that change the model's weights, beside those that a prompt asks for."""
        return tuple(one.matched for one in self.model.additions.of(LoRA))

    @property
    def refiner(self) -> Model | None:
        """The model that does the last part of the way, if there is one."""
        return refiner_of(self.model)

    def _model_for(self, settings: Settings) -> Model:
        """The model with the LoRAs that this prompt asks for (``<lora:name:0.8>``).

        Raises: UsageError, CheckpointError.
        """
        asked = asked_for(settings.prompt, settings.prompt_syntax, self.lora_folder)
        if not asked:
            return self.model
        if asked not in self._prompt_loras:  # those of the last prompt are kept
            self._prompt_loras = {asked: LoRA.open(asked, self.model, in_prompt=True)}
        additions = self.model.additions
        loras = (*additions.of(LoRA), *self._prompt_loras[asked])
        return self.model.with_additions(additions.replaced(LoRA, loras))

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
        *,
        clip_skip: int | None = None,
        prompt_syntax: str = "plain",
    ) -> PromptEmbeddings:
        """See ``Model.encode_prompt``."""
        return self.model.encode_prompt(
            prompt,
            negative_prompt,
            prompt_2,
            negative_prompt_2,
            clip_skip=clip_skip,
            prompt_syntax=prompt_syntax,
        )

    def encode_image(self, image: Any, seed: int | None = None) -> np.ndarray:
        """See ``Model.encode_image``."""
        return self.model.encode_image(image, seed)

    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """See ``Model.decode``."""
        return self.model.decode(latents)

    @takes(RunOptions)
    def settings(self, asked: RunOptions) -> Settings:
        """Check options of a run, and fill in the defaults.

        Args:
            {options}
        Returns: Settings.
        Raises: UsageError where an option cannot be honoured.
        """
        return self._prepare(asked).settings

    @takes(RunOptions)
    def prepare(self, asked: RunOptions) -> Run:
        """Check and plan a run, for ``draw``; arguments as for ``settings``.

        Args:
            {options}
        Returns: Run.
        Raises: UsageError where an option cannot be honoured.
        """
        return self._prepare(asked)

    def _prepare(self, asked: RunOptions) -> Run:
        run = resolve(self.model, self.refiner, asked)
        self._require_memory(run.settings)
        return run._replace(model=self._model_for(run.settings))

    def memory(
        self,
        settings: Settings,
        *,
        scale: int = 1,
        low_memory: bool = False,
        quantize: int | None = None,
    ) -> Estimate:
        """How much memory a run of these settings takes.

        Args:
            scale: divides the picture's sides.
            low_memory, quantize: as if the model were loaded so.
        """
        backend, model = self.backend, self.model
        shown = max((len(prompt.images) for prompt in settings.image_prompts), default=1)
        largest = settings.enlarged or settings
        height, width = largest.height // scale, largest.width // scale
        low_memory = low_memory or model.low_memory
        return estimate(
            model,
            Device(backend.name, backend.has_gpu(), backend.dtype),
            height,
            width,
            batch=settings.batch(model),
            image=settings.encodes or settings.hires is not None,
            pictures=shown,
            refiner=self.refiner,
            low_memory=low_memory,
            band_bytes=model.band_bytes(height, width, low_memory),
            recipe=None if quantize is None else find_recipe(quantize),
        )

    def _require_memory(self, settings: Settings) -> None:
        """Refuse what cannot fit, before anything is loaded for it. Raises: UsageError."""
        expected = partial(self.memory, settings)
        helps = {
            "low memory (--low-memory)": partial(expected, low_memory=True),
            f"half the size ({settings.width // 2}x{settings.height // 2})": partial(
                expected, scale=2
            ),
        }
        if recipe_of(self.source) is None:
            # On a CPU quantized weights are small only where they are kept so: with low memory.
            if self.backend.has_gpu():
                helps["weights in 4 bits (-q 4)"] = partial(expected, quantize=4)
            helps["both low memory and 4 bits (--low-memory -q 4)"] = partial(
                expected, low_memory=True, quantize=4
            )
        require(expected(), self.backend.memory_size(), self.memory_limit, helps)

    @takes(RunOptions)
    def stream(self, asked: RunOptions) -> Iterator[Step]:
        """Draw step by step.

        Args:
            {options}
        Yields: a Step after each evaluation of the U-Net; the latents of a picture's last step are
            its final ones.
        Raises: UsageError where an option cannot be honoured.
        """
        return self._steps(self._prepare(asked), {})

    def _steps(self, run: Run, timings: dict[str, Any]) -> Iterator[Step]:
        """Draw the pictures of a run one after the other: each is then exactly what it is alone."""
        model, backend, settings = run.model, self.backend, run.settings
        stages = make_stages(settings, run.plans, model, refiner_of(model))
        if settings.encodes:
            model.component("vae")
        start = time.perf_counter()
        inputs = Inputs(model, settings)
        if settings.encodes:
            timings["image"] = time.perf_counter() - start
        denoisers: dict[int, Any] = {}
        seconds = timings["steps"] = []
        if settings.hires is not None:
            timings["hires"] = 0.0
        total = sum(len(stage.plan) for stage in stages)
        for picture, seed in enumerate(run.seeds):
            generator, index, x = Generator(seed), 0, None
            given = None if run.noise is None else run.noise[picture][None]
            for part, stage in enumerate(stages):
                size = stage.settings.height, stage.settings.width
                draw = partial(draw_noise, generator, model.latent_shape(*size))
                if part not in denoisers and stage.model.low_memory:
                    denoisers.clear()
                    denoise = None
                if x is None:
                    begun = inputs.begin(stage.plan, draw, given)
                else:
                    start = time.perf_counter()
                    begun = inputs.go_on(stage, begun, backend.to_numpy(x), draw)
                    if settings.hires is not None:
                        timings["hires"] += time.perf_counter() - start
                if part not in denoisers:
                    denoisers[part] = self._make_denoiser(stage, timings)
                denoise = denoisers[part]
                for x, clean, elapsed in _evaluations(stage, begun, denoise, backend, draw):
                    seconds.append(elapsed)
                    latents = _finite(backend.to_numpy(x)[0], index, total, backend.dtype)
                    yield Step(
                        index=index,
                        total=total,
                        picture=picture,
                        seed=seed,
                        seconds=elapsed,
                        latents=latents,
                        _decode=model.decode,
                        _sketch=model.sketch,
                        _denoised=clean,
                    )
                    index += 1
            backend.clear_cache()

    def _make_denoiser(self, stage: Stage, timings: dict[str, Any]) -> Any:
        """Run the text encoders of a stage; what loading takes is not counted."""
        loaded, start = self._load_seconds, time.perf_counter()
        made = make_denoiser(stage.model, stage.settings, stage.plan.timesteps, stage.before)
        elapsed = time.perf_counter() - start - (self._load_seconds - loaded)
        timings["text_encoder"] = timings.get("text_encoder", 0.0) + elapsed
        return made

    @property
    def _load_seconds(self) -> float:
        refiner = 0.0 if self.refiner is None else self.refiner.load_seconds
        return self.model.load_seconds + refiner

    @takes(GenerateOptions)
    def generate(self, asked: GenerateOptions) -> Result:
        """Draw pictures.

        Args:
            {options}
        Returns: Result.
        Raises: UsageError where an option cannot be honoured.
        """
        return self.draw(self._prepare(asked), asked.on_step)

    def draw(self, run: Run, on_step: Callable[[Step], object] | None = None) -> Result:
        """Draw the pictures of a run that ``prepare`` has made.

        Args:
            on_step: called with each Step.
        """
        settings, loaded = run.settings, self._load_seconds
        timings: dict[str, Any] = {}
        final = []
        for step in self._steps(run, timings):
            if on_step is not None:
                on_step(step)
            if step.index == step.total - 1:
                final.append(step.latents)
        run.model.load_decoder()
        start = time.perf_counter()
        images = run.model.decode(np.stack(final))
        if settings.canvas is not None and settings.paste_original:
            images = [settings.canvas.paste_original(image) for image in images]
        self.backend.clear_cache()
        timings["vae"] = time.perf_counter() - start
        timings["unet"] = sum(timings["steps"])
        timings["load"] = self._load_seconds - loaded
        return Result(
            images=images,
            latents=np.stack(final),
            seeds=run.seeds,
            settings=settings,
            metadata=self._metadata(run),
            timings=timings,
            peak_memory=self.backend.peak_memory(),
        )

    def _metadata(self, run: Run) -> list[Metadata]:
        """What each picture says of itself."""
        said = run.settings.describe() | run.model.additions.describe(run.settings)
        said |= {"quantize": recipe_of(self.source), "exact": self.exact or None}
        own = {key: said.pop(key) for key in METADATA_FIELDS if key in said}
        provenance = self.source.provenance
        first = Metadata(
            **own,
            model=provenance.get("source"),
            revision=provenance.get("revision"),
            dtype=self.backend.dtype,
            backend=self.backend.name,
            version=__version__,
            extra={
                key: list(value) if isinstance(value, tuple) else value
                for key, value in said.items()
                if value is not None
            },
        )
        return [replace(first, seed=seed) for seed in run.seeds]


def _open_model(source: ModelSource, backend: Any) -> Model:
    kind = PixelModel if source.family == "ddpm" else LatentModel
    return kind(source, backend)


def _several(paths: Any) -> list[Any]:
    """A list of paths; one alone counts as a list of one."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=3)


def _evaluations(
    stage: Stage, begun: Start, denoise: Any, backend: Any, draw: Callable[[], np.ndarray]
) -> Iterator[tuple[Any, Callable[[], np.ndarray], float]]:
    """Evaluate the U-Net of a stage again and again, for one picture.

    Args:
        begun: what the picture starts from.
        draw: noise of the picture's own generator.
    Yields: x after each step, (1, h, w, C); what gives it without noise; seconds.
    """
    plan, x = stage.plan, backend.asarray(begun.x)
    beside = None if begun.beside is None else backend.asarray(begun.beside)
    kept = None if begun.kept is None else begun.kept.on(backend)
    state = plan.start()
    for i, t in enumerate(plan.timesteps):
        start = time.perf_counter()
        evaluation = Evaluation(t, i, len(plan), beside)
        output = denoise(plan.scale_model_input(x, state), evaluation)
        clean = partial(_denoised, backend, plan, i, x, output)
        x, state = plan.step(x, output, state, noise=partial(_on_backend, backend, draw))
        if kept is not None:
            x = kept(x, plan, i + 1)
        backend.evaluate(x)
        yield x, clean, time.perf_counter() - start


def _finite(latents: np.ndarray, index: int, total: int, dtype: str) -> np.ndarray:
    """The latents of a step. Raises: MlxdiffError unless they are finite."""
    if not np.isfinite(latents).all():
        damaged = "the weights are damaged, or the computation overflowed"
        way_out = "verify the model" if dtype == "float32" else "use float32 (--dtype float32)"
        raise MlxdiffError(
            f"step {index + 1} of {total} gives latents that are not finite: {damaged}; {way_out}"
        )
    return latents


def _denoised(backend: Any, plan: samplers.Plan, index: int, x: Any, output: Any) -> np.ndarray:
    clean: np.ndarray = backend.to_numpy(plan.denoised(x, output, index))[0]
    return clean


def _on_backend(backend: Any, draw: Callable[[], np.ndarray]) -> Any:
    return backend.asarray(draw())
