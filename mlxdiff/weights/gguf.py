"""GGUF files: the container of llama.cpp and stable-diffusion.cpp, and the forms of their tensors.

Opening a file reads only its header. A tensor is mapped and decoded when it is read.

A block holds 32 or 256 values of a row, with one or more scales. Forms whose groups are those of
MLX (one scale and one bias for 32 values) are QuantizedTensors: MLX holds the same values. The
others are decoded to float32, a few rows at a time.

Source: ggml's docs/gguf.md (the container), ggml-common.h and ggml-quants.c (the blocks).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import CheckpointError
from mlxdiff.machine.disk import SourceFile
from mlxdiff.weights.quantization import Packed, Quantization, fits, packed, unchecked
from mlxdiff.weights.tensors import (
    MAX_HEADER_BYTES,
    MAX_NAME,
    LazyTensor,
    Shape,
    foreign,
    lazy,
    quantized,
    read_values,
    shown,
    width_of,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 200_000  # tensors or metadata entries; SDXL has 2,500 tensors
MAX_LIST = 64  # longest list of the metadata that is kept; shapes have at most 4 numbers
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Metadata key of the shape of a tensor that ComfyUI-GGUF's converter has flattened."""

# Type number of a metadata value -> its format for struct.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _LIST = 8, 9


@dataclass(frozen=True)
class BlockForm:
    """A form of ggml for the values of a tensor.

    Attributes:
        name: ggml's name, for example "q4_K".
        values: number of values in a block.
        bytes: bytes of a block.
        decode: takes blocks, (N, bytes) uint8; returns their values, (N, values) float32.
        group: for forms that MLX can hold: takes blocks; returns integers (N, values) uint8, scales
            (N,) float16 and biases (N,), float16 numbers, of the equal affine groups.
        bits: bits of these integers.
    """

    name: str
    values: int
    bytes: int
    decode: Callable[[np.ndarray], np.ndarray]
    group: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    bits: int = 0


# ------------------------------------------------------------------------------ blocks of 32 values


def _half(blocks: np.ndarray, place: int) -> np.ndarray:
    """Return the float16 numbers at a place in each block: (N,)."""
    return np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2")[:, 0]


def _whole(scales: np.ndarray) -> np.ndarray:
    """Return float16 scales as float32, where products with small integers are exact."""
    return scales.astype(np.float32)


def _nibbles(octets: np.ndarray) -> np.ndarray:
    """Return the low halves of the bytes of a row, then the high halves: (N, B) -> (N, 2 B)."""
    return np.concatenate([octets & 15, octets >> 4], axis=-1)


def _fifth_bits(blocks: np.ndarray, place: int) -> np.ndarray:
    """Return the bits of four bytes, shifted to the value 16: (N, 32)."""
    bits = np.unpackbits(blocks[:, place : place + 4], axis=-1, bitorder="little")
    return bits << 4


def _q4_0(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d = _half(b, 0)
    return _nibbles(b[:, 2:]), d, _whole(d) * -8


def _q4_1(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _nibbles(b[:, 4:]), _half(b, 0), _half(b, 2)


def _q5_0(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d = _half(b, 0)
    return _nibbles(b[:, 6:]) | _fifth_bits(b, 2), d, _whole(d) * -16


def _q5_1(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _nibbles(b[:, 8:]) | _fifth_bits(b, 4), _half(b, 0), _half(b, 2)


def _q8_0(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d = _half(b, 0)
    return b[:, 2:] ^ np.uint8(128), d, _whole(d) * -128


def _affine(
    group: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that decodes blocks of an affine form: ``scale * integer + bias``."""

    def decode(blocks: np.ndarray) -> np.ndarray:
        codes, scales, biases = group(blocks)
        values = codes * scales.astype(np.float32)[:, None]
        values += biases.astype(np.float32)[:, None]
        return values

    return decode


_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    values = _IQ4[_nibbles(b[:, 2:])]
    values *= _half(b, 0).astype(np.float32)[:, None]
    return values


# ----------------------------------------------------------------------------- blocks of 256 values


def _fields(octets: np.ndarray, bits: int) -> np.ndarray:
    """Return the fields of this many bits in each byte: (..., B) -> (8 / bits, ..., B).

    The first axis is the number of the field: all lowest fields come first.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, *(1,) * octets.ndim)
    return (octets[None] >> shifts) & np.uint8(2**bits - 1)


def _interleaved(octets: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Unpack fields that are stored in runs of bytes: (N, B) -> (N, 8 / bits * B).

    Each run of bytes gives its lowest fields, then its second-lowest fields, and so on.
    """
    runs = octets.reshape(len(octets), -1, run)
    return np.moveaxis(_fields(runs, bits), 0, 2).reshape(len(octets), -1)


def _scaled(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """Return ``scale * code - offset`` of each group: codes (N, 256), scales (N, groups)."""
    groups = codes.reshape(*scales.shape, -1).astype(np.float32)
    groups *= scales[..., None]
    if offsets is not None:
        groups -= offsets[..., None]
    return groups.reshape(codes.shape)


def _q2_k(b: np.ndarray) -> np.ndarray:
    d, least = (_half(b, place).astype(np.float32)[:, None] for place in (80, 82))
    return _scaled(_interleaved(b[:, 16:80], 2, 32), d * (b[:, :16] & 15), least * (b[:, :16] >> 4))


def _q3_k(b: np.ndarray) -> np.ndarray:
    low = _interleaved(b[:, 32:96], 2, 32)
    high = _interleaved(b[:, :32], 1, 32)
    codes = (low | high << 2).astype(np.int8) - np.int8(4)
    scales = _nibbles(b[:, 96:104]) | _interleaved(b[:, 104:108], 2, 4) << 4
    d = _half(b, 108).astype(np.float32)[:, None]
    return _scaled(codes, d * (scales.astype(np.int8) - np.int8(32)), None)


def _six_bit_pairs(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the 8 scales and 8 offsets, of 6 bits each, from 12 bytes: two arrays (N, 8)."""
    first, second, third = b[:, :4], b[:, 4:8], b[:, 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    offsets = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, offsets


def _q4_k(b: np.ndarray) -> np.ndarray:
    d, least = (_half(b, place).astype(np.float32)[:, None] for place in (0, 2))
    scales, offsets = _six_bit_pairs(b[:, 4:16])
    return _scaled(_interleaved(b[:, 16:], 4, 32), d * scales, least * offsets)


def _q5_k(b: np.ndarray) -> np.ndarray:
    d, least = (_half(b, place).astype(np.float32)[:, None] for place in (0, 2))
    scales, offsets = _six_bit_pairs(b[:, 4:16])
    codes = _interleaved(b[:, 48:], 4, 32) | _interleaved(b[:, 16:48], 1, 32) << 4
    return _scaled(codes, d * scales, least * offsets)


def _q6_k(b: np.ndarray) -> np.ndarray:
    codes = _interleaved(b[:, :128], 4, 64) | _interleaved(b[:, 128:192], 2, 32) << 4
    d = _half(b, 208).astype(np.float32)[:, None]
    scales = d * np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return _scaled(codes.astype(np.int8) - np.int8(32), scales, None)


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(len(b), 8)
    scales = (low | (high & 3).astype(np.uint8) << 4).astype(np.int8) - np.int8(32)
    d = _half(b, 0).astype(np.float32)[:, None]
    return _scaled(_IQ4[_interleaved(b[:, 8:], 4, 16)], d * scales, None)


# ggml's type number -> type of the values as safetensors names it.
PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
BLOCKS: dict[int, BlockForm] = {
    2: BlockForm("q4_0", 32, 18, _affine(_q4_0), _q4_0, 4),
    3: BlockForm("q4_1", 32, 20, _affine(_q4_1), _q4_1, 4),
    6: BlockForm("q5_0", 32, 22, _affine(_q5_0), _q5_0, 5),
    7: BlockForm("q5_1", 32, 24, _affine(_q5_1), _q5_1, 5),
    8: BlockForm("q8_0", 32, 34, _affine(_q8_0), _q8_0, 8),
    10: BlockForm("q2_K", 256, 84, _q2_k),
    11: BlockForm("q3_K", 256, 110, _q3_k),
    12: BlockForm("q4_K", 256, 144, _q4_k),
    13: BlockForm("q5_K", 256, 176, _q5_k),
    14: BlockForm("q6_K", 256, 210, _q6_k),
    20: BlockForm("iq4_nl", 32, 18, _iq4_nl),
    23: BlockForm("iq4_xs", 256, 136, _iq4_xs),
}
"""ggml's type number -> form."""
REFUSED = {
    9: "q8_1", 15: "q8_K", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 21: "iq3_s",
    22: "iq2_s", 29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4", 41: "q1_0",
}  # fmt: skip
"""Type number -> name of the forms that are not supported."""

_ROWS = 1 << 20  # values that are decoded at a time
_PIECE = 1 << 16  # bytes of the header that are read at a time


class GGUFFile:
    """A GGUF file with a checked header.

    Attributes:
        path: the file.
        metadata: texts, numbers and short lists of numbers in the header.
        tensors: name -> LazyTensor, in the order of the file. Shapes are PyTorch's.
    Raises: CheckpointError if the file is not a complete and sound GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, LazyTensor] = {}
        try:
            self._file = SourceFile(self.path)
            self._read(_Reader(self._file, self._fault))
        except OSError as error:
            raise self._fault(f"cannot be read ({error.strerror or error})") from None

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _read(self, reader: _Reader) -> None:
        head = reader.take(min(16, reader.end))
        if not head.startswith(MAGIC):
            raise self._fault(
                foreign(head, reader.end) or f"not a GGUF file, or damaged ({reader.end} bytes)"
            )
        reader.place = len(MAGIC)
        version = reader.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            why = "was written on a big-endian machine" if swapped else f"has version {version}"
            raise self._fault(
                f"is a GGUF file that {why}, which is not supported (versions 2 and 3 are, "
                "little-endian); convert it with a current stable-diffusion.cpp"
            )
        counts = reader.number("Q"), reader.number("Q")
        if max(counts) > MAX_ENTRIES:
            raise self._fault(f"damaged: its header announces {max(counts)} entries")
        for _ in range(counts[1]):
            key = reader.text()
            if key in self.metadata:
                raise self._fault(f"damaged: the entry {shown(key)!r} occurs twice")
            self.metadata[key] = reader.value()
        entries = [self._entry(reader) for _ in range(counts[0])]
        step = self.metadata.get("general.alignment", 32)
        if type(step) is not int or not 8 <= step <= 1 << 16 or step & (step - 1):
            raise self._fault(f"damaged: its alignment is {step!r}")
        start = -(-reader.place // step) * step
        spans = []
        for name, shape, kind, offset in entries:
            if name in self.tensors:
                raise self._fault(f"tensor {shown(name)!r} occurs twice")
            size = self._bytes(name, shape, kind)
            if offset % step:
                raise self._fault(f"damaged: tensor {shown(name)!r} is not aligned")
            if start + offset + size > reader.end:
                raise self._fault(
                    f"truncated: {start + offset + size} bytes expected, {reader.end} found; "
                    "download it again"
                )
            spans.append((offset, offset + size, name))
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)
        place = 0
        for begin, stop, name in sorted(spans):
            if begin < place and begin != stop:
                raise self._fault(f"damaged: tensor {shown(name)!r} overlaps another tensor")
            place = max(place, stop)

    def _entry(self, reader: _Reader) -> tuple[str, Shape, int, int]:
        """Read a tensor's description: name, shape, type number, offset in the data."""
        name = reader.text()
        if not name:
            raise self._fault("is a damaged GGUF file: one of its tensors has no name")
        dimensions = reader.number("I")
        if dimensions > 8:
            raise self._fault(f"damaged: tensor {shown(name)!r} has {dimensions} dimensions")
        # ggml lists the fastest axis first.
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        if math.prod(shape) >= 2**48 or any(side >= 2**48 for side in shape):
            raise self._fault(f"damaged: tensor {shown(name)!r} has shape {shape}")
        return name, shape, reader.number("I"), reader.number("Q")

    def _bytes(self, name: str, shape: Shape, kind: int) -> int:
        """Return the size of a tensor. Check its type and its rows."""
        if kind in PLAIN:
            return math.prod(shape) * width_of(PLAIN[kind])
        if kind not in BLOCKS:
            what = REFUSED.get(kind, f"unknown ({kind})")
            raise self._fault(
                f"tensor {shown(name)!r} is stored as {what}, which is not supported; use a file "
                f"in one of {', '.join(form.name for form in BLOCKS.values())}, f16 or f32"
            )
        form = BLOCKS[kind]
        if not shape or shape[-1] % form.values:
            raise self._fault(
                f"damaged: tensor {shown(name)!r} has shape {shape}, but {form.name} needs rows of "
                f"a multiple of {form.values} values"
            )
        return math.prod(shape) // form.values * form.bytes

    def _tensor(self, name: str, stored: Shape, kind: int, offset: int) -> LazyTensor:
        shape = self._original(name, stored)
        if kind in PLAIN:
            return lazy(self._file, name, PLAIN[kind], shape, offset)
        form, file = BLOCKS[kind], self._file
        size = math.prod(shape) // form.values * form.bytes
        label = f"gguf {form.name}"

        def blocks() -> np.ndarray:
            rows = (math.prod(shape) // form.values, form.bytes)
            return read_values(file, name, "U8", rows, offset)

        def read() -> np.ndarray:
            stored, out = blocks(), np.empty((math.prod(shape) // form.values, form.values), "f4")
            step = _ROWS // form.values
            for start in range(0, len(out), step):
                with unchecked():
                    out[start : start + step] = form.decode(stored[start : start + step])
            return out.reshape(shape)

        how = None if form.group is None else Quantization(form.bits, form.values)
        if how is None or len(shape) != 2 or not fits(shape, how):
            return LazyTensor(shape, "F32", read, form=label, stored=size)
        return quantized(
            shape,
            "F16",
            how,
            lambda: _packed(blocks(), shape, form, how),
            form=label,
            stored=size,
        )

    def _original(self, name: str, stored: Shape) -> Shape:
        """Return the shape that the metadata gives to a flattened tensor, or the stored shape."""
        given = self.metadata.get(ORIGINAL_SHAPE + name)
        if given is None:
            return stored
        sound = isinstance(given, list) and all(type(n) is int and n > 0 for n in given)
        if not sound or math.prod(given) != math.prod(stored):
            raise self._fault(
                f"damaged: tensor {shown(name)!r} has {math.prod(stored)} values, but its original "
                f"shape is {shown(repr(given))}"
            )
        return tuple(given)


def _packed(blocks: np.ndarray, shape: Shape, form: BlockForm, how: Quantization) -> Packed:
    """Regroup blocks as MLX stores them, without a change of the values."""
    assert form.group is not None
    codes = np.empty((len(blocks), form.values), np.uint8)
    scales, biases = (np.empty(len(blocks), np.float16) for _ in range(2))
    step = _ROWS // form.values
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        with unchecked():  # a scale above 511 becomes infinite, and is then refused
            codes[part], scales[part], biases[part] = form.group(blocks[part])
    return packed(codes.reshape(shape), scales, biases, how)


class _Reader:
    """Reads the header of a file, within its bounds.

    Attributes:
        place: position in the file.
        end: length of the file.
    """

    def __init__(self, file: SourceFile, fault: Callable[[str], CheckpointError]) -> None:
        self._file, self._fault = file, fault
        self.place = 0
        self.end = file.size
        self._start, self._piece = 0, bytearray()

    def _check(self, size: int) -> None:
        if size > self.end - self.place:
            raise self._fault("truncated: its header is incomplete; download it again")
        if self.place + size > MAX_HEADER_BYTES:
            raise self._fault(f"damaged: its header has more than {MAX_HEADER_BYTES} bytes")

    def take(self, size: int) -> bytes:
        """Read the next bytes. The file is read in pieces, because headers have many entries."""
        self._check(size)
        begin = self.place - self._start
        if not 0 <= begin <= begin + size <= len(self._piece):
            length = min(max(size, _PIECE), self.end - self.place)
            self._start, self._piece = self.place, self._file.read(self.place, length)
            begin = 0
        self.place += size
        return bytes(self._piece[begin : begin + size])

    def skip(self, size: int) -> None:
        """Go on without reading."""
        self._check(size)
        self.place += size

    def number(self, kind: str) -> Any:
        raw = self.take(struct.calcsize("<" + kind))
        return struct.unpack("<" + kind, raw)[0]

    def text(self) -> str:
        """Read a name or a key."""
        size = self.number("Q")
        if size > MAX_NAME:
            raise self._fault(f"damaged: a name in its header has {size} characters")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise self._fault("damaged: a name in its header is not text") from None

    def value(self) -> Any:
        """Read a value of the metadata. Long texts and lists are skipped (None)."""
        kind = self.number("I")
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _LIST:
            raise self._fault(f"damaged: its metadata has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            if count > MAX_HEADER_BYTES // 8:
                raise self._fault(f"damaged: its metadata has a list of {count} texts")
            for _ in range(count):
                self._string()
            return None
        if inner not in _SCALARS:
            raise self._fault(f"damaged: its metadata has a list of the unknown type {inner}")
        width = struct.calcsize("<" + _SCALARS[inner])
        if count > MAX_LIST:
            self.skip(count * width)
            return None
        return [self.number(_SCALARS[inner]) for _ in range(count)]

    def _string(self) -> str | None:
        size = self.number("Q")
        if size > MAX_NAME:
            self.skip(size)
            return None
        return self.take(size).decode("utf-8", "replace")
