"""Model, backend and all that is added to them -> a Pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxdiff import library
from mlxdiff.convert.clip import open_clip
from mlxdiff.convert.upscaler import open_upscaler
from mlxdiff.errors import UsageError
from mlxdiff.machine.exact import require as require_exact
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.additions.judge import TEXT
from mlxdiff.run.judge import Judge
from mlxdiff.run.options import BACKENDS, DTYPES, LoadOptions
from mlxdiff.run.progress import downloads
from mlxdiff.run.table import function_of
from mlxdiff.run.upscaling import NetworkUpscaler
from mlxdiff.store.catalogue import SHIPPED
from mlxdiff.store.folder import Progress
from mlxdiff.text.styles import read_styles

logger = logging.getLogger("mlxdiff")

BUILTIN = SHIPPED["builtin"]


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
            from mlxdiff.backends.mlx import MLXBackend
        except UsageError:  # no MLX on this machine
            if name == "mlx":
                raise
        else:
            if name == "mlx" or MLXBackend.has_gpu():
                return MLXBackend
    from mlxdiff.backends.numpy import NumPyBackend

    return NumPyBackend


def load_upscaler(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    dtype: str | None = None,
    low_memory: bool = False,
    tile: int | None = None,
    tile_overlap: int | None = None,
    progress: Progress | None = None,
) -> NetworkUpscaler:
    """Open a network that enlarges pictures, without a model: ESRGAN, Real-ESRGAN.

    Args:
        path: its file, or the hub id of one (``org/name/FILE``).
        backend, dtype, low_memory, progress: as for ``load``.
        tile: side of a tile in pixels of the small picture; 0: the whole picture at once. None: as
            large as memory allows.
        tile_overlap: pixels that tiles have in common with their neighbours. None: all that a pixel
            depends on, if that is at most 64, else 32.
    Returns: a NetworkUpscaler; ``picture(...)`` enlarges.
    Raises: UsageError, CheckpointError, HubError.
    """
    component = open_upscaler(path, progress)
    chosen = make_backend(backend, dtype)
    chosen.limit_cache(low_memory)
    loaded: list[Any] = []
    wide = chosen.dtype == "bfloat16"

    def network() -> Any:
        if not loaded:
            kind = "float32" if wide else None
            stored = True if low_memory else None
            loaded.append(chosen.load(component.config, component.tensors(), kind, stored))
        return loaded[0]

    def widen() -> bool:
        nonlocal wide
        before, wide = wide, True
        loaded.clear()
        return not before and chosen.dtype != "float32"

    return NetworkUpscaler(
        component,
        chosen,
        network,
        widen,
        low_memory=low_memory,
        side=tile,
        overlap=tile_overlap,
    )


def load_judge(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    dtype: str | None = None,
    low_memory: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
) -> Judge:
    """Open a CLIP, without a model, to compare pictures with words and with each other.

    Args:
        path: its folder, as transformers writes a CLIPModel, or a hub id.
        backend, dtype, low_memory, variant, progress: as for ``load``.
    Returns: a Judge.
    Raises: UsageError, CheckpointError, ConfigError, HubError.
    """
    clip = open_clip(path, variant, progress)
    chosen = make_backend(backend, dtype)
    chosen.limit_cache(low_memory)
    kept: dict[str, Any] = {}

    def encoder(name: str) -> Any:
        if name not in kept:
            if low_memory:
                kept.clear()
            part = clip.text if name == TEXT else clip.image
            stored = True if low_memory else None
            kept[name] = chosen.load(part.config, part.tensors(), keep_stored=stored)
        return kept[name]

    return Judge(clip, chosen, encoder)


@function_of(LoadOptions)
def load(asked: LoadOptions) -> Pipeline:
    """Open a model for drawing.

    Args:
        {options}
    Returns: a Pipeline; its weights are read when they are first needed.
    Raises: UsageError, ConfigError, CheckpointError, HubError.
    """
    progress = downloads(asked.progress, asked.on_progress, asked.cancel)
    asked = replace(asked, progress=progress)
    source = library.open_model(
        BUILTIN if asked.model is None else asked.model,
        dtype=asked.dtype,
        quantize=asked.quantize,
        revision=asked.revision,
        variant=asked.variant,
        progress=asked.progress,
        config=asked.config,
        prediction_type=asked.prediction_type,
        zero_snr=asked.zero_snr,
    )
    if asked.exact and asked.backend != "numpy":
        require_exact()
    chosen = make_backend(asked.backend, asked.dtype)
    if asked.exact:
        chosen.check_exact()
    if asked.exact and not chosen.has_gpu():
        logger.warning("exact has no effect: nothing is computed on a GPU here")
    pipe = Pipeline(source, chosen)
    pipe.lora_folder = Path(asked.lora_folder)
    add(pipe, asked)
    if asked.memory_limit is not None:
        pipe.limit_memory(asked.memory_limit)
    pipe.save_memory(asked.low_memory, asked.vae_tiling)
    pipe.exact = asked.exact and chosen.has_gpu()
    return pipe


ADDITIONS = (
    "style_file",
    "vae",
    "motion_adapter",
    "controlnets",
    "t2i_adapters",
    "map_models",
    "ip_adapters",
    "image_encoder",
    "loras",
    "fast",
    "embeddings",
    "refiner",
    "judge",
    "upscaler",
)
"""Options of ``load`` that can change on a pipeline that is open, in the order in which they are
set."""


def add(pipe: Pipeline, asked: LoadOptions, names: Collection[str] = ADDITIONS) -> None:
    """Set additions of a pipeline.

    Args:
        asked: all options of loading.
        names: of the additions to set, of ``ADDITIONS``.
    Raises: UsageError, CheckpointError, ConfigError, HubError.
    """
    variant, progress = asked.variant, asked.progress
    of_a_model: dict[str, Any] = {
        "dtype": asked.dtype,
        "quantize": asked.quantize,
        "variant": variant,
        "progress": progress,
    }
    if "style_file" in names and asked.style_file is not None:
        pipe.styles = read_styles(asked.style_file)
    if "vae" in names:
        pipe.set_vae(asked.vae, progress=progress)
    if "motion_adapter" in names:
        pipe.set_motion_adapter(asked.motion_adapter, variant=variant, progress=progress)
    if "controlnets" in names:
        pipe.set_controlnets(asked.controlnets, variant=variant, progress=progress)
    if "t2i_adapters" in names:
        pipe.set_t2i_adapters(asked.t2i_adapters, variant=variant, progress=progress)
    if "map_models" in names:
        pipe.set_map_models(asked.map_models, **of_a_model)
    if "ip_adapters" in names or "image_encoder" in names:
        pipe.set_ip_adapters(
            asked.ip_adapters,
            image_encoder=asked.image_encoder,
            variant=variant,
            progress=progress,
        )
    if "loras" in names:
        pipe.set_loras(asked.loras, progress=progress)
    if "fast" in names and (asked.fast or pipe.is_fast):
        pipe.set_fast(asked.fast, progress=progress)
    if "embeddings" in names:
        pipe.set_embeddings(asked.embeddings)
    if "refiner" in names:
        pipe.set_refiner(asked.refiner, **of_a_model)
    if "judge" in names:
        pipe.set_judge(asked.judge, variant=variant, progress=progress)
    if "upscaler" in names:
        pipe.set_upscaler(asked.upscaler, **of_a_model)
