"""Arithmetic of weights in few bits, in NumPy. ``store.recipes`` chooses the bits of each tensor.

A row of a weight (its last axis) is cut into groups. A group has a scale and, in affine mode, a
bias. Each value is stored as an integer q of few bits and equals ``scale * q + bias``. The integers
of a row form one stream of bits in 32-bit words, lowest bit first. This is MLX's layout:
``mx.quantize`` gives the same bytes, and ``mx.dequantize`` and ``mx.quantized_matmul`` read them.
The float modes store 4- or 8-bit floating-point numbers with one scale for each group (OCP
"Microscaling formats" v1.0; nvfp4 is NVIDIA's, with 8-bit scales).

A convolution (out, kH, kW, in) is cut along its input channels, like a linear map.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.machine import threads

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FLOAT_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
"""Float mode -> its bits and group size, which are fixed."""

_CHUNK = 1 << 18  # values per piece of work of a thread, which needs ten times their memory


@dataclass(frozen=True)
class Quantization:
    """The stored form of one tensor.

    Attributes:
        bits: bits of a value.
        group_size: number of values that share a scale.
        mode: "affine" or one of FLOAT_MODES.
    Raises: UsageError for a combination that MLX has no kernels for.
    """

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode == "affine":
            if self.bits not in AFFINE_BITS:
                known = ", ".join(map(str, AFFINE_BITS))
                raise UsageError(f"quantization to {self.bits} bits does not exist; choose {known}")
            if self.group_size not in AFFINE_GROUPS:
                known = ", ".join(map(str, AFFINE_GROUPS))
                raise UsageError(f"group size {self.group_size} does not exist; choose {known}")
        elif self.mode not in FLOAT_MODES:
            known = ", ".join(("affine", *FLOAT_MODES))
            raise UsageError(f"quantization mode {self.mode!r} does not exist; choose {known}")
        elif (self.bits, self.group_size) != FLOAT_MODES[self.mode]:
            bits, group = FLOAT_MODES[self.mode]
            raise UsageError(f"{self.mode} exists only with {bits} bits in groups of {group}")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each value, with 16-bit scales and biases included."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size

    def __str__(self) -> str:
        """Return the form for manifests: "affine-4-64"."""
        return f"{self.mode}-{self.bits}-{self.group_size}"

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """Parse the result of ``str``. Raises: ConfigError."""
        match = re.fullmatch(r"(\w+)-(\d+)-(\d+)", text)
        try:
            if match is None:
                raise UsageError("expected mode-bits-group")
            return cls(int(match[2]), int(match[3]), match[1])
        except UsageError as error:
            raise ConfigError(f"quantization {text!r} is unknown: {error}") from None


class Packed(NamedTuple):
    """The stored arrays of a quantized tensor.

    Attributes:
        weight: (..., in * bits / 32) uint32.
        scales: (..., in / group_size), floating point; uint8 in the float modes.
        biases: like scales; None in the float modes.
        quantization: bits, group size and mode.
        global_scale: float32 factor for the whole tensor, or None for 1. MLX's own form has none;
            files of other tools do.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    quantization: Quantization
    global_scale: np.float32 | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original tensor."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.quantization.group_size)

    @property
    def nbytes(self) -> int:
        """Number of stored bytes."""
        parts = (self.weight, self.scales, self.biases, self.global_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def is_finite(self) -> bool:
        """Return True if no value is NaN or infinite."""
        if self.global_scale is not None and not np.isfinite(self.global_scale):
            return False
        if self.biases is not None:
            return bool(np.isfinite(self.scales).all() and np.isfinite(self.biases).all())
        if self.quantization.mode == "nvfp4":
            return not (self.scales & 127 == 127).any()
        codes = self.weight.view(np.uint8)
        floats = self.quantization.mode == "mxfp8" and (codes & 127 == 127).any()
        return not (floats or (self.scales == 255).any())

    def rows(self, choose: Callable[[np.ndarray], np.ndarray]) -> Packed:
        """Return some of the rows. ``choose`` selects them from an array, on its first axis."""
        biases = None if self.biases is None else choose(self.biases)
        return self._replace(weight=choose(self.weight), scales=choose(self.scales), biases=biases)


class Beside(NamedTuple):
    """A change to a weight that stays packed: ``gain * weight + up @ down``.

    Attributes:
        down: (R, ...), where a row has the shape of a row of the weight; or, without ``up``, the
            whole change (out, ...).
        up: (out, R), or None.
        gain: (out,), or None for 1.
    """

    down: np.ndarray
    up: np.ndarray | None = None
    gain: np.ndarray | None = None


def packed_shapes(shape: tuple[int, ...], how: Quantization) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the stored arrays: weight, scales and, in affine mode, biases."""
    *rows, width = shape
    groups = (*rows, width // how.group_size)
    shapes = {"weight": (*rows, width * how.bits // 32), "scales": groups}
    return shapes | {"biases": groups} if how.mode == "affine" else shapes


def fits(shape: tuple[int, ...], how: Quantization) -> bool:
    """Return True if a tensor of this shape can be stored with this quantization."""
    return len(shape) >= 2 and shape[-1] > 0 and shape[-1] % how.group_size == 0


def quantize(array: np.ndarray, how: Quantization, fitted: bool = False) -> Packed:
    """Round a tensor. Unless ``fitted``, the result equals that of ``mx.quantize``.

    Args:
        array: (..., in) float16 or float32. Scales and biases get its type.
        fitted: in affine mode, choose the scale and bias of each group for the least squared error,
            not from its extremes (0.5 to 1.4 dB less error, 2.5 times the work).
    Raises: UsageError if the group size does not divide ``in``.
    """
    if not fits(array.shape, how):
        raise UsageError(
            f"shape {array.shape} cannot be cut into groups of {how.group_size}; choose a group "
            "size that divides its last axis"
        )
    groups = np.ascontiguousarray(array).reshape(-1, how.group_size)
    codes = np.empty(groups.shape, np.uint8)
    kind = array.dtype if how.mode == "affine" else np.dtype(np.uint8)
    scales = np.empty(len(groups), kind)
    biases = np.empty(len(groups), kind) if how.mode == "affine" else None

    def work(part: slice) -> None:
        if biases is None:
            codes[part], scales[part] = _round_float(groups[part], how)
        else:
            affine = _round_fitted if fitted else _round_affine
            codes[part], scales[part], biases[part] = affine(groups[part], how.bits)

    _for_each(work, _parts(len(groups), how.group_size))
    return packed(codes.reshape(array.shape), scales, biases, how)


def packed(
    codes: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, how: Quantization
) -> Packed:
    """Pack integers as MLX stores them.

    Args:
        codes: (..., in) uint8, below 2**bits.
        scales, biases: one for each group, of any shape; see Packed.
    """
    shapes = packed_shapes(codes.shape, how)
    return Packed(
        _pack(codes.reshape(-1, codes.shape[-1]), how.bits).reshape(shapes["weight"]),
        scales.reshape(shapes["scales"]),
        None if biases is None else biases.reshape(shapes["biases"]),
        how,
    )


def unchecked() -> Any:
    """Return a context in which scales of a file may give values that are not finite.

    NumPy warns of such arithmetic; a run whose latents are not finite ends with an error.
    """
    return np.errstate(over="ignore", invalid="ignore")


def dequantize(packed: Packed, dtype: Any = np.float32) -> np.ndarray:
    """Compute the values of a quantized tensor, in this type, as MLX computes them.

    Args:
        dtype: float32 or float16.
    Returns: (..., in).
    """
    how = packed.quantization
    codes = _unpack(packed.weight, how.bits).reshape(-1, how.group_size)
    out = np.empty(codes.shape, dtype)
    scales, biases = packed.scales.reshape(-1, 1), packed.biases

    def work(part: slice) -> None:
        if biases is not None:
            np.multiply(codes[part], scales[part].astype(dtype), out=out[part], casting="unsafe")
            out[part] += biases.reshape(-1, 1)[part].astype(dtype)
            if packed.global_scale is not None:
                out[part] *= packed.global_scale
        else:
            values = (_E2M1 if how.bits == 4 else E4M3)[codes[part]]
            factor = (E4M3 if how.mode == "nvfp4" else E8M0)[scales[part]]
            # Exact: both have few bits. So a global scale rounds each value once.
            values = values * factor
            if packed.global_scale is not None:
                values *= packed.global_scale
            out[part] = values

    with unchecked():
        _for_each(work, _parts(len(codes), how.group_size))
    return out.reshape(packed.shape)


def _parts(rows: int, width: int) -> list[slice]:
    step = max(1, _CHUNK // width)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _for_each(work: Callable[[slice], None], parts: list[slice]) -> None:
    """Run the work for all parts, on several threads."""
    threads.for_each(work, parts, len(parts))


def _round_affine(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return integers, scales and biases of groups (N, group), in float32 as MLX does.

    The extreme further from zero is exact, and zero is one of the values.
    """
    w = w.astype(np.float32)
    most = np.float32(2**bits - 1)
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / most, np.float32(1e-7))
    scale = np.where(below, scale, -scale)
    edge = np.where(below, low, high)
    steps = np.rint(edge / scale)
    usable = steps != 0
    scale = np.where(usable, edge / np.where(usable, steps, 1), scale)
    bias = np.where(usable, edge, np.float32(0))
    w -= bias
    w /= scale
    np.rint(w, out=w)
    np.clip(w, 0, most, out=w)
    return w.astype(np.uint8), scale[:, 0], bias[:, 0]


def _round_fitted(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the result of _round_affine with the smallest squared error found.

    The search starts from a range that is cut slightly at both ends. It alternates two steps:
    round, then fit the best scale and bias to these integers (a straight line). Each group keeps
    its best result, which may be _round_affine's. Scales and biases are tried in their stored type.
    """

    def stored(x: np.ndarray) -> np.ndarray:
        return x.astype(kind).astype(np.float32)[:, None]

    kind, most, size = w.dtype, np.float32(2**bits - 1), np.float32(w.shape[1])
    codes, scales, biases = _round_affine(w, bits)
    w = w.astype(np.float32)
    best = codes.astype(np.float32), stored(scales), stored(biases)
    error = best[0] * best[1] + best[2] - w
    least = np.einsum("ng,ng->n", error, error)
    low, high, mean = w.min(axis=1), w.max(axis=1), w.mean(axis=1)
    for share in (1 - 2.0**-bits, 1 - 2.0 ** (1 - bits)):  # the useful amounts of clipping
        half = (high - low) * np.float32(share / 2)
        scale, bias = stored(2 * half / most), stored((high + low) / 2 - half)
        for _ in range(_ROUNDS):
            q = w - bias
            q /= np.where(scale == 0, np.float32(1), scale)
            np.rint(q, out=q)
            np.clip(q, 0, most, out=q)
            np.multiply(q, scale, out=error)
            error += bias
            error -= w
            squares = np.einsum("ng,ng->n", error, error)
            better = squares < least
            least[better] = squares[better]
            for kept, one in zip(best, (q, scale, bias), strict=True):
                kept[better] = one[better]
            middle = q.mean(axis=1)
            spread = np.einsum("ng,ng->n", q, q) - size * middle * middle
            slope = (np.einsum("ng,ng->n", q, w) - size * middle * mean) / np.maximum(spread, 0.5)
            scale, bias = stored(slope), stored(mean - slope * middle)
    return best[0].astype(np.uint8), best[1][:, 0], best[2][:, 0]


_ROUNDS = 4


def _round_float(w: np.ndarray, how: Quantization) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of groups (N, group). Each step uses the weights' type, as in MLX."""
    kind = w.dtype.type
    largest = np.abs(w).max(axis=1, keepdims=True) / kind(6.0 if how.bits == 4 else 448.0)
    if how.mode == "nvfp4":
        scales = _to_e4m3(largest.astype(np.float32))
        factor = E4M3[scales].astype(kind)
        with np.errstate(divide="ignore", invalid="ignore"):
            w = w / factor
    else:
        exponents = np.zeros(largest.shape, np.int32)
        filled = largest != 0
        # Round up, so that nothing saturates (MLX before 0.32.3 rounded to the nearest power).
        exponents[filled] = np.ceil(np.log2(largest[filled].astype(np.float32))).astype(np.int32)
        scales = (exponents + 127).astype(np.uint8)
        w = w / np.exp2(exponents.astype(kind))
    if how.bits == 8:
        return _to_e4m3(w.astype(np.float32)), scales[:, 0]
    # Take the nearest of 16 values; of two equally near, the first. NaN (0 / 0) gives the first.
    values = _E2M1.astype(kind)
    codes = np.zeros(w.shape, np.uint8)
    nearest = np.abs(w - values[0])
    for code in range(1, 16):
        distance = np.abs(w - values[code])
        closer = distance < nearest
        codes[closer] = code
        np.copyto(nearest, distance, where=closer)
    return codes, scales[:, 0]


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers (rows, in) below 2**bits into words (rows, in * bits / 32)."""
    rows, width = codes.shape
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4").astype(np.uint32, copy=False)
    out = np.empty((rows, width * bits // 32), "<u4")
    for part in _parts(rows, width * bits):
        stream = np.unpackbits(codes[part][..., None], axis=-1, count=bits, bitorder="little")
        packed = np.packbits(stream.reshape(len(stream), -1), axis=-1, bitorder="little")
        out[part] = packed.view("<u4")
    return out.astype(np.uint32, copy=False)


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Invert ``_pack``: (..., words) -> (rows, in) uint8."""
    stream = np.ascontiguousarray(words.reshape(-1, words.shape[-1]).astype("<u4", copy=False))
    octets = stream.view(np.uint8)
    if bits == 8:
        return octets
    rows, width = len(octets), octets.shape[1] * 8 // bits
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes: np.ndarray = (octets[..., None] >> shifts) & np.uint8(2**bits - 1)
        return codes.reshape(rows, width)
    out = np.empty((rows, width), np.uint8)
    for part in _parts(rows, width * 8):
        ones = np.unpackbits(octets[part], axis=-1, bitorder="little").reshape(-1, width, bits)
        packed = np.packbits(ones, axis=-1, bitorder="little")
        out[part] = packed.reshape(-1, width)
    return out


# ----------------------------------------------------------------------------- 4- and 8-bit numbers

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])


def _e4m3_values() -> np.ndarray:
    """Compute the value of each byte: sign, 4 exponent bits (bias 7), 3 mantissa bits.

    There is no infinity.

    Source: Micikevicius et al. 2022, "FP8 formats for deep learning", table 1.
    """
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10)
    )
    values = np.where(byte & 128, -values, values)
    return np.where(byte & 127 == 127, np.nan, values).astype(np.float32)


E4M3 = _e4m3_values()
"""Byte of the 8-bit float e4m3 -> its value."""


E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
"""Byte of the 8-bit float e5m2 -> its value. It is the upper half of a float16."""


@cache
def _e4m3_midpoints() -> np.ndarray:
    """Return the midpoints between neighbours of the values 0 ... 448."""
    values = E4M3[:127].astype(np.float64)
    return (values[1:] + values[:-1]) / 2


def _to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to the nearest e4m3 number, ties to even. Larger values give 448."""
    size = np.abs(x).astype(np.float64)
    midpoints = _e4m3_midpoints()
    code: np.ndarray = np.searchsorted(midpoints, size)  # left: a tie goes down
    tie = (code < len(midpoints)) & (midpoints[np.minimum(code, len(midpoints) - 1)] == size)
    code += tie & (code % 2 == 1)
    code |= np.where(np.signbit(x), 128, 0)
    return code.astype(np.uint8)


def _e8m0_values() -> np.ndarray:
    """Compute the power of two of each byte. Source: OCP "Microscaling formats" v1.0, 5.4.1."""
    powers = np.ldexp(1.0, np.arange(255) - 127)
    return np.append(powers, np.nan).astype(np.float32)


E8M0 = _e8m0_values()
"""Byte of the 8-bit exponent e8m0 -> its value."""
