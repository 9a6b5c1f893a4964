"""Unconverted diffusers folders, opened as a ModelSource in our names and layout."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.convert import detect
from mlxdiff.convert.keymap import DIFFUSERS, Layout, Mapped, Use, map_names, targets
from mlxdiff.convert.preprocessor import check_preparation
from mlxdiff.errors import CheckpointError
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import ComponentConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.store.folder import (
    FEATURE_EXTRACTOR,
    IMAGE_ENCODER,
    OWN_PARTS,
    PREPROCESSOR,
    ModelFolder,
)
from mlxdiff.weights.files import open_file as open_weight_file
from mlxdiff.weights.pickles import SUFFIXES
from mlxdiff.weights.quantization import Packed
from mlxdiff.weights.tensors import (
    READABLE,
    LazyTensor,
    QuantizedTensor,
    Shape,
    open_weights,
    quantized,
    raise_faults,
    shard_files,
)

# Weight file names of diffusers and transformers. Their versions have used different orders of
# stem, variant and index ("x.fp16.safetensors", "x.safetensors.index.fp16.json", ...).
FORMS = ("safetensors", "bin")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?P<a>\.[\w-]+?)?\.(?P<form>safetensors|bin)"
    r"(?:(?P<b>\.[\w-]+?)?\.index(?P<c>\.[\w-]+?)?\.json)?"
)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}.*")


@dataclass(frozen=True)
class ComponentFiles:
    """The weight files of a component.

    Attributes:
        entry: the file, or the index of the shards.
        tensors: the tensors under their names in the file.
        mapped: the mapping to our parameters.
    """

    entry: Path
    tensors: dict[str, LazyTensor]
    mapped: Mapped

    def read(self, config: ComponentConfig) -> dict[str, LazyTensor]:
        """Return the tensors in our names and layout."""
        shapes = expected_parameters(config)
        return {
            target: _transformed(self.tensors[use.source], use, shapes[target], self.entry)
            for target, use in self.mapped.uses.items()
        }


def open_component(entry: Path, component: str, config: ComponentConfig) -> ComponentFiles:
    """Open the weights of a component and map its tensors. Raises: CheckpointError."""
    refused: dict[str, str] = {}
    ignored: list[tuple[str, str]] = []

    def open_file(path: Path) -> dict[str, LazyTensor]:
        file = open_weight_file(path)
        refused.update(file.refused)
        ignored.extend(file.ignored)
        return file.tensors

    tensors = open_weights(entry, open_file)
    found = map_component(entry, tensors, DIFFUSERS[component], config, str(entry), refused)
    mapped = replace(found.mapped, ignored=(*found.mapped.ignored, *dict.fromkeys(ignored)))
    return replace(found, mapped=mapped)


def map_component(
    entry: Path,
    tensors: dict[str, LazyTensor],
    layout: Layout,
    config: ComponentConfig,
    where: str,
    refused: Mapping[str, str] | None = None,
) -> ComponentFiles:
    """Map each source tensor to a parameter.

    Args:
        entry: the file of the tensors.
        tensors: all tensors of this component in the file.
        layout: spelling of their names.
        config: config of the component.
        where: name of the component in messages.
        refused: values among the tensors that are not readable tensors, see PickleFile.
    Raises: CheckpointError.
    """
    expected = expected_parameters(config)
    raise_faults(
        where,
        unreadable=[
            f"{name} is {what}"
            for name, what in (refused or {}).items()
            if any(target in expected for target in targets(layout, name))
        ],
    )
    mapped = map_names(
        {name: tensor.shape for name, tensor in tensors.items()},
        expected,
        layout,
        where,
    )
    used = dict.fromkeys(use.source for use in mapped.uses.values())
    raise_faults(
        where,
        unsupported=[
            f"{n} is {tensors[n].dtype} (supported: {', '.join(READABLE)})"
            for n in used
            if tensors[n].dtype not in READABLE
        ],
    )
    return ComponentFiles(entry, tensors, mapped)


class DiffusersFolder(ModelFolder):
    """An unconverted diffusers folder. Opening it checks everything that the headers show.

    Args:
        path: the folder.
        name: name of the source in the provenance. Default: the name of the folder.
        revision: revision on the hub.
        variant: weights variant.
        prefer: order of variants to look for if ``variant`` is None ("" is no variant).
        without: components whose weights come from elsewhere. Only their configs are read.
    Attributes:
        files: component -> its weight files.
        notes: omissions and substitutions, one line each.
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
        without: Collection[str] = (),
    ) -> None:
        path = Path(path)
        if not os.path.isfile(path / "model_index.json"):
            raise detect.not_a_model(path)
        notes = detect.check_model_index(read_json(path / "model_index.json"), path)
        super().__init__(path)
        self.family = detect.family(self._configs)
        if self.uses(FEATURE_EXTRACTOR):
            check_preparation(
                path / FEATURE_EXTRACTOR / PREPROCESSOR, self.config(IMAGE_ENCODER).image_size
            )
        self._check_tokenizers()
        self.provenance: dict[str, Any] = {"source": name or path.resolve().name}
        if revision is not None:
            self.provenance["revision"] = revision
        needed = {name: self.place(name) for name in self.components if name not in without}
        entries, more = find_weights(path, needed, variant, prefer)
        self.notes = notes + more
        self.files = {
            name: open_component(entry, name, self.config(name)) for name, entry in entries.items()
        }

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        return self.files[component].read(self.config(component))

    def source_files(self) -> dict[str, Path]:
        """Return every file that the model is read from: relative name -> path."""
        paths = list(self.document_paths().values())
        for files in self.files.values():
            paths += shard_files(files.entry)
        return {path.relative_to(self.path).as_posix(): path for path in sorted(paths)}

    def documents(self) -> dict[str, bytes]:
        """See ModelFolder. Parts that are not converted become [null, null] in model_index.json."""
        own = OWN_PARTS.get(str(self.model_index.get("_class_name")), ())
        skipped = detect.SKIPPED.keys() - set(own)
        index = {
            part: [None, None] if part in skipped and isinstance(entry, list) else entry
            for part, entry in self.model_index.items()
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        return super().documents() | {"model_index.json": text.encode()}


def _transformed(tensor: LazyTensor, use: Use, shape: Shape, where: Path) -> LazyTensor:
    """Return the tensor in our layout. Reading it checks that all values are finite.

    A quantized tensor stays quantized if the transform only selects rows.
    """

    def read() -> np.ndarray:
        values = tensor.read()
        if not all_finite(values):
            raise _not_finite(where, use.source, values.size - int(np.isfinite(values).sum()))
        return use.transform.forward(values)

    stored = tensor.stored * math.prod(shape) // max(1, tensor.size)
    if not isinstance(tensor, QuantizedTensor) or not use.transform.keeps_rows:
        return LazyTensor(shape, tensor.dtype, read, form=tensor.form, stored=stored)

    def read_packed() -> Packed:
        packed = tensor.read_packed()
        if not packed.is_finite():
            raise _not_finite(where, use.source)
        return packed.rows(use.transform.forward)

    return quantized(
        shape,
        tensor.dtype,
        tensor.quantization,
        read_packed,
        has_global_scale=tensor.has_global_scale,
        form=tensor.form,
        stored=stored,
    )


def _not_finite(where: Path, name: str, count: int | None = None) -> CheckpointError:
    many = "" if count is None else f"{count} "
    return CheckpointError(
        f"{where}: {name} holds {many}values that are NaN or infinite; the file is damaged or "
        "comes from a failed training; download it again or use another"
    )


def all_finite(values: np.ndarray) -> bool:
    """Return True if no value is NaN or infinite. float16 bits are checked, 3 times as fast."""
    if values.dtype == np.float16:
        return not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()
    return bool(np.isfinite(values).all())


def find_weights(
    path: Path, folders: Mapping[str, Path], variant: str | None, prefer: tuple[str, ...]
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Find the weights of each component.

    For one variant, safetensors files come before PyTorch's pickles. If no variant is requested,
    all preferred variants in safetensors come before those in pickles. A component without the
    requested variant gives its plain file. A component without a preferred variant gives any
    variant that it has. Notes report each substitution.

    Args:
        path: the model, for messages.
        folders: component -> folder of its weights.
        variant, prefer: see ``DiffusersFolder``.
    Returns: component -> file or index; notes.
    Raises: CheckpointError if a component has no weights, or no component has the requested
        variant.
    """
    found = {name: _variants(folder) for name, folder in folders.items()}
    known = sorted({v for there in found.values() for _, v in there})
    if variant is not None and variant not in known:
        raise CheckpointError(
            f"{path}: no weights of variant {variant!r}; "
            f"its variants: {', '.join(filter(None, known)) or 'none'}"
        )
    if variant is None:
        order = [(form, v) for form in FORMS for v in prefer]
    else:
        order = [(form, v) for v in (variant, "") for form in FORMS]
    wanted = order[0][1]
    chosen: dict[str, Path] = {}
    notes = []
    for name, there in found.items():
        if not there:
            raise _no_weights(folders[name])
        form, take = next(key for key in (*order, *sorted(there, reverse=True)) if key in there)
        chosen[name] = there[form, take]
        if take != wanted and (variant is not None or take):
            lacks, takes = (f"{v} variant" if v else "plain file" for v in (wanted, take))
            notes.append(f"{name}: has no {lacks}; its {takes} is used")
        if form == "bin":
            notes.append(f"{name}: has no safetensors; its pickle was read without running it")
    return chosen, tuple(notes)


def _variants(folder: Path) -> dict[tuple[str, str], Path]:
    """Return (form, variant or "") -> file or index of the weights in a component's folder."""
    result: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(file.name)
        if match is None or _SHARD.fullmatch(file.name) or not file.is_file():
            continue
        variant = "".join(part[1:] for part in match.group("a", "b", "c") if part)
        # If a folder has both one file and an index, diffusers takes the file.
        if (match["form"], variant) not in result or file.suffix != ".json":
            result[match["form"], variant] = file
    return result


def _no_weights(folder: Path) -> CheckpointError:
    names = [p.name for p in sorted(folder.iterdir())]
    if shards := [n for n in names if n.endswith((".safetensors", ".bin")) and _SHARD.fullmatch(n)]:
        return CheckpointError(
            f"{folder}: has the shard {shards[0]}, but no index of the shards; download its "
            ".index.json"
        )
    if others := [n for n in names if n.endswith((".safetensors", *SUFFIXES))]:
        return CheckpointError(
            f"{folder}: has {others[0]}, but no weights under a name of diffusers or transformers; "
            "rename it (diffusion_pytorch_model.safetensors, model.safetensors, or .bin)"
        )
    if any(n.endswith(".flashpack") for n in names):
        return CheckpointError(
            f"{folder}: has its weights in flashpack's form (model.flashpack), which is not "
            "supported; use the safetensors files of the model"
        )
    if any(n.endswith((".msgpack", ".onnx", ".h5", ".pb")) for n in names):
        return CheckpointError(
            f"{folder}: has no PyTorch weights; use the safetensors files of the model"
        )
    return CheckpointError(f"{folder}: has no weights; expected a .safetensors file")
