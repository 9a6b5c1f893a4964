"""Prompt -> picture. Composes the parts of the library; the maths is in them.

The order of the work, the defaults and the draws of noise are those of diffusers' pipelines (Stable
Diffusion, SDXL and latent consistency models, text to image and image to image), so that the same
seed gives the same picture.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff import samplers
from mlxdiff._version import __version__
from mlxdiff.adapters import lora, textual_inversion
from mlxdiff.convert import Component, open_controlnet, open_ip_adapter
from mlxdiff.errors import UsageError
from mlxdiff.noise import Generator
from mlxdiff.pictures import preview
from mlxdiff.pictures.metadata import FIELDS as METADATA_FIELDS
from mlxdiff.pictures.metadata import Metadata
from mlxdiff.run import control, image_prompt
from mlxdiff.run.denoiser import Evaluation, make_denoiser
from mlxdiff.run.inputs import Inputs, Stage, Start, make_stages
from mlxdiff.run.memory import Device, Estimate, estimate, require
from mlxdiff.run.model import Model, PromptEmbeddings, draw_noise
from mlxdiff.run.options import GenerateOptions, RunOptions
from mlxdiff.run.pixel_model import PixelModel
from mlxdiff.run.settings import Run, Settings, resolve
from mlxdiff.run.table import takes
from mlxdiff.store.folder import ModelSource
from mlxdiff.store.recipes import find_recipe, recipe_of
from mlxdiff.text import a1111

if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger("mlxdiff")


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
        model: its networks, stage by stage.
        refiner: those of the model that does the last part of the way, if there is one.
        lora_folder: where the LoRAs lie that a prompt calls by name.
        memory_limit: gigabytes that a run may take; None: as much as the machine has. What is
            expected to take more is refused (``mlxdiff.run.memory``).
        exact: whether a GPU computes as exactly as the type allows.
    """

    def __init__(self, source: ModelSource, backend: Any, vae: Component | None = None) -> None:
        self.model = _open_model(source, backend, vae)
        self.refiner: Model | None = None
        self.memory_limit: float | None = None
        self.exact = False
        self.lora_folder = Path()
        self._asked: tuple[lora.Given, ...] = ()  # the LoRAs that the last prompt asked for

    def limit_memory(self, gigabytes: float | None) -> None:
        """Refuse runs that are expected to take more than this. Raises: UsageError."""
        number = isinstance(gigabytes, (int, float)) and not isinstance(gigabytes, bool)
        if gigabytes is not None and not (number and 0 < gigabytes < 1e6):
            raise UsageError(f"memory_limit is {gigabytes!r}; expected gigabytes, such as 4 or 6.5")
        self.memory_limit = gigabytes
        self.backend.limit_memory(None if gigabytes is None else int(gigabytes * 1e9))

    def refine_with(self, refiner: Pipeline | None) -> None:
        """Let another model do the last part of the way (SDXL's refiner); None: none.

        Raises: UsageError where the two do not go together.
        """
        if refiner is None:
            self.refiner = None
            return
        first, second = (_only_sdxl(pipe.model) for pipe in (self, refiner))
        if second.vae_config.latent_channels != first.vae_config.latent_channels:
            raise UsageError(f"{second.source.path}: its latents are not those of the model")
        if (second.backend.name, second.backend.dtype) != (first.backend.name, first.backend.dtype):
            raise UsageError("the refiner must be loaded with the same backend and dtype")
        second.texts.set_embeddings([e for e in self.embeddings if "clip_g" in e.vectors])
        self.refiner = second

    def control_with(
        self,
        *controlnets: str | os.PathLike[str],
        variant: str | None = None,
        progress: Callable[..., None] | None = None,
    ) -> None:
        """Let pictures decide what stands where (ControlNet), in place of what did so before; none
        given: none does.

        Args:
            controlnets: as ``load`` takes them.
            variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError where one cannot be had or is not
            made for this model.
        """
        model = self.model
        if isinstance(model, PixelModel):
            raise UsageError(f"{self.source.path}: draws pixels; it has no part for a ControlNet")
        found = [open_controlnet(p, model.unet_config, variant, progress) for p in controlnets]
        for path, one in zip(controlnets, found, strict=True):
            model.check_latents_of(one.config, path)
        model.add("controlnet", found)

    def show_with(
        self,
        *ip_adapters: str | os.PathLike[str],
        image_encoder: str | os.PathLike[str] | None = None,
        variant: str | None = None,
        progress: Callable[..., None] | None = None,
    ) -> None:
        """Let pictures be prompts (IP-Adapter), in place of what did so before; none given: none.

        Args:
            ip_adapters, image_encoder, variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError where one cannot be had or is not
            made for this model.
        """
        model = self.model
        if isinstance(model, PixelModel):
            raise UsageError(f"{self.source.path}: draws pixels; it has no part for an IP-Adapter")
        pairs = [
            open_ip_adapter(path, model.unet_config, image_encoder, variant, progress)
            for path in ip_adapters
        ]
        for _, encoder in pairs[1:]:
            if encoder.config != pairs[0][1].config:
                raise UsageError("IP-Adapters of different image encoders cannot be used together")
        model.add("ip_adapter", [adapter for adapter, _ in pairs])
        model.add("image_encoder", [encoder for _, encoder in pairs[:1]])

    def save_memory(self, low_memory: bool = True, vae_tiling: bool | None = None) -> None:
        """Trade time for memory, from the next picture on; see ``load``."""
        for model in (self.model, self.refiner):
            if model is not None:
                model.save_memory(low_memory, vae_tiling)
        self.backend.limit_cache(low_memory)

    @property
    def embeddings(self) -> tuple[textual_inversion.Embedding, ...]:
        """Words with vectors of their own."""
        return () if isinstance(self.model, PixelModel) else self.model.texts.embeddings

    def set_embeddings(self, embeddings: Iterable[textual_inversion.Given]) -> None:
        """Let these words, and no others, stand for vectors of their own (textual inversion).

        Args:
            embeddings: each a file or (file, word), or one of ``Pipeline.embeddings``.
        Raises: UsageError, CheckpointError; nothing is changed then.
        """
        opened = textual_inversion.open_all(embeddings)
        if isinstance(self.model, PixelModel):
            if opened:
                raise UsageError(f"{self.source.path}: this model has no text encoder")
            return
        self.model.texts.set_embeddings(opened)
        if self.refiner is not None:
            self.refiner.texts.set_embeddings([e for e in opened if "clip_g" in e.vectors])

    @property
    def loras(self) -> tuple[lora.Lora, ...]:
        """What the model's weights are changed by, beside what a prompt asks for."""
        return self.model.loras[: len(self.model.loras) - len(self._asked)]

    def set_loras(self, loras: Iterable[lora.Given]) -> None:
        """Change the model's weights by these LoRAs and by no others; by none where there are none.

        Args:
            loras: each a path or (path, scale), or one of ``Pipeline.loras``.
        Raises: UsageError, CheckpointError; nothing is changed then.
        """
        if isinstance(self.model, PixelModel):
            if next(iter(loras), None) is not None:
                raise UsageError(f"{self.source.path}: this model has no part for a LoRA")
            return
        self.model.set_loras(loras)
        self._asked = ()

    def _asked_for(self, settings: Settings) -> tuple[lora.Given, ...]:
        """The LoRAs that a prompt asks for (``<lora:name:0.8>``)."""
        if settings.prompt_syntax == "plain":
            return ()
        return tuple(
            (lora.find(one.name, self.lora_folder), (one.unet, one.text_encoder))
            for one in a1111.networks(settings.prompt)[1]
        )

    def _change_for(self, settings: Settings) -> None:
        """Let the model be changed by what this prompt asks for, and not by what the last did."""
        asked = self._asked_for(settings)
        if asked != self._asked and isinstance(self.model, Model):
            self.model.set_loras((*self.loras, *asked))
            self._asked = asked

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
        self._asked_for(run.settings)  # they must be there
        self._require_memory(run.settings)
        return run

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
        largest = settings.enlarged or settings
        height, width = largest.height // scale, largest.width // scale
        low_memory = low_memory or model.low_memory
        return estimate(
            model,
            Device(backend.name, backend.has_gpu(), backend.dtype),
            height,
            width,
            batch=settings.batch(model) if isinstance(model, Model) else 1,
            image=settings.encodes or settings.hires is not None,
            refiner=self.refiner,
            low_memory=low_memory,
            tiled=isinstance(model, Model)
            and model.tiles(height, width, low_memory, model.vae_tiling),
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
        model, backend, settings = self.model, self.backend, run.settings
        self._change_for(settings)
        stages = make_stages(settings, run.plans, model, self.refiner)
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
                    yield Step(
                        index=index,
                        total=total,
                        picture=picture,
                        seed=seed,
                        seconds=elapsed,
                        latents=backend.to_numpy(x)[0],
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
        if isinstance(self.model, Model):
            self.model.component("vae")
        start = time.perf_counter()
        images = self.decode(np.stack(final))
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
        said = run.settings.describe() | self._describe_additions(run.settings)
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

    def _describe_additions(self, settings: Settings) -> dict[str, Any]:
        """What metadata say of all that is added to the model."""
        said: dict[str, Any] = {}
        if isinstance(self.model, Model):
            named = {k: _named(part.provenance) for k, part in self.model.added.items()}
            nets, adapters = (
                [named[name] for name in names]
                for names in (self.model.controlnets, self.model.ip_adapters)
            )
            encoder = named.get("image_encoder_0", "")
            said |= control.describe(settings.controls, nets, settings.guess_mode)
            said |= image_prompt.describe(settings.image_prompts, adapters, encoder)
        said["vae"] = None if self.model.vae is None else _named(self.model.vae.provenance)
        said["refiner"] = None if self.refiner is None else _named(self.refiner.source.provenance)
        said["embeddings"] = [
            {"token": e.token, "name": e.path.name, "sha256": e.sha256} for e in self.embeddings
        ] or None
        said["quantize"] = recipe_of(self.source)
        said["exact"] = self.exact or None
        given = len(self.loras)
        said["loras"] = [
            {
                "name": one.name,
                "scale": one.scale,
                **({"text_scale": one.text_scale} if one.text_scale != one.scale else {}),
                **({"in_prompt": True} if i >= given else {}),
                "sha256": one.file.sha256,
                "short_hash": one.file.short_hash,
            }
            for i, one in enumerate(self.model.loras)
        ] or None
        return said


def _open_model(source: ModelSource, backend: Any, vae: Component | None) -> Model | PixelModel:
    if source.family != "ddpm":
        return Model(source, backend, vae)
    if vae is not None:
        raise UsageError(f"{source.path}: this model draws pixels; it has no part for a VAE")
    return PixelModel(source, backend)


def _only_sdxl(model: Model | PixelModel) -> Model:
    if isinstance(model, PixelModel) or not model.is_sdxl:
        raise UsageError(
            f"{model.source.path}: is no SDXL model; a refiner is one, and works on one"
        )
    return model


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
    prediction = stage.model.source.scheduler_config.get("prediction_type", "epsilon")
    beside = None if begun.beside is None else backend.asarray(begun.beside)
    kept = None if begun.kept is None else begun.kept.on(backend)
    state = plan.start()
    for i, t in enumerate(plan.timesteps):
        start = time.perf_counter()
        evaluation = Evaluation(t, i, len(plan), beside)
        output = denoise(plan.scale_model_input(x, state), evaluation)
        clean = partial(_denoised, backend, plan, i, prediction, x, output)
        x, state = plan.step(x, output, state, noise=partial(_on_backend, backend, draw))
        if kept is not None:
            x = kept(x, plan, i + 1)
        backend.evaluate(x)
        yield x, clean, time.perf_counter() - start


def _denoised(
    backend: Any, plan: samplers.Plan, index: int, prediction: str, x: Any, output: Any
) -> np.ndarray:
    clean: np.ndarray = backend.to_numpy(preview.denoised(plan, index, prediction, x, output))[0]
    return clean


def _on_backend(backend: Any, draw: Callable[[], np.ndarray]) -> Any:
    return backend.asarray(draw())


def _named(provenance: dict[str, Any]) -> str:
    """``source@revision``, as hub ids are given."""
    revision = provenance.get("revision")
    return f"{provenance['source']}@{revision}" if revision else str(provenance["source"])
