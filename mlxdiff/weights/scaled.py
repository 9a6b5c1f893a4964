"""Quantized layers in checkpoints of ComfyUI and similar tools: weights of few bits, and scales.

``decode`` joins the arrays of each layer into one lazy tensor with the layer's shape. A form whose
values MLX can hold is a QuantizedTensor. The others are decoded to float32 when they are read, some
rows at a time.

A layer has its form from the first of these sources:

1. ``LAYER.comfy_quant``: bytes of a JSON text, for example ``{"format": "nvfp4"}``.
2. The file's metadata, ``_quantization_metadata``: ``{"layers": {LAYER: {"format": "nvfp4"}}}``.
3. A scale beside an 8-bit float, without a mark: ``LAYER.scale_weight`` or ``LAYER.weight_scale``.

Source: the eager CPU code of comfy-kitchen 0.2.40, which defines these forms; ComfyUI's
``comfy/ops.py`` and ``comfy/utils.py`` for names and marks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import CheckpointError
from mlxdiff.weights.quantization import (
    E4M3,
    Packed,
    Quantization,
    dequantize,
    fits,
    packed,
    unchecked,
)
from mlxdiff.weights.tensors import EIGHT_BITS, FLOATS, LazyTensor, Shape, quantized, shown

MARK = ".comfy_quant"
METADATA = "_quantization_metadata"
MAX_MARK = 1 << 16  # bytes of a mark; real ones have some dozens
PREFIX = "model.diffusion_model."
"""Prefix that some tools add to the layers' names, or leave out of them, in the metadata only."""

_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_OLD_MARK = re.compile(r"(?:.*\.)?scaled_fp8")
_ACTIVATION = re.compile(r".*\.(?:scale_input|input_scale)")
_ATTENTION = re.compile(r"(?:.*\.)?comfy_attention\.config")
_FOR_INT8 = "scales of the activations in 8 bits; mlxdiff computes with the dequantized weights"
_ROWS = 1 << 20  # values that are decoded at a time

# Marks of weights that only their own programs can run -> name and way out.
FOREIGN: tuple[tuple[str, str], ...] = (
    (
        r".*\.(?:qweight|wscales|wtscale|smooth_factor(?:_orig)?|proj_down|proj_up)",
        "weights in SVDQuant's form (Nunchaku), whose layout only its CUDA kernels read; use the "
        "original model, and 4 bits for small weights",
    ),
    (
        r".*\.quant_state\.bitsandbytes__\w+|.*\.weight\.(?:absmax|quant_map|nested_\w+)|.*\.SCB",
        "weights quantized by bitsandbytes; use the original model, and 4 bits for small weights",
    ),
    (
        r".*\.weight\._(?:data|scale|shift)",
        "weights quantized by quanto; use the original model, and 8 bits for small weights",
    ),
    (
        r".*\.weight(?:_|:_?)(?:qdata|tensor_data)|.*\._weight_qdata",
        "weights quantized by torchao; use the original model, and 8 bits for small weights",
    ),
    (
        r".*\.(?:svd_up|svd_down|zero_point)",
        "weights quantized by SDNQ; use the original model, and 4 bits for small weights",
    ),
)


@dataclass
class Decoded:
    """The tensors of a file after decoding.

    Attributes:
        tensors: name -> tensor; each quantized layer is one tensor.
        ignored: (name, reason) of what was read here, or has no use.
        forms: names of the forms that were found -> number of layers.
    """

    tensors: dict[str, LazyTensor]
    ignored: list[tuple[str, str]] = field(default_factory=list)
    forms: dict[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sum up the forms in one line, or nothing."""
        if not self.forms:
            return ()
        found = ", ".join(f"{count} x {form}" for form, count in self.forms.items())
        return (f"quantized tensors in the file: {found}",)


def foreign_form(tensors: Mapping[str, LazyTensor]) -> str | None:
    """Describe quantized weights that only another program reads. Return None for other files."""
    for pattern, words in FOREIGN:
        if any(map(re.compile(pattern).fullmatch, tensors)):
            return words
    for name in tensors:
        weight = tensors.get(f"{name.removesuffix('.scale')}.weight")
        if name.endswith(".scale") and weight is not None and weight.dtype in ("I8", "U8"):
            return FOREIGN[-1][1]  # SDNQ without the parts of its other forms
    return None


def decode(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Decoded:
    """Join the arrays of each quantized layer into one tensor. Other tensors stay as they are.

    Args:
        path: the file, for messages.
        tensors: all tensors of the file.
        metadata: texts in its header.
    Raises: CheckpointError for a form that is unknown, incomplete or contradictory.
    """
    result = Decoded(dict(tensors))
    rest = result.tensors
    for name in tensors:
        if _ATTENTION.fullmatch(name):
            reason = "asks for attention in 8 bits; mlxdiff computes it in the type of the run"
        elif _OLD_MARK.fullmatch(name):
            reason = "a mark of scaled 8-bit floats; it was read"
        elif _ACTIVATION.fullmatch(name):
            reason = _FOR_INT8
        else:
            continue
        del rest[name]
        result.ignored.append((name, reason))
    marks = _marks(path, rest, metadata)
    result.ignored += [
        (name, "a mark of the quantized form; it was read")
        for name in tensors
        if name.endswith(MARK)
    ]
    for name in list(rest):
        stem, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale") and f"{stem}.weight" in rest:
            if stem not in marks:
                marks[stem] = {"format": _SCALED}
    for layer, mark in marks.items():
        tensor = _Layer(path, layer, rest, mark).tensor()
        rest[f"{layer}.weight"] = tensor
    for tensor in rest.values():
        if tensor.form:
            result.forms[tensor.form] = result.forms.get(tensor.form, 0) + 1
    return result


def _marks(
    path: Path, tensors: dict[str, LazyTensor], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return layer -> its mark. Remove the marks from the tensors."""
    marks: dict[str, dict[str, Any]] = {}
    for layer, mark in _listed(path, tensors, metadata).items():
        marks[layer] = mark
    for name in [name for name in tensors if name.endswith(MARK)]:
        layer, tensor = name.removesuffix(MARK), tensors.pop(name)
        if tensor.dtype not in ("U8", "I8") or tensor.size > MAX_MARK:
            raise CheckpointError(f"{path}: {shown(name)} is not a text")
        mark = _checked(path, layer, _json(path, name, tensor.read().tobytes()))
        if f"{layer}.weight" not in tensors and f"{PREFIX}{layer}.weight" in tensors:
            layer = PREFIX + layer
        if marks.setdefault(layer, mark)["format"] != mark["format"]:
            raise CheckpointError(
                f"{path}: {shown(layer)} is {marks[layer]['format']} in the metadata, but "
                f"{mark['format']} in {shown(name)}; the file contradicts itself, use another"
            )
        marks[layer] = mark
    return marks


def _listed(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return layer -> mark from the metadata of the file."""
    if METADATA not in metadata:
        return {}
    data = _json(path, METADATA, metadata[METADATA].encode())
    layers = data.get("layers") if isinstance(data, dict) else None
    if not isinstance(layers, dict):
        raise CheckpointError(f"{path}: {METADATA} lists no layers")
    marks: dict[str, dict[str, Any]] = {}
    for name, value in layers.items():
        spellings = (name, PREFIX + name, name.removeprefix(PREFIX))
        layer = next((one for one in spellings if f"{one}.weight" in tensors), name)
        if layer in marks:
            raise CheckpointError(f"{path}: {METADATA} lists {shown(layer)} twice")
        marks[layer] = _checked(path, name, value)
    return marks


def _json(path: Path, name: str, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: {shown(name)} is not JSON") from None


def _checked(path: Path, layer: str, mark: Any) -> dict[str, Any]:
    """Return a mark as a table. A bare text is a format."""
    if isinstance(mark, str):
        mark = {"format": mark}
    if not isinstance(mark, dict) or not isinstance(mark.get("format"), str):
        raise CheckpointError(
            f"{path}: {shown(layer)} is quantized, but its mark names no format; use another file "
            "of the model"
        )
    return mark


_SCALED = "scaled"
"""Form of a layer without a mark: the type of the weight decides."""


class _Layer:
    """One quantized layer: checks its arrays and makes its tensor.

    Args:
        path: the file, for messages.
        name: name of the layer.
        tensors: the tensors of the file. The layer's arrays are removed.
        mark: the layer's mark.
    """

    def __init__(
        self, path: Path, name: str, tensors: dict[str, LazyTensor], mark: Mapping[str, Any]
    ) -> None:
        self.path, self.name, self.mark = path, name, mark
        self._tensors = tensors
        self.bytes = 0

    def tensor(self) -> LazyTensor:
        """Return the weight of the layer, with the layer's shape. Raises: CheckpointError."""
        form = self.mark["format"]
        if form not in _FORMS:
            if form == "svdquant_w4a4":
                raise self.fault(f"holds {FOREIGN[0][1]}")
            raise self.fault(
                f"has the form {shown(form)!r}, which is not supported; supported: "
                f"{', '.join(name for name in _FORMS if name != _SCALED)}; use another file of the "
                "model"
            )
        for part in ("pre_quant_scale", "weight_pre_quant_scale"):
            if f"{self.name}.{part}" in self._tensors:
                raise self.fault(f"has a {part}, which is not supported; use another file")
        return _quiet(_FORMS[form](self))

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: the layer {shown(self.name)} {what}")

    def take(self, part: str, *dtypes: str) -> LazyTensor:
        """Take one of the layer's arrays. Check its type."""
        tensor = self.find(part, *dtypes)
        if tensor is None:
            raise self.fault(
                f"is {self.mark['format']}, but has no {part}; the file is incomplete, download it "
                "again"
            )
        return tensor

    def find(self, part: str, *dtypes: str) -> LazyTensor | None:
        """Take an array that can be missing."""
        tensor = self._tensors.pop(f"{self.name}.{part}", None)
        if tensor is None:
            return None
        if tensor.dtype not in dtypes:
            raise self.fault(
                f"is {self.mark['format']}, but its {part} is {tensor.dtype}; expected "
                f"{' or '.join(dtypes)}"
            )
        self.bytes += tensor.nbytes
        return tensor

    def number(self, key: str, default: int) -> int:
        """Return a positive integer of the mark. Some tools put it into a table ``params``."""
        value = self.mark.get(key, self._params.get(key, default))
        if type(value) is not int or not 0 < value <= 1 << 16:
            raise self.fault(f"has {key} = {shown(repr(value))}; expected a positive integer")
        return value

    def flag(self, key: str) -> bool:
        return bool(self.mark.get(key, self._params.get(key, False)))

    @property
    def _params(self) -> Mapping[str, Any]:
        params = self.mark.get("params", {})
        return params if isinstance(params, dict) else {}

    def expect(self, part: str, tensor: LazyTensor, *shapes: Shape) -> None:
        if tensor.shape not in shapes:
            raise self.fault(
                f"has a {part} of shape {tensor.shape}; expected "
                f"{' or '.join(map(str, dict.fromkeys(shapes)))}"
            )

    def matrix(self, tensor: LazyTensor) -> tuple[int, int]:
        """Return rows and stored columns of a matrix."""
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise self.fault(
                f"is {self.mark['format']}, which is a form of matrices, but has shape "
                f"{tensor.shape}"
            )
        return tensor.shape[0], tensor.shape[1]

    def shape(self, rows: int, columns: int, step: int) -> tuple[int, int]:
        """Return the layer's shape without the padding: at most ``step - 1`` rows and columns."""
        given = self.mark.get("orig_shape", self._params.get("orig_shape"))
        if given is None:
            return rows, columns
        sound = isinstance(given, list) and len(given) == 2
        if not sound or not all(
            type(n) is int and whole - step < n <= whole and n > 0
            for n, whole in zip(given, (rows, columns), strict=True)
        ):
            raise self.fault(
                f"has orig_shape {shown(repr(given))}, which does not fit its {rows} x {columns}"
            )
        return given[0], given[1]

    def rotation(self, columns: int) -> int:
        """Return the group size of ConvRot's rotation. Check it."""
        size = self.number("convrot_groupsize", 256)
        if size not in (4, 16, 64, 256, 1024) or columns % size:
            raise self.fault(
                f"is rotated in groups of {size}, which do not fit its {columns} columns"
            )
        return size

    def decoded(
        self, shape: Shape, rows: Callable[[], Callable[[slice], np.ndarray]]
    ) -> LazyTensor:
        """Make a tensor that is decoded some rows at a time.

        Args:
            shape: shape of the layer.
            rows: opens the arrays; returns the function from a slice of rows to their values,
                (N, ...), of which the first columns count.
        """

        def read() -> np.ndarray:
            get, out = rows(), np.empty(shape, np.float32)
            step = max(1, _ROWS // max(1, math.prod(shape[1:])))
            for start in range(0, shape[0], step):
                part = slice(start, min(start + step, shape[0]))
                values = get(part)
                out[part] = values[:, : shape[1]] if values.shape[1:] != shape[1:] else values
            return out

        return LazyTensor(shape, "F32", read, form=self.form, stored=self.bytes)

    def packed(
        self,
        shape: Shape,
        how: Quantization,
        read: Callable[[], Packed],
        *,
        dtype: str = "F32",
        has_global_scale: bool = False,
    ) -> LazyTensor:
        """Make a tensor that MLX can hold. ``dtype`` is the type of its scales."""
        return quantized(
            shape,
            dtype,
            how,
            read,
            has_global_scale=has_global_scale,
            form=self.form,
            stored=self.bytes,
        )

    @property
    def form(self) -> str:
        return str(self.mark["format"])


# ------------------------------------------------------------------------------------------- 8 bits


def _quiet(tensor: LazyTensor) -> LazyTensor:
    """The tensor, read without NumPy's warnings of values that are not finite."""

    def read() -> np.ndarray:
        with unchecked():
            return tensor.read()

    return replace(tensor, read=read)


def _row_scales(layer: _Layer, scale: LazyTensor, shape: Shape) -> Callable[[], np.ndarray]:
    """Check the scale of a weight: for the whole tensor, or for each row.

    Returns: reads it as (1, ...) or (rows, ...), to be multiplied.
    """
    rows, ones = shape[0], (1,) * (len(shape) - 1)
    single = ((), (1,), (1, 1), (1, *ones))
    layer.expect("weight_scale", scale, *single, (rows,), (rows, 1), (rows, *ones))
    return lambda: np.asarray(scale.read(), np.float32).reshape(-1, *ones)


def _eight_bit_floats(layer: _Layer, weight: LazyTensor, scale: LazyTensor | None) -> LazyTensor:
    """Weights in 8-bit floats, or in half precision that kept its scale."""
    if scale is None:
        return weight
    read_scale = _row_scales(layer, scale, weight.shape)
    how, bits = Quantization(8, 32, "mxfp8"), weight.bits
    if (
        weight.dtype == "F8_E4M3"
        and bits is not None
        and scale.size == 1
        and len(weight.shape) == 2
        and fits(weight.shape, how)
    ):

        def read() -> Packed:
            whole = packed(bits(), _even_scales(weight.shape, how), None, how)
            return whole._replace(global_scale=np.float32(read_scale().reshape(-1)[0]))

        return layer.packed(weight.shape, how, read, has_global_scale=True)

    def rows() -> Callable[[slice], np.ndarray]:
        scales = read_scale()
        if bits is None:
            values = weight.read()
            return lambda part: values[part].astype(np.float32) * _of(scales, part)
        codes, table = bits(), EIGHT_BITS[weight.dtype]
        return lambda part: table[codes[part]] * _of(scales, part)

    return layer.decoded(weight.shape, rows)


def _even_scales(shape: Shape, how: Quantization) -> np.ndarray:
    """Return e8m0 scales of 1."""
    return np.full((*shape[:-1], shape[-1] // how.group_size), 127, np.uint8)


def _of(scales: np.ndarray, part: slice) -> np.ndarray:
    return scales if len(scales) == 1 else scales[part]


def _float8(layer: _Layer) -> LazyTensor:
    weight = layer.take("weight", *_EIGHT_BITS, "U8", "I8", *FLOATS)
    if weight.dtype in ("U8", "I8"):  # the bits in a type of older files
        weight = _as_float8(layer, weight)
    scale = layer.find("weight_scale", *FLOATS) or layer.find("scale_weight", *FLOATS)
    return _eight_bit_floats(layer, weight, scale)


def _as_float8(layer: _Layer, weight: LazyTensor) -> LazyTensor:
    if layer.form != "float8_e4m3fn":
        raise layer.fault(f"is {layer.form} in a container of {weight.dtype}; use another file")

    def bits() -> np.ndarray:
        return weight.read().view(np.uint8)

    return LazyTensor(weight.shape, "F8_E4M3", lambda: E4M3[bits()], bits=bits)


def _scaled(layer: _Layer) -> LazyTensor:
    """A layer without a mark: an 8-bit float, or half precision, with a scale beside it."""
    weight = layer.take("weight", *_EIGHT_BITS, *FLOATS, "I8", "U8")
    if weight.dtype in ("I8", "U8"):
        raise layer.fault(
            f"has a weight of {weight.dtype} and a scale, but no mark of its form (comfy_quant); "
            "use another file of the model"
        )
    parts = [layer.find(part, *FLOATS) for part in ("scale_weight", "weight_scale")]
    found = [part for part in parts if part is not None]
    if len(found) != 1:
        raise layer.fault("has a scale_weight and a weight_scale; the file contradicts itself")
    name = "float8" if weight.dtype in _EIGHT_BITS else "scaled half"
    layer.mark = {"format": f"{name}_{weight.dtype.lower().removeprefix('f8_')}"}
    return _eight_bit_floats(layer, weight, found[0])


def _int8(layer: _Layer) -> LazyTensor:
    weight = layer.take("weight", "I8")
    shape = weight.shape
    if len(shape) not in (2, 4) or 0 in shape:
        raise layer.fault(f"is int8 with shape {shape}; expected a matrix or a convolution")
    scale = layer.take("weight_scale", *FLOATS)
    read_scale = _row_scales(layer, scale, shape)
    if layer.flag("convrot"):
        layer.mark = {**layer.mark, "format": "int8_tensorwise convrot"}
        _, columns = layer.matrix(weight)
        size = layer.rotation(columns)

        def rotated() -> Callable[[slice], np.ndarray]:
            codes, scales = weight.read(), read_scale()
            return lambda part: _unrotated(codes[part] * _of(scales, part), size)

        return layer.decoded(shape, rotated)

    def rows() -> Callable[[slice], np.ndarray]:
        codes, scales = weight.read(), read_scale()
        return lambda part: codes[part] * _of(scales, part)

    groups = [size for size in (128, 64, 32) if len(shape) == 2 and shape[1] % size == 0]
    if scale.size != 1 or not groups:
        return layer.decoded(shape, rows)
    how = Quantization(8, groups[0])

    def read() -> Packed:
        # 1 * code - 128 is exact, so the scale of the tensor rounds each value once.
        codes = weight.read().view(np.uint8) ^ np.uint8(128)
        scales = np.ones((shape[0], shape[1] // how.group_size), np.float16)
        whole = packed(codes, scales, scales * np.float16(-128), how)
        return whole._replace(global_scale=np.float32(read_scale().reshape(-1)[0]))

    return layer.packed(shape, how, read, dtype="F16", has_global_scale=True)


# ------------------------------------------------------------------------------ ConvRot's rotation


@cache
def _rotation(size: int) -> np.ndarray:
    """Return ConvRot's orthogonal matrix: the Kronecker power of a matrix of 4, normalized.

    It is symmetric and its own inverse; all its entries are powers of two.
    """
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, four)
    return (matrix / np.float32(math.sqrt(size))).astype(np.float32)


def _unrotated(rows: np.ndarray, size: int) -> np.ndarray:
    """Undo the rotation of each group of columns."""
    groups = rows.astype(np.float32, copy=False).reshape(-1, size)
    return (groups @ _rotation(size)).reshape(rows.shape)


# ------------------------------------------------------------------------------------------- blocks


def _unblocked(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return scales in rows from cuBLAS's order: tiles of 128 x 4, as 32 x (4 x 4) in memory.

    Source: NVIDIA's cuBLAS documentation, "1D block scaling factors layout".
    """
    tiles = scales.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(tiles.shape[0] * 128, -1)[:rows, :columns]


def _block_scales(
    layer: _Layer, part: str, rows: int, columns: int, *dtypes: str
) -> Callable[[], np.ndarray]:
    """Check scales in cuBLAS's order. Returns: reads their bytes, (rows, columns)."""
    scale = layer.take(part, *dtypes)
    layer.expect(part, scale, (-(-rows // 128) * 128, -(-columns // 4) * 4))
    read = scale.read if scale.bits is None else scale.bits
    return lambda: np.ascontiguousarray(_unblocked(read().view(np.uint8), rows, columns))


def _mxfp8(layer: _Layer) -> LazyTensor:
    weight = layer.take("weight", "F8_E4M3", "U8")
    rows, columns = layer.matrix(weight)
    if columns % 32:
        raise layer.fault(f"is mxfp8 with {columns} columns; expected a multiple of 32")
    read_scales = _block_scales(layer, "weight_scale", rows, columns // 32, "F8_E8M0", "U8")
    read_codes = weight.read if weight.bits is None else weight.bits
    return _blocks(layer, rows, columns, 32, Quantization(8, 32, "mxfp8"), read_codes, read_scales)


def _nvfp4(layer: _Layer) -> LazyTensor:
    weight = layer.take("weight", "U8")
    rows, half = layer.matrix(weight)
    if half % 8:
        raise layer.fault(f"is nvfp4 with {2 * half} columns; expected a multiple of 16")
    read_scales = _block_scales(layer, "weight_scale", rows, half // 8, "F8_E4M3", "U8")
    scale = layer.take("weight_scale_2", *FLOATS)
    layer.expect("weight_scale_2", scale, (), (1,))

    def read_codes() -> np.ndarray:
        octets = weight.read()  # the high half of a byte is the even column
        return np.stack([octets >> 4, octets & 15], axis=-1).reshape(rows, 2 * half)

    how = Quantization(4, 16, "nvfp4")
    return _blocks(layer, rows, 2 * half, 16, how, read_codes, read_scales, scale)


def _blocks(
    layer: _Layer,
    rows: int,
    columns: int,
    padding: int,
    how: Quantization,
    read_codes: Callable[[], np.ndarray],
    read_scales: Callable[[], np.ndarray],
    scale: LazyTensor | None = None,
) -> LazyTensor:
    """Make the tensor of a form with block scales that MLX knows. Remove the padding."""
    shape = layer.shape(rows, columns, padding)
    if shape[1] % how.group_size:
        return _padded(layer, shape, partial(_all_blocks, how, read_codes, read_scales, scale))

    def read() -> Packed:
        codes, scales = read_codes()[: shape[0], : shape[1]], read_scales()
        kept = scales[: shape[0], : shape[1] // how.group_size]
        whole = packed(np.ascontiguousarray(codes), np.ascontiguousarray(kept), None, how)
        return whole if scale is None else whole._replace(global_scale=_single(scale))

    return layer.packed(shape, how, read, has_global_scale=scale is not None)


def _single(scale: LazyTensor) -> np.float32:
    return np.float32(np.asarray(scale.read()).reshape(-1)[0])


def _all_blocks(
    how: Quantization,
    read_codes: Callable[[], np.ndarray],
    read_scales: Callable[[], np.ndarray],
    scale: LazyTensor | None,
) -> Packed:
    whole = packed(read_codes(), read_scales(), None, how)
    return whole if scale is None else whole._replace(global_scale=_single(scale))


def _padded(layer: _Layer, shape: Shape, read_packed: Callable[[], Packed]) -> LazyTensor:
    """Make a tensor whose rows MLX's groups do not divide."""

    def rows() -> Callable[[slice], np.ndarray]:
        whole = read_packed()
        return lambda part: dequantize(whole.rows(lambda array: array[part]))

    return layer.decoded(shape, rows)


# ------------------------------------------------------------------------------------------- 4 bits


def _nibbles(octets: np.ndarray) -> np.ndarray:
    """Return the halves of each byte, the low one first: (N, B) -> (N, 2 B) uint8."""
    octets = octets.view(np.uint8)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def _convrot_w4a4(layer: _Layer) -> LazyTensor:
    weight = layer.take("weight", "I8", "U8")
    rows, half = layer.matrix(weight)
    scale = layer.take("weight_scale", *FLOATS)
    layer.expect("weight_scale", scale, (rows,), (rows, 1))
    size = layer.rotation(2 * half)

    def open_rows() -> Callable[[slice], np.ndarray]:
        octets, scales = weight.read(), np.asarray(scale.read(), np.float32).reshape(-1, 1)

        def get(part: slice) -> np.ndarray:
            codes = (_nibbles(octets[part]) ^ np.uint8(8)).astype(np.float32) - np.float32(8)
            return _unrotated(codes * scales[part], size)

        return get

    return layer.decoded((rows, 2 * half), open_rows)


def _w4a8(layer: _Layer) -> LazyTensor:
    """Integers of 4 or 6 bits with scales for groups, rounded to 8 bits, with scales for rows."""
    weight = layer.take("weight", "I8", "U8")
    rows, octets = layer.matrix(weight)
    group = layer.number("group_size", 16)
    relative = layer.take("weight_s_rel", "F8_E4M3", "U8", *FLOATS)
    columns = layer.matrix(relative)[1] * group
    layer.expect("weight_s_rel", relative, (rows, columns // group))
    bits = octets * 8 // columns
    if bits not in (4, 6) or columns * bits != octets * 8 or columns % (16 if bits == 4 else 32):
        raise layer.fault(
            f"has rows of {octets} bytes for {columns} columns; expected 4 or 6 bits a value"
        )
    channel = layer.take("weight_s_channel", *FLOATS)
    layer.expect("weight_s_channel", channel, (rows,), (rows, 1))
    codebook = layer.find("weight_codebook", *FLOATS)
    correction = layer.find("weight_correction", *FLOATS)
    if codebook is not None:
        layer.expect("weight_codebook", codebook, (16,))
    if correction is not None:
        layer.expect("weight_correction", correction, (columns // group, rows))
    if bits == 6 and (codebook, correction) != (None, None):
        raise layer.fault("has 6 bits and a codebook, which do not go together; use another file")
    size = layer.rotation(columns)

    def open_rows() -> Callable[[slice], np.ndarray]:
        stored = weight.read().view(np.uint8)
        scales = relative.read()
        if relative.dtype == "U8":
            scales = E4M3[scales]
        scales = np.asarray(scales, np.float32)
        row_scales = np.asarray(channel.read(), np.float32).reshape(-1, 1)
        table = np.arange(2**bits, dtype=np.float32) - np.float32(2 ** (bits - 1))
        if codebook is not None:
            table = np.asarray(codebook.read(), np.float32)
        added = None if correction is None else np.asarray(correction.read(), np.float32).T

        def get(part: slice) -> np.ndarray:
            codes = _nibbles(np.ascontiguousarray(stored[part, : columns // 2]))
            if bits == 6:
                high = stored[part, columns // 2 :, None] >> np.array([0, 2, 4, 6], np.uint8)
                codes |= (high & 3).reshape(codes.shape) << 4
            values = table[codes].reshape(len(codes), -1, group) * scales[part, :, None]
            values = np.clip(np.rint(values), -127, 127) * row_scales[part, :, None]
            if added is not None:
                values += added[part, :, None]
            return _unrotated(values.reshape(codes.shape), size)

        return get

    return layer.decoded((rows, columns), open_rows)


def _awq(layer: _Layer) -> LazyTensor:
    weight = layer.take("weight", "I8", "U8")
    rows, half = layer.matrix(weight)
    columns, group = 2 * half, layer.number("group_size", 64)
    if columns % group:
        raise layer.fault(f"has {columns} columns in groups of {group}")
    scale = layer.take("weight_scale", *FLOATS)
    zeros = layer.find("weight_zeros", *FLOATS) or layer.take("weight_zero", *FLOATS)
    for part, tensor in (("weight_scale", scale), ("weight_zeros", zeros)):
        layer.expect(part, tensor, (columns // group, rows))

    def open_rows() -> Callable[[slice], np.ndarray]:
        octets = weight.read()
        scales, offsets = (np.asarray(t.read(), np.float32).T[..., None] for t in (scale, zeros))

        def get(part: slice) -> np.ndarray:
            codes = _nibbles(octets[part]).astype(np.float32) - np.float32(8)
            values = codes.reshape(len(codes), -1, group) * scales[part] + offsets[part]
            return values.reshape(codes.shape)

        return get

    return layer.decoded((rows, columns), open_rows)


_FORMS: dict[str, Callable[[_Layer], LazyTensor]] = {
    _SCALED: _scaled,
    "float8_e4m3fn": _float8,
    "float8_e5m2": _float8,
    "int8_tensorwise": _int8,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "convrot_w4a4": _convrot_w4a4,
    "asym_w4a8_int8": _w4a8,
    "awq_w4a16": _awq,
}
