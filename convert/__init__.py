"""Pretrained weights -> a converted folder; imported as ``mlxdiff.convert``. No mlx, no torch.

    report = mlxdiff.convert.convert("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15")

Stages: open the files (``checkpoint``), find out what they are (``detect``), give every tensor its
name (``keymap``) and layout (``transforms``), check and write (``mlxdiff.weights``), say what was
done (``report``).
"""

if __name__ != "mlxdiff.convert":
    raise ImportError(
        "this folder is mlxdiff.convert: install mlxdiff (pip install -e .), import it by that name"
    )

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mlxdiff.config import UNet2DConditionConfig
from mlxdiff.convert.checkpoint import DiffusersFolder, open_source
from mlxdiff.convert.component import Component, open_vae
from mlxdiff.convert.report import ComponentReport, Report
from mlxdiff.errors import UsageError
from mlxdiff.weights import (
    DTYPES,
    ConvertedFolder,
    ModelSource,
    Progress,
    check_dest,
    sha256,
    write_folder,
)

__all__ = [
    "Component",
    "ComponentReport",
    "DiffusersFolder",
    "Report",
    "convert",
    "describe",
    "open_source",
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
) -> Report:
    """Convert a model; memory stays near the size of its largest tensor.

    Args:
        source: diffusers folder or hub id; a converted folder too, to change its dtype.
        dest: folder to write. Nothing is there after a failure or an interruption.
        dtype: type of all weights: "float16", "bfloat16" or "float32".
        revision: branch, tag or commit on the hub.
        variant: weights variant, "fp16" for example.
        force: replace ``dest`` if it is a converted folder.
        progress: called with bytes done, bytes in all, and what is being worked on; a download
            from the hub is counted first, on its own.
    Returns: what was done with every tensor.
    Raises: UsageError, CheckpointError, ConfigError, HubError.
    """
    begin = time.perf_counter()
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    check_dest(dest, force)
    model = open_source(source, revision, variant, progress)
    width = 4 if dtype == "float32" else 2
    to_write = sum(t.size * width for c in model.components for t in model.tensors(c).values())
    provenance = model.provenance
    to_hash = 0
    if isinstance(model, DiffusersFolder):
        files = model.source_files()
        to_hash = sum(path.stat().st_size for path in files.values())
        provenance = provenance | {"sha256": _hash(files, to_hash + to_write, progress)}
    write_folder(
        model,
        dest,
        dtype,
        provenance=provenance,
        force=force,
        progress=progress
        and (lambda done, total, name: progress(to_hash + done, to_hash + total, name)),
    )
    return Report(
        source=str(source),
        dest=Path(dest),
        family=model.family,
        dtype=dtype,
        components=tuple(_component_report(model, name, width) for name in model.components),
        notes=model.notes if isinstance(model, DiffusersFolder) else (),
        seconds=time.perf_counter() - begin,
    )


def _hash(files: dict[str, Path], total: int, progress: Progress | None) -> dict[str, str]:
    """sha256 of each file. ``total`` is what progress is to count up to, in bytes."""
    done, digests = 0, {}
    for name, path in files.items():

        def advance(size: int, name: str = name) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total, f"reading {name}")

        digests[name] = sha256(path, advance)
    return digests


def _component_report(model: ModelSource, name: str, width: int) -> ComponentReport:
    tensors = model.tensors(name)
    parameters = sum(t.size for t in tensors.values())
    file, transforms = name, Counter[str]()
    ignored: tuple[tuple[str, str], ...] = ()
    if isinstance(model, DiffusersFolder):
        files = model.files[name]
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
        dtypes=dict(Counter(t.dtype for t in tensors.values())),
        bytes_in=sum(t.nbytes for t in tensors.values()),
        bytes_out=parameters * width,
    )


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model folder holds, in plain JSON values; for `mlxdiff info`.

    Args:
        path: a converted folder, a diffusers folder or a hub id.
    Returns: kind ("converted" or "diffusers"), path, family, pipeline, resolution (height, width in
        pixels; None where the config does not say), prediction_type, scheduler, parameters, bytes,
        components (class, tensors, parameters, bytes, dtypes of each), source, notes.
    Raises: CheckpointError, ConfigError, HubError.
    """
    model = open_source(path)
    unet: UNet2DConditionConfig = model.config("unet")
    factor = model.config("vae").factor
    components = {}
    for name in model.components:
        tensors = model.tensors(name).values()
        components[name] = {
            "class": model.class_name(name),
            "tensors": len(tensors),
            "parameters": sum(t.size for t in tensors),
            "bytes": sum(t.nbytes for t in tensors),
            "dtypes": dict(Counter(t.dtype for t in tensors)),
        }
    converted = isinstance(model, ConvertedFolder)
    return {
        "kind": "converted" if converted else "diffusers",
        "path": str(model.path),
        "family": model.family,
        "pipeline": model.model_index.get("_class_name"),
        "resolution": unet.sample_size and [side * factor for side in unet.sample_size],
        "prediction_type": model.scheduler_config.get("prediction_type", "epsilon"),
        "scheduler": model.scheduler_config.get("_class_name"),
        "parameters": sum(c["parameters"] for c in components.values()),
        "bytes": sum(c["bytes"] for c in components.values()),
        "components": components,
        "source": model.provenance,
        "notes": [] if isinstance(model, ConvertedFolder) else list(model.notes),
    }
