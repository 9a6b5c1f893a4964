"""Model, backend and all that is added to them -> a Pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mlxdiff import library
from mlxdiff.adapters import lora, textual_inversion
from mlxdiff.errors import UsageError
from mlxdiff.machine.exact import require as require_exact
from mlxdiff.pipeline import Pipeline

logger = logging.getLogger("mlxdiff")

BUILTIN = Path(__file__).parent / "builtin"
BACKENDS = ("auto", "mlx", "numpy")
DTYPES = ("auto", "float32", "float16", "bfloat16")


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


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    dtype: str | None = None,
    quantize: int | str | None = None,
    vae: str | os.PathLike[str] | None = None,
    refiner: str | os.PathLike[str] | Pipeline | None = None,
    controlnets: Sequence[str | os.PathLike[str]] = (),
    ip_adapters: Sequence[str | os.PathLike[str]] = (),
    image_encoder: str | os.PathLike[str] | None = None,
    embeddings: Iterable[textual_inversion.Given] = (),
    loras: Iterable[lora.Given] = (),
    lora_folder: str | os.PathLike[str] = ".",
    revision: str | None = None,
    variant: str | None = None,
    config: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    low_memory: bool = False,
    vae_tiling: bool | None = None,
    exact: bool = False,
    memory_limit: float | None = None,
    progress: Callable[..., None] | None = None,
) -> Pipeline:
    """Open a model for drawing.

    Args:
        model: a folder or file, a hub id ``org/name[@revision]`` or a short name (fetched and
            converted at first use, see ``mlxdiff.library``), or None for the built-in model.
        backend: "mlx", "numpy" or "auto".
        dtype: what the U-Net and the text encoders compute in; None or "auto": float16 on a
            GPU, else float32. The VAE keeps to float32 where its config says ``force_upcast``.
        quantize: weights in so many bits (2, 3, 4, 5, 6, 8), or in a float mode ("mxfp4", "nvfp4",
            "mxfp8"): rounded while they are read, by the best recipe (docs/quantization.md). None:
            as the model is.
        vae: another VAE: the folder of an AutoencoderKL or an AutoencoderTiny (TAESD), or a model
            whose VAE is to be taken.
        refiner: an SDXL model that does the last part of the way: as for ``model``, or a Pipeline
            of the same backend.
        controlnets: ControlNets that were made for this kind of model, each a folder, a file or a
            hub id; ``generate`` then takes a control_image for each.
        ip_adapters: IP-Adapters that were made for this kind of model, each a file or the hub id of
            one; ``generate`` then takes an ip_image for each.
        image_encoder: the CLIP image encoder of all of them, a folder or hub id; None: the folder
            image_encoder beside the file.
        embeddings: textual inversions, words with vectors of their own: each a file or
            (file, word).
        loras: files (or folders) that change the model's weights: each a path, or (path, scale).
        lora_folder: where the LoRAs lie that a prompt in a1111 syntax calls by name
            (``<lora:name:0.8>``).
        revision, variant: for a hub id: branch, tag or commit; for either: "fp16" and such.
        config: for a single file: a folder whose configs, scheduler and tokenizer count, and whose
            weights stand in for parts that the file does not have.
        prediction_type: for a single file: "epsilon", "v_prediction" or "sample", whatever the file
            looks like.
        low_memory: hold one stage's networks at a time, and weights as they are stored: each
            picture reads them anew, and on a CPU each step expands them anew.
        vae_tiling: decode in bands of rows: the same picture in less memory. None: where it has
            more than 256 x 256 pixels, and always with low_memory.
        exact: on a GPU, compute as exactly as the type allows, for a price in speed
            (docs/metal.md). Must be asked for before MLX is imported by anything.
        memory_limit: gigabytes that a run may take; what is expected to take more is refused. None:
            as much as the machine has.
        progress: called while files are fetched, as ``mlxdiff.store.hub.resolve`` does.
    Returns: a Pipeline; its weights are read when they are first needed.
    Raises: UsageError, ConfigError, CheckpointError, HubError.
    """
    source = library.open_model(
        BUILTIN if model is None else model,
        dtype=dtype,
        quantize=quantize,
        revision=revision,
        variant=variant,
        progress=progress,
        config=config,
        prediction_type=prediction_type,
    )
    if exact and backend != "numpy":
        require_exact()
    chosen = make_backend(backend, dtype)
    if exact and not chosen.has_gpu():
        logger.warning("exact has no effect: nothing is computed on a GPU here")
    pipe = Pipeline(source, chosen)
    pipe.lora_folder = Path(lora_folder)
    pipe.set_vae(vae, progress=progress)
    pipe.set_controlnets(controlnets, variant=variant, progress=progress)
    pipe.set_ip_adapters(
        ip_adapters, image_encoder=image_encoder, variant=variant, progress=progress
    )
    pipe.set_loras(loras)
    pipe.set_embeddings(embeddings)
    if memory_limit is not None:
        pipe.limit_memory(memory_limit)
    pipe.set_refiner(refiner, dtype=dtype, quantize=quantize, variant=variant, progress=progress)
    pipe.save_memory(low_memory, vae_tiling)
    pipe.exact = exact and chosen.has_gpu()
    return pipe
