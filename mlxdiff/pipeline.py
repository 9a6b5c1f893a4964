"""Prompt -> picture. Composes the parts of the library; the maths is in them.

The order of the work, the defaults and the draws of noise are those of diffusers' pipelines (Stable
Diffusion, SDXL and latent consistency models, text to image and image to image), so that the same
seed gives the same picture.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mlxdiff import library
from mlxdiff._version import __version__
from mlxdiff.adapters import lora, textual_inversion
from mlxdiff.errors import UnknownAttribute, UsageError, argument
from mlxdiff.machine.disk import identity
from mlxdiff.machine.turns import in_turn, turn
from mlxdiff.pictures.metadata import FIELDS as METADATA_FIELDS
from mlxdiff.pictures.metadata import Metadata
from mlxdiff.run.additions import AdditionT, Fetch
from mlxdiff.run.additions.controlnet import ControlNet
from mlxdiff.run.additions.ip_adapter import IPAdapter
from mlxdiff.run.additions.judge import PictureJudge
from mlxdiff.run.additions.lora import LoRA, asked_for, few_step_of, open_few_step
from mlxdiff.run.additions.map_maker import MapMaker, makers_of
from mlxdiff.run.additions.motion import Motion
from mlxdiff.run.additions.refiner import Refiner, refiner_of
from mlxdiff.run.additions.t2i_adapter import T2IAdapter
from mlxdiff.run.additions.upscaler import HiresUpscaler, Upscaler, upscaler_of
from mlxdiff.run.additions.vae import AnotherVAE, note_scale
from mlxdiff.run.additions.word_vectors import WordVectors
from mlxdiff.run.drawing import Picture, Result, Run, Step
from mlxdiff.run.memory import Device, Estimate, estimate, require
from mlxdiff.run.model import Model, PromptEmbeddings
from mlxdiff.run.opening import make_model
from mlxdiff.run.options import GenerateOptions, LoadOptions, RunOptions, StreamOptions
from mlxdiff.run.planning import PlannedRun, resolve
from mlxdiff.run.progress import Watch
from mlxdiff.run.seeds import variation
from mlxdiff.run.settings import Settings
from mlxdiff.run.table import entries, make, takes
from mlxdiff.run.video import frames_of
from mlxdiff.store.folder import ModelSource, Progress
from mlxdiff.store.recipes import find_recipe, recipe_of
from mlxdiff.text.styles import Style
from mlxdiff.text.styles import apply as apply_styles

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Picture", "Pipeline", "Result", "Run", "Step"]

AnyPath = str | os.PathLike[str]


# Names of other libraries, and what to do here.
_ELSEWHERE = {
    "__call__": "call generate(...), or stream(...) step by step",
    "components": "call model.component('unet'), and so on",
    "delete_adapters": "call set_loras([...]) with those that stay",
    "disable_attention_slicing": "nothing is needed: attention takes little memory",
    "enable_attention_slicing": "nothing is needed: attention takes little memory",
    "enable_free_noise": "give context_length to generate",
    "enable_freeu": "give freeu to generate",
    "enable_model_cpu_offload": "call save_memory()",
    "enable_sequential_cpu_offload": "call save_memory()",
    "enable_vae_slicing": "nothing is needed: pictures are decoded one after the other",
    "enable_vae_tiling": "call save_memory(False, vae_tiling=True)",
    "enable_xformers_memory_efficient_attention": "nothing is needed: attention is fast as it is",
    "from_pipe": "nothing is needed: generate takes image and mask on the same pipeline",
    "from_pretrained": "call mlxdiff.load(model)",
    "from_single_file": "call mlxdiff.load(file)",
    "fuse_lora": "call set_loras([...])",
    "load_ip_adapter": "call set_ip_adapters([...])",
    "load_lora_weights": "call set_loras([...])",
    "load_textual_inversion": "call set_embeddings([...])",
    "safety_checker": "none is run; check result.images if your app needs it",
    "save_pretrained": "type mlxdiff convert MODEL FOLDER --to diffusers",
    "scheduler": "give sampler and schedule to generate",
    "set_adapters": "call set_loras([(path, scale), ...])",
    "set_ip_adapter_scale": "give ip_scale to generate",
    "set_progress_bar_config": "give on_progress to generate",
    "text_encoder": "call model.component('text_encoder')",
    "text_encoder_2": "call model.component('text_encoder_2')",
    "to": "give backend to mlxdiff.load",
    "unet": "call model.component('unet')",
    "unload_ip_adapter": "call set_ip_adapters([])",
    "unload_lora_weights": "call set_loras([])",
    "unload_textual_inversion": "call set_embeddings([])",
    "upcast_vae": "nothing is needed: a VAE that overflows is computed in float32",
}


class _Advising(type):
    """The class of Pipeline, which knows the names of other libraries, too."""

    def __getattr__(cls, name: str) -> NoReturn:
        raise UnknownAttribute(f"Pipeline has no {name}{_advice(name)}")


class Pipeline(metaclass=_Advising):
    """A model, ready to draw; keeps its weights between calls.

    Several threads may use one pipeline: each run draws what it would draw alone, one thread
    computes at a time. A run keeps the additions that the pipeline had when it was made
    (docs/embedding.md).

    Attributes:
        model: its networks, stage by stage, with all that is added to it.
        lora_folder: where the LoRAs lie that a prompt calls by name.
        styles: of the user, by name, beside those of ``mlxdiff.text.styles``.
        memory_limit: gigabytes that a run may take; None: as much as the machine has. What is
            expected to take more is refused (``mlxdiff.run.memory``).
        exact: whether a GPU computes as exactly as the type allows.
    """

    def __init__(self, source: ModelSource, backend: Any) -> None:
        self.model = make_model(source, backend)
        if self.model.upscales:
            note_scale(source, source.config("vae"))
        self.memory_limit: float | None = None
        self.exact = False
        self.lora_folder = Path()
        self.styles: Mapping[str, Style] = {}
        self._prompt_loras: dict[Any, tuple[LoRA, ...]] = {}
        self._hires_networks: dict[Any, HiresUpscaler] = {}

    def __repr__(self) -> str:
        name = self.source.provenance.get("source", self.source.path)
        kinds = [type(one).__name__ for one in self.model.additions.items]
        added = "".join(f", {kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        backend = f"{self.backend.name}, {self.backend.dtype}"
        return f"<Pipeline: {name} ({self.source.family}), {backend}{added}>"

    def __getattr__(self, name: str) -> Any:
        raise UnknownAttribute(f"a Pipeline has no {name}{_advice(name)}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raise UsageError: what draws has a name."""
        raise UsageError(f"a Pipeline is not called itself{_advice('__call__')}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ATTRIBUTES:
            how = f"; call set_{name}(...)" if hasattr(type(self), f"set_{name}") else ""
            raise UnknownAttribute(
                f"a Pipeline takes no {name}: setting it would change nothing{how or _advice(name)}"
            )
        super().__setattr__(name, value)

    def limit_memory(self, gigabytes: float | None) -> None:
        """Refuse runs that are expected to take more than this. Raises: UsageError."""
        gigabytes = make(LoadOptions, {"memory_limit": gigabytes}).memory_limit
        if gigabytes is not None and gigabytes >= 1e6:
            raise UsageError(
                f"{argument('memory_limit')} is {gigabytes!r}; expected gigabytes, such as 4 or 6.5"
            )
        self.memory_limit = gigabytes
        self.backend.limit_memory(None if gigabytes is None else int(gigabytes * 1e9))

    def save_memory(self, low_memory: bool = True, vae_tiling: bool | None = None) -> None:
        """Trade time for memory, from the next picture on; see ``load``."""
        with turn():
            upscaler = upscaler_of(self.model)
            enlarging = None if upscaler is None else upscaler.model
            for model in (self.model, self.refiner, enlarging, *makers_of(self.model).values()):
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
        vae = make(LoadOptions, {"vae": vae}).vae
        fetch = Fetch(progress=progress)
        self._set(AnotherVAE, [] if vae is None else [vae], partial(AnotherVAE.open, fetch=fetch))

    def set_motion_adapter(
        self,
        motion_adapter: AnyPath | None,
        *,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Draw videos with this motion adapter; None: draw pictures.

        Args:
            motion_adapter, variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        motion_adapter = make(LoadOptions, {"motion_adapter": motion_adapter}).motion_adapter
        fetch = Fetch(variant, progress)
        given = [] if motion_adapter is None else [motion_adapter]
        self._set(Motion, given, partial(Motion.open, fetch=fetch))

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
        controlnets = make(LoadOptions, {"controlnets": controlnets}).controlnets
        fetch = Fetch(variant, progress)
        self._set(ControlNet, _several(controlnets), partial(ControlNet.open, fetch=fetch))

    def set_t2i_adapters(
        self,
        t2i_adapters: AnyPath | Iterable[AnyPath],
        *,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Let the feature maps of these T2I-Adapters, and of no others, guide the U-Net.

        Args:
            t2i_adapters, variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        t2i_adapters = make(LoadOptions, {"t2i_adapters": t2i_adapters}).t2i_adapters
        fetch = Fetch(variant, progress)
        self._set(T2IAdapter, _several(t2i_adapters), partial(T2IAdapter.open, fetch=fetch))

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
        given = {"ip_adapters": ip_adapters, "image_encoder": image_encoder}
        asked = make(LoadOptions, given)
        paths = _several(asked.ip_adapters)
        if not paths and image_encoder is not None:
            raise UsageError(
                f"{argument('image_encoder')}: there is no IP-Adapter; give one "
                f"({argument('ip_adapters')})"
            )
        fetch = Fetch(variant, progress)
        self._set(
            IPAdapter, paths, partial(IPAdapter.open, image_encoder=image_encoder, fetch=fetch)
        )

    def set_loras(self, loras: Iterable[lora.Given], *, progress: Progress | None = None) -> None:
        """Change the model's weights by these LoRAs, and by no others.

        Args:
            loras: each a path, a hub id ``org/name[/FILE][@revision]``, one of these with a scale
                (path, scale), or one of ``Pipeline.loras``.
            progress: as ``load`` takes it.
        Raises: UsageError, CheckpointError, HubError.
        """
        loras = make(LoadOptions, {"loras": loras}).loras
        fast = tuple(one for one in self.model.additions.of(LoRA) if one.way is not None)

        def open_all(given: Iterable[lora.Given], model: Model) -> tuple[LoRA, ...]:
            return (*LoRA.open(given, model, progress=progress), *fast)

        self._set(LoRA, loras, open_all)

    def set_fast(self, fast: bool = True, *, progress: Progress | None = None) -> None:
        """Draw in few steps, with the few-step LoRA of this kind of model.

        Its sampler, steps and guidance are then the defaults (``store.few_step``).

        Args:
            fast, progress: as ``load`` takes them.
        Raises: UsageError where none is published, or it is not here and cannot be fetched.
        """
        fast = make(LoadOptions, {"fast": fast}).fast
        own = tuple(one for one in self.model.additions.of(LoRA) if one.way is None)
        added = [None] if fast else []

        def open_all(given: Iterable[None], model: Model) -> tuple[LoRA, ...]:
            return (*own, *(open_few_step(model, progress) if list(given) else ()))

        self._set(LoRA, added, open_all)

    def set_embeddings(self, embeddings: Iterable[textual_inversion.Given]) -> None:
        """Let these words, and no others, stand for vectors of their own (textual inversion).

        Args:
            embeddings: each a file or (file, word), or one of ``Pipeline.embeddings``.
        Raises: UsageError, CheckpointError.
        """
        embeddings = make(LoadOptions, {"embeddings": embeddings}).embeddings
        self._set(WordVectors, embeddings, WordVectors.open)

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
        refiner = make(LoadOptions, {"refiner": refiner}).refiner
        opened = self._opener(dtype, quantize, variant, progress)

        def open_refiners(given: Iterable[AnyPath | Pipeline], model: Model) -> Iterator[Refiner]:
            for one in given:
                other = one.model if isinstance(one, Pipeline) else opened(one)
                yield Refiner.open(other, model)

        self._set(Refiner, [] if refiner is None else [refiner], open_refiners)

    def set_map_models(
        self,
        map_models: AnyPath | Iterable[AnyPath],
        *,
        dtype: str | None = None,
        quantize: int | str | None = None,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Let these models, and no others, make depth maps and normals of control pictures.

        Args:
            map_models, dtype, quantize, variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        map_models = make(LoadOptions, {"map_models": map_models}).map_models
        opened = self._opener(dtype, quantize, variant, progress)

        def open_all(given: Iterable[AnyPath], model: Model) -> Iterator[MapMaker]:
            for path in given:
                yield MapMaker.open(path, opened(path), model)

        self._set(MapMaker, _several(map_models), open_all)

    def set_upscaler(
        self,
        upscaler: AnyPath | None,
        *,
        dtype: str | None = None,
        quantize: int | str | None = None,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Enlarge each finished picture; None: leave it as it is.

        Args:
            upscaler, dtype, quantize, variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        upscaler = make(LoadOptions, {"upscaler": upscaler}).upscaler
        opened = self._opener(dtype, quantize, variant, progress)

        def open_all(given: Iterable[AnyPath], model: Model) -> Iterator[Upscaler]:
            for path in given:
                yield Upscaler.open(path, model, opened, Fetch(variant, progress))

        self._set(Upscaler, [] if upscaler is None else [upscaler], open_all)

    def set_judge(
        self,
        judge: AnyPath | None,
        *,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Score each finished picture for its prompt; None: do not.

        Args:
            judge, variant, progress: as ``load`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        judge = make(LoadOptions, {"judge": judge}).judge

        def open_all(given: Iterable[AnyPath], model: Model) -> Iterator[PictureJudge]:
            for path in given:
                yield PictureJudge.open(path, Fetch(variant, progress))

        self._set(PictureJudge, [] if judge is None else [judge], open_all)

    def _opener(
        self,
        dtype: str | None,
        quantize: int | str | None,
        variant: str | None,
        progress: Progress | None,
    ) -> Callable[[AnyPath], Model]:
        """Return what opens another model on the same backend, with these options of ``load``."""

        def opened(path: AnyPath) -> Model:
            source = library.open_model(
                path, dtype=dtype, quantize=quantize, variant=variant, progress=progress
            )
            return Pipeline(source, self.backend).model

        return opened

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
        given = list(given)
        if given:
            self.model.require(kind.part)
        opened = tuple(open_all(given, self.model))
        with turn():
            additions = self.model.additions.replaced(kind, opened)
            if kind.adds_layers:
                bare = self.model.with_additions(additions.replaced(LoRA, ()))
                loras = LoRA.matched_again(additions.of(LoRA), bare)
                additions = additions.replaced(LoRA, loras)
                self._prompt_loras.clear()
            words = additions.of(WordVectors)
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
    def embeddings(self) -> tuple[textual_inversion.TextualInversion, ...]:
        """Words with vectors of their own."""
        return tuple(one.embedding for one in self.model.additions.of(WordVectors))

    @property
    def loras(self) -> tuple[lora.Lora, ...]:
        """The LoRAs that change the model's weights, beside those that a prompt asks for."""
        return tuple(one.matched for one in self.model.additions.of(LoRA))

    @property
    def is_fast(self) -> bool:
        """Return True if the model draws in few steps by a LoRA of ``set_fast``."""
        return few_step_of(self.model.additions) is not None

    @property
    def refiner(self) -> Model | None:
        """The model that does the last part of the way, if there is one."""
        return refiner_of(self.model)

    def _with_prompt_loras(self, model: Model, settings: Settings) -> Model:
        """Return the model with the LoRAs that a prompt asks for (``<lora:name:0.8>``).

        Raises: UsageError, CheckpointError.
        """
        asked = asked_for(settings.prompt, settings.prompt_syntax, self.lora_folder)
        if not asked:
            return model
        with turn():
            key = asked, tuple(identity(path) for path, _ in asked)
            if key not in self._prompt_loras:  # those of the last prompt are kept
                self._prompt_loras = {key: LoRA.open(asked, model, in_prompt=True)}
            loras = (*model.additions.of(LoRA), *self._prompt_loras[key])
        return model.with_additions(model.additions.replaced(LoRA, loras))

    def _with_hires_network(self, model: Model, settings: Settings) -> Model:
        """Return the model with the network that a hires pass asks for.

        Raises: UsageError, CheckpointError.
        """
        path = None if settings.hires is None else settings.hires.network
        if path is None:
            return model
        with turn():
            key = path, identity(path) if os.path.exists(path) else None
            if key not in self._hires_networks:  # that of the last run is kept
                self._hires_networks = {key: HiresUpscaler.open(path)}
            opened = (self._hires_networks[key],)
        return model.with_additions(model.additions.replaced(HiresUpscaler, opened))

    @property
    def source(self) -> ModelSource:
        """The opened model."""
        return self.model.source

    @property
    def backend(self) -> Any:
        """The backend that computes."""
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
        return in_turn(self.model.encode_prompt)(
            prompt,
            negative_prompt,
            prompt_2,
            negative_prompt_2,
            clip_skip=clip_skip,
            prompt_syntax=prompt_syntax,
        )

    def encode_image(self, image: Any, seed: int | None = None) -> np.ndarray:
        """See ``Model.encode_image``."""
        return in_turn(self.model.encode_image)(image, seed)

    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """See ``Model.decode``."""
        return in_turn(self.model.decode)(latents)

    @takes(RunOptions)
    def settings(self, asked: RunOptions) -> Settings:
        """Check options of a run, and fill in the defaults.

        Args:
            {options}
        Returns: Settings.
        Raises: UsageError where an option cannot be honoured.
        """
        return self._plan(asked).settings

    def _plan(self, asked: RunOptions) -> PlannedRun:
        model = self.model  # another thread may put another one in its place
        asked = self._styled(asked)
        planned = resolve(model, refiner_of(model), asked)
        self._require_memory(planned.settings)
        model = self._with_hires_network(model, planned.settings)
        if (upscaler := upscaler_of(model)) is not None and upscaler.model is not None:
            settings = planned.settings  # what can be refused is refused before anything is drawn
            drawn = settings.enlarged or settings
            blank = np.zeros((drawn.height, drawn.width, 3), np.uint8)
            resolve(upscaler.model, None, upscaler.asked(settings, blank, 0))
        return planned._replace(model=self._with_prompt_loras(model, planned.settings))

    def _styled(self, asked: RunOptions) -> RunOptions:
        """The same with the prompt in its styles. Raises: UsageError."""
        if asked.style is None:
            return asked
        self.model.require("prompt", "style")
        if asked.prompt is None:
            raise UsageError("style: no prompt is given that could be put into it")
        prompt, negative = apply_styles(
            asked.style, self.styles, asked.prompt, asked.negative_prompt
        )
        return replace(asked, style=None, prompt=prompt, negative_prompt=negative)

    def memory(
        self,
        settings: Settings,
        *,
        scale: int = 1,
        low_memory: bool = False,
        quantize: int | None = None,
    ) -> Estimate:
        """Estimate the memory of a run of these settings.

        Args:
            scale: divides the picture's sides.
            low_memory, quantize: as if the model were loaded so.
        """
        backend, model = self.backend, self.model
        shown = max((len(prompt.images) for prompt in settings.image_prompts), default=1)
        largest = settings.enlarged or settings
        height, width = (side // scale for side in largest.drawn)
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
            frames=frames_of(settings, low_memory),
            decoded=settings.decode_chunk or 1,
        )

    def _require_memory(self, settings: Settings) -> None:
        """Refuse what cannot fit, before anything is loaded for it. Raises: UsageError."""
        expected = partial(self.memory, settings)
        low, four = argument("low_memory", True), argument("quantize", 4)
        helps = {
            f"low memory ({low})": partial(expected, low_memory=True),
            f"half the size ({settings.width // 2}x{settings.height // 2})": partial(
                expected, scale=2
            ),
        }
        if settings.decode_chunk is not None and settings.decode_chunk > 1:
            one = argument("decode_chunk", 1)
            helps[f"frames decoded one at a time ({one})"] = partial(
                self.memory, replace(settings, decode_chunk=1)
            )
        if recipe_of(self.source) is None:
            # On a CPU quantized weights are small only where they are kept so: with low memory.
            if self.backend.has_gpu():
                helps[f"weights in 4 bits ({four})"] = partial(expected, quantize=4)
            helps[f"both low memory and 4 bits ({low} {four})"] = partial(
                expected, low_memory=True, quantize=4
            )
        require(expected(), self.backend.memory_size(), self.memory_limit, helps)

    @takes(StreamOptions)
    def stream(self, asked: StreamOptions) -> Run:
        """Draw step by step, and end in ``run.result``.

        Args:
            {options}
        Returns: a Run, which yields a Step after each evaluation of the U-Net. The latents of a
            picture's last step are its final ones.
        Raises: UsageError where an option cannot be honoured.
        """
        return self._begin(asked)

    @takes(GenerateOptions)
    def generate(self, asked: GenerateOptions) -> Result:
        """Draw pictures.

        Args:
            {options}
        Returns: Result.
        Raises: UsageError where an option cannot be honoured.
        """
        run = self._begin(asked)
        if asked.on_step is not None:
            for step in run:
                asked.on_step(step)
        return run.result

    def _begin(self, asked: StreamOptions) -> Run:
        """Make a run. All that decides its pictures is fixed here."""
        planned = self._plan(asked)
        steps = sum(map(len, planned.plans))
        watch = Watch(len(planned.seeds), steps, asked.on_progress, asked.cancel)
        return Run(planned, self._metadata(planned), watch)

    def _metadata(self, planned: PlannedRun) -> list[Metadata]:
        """Describe each picture of a run."""
        model = planned.model
        said = planned.settings.describe() | model.additions.describe(planned.settings)
        said |= {"quantize": recipe_of(model.source), "exact": self.exact or None}
        own = {key: said.pop(key) for key in METADATA_FIELDS if key in said}
        provenance = model.source.provenance
        first = Metadata(
            **own,
            model=provenance.get("source"),
            revision=provenance.get("revision"),
            dtype=model.backend.dtype,
            backend=model.backend.name,
            version=__version__,
            extra={
                key: list(value) if isinstance(value, tuple) else value
                for key, value in said.items()
                if value is not None
            },
        )
        vary = planned.settings.vary
        return [
            replace(first, seed=seed)
            if vary is None
            else replace(
                first, seed=seed, extra={**first.extra, "vary": list(variation(vary, index) or ())}
            )
            for index, seed in enumerate(planned.seeds)
        ]


_ATTRIBUTES = frozenset(
    {"model", "memory_limit", "exact", "lora_folder", "styles", "_prompt_loras", "_hires_networks"}
)


def _advice(name: str) -> str:
    """Say what takes the place of an attribute that a Pipeline does not have."""
    if name in _ELSEWHERE:
        return f"; {_ELSEWHERE[name]}"
    for table, call in ((GenerateOptions, "generate"), (LoadOptions, "mlxdiff.load")):
        for entry in entries(table).values():
            if name in (entry.name, *entry.elsewhere):
                return f"; give {entry.name} to {call}"
    return ""


def _several(paths: Any) -> list[Any]:
    """A list of paths; one alone counts as a list of one."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=3)
