"""Tensors in safetensors files: described by their headers, read on demand, written one by one.

Opening a file reads only its header. The bytes of a tensor are read (pread) only while an array of
it exists, so memory depends on the largest tensor, not on the file. Nothing is mapped: a mapped
file that shrinks kills the process.

The safetensors library checks each header first. Its NumPy reader is not used for the values: it
refuses bfloat16 and 8-bit floats, does not tell where a tensor lies in the file, and does not tell
users what is wrong. Its writer needs all tensors of a file in memory at once.
Format: https://github.com/huggingface/safetensors (8 bytes with the header length, little-endian; a
JSON header; the tensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import CheckpointError, ConfigError, one_line, quoted, shortened
from mlxdiff.machine.disk import SourceFile, read_json
from mlxdiff.weights.quantization import (
    E4M3,
    E5M2,
    E8M0,
    Beside,
    Packed,
    Quantization,
    dequantize,
    packed_shapes,
    quantize,
)

Shape = tuple[int, ...]

MAX_HEADER_BYTES = 8 << 20  # SDXL has 400 kB; a LoRA with a list of its training texts some MB
MAX_EXPLAINED_BYTES = 2 << 20  # a larger header that safetensors refuses is not looked at again
MAX_NAME = 1000

# Type name in a safetensors header -> bytes per value, NumPy type of the stored bits.
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
    "F8_E8M0": (1, "|u1"),
}
EIGHT_BITS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0}
"""8-bit type -> value of each byte."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that weights in a converted folder can have."""

READABLE = (*FLOATS, "F8_E4M3", "F8_E5M2")
"""Types that weights in a checkpoint can have."""

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""User's name of each type that mlxdiff writes -> its name in safetensors."""


def width_of(dtype: str) -> int:
    """Return the bytes of a value of this stored type."""
    return _STORED[dtype][0]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor with a known shape and type. Its values are read on demand.

    Attributes:
        shape: shape of the array that ``read`` returns.
        dtype: safetensors' name of the stored type ("F16", "BF16", ...).
        read: reads the values. BF16 and the 8-bit floats become float32, exactly. The array may be
            read-only. Raises: CheckpointError.
        form: name of the form that ``read`` decodes, for example "gguf q4_K". Empty if the file
            stores the values themselves, in ``dtype``.
        stored: bytes of the form in the file; 0 without a form.
        bits: for the 8-bit floats, reads the stored bytes as uint8. None for other types.
    """

    shape: Shape
    dtype: str
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)
    form: str = field(default="", kw_only=True)
    stored: int = field(default=0, kw_only=True)
    bits: Callable[[], np.ndarray] | None = field(
        default=None, repr=False, compare=False, kw_only=True
    )

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in ``dtype``."""
        return self.size * _STORED[self.dtype][0]

    @property
    def file_bytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        return self.stored or self.nbytes


@dataclass(frozen=True)
class QuantizedTensor(LazyTensor):
    """A tensor that is stored in few bits. ``read`` returns its values as float32.

    Attributes:
        dtype: type name of the stored scales (in the float modes: of scales that would be stored).
        quantization: how the tensor is stored.
        read_packed: reads the stored arrays. Raises: CheckpointError.
        has_global_scale: True if a factor for the whole tensor is stored beside the scales.
    """

    quantization: Quantization
    read_packed: Callable[[], Packed] = field(repr=False, compare=False)
    has_global_scale: bool = field(default=False, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales, biases and global scale."""
        return sum(math.prod(shape) * _STORED[kind][0] for shape, kind in self.parts().values())

    def parts(self) -> dict[str, tuple[Shape, str]]:
        """Return name of each stored array -> shape, type.

        The names are "weight", "scales", "biases" (affine) and "global_scale" (if it has one).
        """
        scales = self.dtype if self.quantization.mode == "affine" else "U8"
        parts = {
            part: (shape, "U32" if part == "weight" else scales)
            for part, shape in packed_shapes(self.shape, self.quantization).items()
        }
        return parts | {"global_scale": ((), "F32")} if self.has_global_scale else parts

    def fits_exactly(self, dtype: str) -> bool:
        """Return True if scales and biases keep their values in this type.

        Args:
            dtype: "float32", "float16" or "bfloat16".
        """
        return self.quantization.mode != "affine" or DTYPES[dtype] in (self.dtype, "F32")


@dataclass(frozen=True)
class AdaptedTensor(QuantizedTensor):
    """A tensor that is stored in few bits, with a change beside it in full precision.

    ``read`` returns the changed values, ``read_packed`` the stored arrays without the change.

    Attributes:
        read_beside: reads the change. Raises: CheckpointError.
    """

    read_beside: Callable[[], Beside] = field(repr=False, compare=False)


def quantized(
    shape: Shape,
    dtype: str,
    how: Quantization,
    read_packed: Callable[[], Packed],
    *,
    has_global_scale: bool = False,
    form: str = "",
    stored: int = 0,
) -> QuantizedTensor:
    """Make a lazy tensor whose stored arrays come from ``read_packed``.

    Args: see QuantizedTensor.
    """
    return QuantizedTensor(
        shape,
        dtype,
        lambda: dequantize(read_packed()),
        how,
        read_packed,
        has_global_scale=has_global_scale,
        form=form,
        stored=stored,
    )


def quantize_tensor(
    name: str, tensor: LazyTensor, how: Quantization, dtype: str, fitted: bool = False
) -> LazyTensor:
    """Make a tensor that is rounded whenever it is read: first to ``dtype``, then to few bits.

    Args:
        name: name for messages.
        dtype: type of the scales: "float16", "bfloat16" or "float32".
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
    """A safetensors file with a checked header: every byte belongs to exactly one tensor.

    Attributes:
        path: the file.
        metadata: the strings under ``__metadata__``.
        tensors: name -> LazyTensor, in the order of the header.
    Raises: CheckpointError if the file is not a complete and sound safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = _opened(self.path)
        header, start, end = _read_header(file)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fault("__metadata__ is not a table of strings")
        self.metadata: dict[str, str] = metadata
        self.tensors: dict[str, LazyTensor] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            if len(name) > MAX_NAME:
                raise self._fault(f"a tensor's name has {len(name)} characters")
            if not is_unicode(name):
                raise self._fault(f"the name of tensor {name!r} is not valid Unicode")
            tensor, begin, stop = self._entry(file, name, entry, start)
            self.tensors[name] = tensor
            spans.append((begin, stop, name))
        place = 0
        for begin, stop, name in sorted(spans):
            if begin != place:
                what = "overlaps another tensor" if begin < place else "has a gap before it"
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

    def _entry(
        self, file: SourceFile, name: str, entry: Any, start: int
    ) -> tuple[LazyTensor, int, int]:
        """Check one header entry. Return the tensor, its begin and its end in the data."""
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._fault(
                f"tensor {name!r}: expected dtype, shape and data_offsets in the header"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _STORED:
            known = ", ".join(_STORED)
            raise self._fault(f"tensor {name!r} has type {quoted(dtype)}; known: {known}")
        if not _are_sizes(shape):
            raise self._fault(f"tensor {name!r} has shape {quoted(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self._fault(f"tensor {name!r} has data_offsets {quoted(offsets)}")
        begin, stop = offsets
        size = math.prod(shape) * _STORED[dtype][0]
        if stop - begin != size:
            raise self._fault(
                f"tensor {name!r} has {stop - begin} bytes; {dtype} {shape} needs {size}"
            )
        tensor = lazy(file, name, dtype, tuple(shape), start + begin)
        return tensor, begin, stop


def lazy(
    file: SourceFile,
    name: str,
    dtype: str,
    shape: Shape,
    offset: int,
    strides: tuple[int, ...] | None = None,
) -> LazyTensor:
    """Make the lazy tensor of these bytes of a file. Args: see ``read_values``."""

    def bits() -> np.ndarray:
        return read_values(file, name, "U8", shape, offset, strides)

    return LazyTensor(
        shape,
        dtype,
        lambda: read_values(file, name, dtype, shape, offset, strides),
        bits=bits if dtype.startswith("F8_") else None,
    )


def _are_sizes(values: Any) -> bool:
    """Return True if this is a list of integers that can be sizes or offsets."""
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def is_unicode(text: str) -> bool:
    """Return True if a text holds no half of a surrogate pair, so that it can be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _opened(path: Path) -> SourceFile:
    """Open a weight file. Raises: CheckpointError."""
    try:
        return SourceFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _read_header(file: SourceFile) -> tuple[dict[str, Any], int, int]:
    """Return the header of a safetensors file, the offset of its data, and the file's length."""
    path, end = file.path, file.size
    try:
        prefix = bytes(file.read(0, min(end, 8)))
        length = int.from_bytes(prefix, "little")
        if end >= 8 + length > MAX_HEADER_BYTES and not foreign(prefix, end):
            raise CheckpointError(
                f"{path}: its header has {length} bytes; at most {MAX_HEADER_BYTES} are read"
            )
        if len(prefix) < 8 or length > end - 8:
            raise CheckpointError(f"{path}: {_not_safetensors(prefix, end)}")
        refused = _refusal(path)
        if refused and length > MAX_EXPLAINED_BYTES:
            raise CheckpointError(f"{path}: not a sound safetensors file ({refused})")
        raw = file.read(8, length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file (its header is not JSON: {one_line(error)})"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file (its header is not a JSON object)")
    return header, 8 + length, end


def _refusal(path: Path) -> str:
    """Return the reason why the safetensors library refuses a file, or ""."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np", backend="pread"):
            return ""
    except (SafetensorError, OSError, ValueError) as error:
        return one_line(error)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{quoted(name)} occurs twice")
        result[name] = value
    return result


def shown(text: str) -> str:
    """Prepare text from a file for a message: one line, limited length, no control characters."""
    return shortened(text if text.isprintable() else repr(text))


def _not_safetensors(prefix: bytes, size: int) -> str:
    """Describe a file whose first bytes are not a safetensors header."""
    if prefix.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a PyTorch pickle, not a safetensors file"
    return foreign(prefix, size) or f"not a safetensors file, or truncated ({size} bytes)"


def foreign(prefix: bytes, size: int) -> str | None:
    """Describe a file of a common other kind. Return None if the kind is unknown.

    Args:
        prefix: the first bytes of the file.
        size: the length of the file.
    """
    if size == 0:
        return "is empty"
    if prefix.startswith(b"version "):
        return "is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
    if prefix.startswith(b"GGUF"):
        return "is a GGUF file; give it as a model, or use the safetensors file instead"
    if prefix.lstrip().startswith(b"<"):
        return "is a web page, not the weights; download it again"
    return None


def read_values(
    file: SourceFile,
    name: str,
    dtype: str,
    shape: Shape,
    offset: int,
    strides: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Read one tensor.

    Args:
        file: file that holds the bytes.
        name: name of the tensor, for messages.
        dtype, shape: see LazyTensor.
        offset: position of the first value in the file, in bytes.
        strides: step to the next value along each axis, in values, not negative. None: contiguous.
    Returns: see ``LazyTensor.read``; read-only.
    Raises: CheckpointError, also if the file has become shorter.
    """
    width, stored = _STORED[dtype]
    if math.prod(shape) == 0:
        return _decoded(np.empty(shape, stored), dtype)
    if strides is None:
        count = math.prod(shape)
    else:
        count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    try:
        data = file.read(offset, count * width)
    except OSError as error:
        raise CheckpointError(
            f"{file.path}: tensor {shown(name)!r} cannot be read ({error.strerror})"
        ) from None
    values = np.frombuffer(data, stored)
    values.flags.writeable = False
    if strides is None:
        values = values.reshape(shape)
    else:
        steps = [step * width for step in strides]
        values = np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False)
    return _decoded(values, dtype)


def _decoded(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Convert types that NumPy lacks to float32. Leave other types unchanged."""
    values = bits
    if dtype == "BF16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    elif dtype in EIGHT_BITS:
        values = EIGHT_BITS[dtype][bits]
    return values


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    return TensorFile(path).tensors


def open_weights(
    path: str | os.PathLike[str],
    open_file: Callable[[Path], Mapping[str, LazyTensor]] = _open_safetensors,
) -> dict[str, LazyTensor]:
    """Open all tensors of a file, or of the shards in an ``.index.json``.

    Args:
        path: file or index.
        open_file: opens one file. Default: as safetensors only.
    Raises: CheckpointError, also for a missing shard, a tensor that is not in the shard of the
        index, and a tensor in two shards.
    """
    path = Path(path)
    if not path.name.endswith(".json"):
        return dict(open_file(path))
    tensors: dict[str, LazyTensor] = {}
    place: dict[str, str] = {}
    weight_map = _read_weight_map(path)
    for shard in sorted(set(weight_map.values())):
        if not os.path.isfile(path.parent / shard):
            raise CheckpointError(
                f"{path}: the shard {shard} is missing from the folder; download it"
            )
        for name, tensor in open_file(path.parent / shard).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in {place[name]} and in {shard}")
            tensors[name], place[name] = tensor, shard
    for name, shard in weight_map.items():
        if place.get(name) != shard:
            raise CheckpointError(
                f"{path}: tensor {name!r} is not in {shard}, although the index says so; download "
                "the index and the shards again"
            )
    return tensors


def _read_weight_map(path: Path) -> dict[str, str]:
    """Read the ``weight_map`` of an index: tensor name -> file name in the same folder."""
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map, so it is not an index of shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise CheckpointError(
                f"{path}: {shard!r}, for {name!r}, is not a file name in this folder"
            )
        if not shard.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{path}: names {shard!r}, which is not a weight file")
    return weight_map


def shard_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files that ``open_weights`` reads: the file, or the index and its shards."""
    path = Path(path)
    if not path.name.endswith(".json"):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_read_weight_map(path).values())))]


def raise_faults(where: str, **faults: list[str]) -> None:
    """Raise a CheckpointError for these faults (kind -> names). Do nothing if all are empty."""
    parts = []
    for kind, names in faults.items():
        if names:
            few = ", ".join(map(shown, names[:10])) + (", ..." if len(names) > 10 else "")
            parts.append(f"{len(names)} {kind} tensor{'s'[: len(names) > 1]}: {few}")
    if parts:
        raise CheckpointError(f"{where}: {'; '.join(parts)}")


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Round values to the stored type, to nearest even. bfloat16 values become their bits (uint16).

    Args:
        array: float16, float32 or float64, finite.
        dtype: "float32", "float16" or "bfloat16".
        name: name of the tensor, for the message.
    Raises: CheckpointError if a value is beyond the range of the type.
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
    """Return the values that ``cast`` would store, as floating-point numbers."""
    return _decoded(cast(array, dtype, "a value"), DTYPES[dtype])


def stored_arrays(
    name: str, tensor: LazyTensor, dtype: str, label: str = ""
) -> dict[str, tuple[Shape, str, Callable[[Any], np.ndarray]]]:
    """Return the arrays to write: name -> shape, type name, function of the read values.

    Args:
        label: name of the tensor in messages.
    """
    if not isinstance(tensor, QuantizedTensor):
        return {name: (tensor.shape, DTYPES[dtype], lambda values: cast(values, dtype, label))}
    stem = name.removesuffix("weight")

    def part_of(part: str, kind: str) -> Callable[[Any], np.ndarray]:
        def get(packed: Packed) -> np.ndarray:
            values: np.ndarray = np.asarray(getattr(packed, part))
            if part == "global_scale" or kind in ("U32", "U8"):
                return values
            return cast(values, dtype, label)

        return get

    tensor = replace(tensor, dtype=DTYPES[dtype])

    return {
        stem + part: (shape, kind, part_of(part, kind))
        for part, (shape, kind) in tensor.parts().items()
    }


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: str,
    on_tensor: Callable[[int, str], None] = lambda size, name: None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file, one tensor at a time, in the given order.

    Args:
        path: file to write.
        tensors: name -> tensor.
        dtype: "float32", "float16" or "bfloat16".
        on_tensor: called with bytes and name after each tensor.
        metadata: strings for the header. None: that the arrays are in MLX's layout.
    Returns: sha256 of the file, in hex.
    Raises: CheckpointError if a tensor cannot be read or cast.
    """
    folder = path.parent.name
    arrays = {
        name: stored_arrays(name, t, dtype, f"{folder}/{name}") for name, t in tensors.items()
    }
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "mlx"})}
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
                values = np.asarray(get(loaded), order="C")
                if values.shape != shape:
                    raise AssertionError(f"{part}: read {values.shape}, announced {shape}")
                put(values.reshape(-1).view(np.uint8).data)
                size += values.nbytes
            on_tensor(size, name)
    return digest.hexdigest()


def stored_bytes(tensor: LazyTensor, dtype: str) -> int:
    """Return the bytes of a tensor in a converted folder of this type."""
    if isinstance(tensor, QuantizedTensor):
        return replace(tensor, dtype=DTYPES[dtype]).nbytes
    return tensor.size * _STORED[DTYPES[dtype]][0]
