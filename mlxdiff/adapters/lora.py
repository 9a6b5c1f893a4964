"""Read LoRA files and related forms, match them to a model, and apply them to its weights.

Open a file once (``open_lora``), then match it to a model (``match``): every tensor must belong to
a weight. ``changed`` returns the model's tensors with the changes added. A quantized tensor stays
packed, and the change is kept beside it.

Sources: Hu et al. 2021 (LoRA), Hyeon-Woo et al. 2021 (LoHa), Yeh et al. 2023 (LoCon, LoKr), Liu et
al. 2024 (DoRA), Kalajdzievski 2023 (rank-stabilised); the names of PEFT, diffusers, kohya's
sd-scripts, LyCORIS, ComfyUI, OneTrainer and cloneofsimo's lora. ``lora_forms`` has the other forms.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlxdiff.adapters import lora_names
from mlxdiff.adapters.lora_forms import Delta, Form, Full, Magnitude, make_form
from mlxdiff.adapters.lora_names import Target
from mlxdiff.convert import recognise
from mlxdiff.convert.checkpoint import all_finite
from mlxdiff.errors import CheckpointError, ConfigError, UsageError, argument, quoted
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.params import expected_parameters
from mlxdiff.store.folder import ModelSource
from mlxdiff.weights.pickles import PickleFile, open_tensors
from mlxdiff.weights.quantization import Beside
from mlxdiff.weights.tensors import (
    READABLE,
    AdaptedTensor,
    LazyTensor,
    QuantizedTensor,
    TensorFile,
    shown,
)

logger = logging.getLogger("mlxdiff")

# File names to look for in a folder, in this order.
_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_ENDINGS = ("", ".safetensors", ".pt", ".ckpt", ".bin")
_PEFT_CONFIG = "adapter_config.json"
_PEFT_TYPES = ("LORA", "LOHA", "LOKR", "IA3")
_PEFT_TEXT = re.compile(r"base_model\.model\.(?:text_model|encoder|embeddings|final_layer_norm)\.")
_PARTS = (
    "unet",
    "text_encoder",
    "text_encoder_2",
)  # folders of a model, and of PEFT's LoRAs for it
_DIFFUSERS_CONFIG = "lora_adapter_metadata"  # in the header of a safetensors file

Scale: TypeAlias = "float | tuple[float, float]"
"""Factor for the changes: one for all, or one for the U-Net and one for the text encoders."""

Given: TypeAlias = "str | os.PathLike[str] | tuple[str | os.PathLike[str], Scale] | Lora"
"""A LoRA as users give it: a path, (path, scale), or an open one."""


@dataclass(frozen=True)
class LoraFile:
    """An open LoRA file, not yet matched to a model.

    Attributes:
        path: the file.
        name: name of the file, or of the folder that contains it.
        tensors: the tensors, under the names in the file.
        sha256: SHA-256 of the file.
        short_hash: the first 12 digits of the hash that A1111 and Civitai use.
        settings: prefix of module names ("" for all) -> PEFT's config of the adapter.
        classes: component -> classes of the changed modules, if the modules are numbered
            (``lora_names.numbered``).
        metadata: the strings in the header of a safetensors file.
    """

    path: Path
    name: str
    tensors: dict[str, LazyTensor] = field(repr=False)
    sha256: str
    short_hash: str
    settings: dict[str, dict[str, Any]] = field(repr=False)
    classes: dict[str, list[str]] = field(default_factory=dict, repr=False)
    metadata: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Lora:
    """A LoRA file matched to a model, at a scale.

    Attributes:
        file: the file.
        scale: factor for the changes of the U-Net; may be negative.
        text_scale: factor for the changes of the text encoders; may be negative.
        deltas: component -> parameter -> the changes to add, one for each network in the file.
        ignored: unused tensor names, each with the reason.
    """

    file: LoraFile
    scale: float
    text_scale: float
    deltas: dict[str, dict[str, list[Delta]]] = field(repr=False)
    ignored: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.file.name

    def report(self) -> str:
        """Describe the matched weights in one line."""
        parts = [f"{len(found)} weights of {name}" for name, found in self.deltas.items() if found]
        every = [one for found in self.deltas.values() for some in found.values() for one in some]
        kinds = Counter(("DoRA, " if d.magnitude else "") + d.form.name for d in every)
        ranks = {rank for delta in every if (rank := delta.form.rank()) is not None}
        what = ", ".join(kinds)
        if ranks:
            least, most = min(ranks), max(ranks)
            what += f" of rank {least}" + (f" to {most}" if most > least else "")
        left = f"; {len(self.ignored)} names left over" if self.ignored else ""
        scale = f"{self.scale:g}"
        if self.text_scale != self.scale:
            scale += f" (text {self.text_scale:g})"
        return f"{self.name} at {scale}: {what}; {' and '.join(parts)}{left}"


# ------------------------------------------------------------------------------------------ opening


def open_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Open a LoRA: a safetensors or PyTorch file, or a folder written by diffusers or PEFT.

    Raises: UsageError if nothing is found; CheckpointError if the file cannot be read.
    """
    path = Path(os.path.expanduser(path))
    parts = [path / part for part in _PARTS if _files_in(path / part)]
    if parts and not _files_in(path):
        return _joined(path, [open_lora(part) for part in parts])
    path, name, opened = _open(path)
    settings: dict[str, dict[str, Any]] = {}
    tensors, metadata = opened.tensors, {}
    if isinstance(opened, PickleFile):
        if opened.refused:
            few = ", ".join(f"{shown(n)} is {what}" for n, what in list(opened.refused.items())[:5])
            raise CheckpointError(
                f"{path}: contains entries that are not tensors: {few}; save only the tensors"
            )
    else:
        metadata = opened.metadata
        if _DIFFUSERS_CONFIG in metadata:
            settings = _by_prefix(metadata[_DIFFUSERS_CONFIG], path)
    if path.name.startswith("adapter_model"):
        part = ""
        if any(_PEFT_TEXT.match(name) for name in tensors):
            part = path.parent.name if path.parent.name in _PARTS else "text_encoder"
            tensors = {f"{part}.{name}": tensor for name, tensor in tensors.items()}
        if (path.parent / _PEFT_CONFIG).is_file():
            try:
                settings = {part: read_json(path.parent / _PEFT_CONFIG)}
            except ConfigError as error:
                raise CheckpointError(str(error)) from None
            form = str(settings[part].get("peft_type", "LORA"))
            if form.upper() not in _PEFT_TYPES:
                words = f"{recognise.PEFT_FORM} {shown(form)}"
                raise CheckpointError(f"{path.parent}: is {words}; {recognise.use(words)}")
    digest, short = _hashes(path)
    short = metadata.get("sshs_model_hash", short)
    classes: dict[str, list[str]] = {
        part: _classes(metadata[part], path)
        for part in ("unet", "text_encoder")
        if part in metadata and f"{part}:0:up" in tensors
    }
    return LoraFile(path, name, tensors, digest, short[:12], settings, classes, metadata)


def _files_in(folder: Path) -> list[Path]:
    return [folder / file for file in _FILES if os.path.isfile(folder / file)]


def _joined(path: Path, files: list[LoraFile]) -> LoraFile:
    """Join the LoRAs of a folder that has one folder for each part of the model, as PEFT's are."""
    tensors: dict[str, LazyTensor] = {}
    settings: dict[str, dict[str, Any]] = {}
    digest = hashlib.sha256()
    for file in files:
        for name, tensor in file.tensors.items():
            # Text encoders have the name of their part already.
            inside = name.startswith(tuple(f"{part}." for part in _PARTS))
            tensors[name if inside else f"{file.name}.{name}"] = tensor
        settings |= {prefix or file.name: config for prefix, config in file.settings.items()}
        digest.update(bytes.fromhex(file.sha256))
    whole = digest.hexdigest()
    return LoraFile(path, path.resolve().name, tensors, whole, whole[:12], settings)


def _classes(text: str, path: Path) -> list[str]:
    """Read the classes that cloneofsimo's LoRA has in its metadata."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: its list of changed classes is malformed: {shown(text)}")
    return names


def _open(path: Path) -> tuple[Path, str, PickleFile | TensorFile]:
    """Find and open the file of a LoRA; return its path, its name and the open file."""
    name = path.name
    if os.path.isdir(path):
        found = _files_in(path)
        if not found:
            raise UsageError(
                f"{path}: this folder contains no LoRA; expected one of {', '.join(_FILES)}"
            )
        path, name = found[0], path.resolve().name
    elif not os.path.isfile(path):
        given = argument("loras", form="PATH[:SCALE]")
        raise UsageError(f"{path}: no such LoRA file or folder ({given})")
    return path, name, open_tensors(path)


def _by_prefix(text: str, path: Path) -> dict[str, dict[str, Any]]:
    """Group diffusers' metadata by prefix: {"unet.r": 4, ...} -> {"unet": {"r": 4, ...}}."""
    try:
        flat = json.loads(text)
        pairs = [(key.split(".", 1), value) for key, value in flat.items()]
        settings: dict[str, dict[str, Any]] = {}
        for (prefix, name), value in pairs:
            settings.setdefault(prefix, {})[name] = value
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path}: its {_DIFFUSERS_CONFIG} is malformed; save the LoRA again"
        ) from None
    return settings


def _hashes(path: Path) -> tuple[str, str]:
    """Hash a file: SHA-256 of the whole, and A1111's hash (without a safetensors header)."""
    whole, rest = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(8)
        whole.update(head)
        start = min(int.from_bytes(head, "little"), path.stat().st_size)
        header = file.read(start)
        whole.update(header)
        while piece := file.read(1 << 22):
            whole.update(piece)
            rest.update(piece)
    is_safetensors = header.startswith(b"{")
    return whole.hexdigest(), (rest if is_safetensors else whole).hexdigest()


def is_lora(path: str | os.PathLike[str]) -> bool:
    """Return True if a file or folder contains a LoRA, by its tensor names."""
    for file in files_of(path):
        try:
            tensors = open_tensors(file).tensors
        except CheckpointError:
            continue
        if recognise.kind(tensors).startswith(recognise.PEFT_FORM):
            return False
        if any((found := lora_names.split(n)) and found.part != "alpha" for n in tensors):
            return True
    return False


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a LoRA: a file itself, or those of a folder and of its parts."""
    path = Path(os.path.expanduser(path))
    if path.is_file():
        return [path]
    parts = [file for part in _PARTS for file in _files_in(path / part)[:1]]
    return _files_in(path)[:1] or parts


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a LoRA in plain JSON values, for `mlxdiff info`.

    Raises: the errors of ``open_lora``.
    """
    file = open_lora(path)
    groups, unknown = _grouped(file)
    forms: Counter[str] = Counter()
    ranks: set[int] = set()
    places: Counter[str] = Counter()
    for (module, _), parts in groups.items():
        try:
            form = _form(file, module, parts)[0] if set(parts) - _BIAS - {"alpha"} else None
        except ValueError:
            unknown += [name for name, _ in parts.values()]
            continue
        if form is not None:
            forms[("DoRA, " if {"magnitude", "dora_scale"} & set(parts) else "") + form.name] += 1
            ranks |= {rank for rank in [form.rank()] if rank is not None}
            places[lora_names.place(module)] += 1
        forms["bias difference"] += len(_BIAS & set(parts))
    return {
        "kind": "LoRA",
        "path": str(file.path),
        "use": recognise.use("a LoRA"),
        "made_for": lora_names.made_for({n: t.shape for n, t in file.tensors.items()}),
        "forms": dict(+forms),
        "ranks": sorted(ranks),
        "weights": dict(places),
        "bytes": sum(tensor.nbytes for tensor in file.tensors.values()),
        "sha256": file.sha256,
        "short_hash": file.short_hash,
        "precision": dict(Counter(tensor.dtype for tensor in file.tensors.values())),
        "written": recognise.written(file.metadata),
        "not_understood": _first(unknown),
    }


def _first(names: list[str], most: int = 10) -> list[str]:
    """Return the first names, and how many there are beside them."""
    left = len(names) - most
    return names if left <= 0 else [*names[:most], f"and {left} more"]


# ----------------------------------------------------------------------------------------- matching


def match(file: LoraFile, scale: Scale, configs: Mapping[str, Any], family: str) -> Lora:
    """Match each tensor of a file to a weight of the model.

    Args:
        file: the file.
        scale: factor for the changes.
        configs: component -> config, for the text encoders and the U-Net.
        family: the model's family, from ``convert.detect.family``.
    Raises: CheckpointError that names the tensors that do not fit, or both families if they differ.
    """
    groups, unknown = _grouped(file)
    table = lora_names.spellings(configs)
    if file.classes:
        table |= _numbered(file, groups, table)
    shapes = {name: expected_parameters(config) for name, config in configs.items()}
    deltas: dict[str, dict[str, list[Delta]]] = {name: {} for name in configs}
    taken: set[tuple[str, str, str]] = set()
    left: list[str] = []
    broken: list[str] = []
    misshapen: list[str] = []
    unbiased: list[str] = []
    for (module, network), parts in groups.items():
        targets = table.get(module)
        if targets is None:
            left += [name for name, _ in parts.values()]
            continue
        try:
            found = _changes(file, module, parts)
        except ValueError as error:
            broken.append(f"{module} ({', '.join(parts)}: {error})")
            continue
        for weight, change in itertools.product(targets, found):
            target = weight.bias(shapes[weight.component]) if change.bias else weight
            if target is None:
                unbiased.append(module)
                continue
            try:
                delta = _fitted(change, target, parts)
            except ValueError as error:
                misshapen.append(f"{module} {error}")
                continue
            if (key := (target.component, target.parameter, network)) in taken:
                broken.append(f"{module} (it changes the same weight twice)")
            taken.add(key)
            deltas[target.component].setdefault(target.parameter, []).append(delta)
    unknown += left
    ignored = [
        (name, reason) for name in unknown if (reason := lora_names.ignored(name)) is not None
    ]
    left = [name for name in unknown if lora_names.ignored(name) is None]
    _raise_faults(file, configs, family, any(deltas.values()), left, broken, misshapen, unbiased)
    for reason in dict.fromkeys(reason for _, reason in ignored):
        names = [name for name, why in ignored if why == reason]
        logger.warning("%s: %s: %s", file.name, ", ".join(names[:3]), reason)
    own, text = scale if isinstance(scale, tuple) else (scale, scale)
    return Lora(file, own, text, deltas, tuple(ignored))


Parts: TypeAlias = "dict[str, tuple[str, LazyTensor]]"
_BIAS = {"diff_b", "lora_bias"}
_NORMS = {"magnitude", "dora_scale"}
_NUMBERS = (*READABLE, "I64", "I32", "I16", "I8", "U8", "BOOL")  # types of alpha and on_input


def _grouped(file: LoraFile) -> tuple[dict[tuple[str, str], Parts], list[str]]:
    """Group tensors: (module, network) -> part -> (name, tensor). Return the unknown names, too."""
    groups: dict[tuple[str, str], Parts] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        found = lora_names.split(name)
        if found is None:
            unknown.append(name)
            continue
        parts = groups.setdefault((found.module, found.network), {})
        if found.part in parts:
            raise CheckpointError(
                f"{file.path}: {shown(name)} and {shown(parts[found.part][0])} are the same part"
            )
        known = _NUMBERS if found.part in ("alpha", "on_input") else READABLE
        if tensor.dtype not in known:
            raise CheckpointError(
                f"{file.path}: {shown(name)} is {tensor.dtype} (supported: {', '.join(known)})"
            )
        parts[found.part] = name, tensor
    return groups, unknown


def _numbered(
    file: LoraFile,
    groups: Mapping[tuple[str, str], Parts],
    table: Mapping[str, tuple[Target, ...]],
) -> dict[str, tuple[Target, ...]]:
    """Return the targets of numbered modules: of the order in which all shapes fit."""
    found: dict[str, tuple[Target, ...]] = {}
    for component, classes in file.classes.items():
        weights = {
            t.parameter.removesuffix(".weight"): t
            for targets in table.values()
            for t in targets
            if t.component == component and t.third is None
        }
        numbers = [module for module, _ in groups if module.startswith(f"{component}:")]
        try:
            orders = lora_names.numbered(component, classes, weights)
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {error}") from None
        tables = [
            {f"{component}:{i}": (weights[name],) for i, name in enumerate(order)}
            for order in orders
        ]
        found |= next((one for one in tables if _all_fit(numbers, groups, one)), tables[0])
    return found


def _all_fit(
    modules: Sequence[str],
    groups: Mapping[tuple[str, str], Parts],
    table: Mapping[str, tuple[Target, ...]],
) -> bool:
    def fits(module: str) -> bool:
        if module not in table:
            return False
        tensors = {part: tensor for part, (_, tensor) in groups[module, ""].items()}
        (target,) = table[module]
        try:
            return make_form(tensors).shape(target.matrix, target.inputs) == target.matrix
        except ValueError:
            return False

    return len(modules) == len(table) and all(map(fits, modules))


def _changes(file: LoraFile, module: str, parts: Parts) -> list[Delta]:
    """Return the changes that a module's parts make: of its weight, of its bias.

    Raises: ValueError.
    """
    found = []
    strength = 1.0
    if set(parts) - _BIAS - {"alpha"}:
        form, strength = _form(file, module, parts)
        found.append(Delta(form, strength))
    for part in sorted(_BIAS & set(parts)):
        # PEFT multiplies the bias of lora_B by alpha / rank, as it does the product.
        factor = strength if part == "lora_bias" else 1.0
        found.append(Delta(Full({"diff": parts[part][1]}), factor, bias=True))
    return found


def _fitted(delta: Delta, target: Target, parts: Parts) -> Delta:
    """Fit a change to a weight: rows and norms. Raises: ValueError if it does not fit."""
    matrix = target.matrix
    thirds = 1 if target.third is None else 3
    width = delta.form.shape((thirds * matrix[0], matrix[1]), target.inputs)
    if width != (thirds * matrix[0], matrix[1]):
        raise ValueError(f"is {width}, expected {(thirds * matrix[0], matrix[1])}")
    if target.third is not None:
        if delta.form.reads_weight:
            raise ValueError(f"is {delta.form.name} of a fused weight, which is not supported")
        start = target.third * matrix[0]
        delta = replace(delta, rows=slice(start, start + matrix[0]))
    return delta if delta.bias else replace(delta, magnitude=_magnitude(parts, target))


def _form(file: LoraFile, module: str, parts: Parts) -> tuple[Form, float]:
    """Make the form of a module from its parts; return it and alpha / rank. Raises: ValueError."""
    beside = _BIAS | _NORMS
    form = make_form({part: t for part, (_, t) in parts.items() if part not in beside})
    rank = form.rank()
    if "alpha" in parts:
        tensor = parts["alpha"][1]
        if tensor.size != 1:
            raise ValueError(f"alpha has {tensor.size} values")
        alpha = float(tensor.read().reshape(-1)[0])
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}")
        return form, 1.0 if rank is None else alpha / rank
    if form.reads_weight and rank is None:
        return form, 1.0
    return form, _configured(file, module, rank)


def _configured(file: LoraFile, module: str, rank: int | None) -> float:
    """Compute alpha / rank from PEFT's config of the adapter; 1 without a config."""
    prefix = next((p for p in file.settings if p and module.startswith(f"{p}.")), "")
    config = file.settings.get(prefix)
    if config is None:
        return 1.0
    module = module.removeprefix(f"{prefix}.").removeprefix("base_model.model.")

    def of(name: str, default: Any) -> float:
        patterns = config.get(name + "_pattern" if name != "lora_alpha" else "alpha_pattern") or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        value = config.get(name)
        return float(default if value is None else value)

    try:
        rank = int(of("rank", config.get("r"))) if rank is None else rank
        alpha = of("lora_alpha" if "lora_alpha" in config else "alpha", rank)
    except (TypeError, ValueError, re.error):
        raise CheckpointError(f"{file.path}: its PEFT config has no usable rank or alpha") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _magnitude(parts: Parts, target: Target) -> Magnitude | None:
    """Return DoRA's norms, or None without any. Raises: ValueError if they fit neither axis."""
    out, inputs = target.matrix[0], target.inputs
    if "magnitude" in parts:
        tensor = parts["magnitude"][1]
        if tensor.size != out:
            raise ValueError(f": its magnitude is {tensor.shape}, expected {out} values")
        return Magnitude(tensor, by_output=True, scale_inside=True)
    if "dora_scale" in parts:
        shape = parts["dora_scale"][1].shape
        for by_output, size, wide in ((True, out, shape[:1]), (False, inputs, shape[1:2])):
            if math.prod(shape) == size and wide == (size,):
                return Magnitude(parts["dora_scale"][1], by_output, scale_inside=False)
        raise ValueError(f": its dora_scale is {shape}, expected ({out}, 1) or (1, {inputs})")
    return None


def _raise_faults(
    file: LoraFile,
    configs: Mapping[str, Any],
    family: str,
    matched: bool,
    left: Sequence[str],
    broken: Sequence[str],
    misshapen: Sequence[str],
    unbiased: Sequence[str],
) -> None:
    if not (left or broken or misshapen or unbiased) and matched:
        return
    where = str(file.path)
    if broken:
        raise CheckpointError(f"{where}: is damaged or has an unknown form: {_few(broken)}")
    theirs = lora_names.made_for({name: tensor.shape for name, tensor in file.tensors.items()})
    ours = lora_names.family_words(family, configs["unet"])
    if theirs is not None and theirs.split(" (text")[-1] != ours.split(" (text")[-1]:
        raise CheckpointError(f"{where}: was made for {theirs}; this model is {ours}")
    if not matched and not misshapen and not unbiased:
        if not any(lora_names.split(name) for name in file.tensors):
            raise CheckpointError(f"{where}: is not a LoRA: it {recognise.refusal(file.tensors)}")
        raise CheckpointError(
            f"{where}: none of its {len(file.tensors)} tensors belongs to a weight of this model "
            f"({ours}); it has {_few(list(file.tensors), 3)}; expected names such as "
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight or "
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
        )
    # Names that no tool is known to write, and places that this model lacks, are not the same.
    strange = [name for name in left if lora_names.split(name) is None]
    absent = [name for name in left if lora_names.split(name) is not None]
    faults = []
    if strange:
        faults.append(
            f"{len(strange)} tensors have names that mlxdiff does not know: {_few(strange)}"
        )
    if absent:
        faults.append(f"{len(absent)} tensors belong to no weight of this model: {_few(absent)}")
    if misshapen:
        faults.append(f"{len(misshapen)} do not fit: {_few(misshapen)}")
    if unbiased:
        faults.append(
            f"{len(unbiased)} change the bias of a layer that has none, which is not supported: "
            f"{_few(unbiased)}"
        )
    if not strange and not unbiased:
        faults.append("use the kind of model that it was trained on")
    raise CheckpointError(f"{where}: fits this model ({ours}) only in part: {'; '.join(faults)}")


def _few(names: Sequence[str], count: int = 10) -> str:
    return ", ".join(map(shown, names[:count])) + (", ..." if len(names) > count else "")


def configs_of(model: ModelSource) -> dict[str, Any]:
    """The configs of the networks that a LoRA can change: the U-Net and the text encoders."""
    return {name: model.config(name) for name in model.components if name in _PARTS}


def open_all(given: Iterable[Given], configs: Mapping[str, Any], family: str) -> tuple[Lora, ...]:
    """Open all given LoRAs and match them to a model. Raises: UsageError, CheckpointError."""
    if isinstance(given, (str, bytes, os.PathLike)):
        raise UsageError(f"loras is {given!r}; expected a list of paths or of (path, scale)")
    opened = []
    for one in given:
        if isinstance(one, Lora):
            scales = one.scale, one.text_scale
            opened.append(match(one.file, scales, configs, family))
            continue
        path, scale = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(f"a LoRA is given as {one!r}; expected a path or (path, scale)")
        scales = scale if isinstance(scale, tuple) else (scale, scale)
        if len(scales) != 2 or not all(map(_is_number, scales)):
            raise UsageError(
                f"{path}: its scale is {scale!r}; expected a number (1 applies it fully)"
            )
        if not any(scales):
            logger.warning("%s has no effect: its scale is 0", path)
        own, text = map(float, scales)
        opened.append(match(open_lora(path), (own, text), configs, family))
    return tuple(opened)


class Baked:
    """A model with LoRAs in its weights. All else is that of the model."""

    def __init__(self, source: ModelSource, loras: Sequence[Lora]) -> None:
        self._source = source
        self._loras = loras

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    @property
    def provenance(self) -> dict[str, Any]:
        """See ``ModelSource.provenance``. It names the LoRAs, too."""
        entries = [
            {"name": one.name, "scale": one.scale, "text_scale": one.text_scale}
            | {"sha256": one.file.sha256}
            for one in self._loras
        ]
        return self._source.provenance | {"loras": entries}

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """See ``ModelSource.tensors``."""
        return changed(self._loras, component, self._source.tensors(component))


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def find(name: str, folder: Path) -> Path:
    """Find a LoRA in a folder by its name in a prompt. Raises: UsageError."""
    if not name or name != Path(name).name or "\\" in name:
        raise UsageError(
            f"the prompt asks for the LoRA {quoted(name)}; expected a file name, not a path"
        )
    for ending in _ENDINGS:
        path = folder / f"{name}{ending}"
        if os.path.isfile(path) or (ending == "" and os.path.isdir(path)):
            return path
    try:
        there = sorted(p.stem for p in folder.iterdir() if p.suffix in _ENDINGS[1:])
    except OSError:
        there = []
    # Who sees this may be a client of a server: the path of the folder is not for everyone.
    raise UsageError(
        f"the prompt asks for the LoRA {quoted(name)}, and there is none of this name "
        f"in the folder for such LoRAs ({argument('lora_folder')}); it has "
        f"{', '.join(there[:10]) or 'no LoRA'}"
    )


# ----------------------------------------------------------------------------------------- applying


def changed(
    loras: Iterable[Lora], component: str, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return the tensors of a component with the changes of all LoRAs added.

    A changed tensor is computed on read, in float32, from the values in the model's file, so the
    original can be read again at any time. A quantized tensor stays packed; the change is kept
    beside it.
    """
    result = dict(tensors)
    for name, deltas in _collected(loras, component).items():
        result[name] = _changed(tensors[name], deltas, packed="embedding" not in name)
    return result


Scaled: TypeAlias = "tuple[Delta, float, LoraFile]"


def _collected(loras: Iterable[Lora], component: str) -> dict[str, list[Scaled]]:
    """Collect the changes of all LoRAs: parameter -> changes."""
    collected: dict[str, list[Scaled]] = {}
    for lora in loras:
        scale = lora.scale if component == "unet" else lora.text_scale
        for name, deltas in lora.deltas.get(component, {}).items():
            found = collected.setdefault(name, [])
            found += [(delta, scale, lora.file) for delta in deltas]
    return collected


def _changed(tensor: LazyTensor, deltas: list[Scaled], packed: bool) -> LazyTensor:
    """Return a changed tensor. ``packed``: its layer can add to a packed weight."""

    def read() -> np.ndarray:
        weight = tensor.read().astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            return weight + _sum(weight, deltas)

    if not packed or not isinstance(tensor, QuantizedTensor):
        return LazyTensor(tensor.shape, "F32", read)
    return AdaptedTensor(
        tensor.shape,
        tensor.dtype,
        read,
        tensor.quantization,
        tensor.read_packed,
        lambda: beside(deltas, tensor.shape, tensor.read),
    )


def _sum(weight: np.ndarray, deltas: Sequence[Scaled]) -> np.ndarray:
    """Sum the changes to a weight in our layout; compute each from the unchanged weight."""
    flat = _flat(weight)
    total = np.zeros_like(flat)
    for delta, scale, file in deltas:
        total += _checked(
            delta.added(flat, scale, weight.shape[-1] if weight.ndim > 1 else 1), file
        )
    return _shaped(total, weight.shape)


def _checked(values: np.ndarray, file: LoraFile) -> np.ndarray:
    if not all_finite(values):
        raise CheckpointError(
            f"{file.path}: holds values that are NaN or infinite; the file is damaged, or its "
            "training failed; use another file"
        )
    return values


def _flat(weight: np.ndarray) -> np.ndarray:
    """Reshape (out, [kH, kW,] in) to (out, in * kH * kW), in PyTorch's order. A vector: (n, 1)."""
    if weight.ndim == 4:
        weight = weight.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(weight).reshape(len(weight), -1)


def _shaped(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo ``_flat``."""
    if len(shape) < 4:
        return flat.reshape(shape)
    out, height, width, inputs = shape
    cube = flat.reshape(out, inputs, height, width).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(cube)


def beside(
    deltas: Sequence[Scaled], shape: tuple[int, ...], weight: Callable[[], np.ndarray]
) -> Beside:
    """Combine changes into one term beside a packed weight.

    Low-rank differences are concatenated into one pair of factors. If there are others (LoHa, LoKr,
    DoRA by input channel), the sum is one matrix of the weight's size.

    Args:
        deltas: all changes to the weight.
        shape: shape of the weight, in our layout.
        weight: reads the values of the weight; called only if they matter (DoRA, OFT, ...).
    """
    pairs = [_pair(delta, scale, weight, shape[-1], file) for delta, scale, file in deltas]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        base = (
            weight() if any(d.reads_weight for d, _, _ in deltas) else np.zeros(shape, np.float32)
        )
        return Beside(_sum(base, deltas))
    down = np.concatenate([down for down, _, _ in found])
    up = np.concatenate([up for _, up, _ in found], axis=1)
    gains = [gain for _, _, gain in found if gain is not None]
    gain = np.float32(1) + sum(gains, np.zeros(shape[0], np.float32)) if gains else None
    return Beside(_shaped(down, (len(down), *shape[1:])), up, gain)


def _pair(
    delta: Delta, scale: float, weight: Callable[[], np.ndarray], inputs: int, file: LoraFile
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Return (down, up, gain - 1) of a difference, or None if it is not of low rank."""
    factors, magnitude = delta.factors(), delta.magnitude
    if factors is None or (magnitude is not None and not magnitude.by_output):
        return None
    down, up = (_checked(values, file) for values in factors)
    if magnitude is None:
        return down, up * np.float32(scale), None
    inside = np.float32(scale if magnitude.scale_inside else 1.0)
    outside = np.float32(1.0 if magnitude.scale_inside else scale)
    gain = magnitude.gain(_flat(weight()) + (up * inside) @ down, inputs)
    return down, up * _checked(gain, file) * inside * outside, (gain[:, 0] - 1) * outside
