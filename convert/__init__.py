"""Convert pretrained weights. Import as ``mlxdiff.convert``. Needs no mlx and no torch.

    report = mlxdiff.convert.convert("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15")

Stages: open the files (``checkpoint``), detect the model (``detect``), map each tensor to its name
(``keymap``) and layout (``transforms``), check and write (``store.folder``), report (``report``).
"""

if __name__ != "mlxdiff.convert":
    raise ImportError(
        "this folder is mlxdiff.convert: install mlxdiff (pip install -e .), then import that name"
    )

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from mlxdiff.convert.checkpoint import DiffusersFolder
from mlxdiff.convert.component import Component, open_vae
from mlxdiff.convert.controlnet import open_controlnet
from mlxdiff.convert.export import check_target, model_card, write_diffusers, write_single
from mlxdiff.convert.ip_adapter import open_ip_adapter
from mlxdiff.convert.motion import open_motion_adapter
from mlxdiff.convert.report import ComponentReport, Report
from mlxdiff.convert.singlefile import SingleFile
from mlxdiff.convert.sources import (
    Model,
    identities,
    open_source,
    require_unchanged,
    used_files,
)
from mlxdiff.convert.t2i_adapter import open_t2i_adapter
from mlxdiff.errors import UsageError, argument
from mlxdiff.machine.disk import sha256
from mlxdiff.networks.config import UNetConfig
from mlxdiff.store.folder import ConvertedFolder, ModelSource, Progress, check_dest, write_folder
from mlxdiff.store.recipes import (
    AS_STORED,
    Recipe,
    find_recipe,
    is_quantized,
    quantized_model,
    recipe_of,
    unpacked_model,
)
from mlxdiff.weights.tensors import DTYPES, LazyTensor, QuantizedTensor, stored_bytes

__all__ = [
    "Component",
    "ComponentReport",
    "DiffusersFolder",
    "Report",
    "SingleFile",
    "convert",
    "describe",
    "open_controlnet",
    "open_ip_adapter",
    "open_motion_adapter",
    "open_source",
    "open_t2i_adapter",
    "open_vae",
]


def convert(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    revision: str | None = None,
    variant: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    config: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    ema: bool = False,
    quantize: int | str | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    to: str = "mlxdiff",
    change: Callable[[ModelSource], ModelSource] | None = None,
) -> Report:
    """Convert a model. Memory stays near the size of its largest tensor.

    Args:
        source: diffusers folder, single file or hub id; also a converted folder, to change its
            dtype.
        dest: folder to write. A failure or an interruption leaves nothing there.
        dtype: type of all weights: "float16", "bfloat16" or "float32".
        revision: branch, tag or commit on the hub.
        variant: weights variant, for example "fp16". None: the plain files for dtype float32, else
            see ``open_source``.
        force: replace ``dest`` if it is a converted folder.
        progress: called with the bytes done, the total bytes, and the name of the current item. A
            download from the hub counts separately, before the conversion.
        config: for a single file: a diffusers or converted folder. Its configs, scheduler and
            tokenizer are used, and its weights for parts that the file lacks.
        prediction_type: for a single file: "epsilon", "v_prediction" or "sample". Overrides what
            the file says.
        zero_snr: for a single file: whether it was trained to zero terminal SNR. Likewise.
        ema: for a single file with both: use the moving averages, not the plain weights.
        quantize: bits of a weight, see ``mlxdiff.store.recipes.find_recipe``; None for no
            quantization.
        group_size, recipe: group size and kind of the quantization.
        to: form of the result: "mlxdiff" (a converted folder), "diffusers" (a folder) or "single"
            (one file in LDM naming).
        change: changes the model before it is written (``run.baking.Baking``); its attribute
            ``files`` names the files that it reads.
    Returns: the treatment of every tensor.
    Raises: UsageError, CheckpointError (also for a source that changes meanwhile), ConfigError,
        HubError.
    """
    begin = time.perf_counter()
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    chosen = None
    if quantize is not None:
        chosen = find_recipe(quantize, group_size, recipe)
    elif group_size is not None or recipe is not None:
        bits = argument("quantize", form="BITS")
        raise UsageError(f"a group size or a recipe needs a number of bits; give {bits}")
    if to != "mlxdiff" and chosen is not None:
        quantized = argument("quantize")
        raise UsageError(f"{argument('to', to)} has no quantized form; leave {quantized} out")
    if to != "single":
        check_dest(dest, force)
    if variant is None and dtype == "float32":
        variant = ""
    added: Sequence[Path] = getattr(change, "files", ())
    seen = identities(source, config, *added)
    model = open_source(
        source,
        revision,
        variant,
        progress,
        config=config,
        prediction_type=prediction_type,
        zero_snr=zero_snr,
        ema=ema,
    )
    check_target(model, to, dest, force)
    if to != "single":
        model.documents()  # reports missing tokenizer files before any weights are read
        for component in model.components:
            if component.startswith("text_encoder"):
                model.tokenizer(component.replace("text_encoder", "tokenizer"))  # and unfit ones
    converted = isinstance(model, ConvertedFolder)
    if to == "mlxdiff" and chosen is None and converted and is_quantized(model):
        raise UsageError(
            f"{source}: already quantized; convert the original to change its quantization or dtype"
        )
    source_model: ModelSource = model if change is None else change(unpacked_model(model))
    used = [*used_files(model, tokenizer=to != "single").values()]
    used += [path for path in identities(*added) if path in added or path.parent in added]
    seen = identities(*used) | seen
    if chosen is not None:
        target = quantized_model(source_model, chosen, dtype)
    else:
        target = unpacked_model(source_model, dtype if to == "mlxdiff" else None)
    to_write = sum(
        stored_bytes(t, dtype) for c in target.components for t in target.tensors(c).values()
    )
    provenance = source_model.provenance
    to_hash = 0
    if not isinstance(model, ConvertedFolder):
        files = model.source_files()
        to_hash = sum(path.stat().st_size for path in files.values())
        provenance = provenance | {"sha256": _hash(files, to_hash + to_write, progress)}
    name = None
    if is_quantized(target):
        name = AS_STORED if chosen is None else chosen.name
    card = model_card(model, to, dtype, name, provenance)
    after: Progress | None = progress and (
        lambda done, total, name: progress(to_hash + done, to_hash + total, name)
    )

    def check() -> None:
        require_unchanged(used, seen)

    if to == "single":
        write_single(target, dest, dtype, check=check, progress=after)
    elif to == "diffusers":
        write_diffusers(target, dest, dtype, card=card, force=force, check=check, progress=after)
    else:
        write_folder(
            target,
            dest,
            dtype,
            provenance=provenance,
            recipe=name,
            card=card,
            force=force,
            check=check,
            progress=after,
        )
    return Report(
        source=str(source),
        dest=Path(dest),
        family=model.family,
        dtype=dtype,
        recipe=name,
        components=tuple(
            _component_report(model, name, _stored_size(target, name, dtype))
            for name in model.components
        ),
        ignored=model.ignored if isinstance(model, SingleFile) else (),
        notes=() if isinstance(model, ConvertedFolder) else model.notes + _twice(model, chosen),
        seconds=time.perf_counter() - begin,
    )


def _twice(model: Model, recipe: Recipe | None) -> tuple[str, ...]:
    """Return a note if a recipe rounds tensors that are quantized in the source."""
    if recipe is None or not any(
        tensor.form for name in model.components for tensor in model.tensors(name).values()
    ):
        return ()
    return (
        f"the source is quantized, so {recipe.name} rounds its values a second time; the original "
        "model gives better pictures",
    )


def _hash(files: dict[str, Path], total: int, progress: Progress | None) -> dict[str, str]:
    """Return the sha256 of each file. ``total`` is the end of the progress count, in bytes."""
    done, digests = 0, {}
    for name, path in files.items():

        def advance(size: int, name: str = name) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total, f"reading {name}")

        digests[name] = sha256(path, advance)
    return digests


def _stored_size(model: ModelSource, name: str, dtype: str) -> int:
    return sum(stored_bytes(tensor, dtype) for tensor in model.tensors(name).values())


def _component_report(model: Model, name: str, bytes_out: int) -> ComponentReport:
    tensors = model.tensors(name)
    parameters = sum(t.size for t in tensors.values())
    file, transforms = name, Counter[str]()
    ignored: tuple[tuple[str, str], ...] = ()
    parts = {} if isinstance(model, ConvertedFolder) else model.files
    if name in parts:
        files = parts[name]
        file = files.entry.name
        if isinstance(model, DiffusersFolder):
            file = files.entry.relative_to(model.path).as_posix()
        transforms = Counter(use.transform.name for use in files.mapped.uses.values())
        ignored = files.mapped.ignored
    return ComponentReport(
        name=name,
        file=file,
        converted=len(tensors),
        parameters=parameters,
        transforms=dict(transforms),
        ignored=ignored,
        dtypes=dict(Counter(t.form or t.dtype for t in tensors.values())),
        bytes_in=sum(t.file_bytes for t in tensors.values()),
        bytes_out=bytes_out,
    )


def describe(
    path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Describe a model as plain JSON values, for `mlxdiff info`.

    Args:
        path: a converted folder, a diffusers folder, a single file or a hub id.
        config: for a single file, see ``convert``.
    Returns: kind ("converted", "diffusers" or "single file"), path, family, pipeline, resolution
        (height, width in pixels; None if the config does not give it), prediction_type, scheduler,
        parameters, bytes, components (class, tensors, parameters, bytes, bits_per_weight, dtypes of
        each), quantization (name of the recipe, only if quantized), source, notes.
    Raises: CheckpointError, ConfigError, HubError.
    """
    model = open_source(path, config=config)
    unet: UNetConfig = model.config("unet")
    factor = model.config("vae").factor if "vae" in model.components else 1
    components = {}
    for name in model.components:
        tensors = model.tensors(name).values()
        components[name] = {
            "class": model.class_name(name),
            "tensors": len(tensors),
            "parameters": sum(t.size for t in tensors),
            "bytes": sum(t.file_bytes for t in tensors),
            "bits_per_weight": _bits(tensors),
            "dtypes": dict(Counter(map(_kind, tensors))),
        }
    recipe = recipe_of(model)
    kinds = {ConvertedFolder: "converted", SingleFile: "single file"}
    return {
        "kind": kinds.get(type(model), "diffusers"),
        "path": str(model.path),
        "family": model.family,
        "pipeline": model.model_index.get("_class_name"),
        "resolution": unet.sample_size and [side * factor for side in unet.sample_size],
        "prediction_type": model.scheduler_config.get("prediction_type", "epsilon"),
        "scheduler": model.scheduler_config.get("_class_name"),
        "parameters": sum(c["parameters"] for c in components.values()),
        "bytes": sum(c["bytes"] for c in components.values()),
        "components": components,
        **({} if recipe is None else {"quantization": recipe}),
        "source": model.provenance,
        "notes": [] if isinstance(model, ConvertedFolder) else list(model.notes),
    }


def _bits(tensors: Collection[LazyTensor]) -> float:
    """Return the stored bits per value, with scales and biases included."""
    return round(8 * sum(t.file_bytes for t in tensors) / sum(t.size for t in tensors), 2)


def _kind(tensor: LazyTensor) -> str:
    """Return the stored form of a tensor: "F16", "affine-4-64" or "gguf q8_0"."""
    if tensor.form:
        return tensor.form
    return str(tensor.quantization) if isinstance(tensor, QuantizedTensor) else tensor.dtype
