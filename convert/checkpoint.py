"""A diffusers folder as people have it, opened as a ModelSource with our names and layout."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff import hub
from mlxdiff.config import ComponentConfig, read_json
from mlxdiff.convert import detect
from mlxdiff.convert.keymap import DIFFUSERS, Mapped, Use, map_names
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.params import Shape, expected_parameters
from mlxdiff.weights import (
    FLOATS,
    MANIFEST,
    ConvertedFolder,
    LazyTensor,
    ModelFolder,
    Progress,
    open_folder,
    open_weights,
    raise_faults,
    shard_files,
)

# Names that diffusers and transformers give to weights: stem, variant and index in all the orders
# that their versions have used ("x.fp16.safetensors", "x.safetensors.index.fp16.json", ...).
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?P<a>\.[\w-]+?)?\.safetensors"
    r"(?:(?P<b>\.[\w-]+?)?\.index(?P<c>\.[\w-]+?)?\.json)?"
)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}.*")


@dataclass(frozen=True)
class ComponentFiles:
    """The weights of a component as they were found.

    Attributes:
        entry: the safetensors file, or the index of the shards.
        tensors: the tensors under the names of the file.
        mapped: what becomes of each.
    """

    entry: Path
    tensors: dict[str, LazyTensor]
    mapped: Mapped

    def read(self, config: ComponentConfig) -> dict[str, LazyTensor]:
        """The tensors with our names, in our layout."""
        shapes = expected_parameters(config)
        return {
            target: _transformed(self.tensors[use.source], use, shapes[target], self.entry)
            for target, use in self.mapped.uses.items()
        }


def open_component(entry: Path, component: str, config: ComponentConfig) -> ComponentFiles:
    """Open the weights of a component and find every tensor its place. Raises: CheckpointError."""
    tensors = open_weights(entry)
    mapped = map_names(
        {name: tensor.shape for name, tensor in tensors.items()},
        expected_parameters(config),
        DIFFUSERS[component],
        str(entry),
    )
    used = (use.source for use in mapped.uses.values())
    raise_faults(
        str(entry),
        unsupported=[
            f"{n} is {tensors[n].dtype} (supported: {', '.join(FLOATS)})"
            for n in used
            if tensors[n].dtype not in FLOATS
        ],
    )
    return ComponentFiles(entry, tensors, mapped)


class DiffusersFolder(ModelFolder):
    """An unconverted diffusers folder. Opening it checks everything that headers can tell.

    Args:
        path: the folder.
        name: what the provenance calls it; default: the folder's own name.
        revision: of the hub repository that it comes from.
        variant: weights variant to take.
        prefer: variants to look for, in this order, where none was asked for ("" is none).
    Attributes:
        files: component -> its weights as found.
        notes: what was left out or done otherwise than asked, one line each.
    Raises: CheckpointError, ConfigError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        prefer: tuple[str, ...] = ("", "fp16"),
    ) -> None:
        path = Path(path)
        if not (path / "model_index.json").is_file():
            raise detect.not_a_model(path)
        notes = detect.check_model_index(read_json(path / "model_index.json"), path)
        super().__init__(path)
        self.family = detect.family(self._configs)
        self.provenance: dict[str, Any] = {"source": name or path.resolve().name}
        if revision is not None:
            self.provenance["revision"] = revision
        entries, more = find_weights(path, self.components, variant, prefer)
        self.notes = notes + more
        self.files = {
            name: open_component(entry, name, self.config(name)) for name, entry in entries.items()
        }

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        return self.files[component].read(self.config(component))

    def source_files(self) -> dict[str, Path]:
        """Every file that the model is read from: relative name -> path."""
        paths = [self.path / name for name in self.documents()]
        for files in self.files.values():
            paths += shard_files(files.entry)
        return {path.relative_to(self.path).as_posix(): path for path in sorted(paths)}

    def documents(self) -> dict[str, bytes]:
        """As ModelFolder; what is left out is struck from model_index.json."""
        index = {
            part: [None, None] if part in detect.SKIPPED and isinstance(entry, list) else entry
            for part, entry in self.model_index.items()
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        return super().documents() | {"model_index.json": text.encode()}


def _transformed(tensor: LazyTensor, use: Use, shape: Shape, where: Path) -> LazyTensor:
    """The tensor in our layout; reading it makes sure that all its values are finite."""

    def read() -> np.ndarray:
        values = tensor.read()
        if not all_finite(values):
            count = values.size - int(np.isfinite(values).sum())
            raise CheckpointError(
                f"{where}: {use.source} holds {count} values that are NaN or infinite; "
                "the file is damaged or was saved from a failed training"
            )
        return use.transform.forward(values)

    return LazyTensor(shape, tensor.dtype, read)


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. For float16 by its bits: three times as fast."""
    if values.dtype == np.float16:
        return not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()
    return bool(np.isfinite(values).all())


def find_weights(
    path: Path, components: tuple[str, ...], variant: str | None, prefer: tuple[str, ...]
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The weights of each component.

    A component without the variant asked for gives its plain file; one that has none of the
    preferred variants gives what it has. Both are noted.

    Returns: component -> file or index; notes.
    Raises: CheckpointError where a component has no weights, or none has the variant asked for.
    """
    found = {name: _variants(path / name) for name in components}
    if variant is not None and not any(variant in there for there in found.values()):
        known = sorted({v for there in found.values() for v in there if v})
        raise CheckpointError(
            f"{path}: no weights of variant {variant!r}; "
            f"variants there: {', '.join(known) or 'none'}"
        )
    order = prefer if variant is None else (variant, "")
    chosen: dict[str, Path] = {}
    notes = []
    for name, there in found.items():
        if not there:
            raise _no_weights(path / name)
        take = next(v for v in (*order, *sorted(there)) if v in there)
        if take != order[0] and (variant is not None or take):
            lacks, takes = (f"{v} variant" if v else "plain file" for v in (order[0], take))
            notes.append(f"{name}: has no {lacks}; its {takes} was taken")
        chosen[name] = there[take]
    return chosen, tuple(notes)


def _variants(folder: Path) -> dict[str, Path]:
    """Variant ("" for none) -> file or index of the weights in a component's folder."""
    result: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(file.name)
        if match is None or _SHARD.fullmatch(file.name) or not file.is_file():
            continue
        variant = "".join(part[1:] for part in match.groups() if part)
        # One file and an index may both be there; diffusers takes the one file.
        if variant not in result or file.suffix == ".safetensors":
            result[variant] = file
    return result


def _no_weights(folder: Path) -> CheckpointError:
    names = [p.name for p in sorted(folder.iterdir())]
    if any(n.endswith((".bin", ".ckpt", ".pt", ".pth")) for n in names):
        return CheckpointError(
            f"{folder}: has weights only as a PyTorch pickle, which is not supported yet; take its "
            "safetensors files (on the hub, often in revision refs/pr/1), or save the model again "
            "with safe_serialization=True"
        )
    if shards := [n for n in names if n.endswith(".safetensors") and _SHARD.fullmatch(n)]:
        return CheckpointError(
            f"{folder}: has the shard {shards[0]}, but no index of the shards (.index.json)"
        )
    if any(n.endswith((".msgpack", ".onnx", ".h5", ".pb")) for n in names):
        return CheckpointError(
            f"{folder}: has no PyTorch weights; take the safetensors files of the model"
        )
    return CheckpointError(f"{folder}: has no weights (expected a .safetensors file)")


def open_source(
    path: str | os.PathLike[str],
    revision: str | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
) -> DiffusersFolder | ConvertedFolder:
    """Open a model as people have it.

    Args:
        path: a diffusers folder, a converted folder, or a hub id ``org/name[@revision]``.
        revision: for a hub id, the branch, tag or commit.
        variant: weights variant, "fp16" for example; default: of a folder the
            plain files, of the hub fp16 (half the bytes), each where there are any.
        progress: called while files are fetched from the hub.
    Returns: the model, everything checked that can be without reading the weights.
    Raises: CheckpointError, ConfigError, HubError, UsageError.
    """
    folder = Path(path)
    if isinstance(path, str) and not folder.exists() and hub.is_repo_id(path):
        return _open_hub(path, revision, variant, progress)
    if revision is not None:
        raise UsageError(f"{path} is no hub id (org/name), so it has no revision {revision!r}")
    if (folder / MANIFEST).is_file():
        if variant is not None:
            raise UsageError(f"{path} is a converted folder, so it has no variant {variant!r}")
        return open_folder(folder)
    return DiffusersFolder(folder, variant=variant)


def _open_hub(
    repo: str, revision: str | None, variant: str | None, progress: Progress | None
) -> DiffusersFolder | ConvertedFolder:
    """A model of the hub: what ``hub.resolve`` chose is opened, whatever else is cached."""
    name, _, at = repo.partition("@")
    if revision is not None and at and revision != at:
        raise UsageError(f"{repo}: asks for revision {at!r} and for {revision!r}")
    revision = revision or at
    wanted = f"{name}@{revision}" if revision else name
    folder = hub.resolve(wanted, variant=variant, progress=progress)
    if (folder / MANIFEST).is_file():
        return open_folder(folder)
    prefer = (hub.PREFERRED_VARIANT, "")
    return DiffusersFolder(folder, name=name, revision=folder.name, variant=variant, prefer=prefer)
