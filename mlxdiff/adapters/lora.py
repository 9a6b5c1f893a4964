"""Read LoRA files and related forms, match them to a model, and apply them to its weights.

Open a file once (``open_lora``), then match it to a model (``match``): every tensor must belong to
a weight. ``changed`` returns the model's tensors with the changes added. A quantized tensor stays
packed, and the change is kept beside it.

Sources: Hu et al. 2021 (LoRA), Hyeon-Woo et al. 2021 (LoHa), Yeh et al. 2023 (LoCon, LoKr), Liu et
al. 2024 (DoRA), Kalajdzievski 2023 (rank-stabilised); the names of PEFT, diffusers, kohya's
sd-scripts and LyCORIS.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlxdiff.adapters import lora_names
from mlxdiff.adapters.lora_forms import Delta, Form, Magnitude, make_form
from mlxdiff.adapters.lora_names import Target
from mlxdiff.convert import detect
from mlxdiff.convert.checkpoint import all_finite
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.machine.disk import read_json
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
    """

    path: Path
    name: str
    tensors: dict[str, LazyTensor] = field(repr=False)
    sha256: str
    short_hash: str
    settings: dict[str, dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Lora:
    """A LoRA file matched to a model, at a scale.

    Attributes:
        file: the file.
        scale: factor for the changes of the U-Net; may be negative.
        text_scale: factor for the changes of the text encoders; may be negative.
        deltas: component -> parameter -> the change to add.
        ignored: unused tensor names, each with the reason.
    """

    file: LoraFile
    scale: float
    text_scale: float
    deltas: dict[str, dict[str, Delta]] = field(repr=False)
    ignored: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.file.name

    def report(self) -> str:
        """Describe the matched weights in one line."""
        parts = [f"{len(found)} weights of {name}" for name, found in self.deltas.items() if found]
        every = [delta for found in self.deltas.values() for delta in found.values()]
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
    path, name, opened = _open(Path(os.path.expanduser(path)))
    settings: dict[str, dict[str, Any]] = {}
    if isinstance(opened, PickleFile):
        if opened.refused:
            few = ", ".join(f"{shown(n)} is {what}" for n, what in list(opened.refused.items())[:5])
            raise CheckpointError(
                f"{path}: contains entries that are not tensors: {few}; save only the tensors"
            )
    elif _DIFFUSERS_CONFIG in opened.metadata:
        settings = _by_prefix(opened.metadata[_DIFFUSERS_CONFIG], path)
    if path.name.startswith("adapter_model") and (path.parent / _PEFT_CONFIG).is_file():
        try:
            settings = {"": read_json(path.parent / _PEFT_CONFIG)}
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
    digest, short = _hashes(path)
    if not isinstance(opened, PickleFile):
        short = opened.metadata.get("sshs_model_hash", short)
    return LoraFile(path, name, opened.tensors, digest, short[:12], settings)


def _open(path: Path) -> tuple[Path, str, PickleFile | TensorFile]:
    """Find and open the file of a LoRA; return its path, its name and the open file."""
    name = path.name
    if os.path.isdir(path):
        found = [path / file for file in _FILES if (path / file).is_file()]
        if not found:
            raise UsageError(
                f"{path}: this folder contains no LoRA; expected one of {', '.join(_FILES)}"
            )
        path, name = found[0], path.resolve().name
    elif not os.path.isfile(path):
        raise UsageError(f"{path}: no such LoRA file or folder (--lora PATH[:SCALE])")
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
    try:
        tensors = _open(Path(os.path.expanduser(path)))[2].tensors
    except (CheckpointError, UsageError):
        return False
    return any((found := lora_names.split(name)) and found[1] != "alpha" for name in tensors)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a LoRA in plain JSON values, for `mlxdiff info`.

    Raises: the errors of ``open_lora``.
    """
    file = open_lora(path)
    groups, unknown = _grouped(file)
    forms: Counter[str] = Counter()
    ranks: set[int] = set()
    places: Counter[str] = Counter()
    for module, parts in groups.items():
        try:
            form = _form(file, module, parts)[0]
        except ValueError:
            unknown += [name for name, _ in parts.values()]
            continue
        forms[("DoRA, " if {"magnitude", "dora_scale"} & set(parts) else "") + form.name] += 1
        ranks |= {rank for rank in [form.rank()] if rank is not None}
        places[lora_names.place(module)] += 1
    return {
        "kind": "LoRA",
        "path": str(file.path),
        "made_for": lora_names.made_for({n: t.shape for n, t in file.tensors.items()}),
        "forms": dict(forms),
        "ranks": sorted(ranks),
        "weights": dict(places),
        "bytes": sum(tensor.nbytes for tensor in file.tensors.values()),
        "sha256": file.sha256,
        "short_hash": file.short_hash,
        "not_understood": unknown,
    }


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
    deltas: dict[str, dict[str, Delta]] = {name: {} for name in configs}
    left: list[str] = list(unknown)
    broken: list[str] = []
    misshapen: list[str] = []
    for module, parts in groups.items():
        targets = table.get(module)
        if targets is None:
            left += [name for name, _ in parts.values()]
            continue
        if set(parts) == {"alpha"}:  # changes nothing
            continue
        try:
            form, strength = _form(file, module, parts)
        except ValueError as error:
            broken.append(f"{module} ({', '.join(parts)}: {error})")
            continue
        for target in targets:
            rows, width = None, form.shape()
            if target.third is not None:
                size = width[0] // 3
                rows = slice(target.third * size, (target.third + 1) * size)
                width = size, width[1]
            if width != target.matrix:
                misshapen.append(f"{module} is {width}, expected {target.matrix}")
                continue
            try:
                magnitude = _magnitude(parts, target)
            except ValueError as error:
                misshapen.append(f"{module}: {error}")
                continue
            if target.parameter in deltas[target.component]:
                broken.append(f"{module} (it changes the same weight twice)")
            deltas[target.component][target.parameter] = Delta(form, strength, magnitude, rows)
    ignored = [(name, reason) for name in left if (reason := lora_names.ignored(name)) is not None]
    left = [name for name in left if lora_names.ignored(name) is None]
    _raise_faults(file, configs, family, any(deltas.values()), left, broken, misshapen)
    for reason in dict.fromkeys(reason for _, reason in ignored):
        names = [name for name, why in ignored if why == reason]
        logger.warning("%s: %s: %s", file.name, ", ".join(names[:3]), reason)
    own, text = scale if isinstance(scale, tuple) else (scale, scale)
    return Lora(file, own, text, deltas, tuple(ignored))


Parts: TypeAlias = "dict[str, tuple[str, LazyTensor]]"


def _grouped(file: LoraFile) -> tuple[dict[str, Parts], list[str]]:
    """Group tensors by module; return module -> part -> (name, tensor), and the unknown names."""
    groups: dict[str, Parts] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        found = lora_names.split(name)
        if found is None:
            unknown.append(name)
            continue
        module, part = found
        parts = groups.setdefault(module, {})
        if part in parts:
            raise CheckpointError(
                f"{file.path}: {shown(name)} and {shown(parts[part][0])} are the same part"
            )
        if tensor.dtype not in READABLE:
            raise CheckpointError(
                f"{file.path}: {shown(name)} is {tensor.dtype} (supported: {', '.join(READABLE)})"
            )
        parts[part] = name, tensor
    return groups, unknown


def _form(file: LoraFile, module: str, parts: Parts) -> tuple[Form, float]:
    """Make the form of a module from its parts; return it and alpha / rank. Raises: ValueError."""
    beside = ("alpha", "magnitude", "dora_scale")
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
            raise ValueError(f"its magnitude is {tensor.shape}, expected {out} values")
        return Magnitude(tensor, by_output=True, scale_inside=True)
    if "dora_scale" in parts:
        shape = parts["dora_scale"][1].shape
        for by_output, size, wide in ((True, out, shape[:1]), (False, inputs, shape[1:2])):
            if math.prod(shape) == size and wide == (size,):
                return Magnitude(parts["dora_scale"][1], by_output, scale_inside=False)
        raise ValueError(f"its dora_scale is {shape}, expected ({out}, 1) or (1, {inputs})")
    return None


def _raise_faults(
    file: LoraFile,
    configs: Mapping[str, Any],
    family: str,
    matched: bool,
    left: Sequence[str],
    broken: Sequence[str],
    misshapen: Sequence[str],
) -> None:
    if not (left or broken or misshapen) and matched:
        return
    where = str(file.path)
    if broken:
        raise CheckpointError(f"{where}: is damaged or has an unknown form: {_few(broken)}")
    theirs = lora_names.made_for({name: tensor.shape for name, tensor in file.tensors.items()})
    ours = lora_names.family_words(family, configs["unet"])
    if theirs is not None and theirs.split(" (text")[-1] != ours.split(" (text")[-1]:
        raise CheckpointError(f"{where}: was made for {theirs}; this model is {ours}")
    if not matched and not misshapen:
        if not any(lora_names.split(name) for name in file.tensors):
            what = detect.looks_like(file.tensors)
            raise CheckpointError(f"{where}: is not a LoRA but {what}")
        raise CheckpointError(
            f"{where}: none of its {len(file.tensors)} tensors belongs to a weight of this model "
            f"({ours}); it has {_few(list(file.tensors), 3)}; expected names such as "
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight or "
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
        )
    faults = []
    if left:
        faults.append(f"{len(left)} tensors belong to no weight of this model: {_few(left)}")
    if misshapen:
        faults.append(f"{len(misshapen)} have another shape: {_few(misshapen)}")
    raise CheckpointError(
        f"{where}: fits this model ({ours}) only in part: {'; '.join(faults)}; use the kind of "
        "model that it was trained on"
    )


def _few(names: Sequence[str], count: int = 10) -> str:
    return ", ".join(map(shown, names[:count])) + (", ..." if len(names) > count else "")


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


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def find(name: str, folder: Path) -> Path:
    """Find a LoRA in a folder by its name in a prompt. Raises: UsageError."""
    if not name or name != Path(name).name or "\\" in name:
        raise UsageError(f"the prompt asks for the LoRA {name!r}; expected a file name, not a path")
    for ending in _ENDINGS:
        path = folder / f"{name}{ending}"
        if os.path.isfile(path) or (ending == "" and os.path.isdir(path)):
            return path
    try:
        there = sorted(p.stem for p in folder.iterdir() if p.suffix in _ENDINGS[1:])
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})") from None
    raise UsageError(
        f"the prompt asks for the LoRA {name!r}, but {folder.resolve()} has no {name}.safetensors; "
        f"it has {', '.join(there[:10]) or 'no LoRA'}; give another folder with --lora-folder"
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
        result[name] = _changed(tensors[name], deltas)
    return result


Scaled: TypeAlias = "tuple[Delta, float, LoraFile]"


def _collected(loras: Iterable[Lora], component: str) -> dict[str, list[Scaled]]:
    """Collect the changes of all LoRAs: parameter -> changes."""
    collected: dict[str, list[Scaled]] = {}
    for lora in loras:
        scale = lora.scale if component == "unet" else lora.text_scale
        for name, delta in lora.deltas.get(component, {}).items():
            collected.setdefault(name, []).append((delta, scale, lora.file))
    return collected


def _changed(tensor: LazyTensor, deltas: list[Scaled]) -> LazyTensor:
    def read() -> np.ndarray:
        weight = tensor.read().astype(np.float32)
        return weight + _sum(weight, deltas)

    if not isinstance(tensor, QuantizedTensor):
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
        total += _checked(delta.added(flat, scale, weight.shape[-1]), file)
    return _shaped(total, weight.shape)


def _checked(values: np.ndarray, file: LoraFile) -> np.ndarray:
    if not all_finite(values):
        raise CheckpointError(
            f"{file.path}: holds values that are NaN or infinite; the file is damaged, or its "
            "training failed; use another file"
        )
    return values


def _flat(weight: np.ndarray) -> np.ndarray:
    """Reshape (out, [kH, kW,] in) to (out, in * kH * kW), in PyTorch's order."""
    if weight.ndim == 4:
        weight = weight.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(weight).reshape(len(weight), -1)


def _shaped(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo ``_flat``."""
    if len(shape) == 2:
        return flat
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
        weight: reads the values of the weight; called only if they matter (DoRA's norms).
    """
    pairs = [_pair(delta, scale, weight, shape[-1], file) for delta, scale, file in deltas]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        base = weight() if any(d.magnitude for d, _, _ in deltas) else np.zeros(shape, np.float32)
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
