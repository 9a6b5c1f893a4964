"""Model, backend and all that is added to them -> a Pipeline."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxdiff import library
from mlxdiff.errors import UsageError
from mlxdiff.machine.exact import require as require_exact
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.options import BACKENDS, DTYPES, LoadOptions
from mlxdiff.run.progress import downloads
from mlxdiff.run.table import function_of

logger = logging.getLogger("mlxdiff")

BUILTIN = Path(__file__).parent / "builtin"


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
    "vae",
    "controlnets",
    "ip_adapters",
    "image_encoder",
    "loras",
    "fast",
    "embeddings",
    "refiner",
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
    if "vae" in names:
        pipe.set_vae(asked.vae, progress=progress)
    if "controlnets" in names:
        pipe.set_controlnets(asked.controlnets, variant=variant, progress=progress)
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
        pipe.set_refiner(
            asked.refiner,
            dtype=asked.dtype,
            quantize=asked.quantize,
            variant=variant,
            progress=progress,
        )
