"""The converted folder and the safetensors files in it: read, write, check.

A file is opened by its header alone; a tensor's bytes are mapped only while someone holds the
array, so that memory depends on the largest tensor, not on the file. The reader is our own because
safetensors' NumPy reader refuses bfloat16, and because every fault of a file has to be one clear
CheckpointError. Format: https://github.com/huggingface/safetensors (8 bytes of little-endian header
length, a JSON header, the tensors); the folder is described in docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import mlxdiff
from mlxdiff.config import (
    CLIPTextConfig,
    ComponentConfig,
    UNet2DConfig,
    read_json,
    read_unet,
    read_vae,
)
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.params import Shape, expected_parameters
from mlxdiff.quantization import (
    E4M3,
    Beside,
    Packed,
    Quantization,
    dequantize,
    packed_shapes,
    quantize,
)

if TYPE_CHECKING:
    from mlxdiff.tokenizer import Tokenizer

FORMAT_VERSION = 1
"""Of a folder with floating-point weights."""

QUANTIZED_VERSION = 2
"""Of a folder with quantized weights, which readers of version 1 do not know."""

MANIFEST = "mlxdiff.json"
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae")
TOKENIZERS = ("tokenizer", "tokenizer_2")
LOW_RES_SCHEDULER = "low_res_scheduler"
"""The part of an upscaler that says what noise is added to the picture it is shown."""
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 100_000_000  # as the reference implementation of the format
MAX_NAME = 1000

# Type name in a safetensors header -> bytes a value, NumPy type of the stored bits.
_STORED: dict[str, tuple[int, str]] = {
    "F64": (8, "<f8"),
    "F32": (4, "<f4"),
    "F16": (2, "<f2"),
    "BF16": (2, "<u2"),
    "I64": (8, "<i8"),
    "I32": (4, "<i4"),
    "I16": (2, "<i2"),
    "I8": (1, "|i1"),
    "U64": (8, "<u8"),
    "U32": (4, "<u4"),
    "U16": (2, "<u2"),
    "U8": (1, "|u1"),
    "BOOL": (1, "|b1"),
    "F8_E4M3": (1, "|u1"),
    "F8_E5M2": (1, "|u1"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that a weight of a converted folder may be stored in."""

READABLE = (*FLOATS, "F8_E4M3", "F8_E5M2")
"""Types that a weight of a checkpoint may be stored in."""

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Types that we write, by the name that people use."""

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being worked on."""


# ---------------------------------------------------------------------------------- reading tensors


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known by shape and type, and read when it is asked for.

    Attributes:
        shape: dimensions of what ``read`` returns.
        dtype: type name of the stored values, as safetensors writes it ("F16", "BF16", ...).
        read: reads the values; BF16 and the 8-bit floats come as float32, exactly. The array may
            be a read-only view of the file. Raises: CheckpointError.
    """

    shape: Shape
    dtype: str
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored values."""
        return self.size * _STORED[self.dtype][0]


@dataclass(frozen=True)
class QuantizedTensor(LazyTensor):
    """A tensor that is stored in few bits; ``read`` gives the values it stands for, as float32.

    Attributes:
        dtype: type name of what its scales are stored as (or would be, in the float modes).
        quantization: how it is stored.
        read_packed: reads what is stored. Raises: CheckpointError.
    """

    quantization: Quantization
    read_packed: Callable[[], Packed] = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and biases."""
        return sum(math.prod(shape) * _STORED[kind][0] for shape, kind in self.parts().values())

    def parts(self) -> dict[str, tuple[Shape, str]]:
        """What is stored: "weight", "scales" and, in affine mode, "biases" -> shape, type name."""
        scales = self.dtype if self.quantization.mode == "affine" else "U8"
        return {
            part: (shape, "U32" if part == "weight" else scales)
            for part, shape in packed_shapes(self.shape, self.quantization).items()
        }


@dataclass(frozen=True)
class AdaptedTensor(QuantizedTensor):
    """A tensor that is stored in few bits, with something beside it that is not.

    ``read`` gives all of it, ``read_packed`` what is stored.

    Attributes:
        read_beside: reads what is beside it. Raises: CheckpointError.
    """

    read_beside: Callable[[], Beside] = field(repr=False, compare=False)


def quantized(
    shape: Shape, dtype: str, how: Quantization, read_packed: Callable[[], Packed]
) -> QuantizedTensor:
    """A tensor of which this function reads what is stored."""
    return QuantizedTensor(shape, dtype, lambda: dequantize(read_packed()), how, read_packed)


def quantize_tensor(
    name: str, tensor: LazyTensor, how: Quantization, dtype: str, fitted: bool = False
) -> LazyTensor:
    """A tensor that is rounded whenever it is read: first to ``dtype``, then to few bits.

    Args:
        name: for messages.
        dtype: what the scales are stored as: "float16", "bfloat16" or "float32".
        fitted: see ``quantize``.
    """

    def read_packed() -> Packed:
        values = cast(tensor.read(), dtype, name)
        if dtype != "bfloat16":
            return quantize(values, how, fitted)
        packed = quantize(_decoded(values, "BF16"), how, fitted)
        if packed.biases is None:
            return packed
        return packed._replace(
            scales=round_to(packed.scales, dtype), biases=round_to(packed.biases, dtype)
        )

    return quantized(tensor.shape, DTYPES[dtype], how, read_packed)


class TensorFile:
    """A safetensors file whose header has been checked: every byte belongs to exactly one tensor.

    Attributes:
        path: the file.
        metadata: the strings under ``__metadata__``.
        tensors: name -> LazyTensor, in the order of the header.
    Raises: CheckpointError, for anything that is not a whole and sound safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header, start, end = _read_header(self.path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fault("__metadata__ is not a table of strings")
        self.metadata: dict[str, str] = metadata
        self.tensors: dict[str, LazyTensor] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            if len(name) > MAX_NAME:
                raise self._fault(f"a tensor's name has {len(name)} characters")
            tensor, begin, stop = self._entry(name, entry, start)
            self.tensors[name] = tensor
            spans.append((begin, stop, name))
        place = 0
        for begin, stop, name in sorted(spans):
            if begin != place:
                what = "overlaps another tensor" if begin < place else "leaves a hole before it"
                raise self._fault(f"tensor {name!r} {what} (offset {begin}, expected {place})")
            place = stop
        if place > end - start:
            raise self._fault(
                f"truncated: {start + place} bytes expected, {end} found; download it again"
            )
        if place < end - start:
            raise self._fault(f"{end - start - place} bytes at the end belong to no tensor")

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _entry(self, name: str, entry: Any, start: int) -> tuple[LazyTensor, int, int]:
        """Check one tensor's entry; the tensor, and its place in the data."""
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._fault(
                f"tensor {name!r}: expected dtype, shape and data_offsets in the header"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _STORED:
            known = ", ".join(_STORED)
            raise self._fault(f"tensor {name!r} has type {shown(repr(dtype))}; known: {known}")
        if not _are_sizes(shape):
            raise self._fault(f"tensor {name!r} has shape {shown(repr(shape))}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self._fault(f"tensor {name!r} has data_offsets {shown(repr(offsets))}")
        begin, stop = offsets
        size = math.prod(shape) * _STORED[dtype][0]
        if stop - begin != size:
            raise self._fault(
                f"tensor {name!r} is given {stop - begin} bytes; {dtype} {shape} takes {size}"
            )
        path, offset, shape = self.path, start + begin, tuple(shape)
        return (
            LazyTensor(shape, dtype, lambda: read_values(path, name, dtype, shape, offset)),
            begin,
            stop,
        )


def _are_sizes(values: Any) -> bool:
    """Whether this is a list of whole numbers that can be sizes or offsets."""
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where the data begins, and the file's length."""
    try:
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > end - 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: {_not_safetensors(prefix, end)}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file (its header is no JSON: {error})"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file (its header is no JSON object)")
    return header, 8 + length, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{shown(repr(name))} stands there twice")
        result[name] = value
    return result


def shown(text: str) -> str:
    """A text of a file as messages show it: one line, not too long, no control characters."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else text[:200] + "..."


def _not_safetensors(prefix: bytes, size: int) -> str:
    """What a file is whose first bytes are no safetensors header."""
    if prefix.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a PyTorch pickle, not a safetensors file"
    return foreign(prefix, size) or f"not a safetensors file, or truncated ({size} bytes)"


def foreign(prefix: bytes, size: int) -> str | None:
    """What a file is that holds no tensors but is often found in their place; None where unknown.

    Args:
        prefix: its first bytes.
        size: its length.
    """
    if size == 0:
        return "is empty"
    if prefix.startswith(b"version "):
        return "is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
    if prefix.startswith(b"GGUF"):
        return "is a GGUF file, which is not supported; take the safetensors of the same model"
    if prefix.lstrip().startswith(b"<"):
        return "is a web page, not the weights; download it again"
    return None


def read_values(
    path: Path,
    name: str,
    dtype: str,
    shape: Shape,
    offset: int,
    strides: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Map the bytes of one tensor; they leave memory with the array.

    Args:
        path: file that holds them.
        name: of the tensor, for messages.
        dtype, shape: as LazyTensor has them.
        offset: of the first value in the file, in bytes.
        strides: steps from value to value along each dimension, counted in values, not negative;
            None: contiguous.
    Returns: as ``LazyTensor.read``; read-only where it is a view of the file.
    Raises: CheckpointError.
    """
    width, stored = _STORED[dtype]
    if math.prod(shape) == 0:
        return _decoded(np.empty(shape, stored), dtype)
    if strides is None:
        count = math.prod(shape)
    else:
        count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            data = mmap.mmap(
                file.fileno(), offset - start + count * width, access=mmap.ACCESS_READ, offset=start
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} cannot be read ({error})") from None
    values = np.frombuffer(data, stored, count, offset - start)
    if strides is None:
        values = values.reshape(shape)
    else:
        steps = [step * width for step in strides]
        values = np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False)
    return _decoded(values, dtype)


def _decoded(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values of types that NumPy does not have, as float32; others as they are."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E4M3":
        return E4M3[bits]
    return bits


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    return TensorFile(path).tensors


def open_weights(
    path: str | os.PathLike[str],
    open_file: Callable[[Path], Mapping[str, LazyTensor]] = _open_safetensors,
) -> dict[str, LazyTensor]:
    """All tensors of a file, or of the shards that an ``.index.json`` names.

    Args:
        path: file or index.
        open_file: opens one file; default: as safetensors, and nothing else.
    Raises: CheckpointError; for a missing shard, for a tensor that is not where the index says or
        is in two shards.
    """
    path = Path(path)
    if not path.name.endswith(".json"):
        return dict(open_file(path))
    tensors: dict[str, LazyTensor] = {}
    place: dict[str, str] = {}
    weight_map = _read_weight_map(path)
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: the shard {shard} is missing from the folder")
        for name, tensor in open_file(path.parent / shard).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in {place[name]} and in {shard}")
            tensors[name], place[name] = tensor, shard
    for name, shard in weight_map.items():
        if place.get(name) != shard:
            raise CheckpointError(
                f"{path}: tensor {name!r} is not in {shard}, where the index has it"
            )
    return tensors


def _read_weight_map(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name -> file name in the same folder."""
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map, so it is no index of shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise CheckpointError(
                f"{path}: {shard!r}, for {name!r}, is no file name in this folder"
            )
        if not shard.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{path}: names {shard!r}, which is no file of weights")
    return weight_map


def shard_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files behind what ``open_weights`` takes: the file itself, or index and shards."""
    path = Path(path)
    if not path.name.endswith(".json"):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_read_weight_map(path).values())))]


def check_parameters(found: Mapping[str, Shape], config: ComponentConfig, where: str) -> None:
    """Hold tensors against ``expected_parameters(config)``: every name, every shape, nothing else.

    Raises: CheckpointError that lists at most ten names of each kind of fault, and how many there
        are.
    """
    expected = expected_parameters(config)
    raise_faults(
        where,
        missing=[name for name in expected if name not in found],
        unknown=[name for name in found if name not in expected],
        misshapen=[
            f"{name} is {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ],
    )


def raise_faults(where: str, **faults: list[str]) -> None:
    """Raise a CheckpointError for these faults (kind -> names); nothing where all are empty."""
    parts = []
    for kind, names in faults.items():
        if names:
            few = ", ".join(map(shown, names[:10])) + (", ..." if len(names) > 10 else "")
            parts.append(f"{len(names)} {kind} tensor{'s'[: len(names) > 1]}: {few}")
    if parts:
        raise CheckpointError(f"{where}: {'; '.join(parts)}")


# ---------------------------------------------------------------------------------- writing tensors


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Values in the type that is written; bfloat16 as its bits (uint16), rounded to nearest even.

    Args:
        array: float16, float32 or float64, finite.
        dtype: "float32", "float16" or "bfloat16".
        name: the tensor's name, for the message.
    Raises: CheckpointError where a value is beyond the range of that type.
    """
    if dtype == "bfloat16":
        bits = array.astype(np.float32).view(np.uint32)
        result = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        fits = not ((result & 0x7F80) == 0x7F80).any()
    else:
        with np.errstate(over="ignore"):
            result = array.astype({"float16": "<f2", "float32": "<f4"}[dtype], copy=False)
        fits = result.dtype == array.dtype or bool(np.isfinite(result).all())
    if not fits:
        other = "bfloat16 or float32" if dtype == "float16" else "float32"
        raise CheckpointError(
            f"{name}: values up to {np.abs(array).max():.6g} do not fit {dtype}; "
            f"convert with {other}"
        )
    return result


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values that ``cast`` would store, as floating-point numbers."""
    return _decoded(cast(array, dtype, "a value"), DTYPES[dtype])


def _stored_arrays(
    name: str, tensor: LazyTensor, dtype: str, label: str = ""
) -> dict[str, tuple[Shape, str, Callable[[Any], np.ndarray]]]:
    """What is written for a tensor: name -> shape, type name, and how to get it from what is read.

    Args:
        label: what messages call the tensor.
    """
    if not isinstance(tensor, QuantizedTensor):
        return {name: (tensor.shape, DTYPES[dtype], lambda values: cast(values, dtype, label))}
    stem = name.removesuffix("weight")

    def part_of(part: str, kind: str) -> Callable[[Any], np.ndarray]:
        def get(packed: Packed) -> np.ndarray:
            values: np.ndarray = getattr(packed, part)
            return values if kind in ("U32", "U8") else cast(values, dtype, label)

        return get

    return {
        stem + part: (shape, kind, part_of(part, kind))
        for part, (shape, kind) in tensor.parts().items()
    }


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: str,
    on_tensor: Callable[[int, str], None] = lambda size, name: None,
) -> str:
    """Write a safetensors file tensor by tensor, in the order given: memory is one tensor's.

    Args:
        path: file to write.
        tensors: what to write.
        dtype: "float32", "float16" or "bfloat16".
        on_tensor: called with bytes and name after each tensor.
    Returns: sha256 of the file, in hex.
    Raises: CheckpointError, from reading or casting a tensor.
    """
    folder = path.parent.name
    arrays = {
        name: _stored_arrays(name, t, dtype, f"{folder}/{name}") for name, t in tensors.items()
    }
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    place = 0
    for parts in arrays.values():
        for name, (shape, kind, _) in parts.items():
            stop = place + math.prod(shape) * _STORED[kind][0]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": (place, stop)}
            place = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(len(raw).to_bytes(8, "little"))
        put(raw)
        for name, tensor in tensors.items():
            loaded: Any
            if isinstance(tensor, QuantizedTensor):
                loaded = tensor.read_packed()
            else:
                loaded = tensor.read()
            size = 0
            for part, (shape, _, get) in arrays[name].items():
                values = np.ascontiguousarray(get(loaded))
                if values.shape != shape:
                    raise AssertionError(f"{part}: read {values.shape}, announced {shape}")
                put(values.reshape(-1).view(np.uint8).data)
                size += values.nbytes
            on_tensor(size, name)
    return digest.hexdigest()


def stored_bytes(tensor: LazyTensor, dtype: str) -> int:
    """Bytes of a tensor in a converted folder of this type."""
    if isinstance(tensor, QuantizedTensor):
        return tensor.nbytes
    return tensor.size * _STORED[DTYPES[dtype]][0]


def _shards(
    tensors: Mapping[str, LazyTensor], dtype: str, limit: int
) -> dict[str, dict[str, LazyTensor]]:
    """Split into files of at most ``limit`` bytes (a larger tensor gets its own), by file name."""
    groups: list[dict[str, LazyTensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        size = stored_bytes(tensor, dtype)
        if size > room and groups[-1]:
            groups.append({})
            room = limit
        groups[-1][name] = tensor
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    total = len(groups)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, 1)}


# --------------------------------------------------------------------------------------- the folder


class ModelSource(Protocol):
    """What a pipeline needs of a model, converted or not."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def family(self) -> str:
        """ "sd1", "sd2", "sdxl", "sdxl-refiner"; "ddpm" for a U-Net alone, in pixel space."""

    @property
    def components(self) -> tuple[str, ...]:
        """Those of COMPONENTS that the model has."""

    @property
    def model_index(self) -> dict[str, Any]:
        """model_index.json."""

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """scheduler_config.json."""

    @property
    def low_res_scheduler_config(self) -> dict[str, Any]:
        """The same of an upscaler's low_res_scheduler; empty for all other models."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of the weights: source, revision and, once converted, sha256 of each file."""

    def config(self, component: str) -> Any:
        """The component's config; a CLIPTextConfig, UNetConfig or VAEConfig."""

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """Every tensor, with our name and layout, complete and checked; the caller's to pop."""

    def tokenizer(self, name: str = "tokenizer") -> Tokenizer:
        """The tokenizer, padding as its files say or else as the family does."""

    def documents(self) -> dict[str, bytes]:
        """All files but the weights: relative path -> content."""


def pad_token(family: str, tokenizer: str) -> str:
    """What a tokenizer pads with where its own files do not say.

    SD 2 and the second encoder of SDXL are OpenCLIP models, padded with id 0.
    """
    return "!" if family == "sd2" or tokenizer == "tokenizer_2" else "<|endoftext|>"


class ModelFolder:
    """A folder in the shape that diffusers writes: model_index.json and a folder for each part.

    The common ground of converted and unconverted models; subclasses say what the tensors are.
    Raises: CheckpointError or ConfigError on opening, for a missing or malformed file.
    """

    family: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.model_index: dict[str, Any] = read_json(self.path / "model_index.json")
        self.components: tuple[str, ...] = tuple(c for c in COMPONENTS if self.class_name(c))
        self._configs = {name: self._read_config(name) for name in self.components}
        self.scheduler_config: dict[str, Any] = read_json(
            self.place("scheduler") / "scheduler_config.json"
        )
        self.low_res_scheduler_config: dict[str, Any] = {}
        if self.class_name(LOW_RES_SCHEDULER):
            where = self.path / LOW_RES_SCHEDULER / "scheduler_config.json"
            self.low_res_scheduler_config = read_json(where)

    def class_name(self, part: str) -> str | None:
        """Class that model_index.json gives for a part; None where the model does not have it."""
        entry = self.model_index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            return None
        return entry[1]

    def place(self, part: str) -> Path:
        """The folder of a part; the root for the first pixel-space models, which have none."""
        folder = self.path / part
        return folder if folder.is_dir() else self.path

    def _read_config(self, component: str) -> ComponentConfig:
        where = self.place(component) / "config.json"
        data = read_json(where)
        if component == "unet":
            return read_unet(data, str(where))
        if component == "vae":
            return read_vae(data, str(where))
        projects = self.class_name(component) == "CLIPTextModelWithProjection"
        return CLIPTextConfig.from_dict(data, str(where), with_projection=projects)

    def config(self, component: str) -> Any:
        return self._configs[component]

    def tokenizer(self, name: str = "tokenizer") -> Tokenizer:
        from mlxdiff.tokenizer import Tokenizer

        folder = self.path / name
        files = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
        if any("pad_token" in read_json(file) for file in files if file.is_file()):
            return Tokenizer.from_folder(folder)
        return Tokenizer.from_folder(folder, pad_token=pad_token(self.family, name))

    def document_paths(self) -> dict[str, Path]:
        """What ``documents`` holds: relative path there -> where the file lies."""
        files = [("scheduler", "scheduler_config.json")]
        if self.low_res_scheduler_config:
            files.append((LOW_RES_SCHEDULER, "scheduler_config.json"))
        files += [(name, "config.json") for name in self.components]
        files += [(name, file) for name in TOKENIZERS for file in TOKENIZER_FILES]
        paths = {f"{part}/{file}": self.place(part) / file for part, file in files}
        paths = {"model_index.json": self.path / "model_index.json", **paths}
        return {name: path for name, path in paths.items() if path.is_file()}

    def documents(self) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self.document_paths().items()}


class ConvertedFolder(ModelFolder):
    """A folder that ``write_folder`` made, its manifest and headers checked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self.manifest = _read_manifest(path)
        self.family = self.manifest["family"]
        super().__init__(path)
        pixels = isinstance(self._configs.get("unet"), UNet2DConfig)
        if not ({"unet"} if pixels else {"unet", "vae"}) <= set(self.components):
            raise CheckpointError(f"{path}: model_index.json lacks unet or vae; convert again")
        for name, entry in self.manifest["files"].items():
            _check_size(path / name, entry["bytes"])
        self._tensors = {name: self._open(name) for name in self.components}

    def _open(self, component: str) -> dict[str, LazyTensor]:
        folder = self.path / component
        index = folder / "model.safetensors.index.json"
        stored = open_weights(index if index.is_file() else folder / "model.safetensors")
        tensors = self._assemble(component, stored)
        check_parameters(
            {n: t.shape for n, t in tensors.items()}, self.config(component), str(folder)
        )
        raise_faults(
            str(folder),
            mistyped=[f"{n} ({t.dtype})" for n, t in tensors.items() if t.dtype not in FLOATS],
        )
        return tensors

    def _assemble(self, component: str, stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The tensors of what is stored: weight, scales and biases of a quantized one are one."""
        how_of = {
            name: Quantization.parse(text)
            for text, names in self.quantization.get("tensors", {}).get(component, {}).items()
            for name in names
        }
        where, expected = str(self.path / component), expected_parameters(self.config(component))
        raise_faults(
            f"{where}, quantized as {MANIFEST} says",
            unknown=[n for n in how_of if n not in expected],
        )
        tensors: dict[str, LazyTensor] = {}
        missing, misshapen = [], []
        rest = dict(stored)
        for name, how in how_of.items():
            stem, parts = name.removesuffix("weight"), {}
            template = quantized(expected[name], self._float_type, how, _never)
            for part, (shape, kind) in template.parts().items():
                found = rest.pop(stem + part, None)
                if found is None:
                    missing.append(stem + part)
                elif (found.shape, found.dtype) != (shape, kind):
                    misshapen.append(
                        f"{stem + part} is {found.dtype} {found.shape}, expected {kind} {shape}"
                    )
                else:
                    parts[part] = found
            tensors[name] = quantized(
                expected[name], self._float_type, how, partial(_read_packed, parts, how)
            )
        raise_faults(where, missing=missing, misshapen=misshapen)
        tensors |= rest
        return {name: tensors[name] for name in (*expected, *tensors) if name in tensors}

    @property
    def quantization(self) -> dict[str, Any]:
        """ "recipe", and "tensors": component -> how -> names; empty where nothing is quantized."""
        return dict(self.manifest.get("quantization", {}))

    @property
    def recipe(self) -> str | None:
        """Name of the recipe that it was quantized by; None where it was not."""
        return self.quantization.get("recipe")

    @property
    def _float_type(self) -> str:
        return DTYPES[self.dtype]

    @property
    def dtype(self) -> str:
        """Type of the stored weights, "float16" for example."""
        return str(self.manifest["dtype"])

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self.manifest["source"])

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        return dict(self._tensors[component])

    def verify(self) -> None:
        """Hold every file against the sha256 in the manifest. Raises: CheckpointError."""
        for name, entry in self.manifest["files"].items():
            if sha256(self.path / name) != entry["sha256"]:
                raise CheckpointError(
                    f"{self.path / name}: changed since it was written; convert again"
                )


def _read_packed(parts: Mapping[str, LazyTensor], how: Quantization) -> Packed:
    biases = parts["biases"].read() if "biases" in parts else None
    return Packed(parts["weight"].read(), parts["scales"].read(), biases, how)


def _never() -> Packed:
    raise AssertionError("a template has no values")


def _read_manifest(path: Path) -> dict[str, Any]:
    """mlxdiff.json, of a version that we know and with the keys that we write."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    where = path / MANIFEST
    if not where.is_file():
        raise CheckpointError(f"{path}: not a converted folder (it has no {MANIFEST})")
    try:
        manifest = read_json(where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    version = manifest.get("format_version")
    if version not in (FORMAT_VERSION, QUANTIZED_VERSION):
        raise CheckpointError(
            f"{where}: format version {version!r} is unknown to mlxdiff {mlxdiff.__version__}, "
            f"which reads {FORMAT_VERSION} and {QUANTIZED_VERSION}; convert the model again, or "
            "update mlxdiff"
        )
    files = manifest.get("files")
    sound = (
        isinstance(manifest.get("family"), str)
        and manifest.get("dtype") in tuple(DTYPES)
        and isinstance(manifest.get("source"), dict)
        and isinstance(files, dict)
        and all(
            isinstance(e, dict) and type(e.get("bytes")) is int and isinstance(e.get("sha256"), str)
            for e in files.values()
        )
    )
    if not sound:
        raise CheckpointError(f"{where}: family, dtype, source or files is missing or malformed")
    if ("quantization" in manifest) != (version == QUANTIZED_VERSION):
        raise CheckpointError(f"{where}: version {version} does not go with its quantization")
    if version == QUANTIZED_VERSION and not _is_quantization(manifest["quantization"]):
        raise CheckpointError(f"{where}: quantization is malformed; convert the model again")
    return manifest


def _is_quantization(data: Any) -> bool:
    """Whether this is {"recipe": text, "tensors": {component: {how: [names]}}}."""
    return (
        isinstance(data, dict)
        and isinstance(data.get("recipe"), str)
        and isinstance(data.get("tensors"), dict)
        and all(
            isinstance(kinds, dict)
            and all(
                isinstance(names, list) and all(isinstance(n, str) for n in names)
                for names in kinds.values()
            )
            for kinds in data["tensors"].values()
        )
    )


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing from the converted folder; convert again")
    found = path.stat().st_size
    if found != expected:
        raise CheckpointError(
            f"{path}: truncated or changed: {expected} bytes expected, {found} found; convert again"
        )


def open_folder(path: str | os.PathLike[str]) -> ConvertedFolder:
    """Open a converted folder: manifest, file sizes, names and shapes of all tensors are checked.

    Raises: CheckpointError that names what is wrong; ConfigError for a config file.
    """
    return ConvertedFolder(path)


def write_folder(
    source: ModelSource,
    dest: str | os.PathLike[str],
    dtype: str = "float16",
    *,
    provenance: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model as a converted folder; the same source gives the same bytes.

    It is written beside ``dest`` under a temporary name and renamed whole, so that after any
    failure or interruption nothing new is there.

    Args:
        source: the model; its QuantizedTensors are written as they are.
        dest: folder to make; its parents are made too.
        dtype: type of all weights, "float16", "bfloat16" or "float32".
        recipe: name of the quantization recipe, for the manifest.
        provenance: what the manifest says of the source; default: ``source.provenance``.
        force: replace ``dest`` if it is a converted folder (nothing else is ever replaced).
        progress: called after each tensor.
        shard_bytes: a component that takes more is split into files of at most this size.
    Returns: dest.
    Raises: UsageError (dest, dtype, space), CheckpointError (a tensor that cannot be read or
        stored).
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    dest = Path(dest)
    tensors = {name: source.tensors(name) for name in source.components}
    total = sum(stored_bytes(t, dtype) for part in tensors.values() for t in part.values())
    done = 0

    def advance(size: int, name: str) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total, name)

    with _new_folder(dest, total, force) as folder:
        files: dict[str, bytes] = dict(source.documents())
        digests: dict[str, str] = {}
        for component, part in tensors.items():
            (folder / component).mkdir()
            shards = _shards(part, dtype, shard_bytes)
            for file, members in shards.items():
                digests[f"{component}/{file}"] = write_safetensors(
                    folder / component / file,
                    members,
                    dtype,
                    lambda size, name, c=component: advance(size, f"{c}/{name}"),  # type: ignore[misc]
                )
            if len(shards) > 1:
                size = sum(stored_bytes(t, dtype) for t in part.values())
                weight_map = {
                    stored: file
                    for file, members in shards.items()
                    for name, tensor in members.items()
                    for stored in _stored_arrays(name, tensor, dtype)
                }
                files[f"{component}/model.safetensors.index.json"] = _json(
                    {"metadata": {"total_size": size}, "weight_map": weight_map}
                )
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        packed = _quantization_table(tensors)
        manifest = {
            "format_version": QUANTIZED_VERSION if packed else FORMAT_VERSION,
            "mlxdiff": mlxdiff.__version__,
            "family": source.family,
            "dtype": dtype,
            **({"quantization": {"recipe": recipe, "tensors": packed}} if packed else {}),
            "source": dict(source.provenance if provenance is None else provenance),
            "files": {
                name: {"bytes": (folder / name).stat().st_size, "sha256": digests[name]}
                for name in sorted(digests)
            },
        }
        (folder / MANIFEST).write_bytes(_json(manifest))
    return dest


def _quantization_table(
    tensors: Mapping[str, Mapping[str, LazyTensor]],
) -> dict[str, dict[str, list[str]]]:
    """Component -> how -> names of the tensors that are stored so."""
    table: dict[str, dict[str, list[str]]] = {}
    for component, part in tensors.items():
        for name, tensor in part.items():
            if isinstance(tensor, QuantizedTensor):
                by_kind = table.setdefault(component, {})
                by_kind.setdefault(str(tensor.quantization), []).append(name)
    return table


@contextmanager
def _new_folder(dest: Path, size: int, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``dest`` when the block ends well, and goes otherwise."""
    check_dest(dest, force)
    parents = [p for p in dest.absolute().parents if not p.exists()]
    temporary = dest.absolute().with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.partial")
    old = temporary.with_suffix(".old")
    try:
        try:
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
            if free < size:
                raise UsageError(
                    f"{dest}: needs {size / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free there"
                )
            yield temporary
            if dest.exists():
                check_dest(dest, force)  # it may have come into being meanwhile
                dest.rename(old)
            temporary.rename(dest)
        except OSError as error:
            raise UsageError(f"{dest}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        if old.exists() and not dest.exists():
            old.rename(dest)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_dest(dest: str | os.PathLike[str], force: bool) -> None:
    """Whether a converted folder may be written there. Raises: UsageError."""
    dest = Path(dest)
    if not os.path.lexists(dest):
        return
    if not force:
        raise UsageError(
            f"{dest} exists already; give another name, or force (--force) to replace it"
        )
    if (
        dest.is_symlink()
        or not dest.is_dir()
        or not ((dest / MANIFEST).is_file() or not any(dest.iterdir()))
    ):
        raise UsageError(
            f"{dest} is not a converted folder, so it is not replaced; remove it yourself"
        )


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda size: None) -> str:
    """sha256 of a file, in hex. ``on_bytes`` is called with the size of each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()
