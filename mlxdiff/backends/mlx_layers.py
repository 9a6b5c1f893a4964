"""The layers that the networks are made of, in MLX (``networks.layers.Layers``).

Feature maps are (B, H, W, C). Every layer computes in the dtype of its weights, except where a line
says float32. Activations are written out here instead of taken from mlx.nn: those are compiled
functions, and compiling on Linux runs g++ at run time.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdiff.backends.frequencies import frequencies
from mlxdiff.networks.layers import convolve
from mlxdiff.weights.quantization import Beside, Packed, Quantization

# Attention without a fused kernel holds its scores, a convolution on the CPU its unfolded input;
# what would need more than this many bytes is computed in parts. Each part is evaluated before the
# next, or MLX would allocate the memory of all parts before it computes the first.
_WORK_BYTES = 64 << 20

# On a CPU other than Apple's, MLX computes exp and erf value by value, 12 to 26 ns each, and what
# compilers vectorize (sums, products, shifts of bits) at 0.2 ns. There they are put together from
# the latter, for so many values at a time that these stay in the cache.
_SCALAR_EXP = platform.system() != "Darwin"
_BLOCK = 1 << 18


def _on_gpu() -> bool:
    return bool(mx.default_device() == mx.gpu)


class Module(nn.Module):
    """Base of all layers and networks: a tree whose leaves are parameters.

    Constructing one costs no memory: parameters are lazy zeros that are never computed, because
    ``load_weights`` (strict) replaces every one of them.

    Attributes:
        dtype: what a network computes in; its weights may be kept in another (StoredWeight).
    """

    dtype: mx.Dtype = mx.float32

    def put(self, name: str, weight: mx.array | StoredWeight) -> None:
        """Replace the parameter of this name, of this module or of one below it."""
        *path, key = name.split(".")
        owner: Any = self
        for part in path:
            owner = owner[int(part)] if isinstance(owner, list) else owner[part]
        owner[key] = weight

    def view(self, name: str, make: Callable[[mx.array], mx.array]) -> mx.array:
        """A parameter as it is computed with: the same memory in another shape.

        Made once, or every evaluation would make it anew, a node of its graph each time.
        """
        kept = f"_{name}"  # MLX takes such a name for no parameter's
        if kept not in self:
            self[kept] = make(self[name])
            mx.eval(self[kept])
        view: mx.array = self[kept]
        return view

    def __setitem__(self, name: str, value: Any) -> None:
        self.pop(f"_{name}", None)
        super().__setitem__(name, value)


class StoredWeight(Module):
    """A weight that is kept smaller than it is computed with, and expanded whenever it is used.

    Args:
        stored: quantized, or in another dtype.
        dtype: what it is expanded to.
        beside: what is added to it, never rounded to its bits (a LoRA).
    """

    def __init__(
        self, stored: Packed | np.ndarray, dtype: mx.Dtype, beside: Beside | None = None
    ) -> None:
        super().__init__()
        parts = (None, None, None) if beside is None else beside
        self.down, self.up, self.gain = (
            None if part is None else mx.array(part).astype(dtype) for part in parts
        )
        self.dtype = dtype
        self.shape = tuple(stored.shape)
        self.quantization: Quantization | None = None
        self.global_scale: float | None = None
        if isinstance(stored, Packed):
            self.quantization = stored.quantization
            if stored.global_scale is not None:
                self.global_scale = float(stored.global_scale)
            self.weight = mx.array(stored.weight)
            # The float modes' scales are bytes; affine ones are computed with, so in that dtype.
            self.scales = mx.array(stored.scales)
            self.biases = None
            if stored.biases is not None:
                self.scales = self.scales.astype(_smaller(self.scales.dtype, dtype))
                self.biases = mx.array(stored.biases).astype(self.scales.dtype)
        else:
            self.weight = mx.array(stored)

    def expand(self) -> mx.array:
        """The whole weight."""
        weight, down = self._expand(lambda part: part), self.down
        if self.gain is not None:
            weight = weight * self.gain.reshape(-1, *(1,) * (weight.ndim - 1))
        if down is None:
            return weight
        added = down if self.up is None else self.up @ down.reshape(len(down), -1)
        return weight + added.reshape(weight.shape)

    def take(self, ids: mx.array) -> mx.array:
        """Rows of the weight by their number."""
        return self._expand(lambda part: part[ids])

    def _expand(self, choose: Callable[[mx.array], mx.array]) -> mx.array:
        how = self.quantization
        if how is None:
            return choose(self.weight).astype(self.dtype)
        scales, biases = choose(self.scales), self.biases
        # A global scale is small: half precision would lose its bits.
        dtype = self.dtype if self.global_scale is None else mx.float32
        if biases is not None:
            scales, biases = scales.astype(dtype), choose(biases).astype(dtype)
        values = mx.dequantize(
            choose(self.weight),
            scales,
            biases,
            how.group_size,
            how.bits,
            how.mode,
            dtype=dtype,
        )
        return (
            values if self.global_scale is None else (values * self.global_scale).astype(self.dtype)
        )


def _smaller(one: mx.Dtype, other: mx.Dtype) -> mx.Dtype:
    return one if one.size < other.size else other


class Linear(Module):
    """Affine map of the last axis; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros((out_features, in_features))
        if bias:
            self.bias = mx.zeros((out_features,))

    def __call__(self, x: mx.array) -> mx.array:
        return _affine(self, x)


class Conv2d(Module):
    """Convolution with a square kernel and zero padding; weight (out, kH, kW, in).

    Args:
        x: (B, H, W, in_channels).
        more: added to the result: a feature map, or (B, 1, 1, out_channels), or a function that
            makes it. None: nothing.
    Returns: (B, H', W', out_channels).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.weight = mx.zeros((out_channels, kernel_size, kernel_size, in_channels))
        if bias:
            self.bias = mx.zeros((out_channels,))

    def __call__(
        self, x: mx.array, more: mx.array | Callable[[], mx.array] | None = None
    ) -> mx.array:
        weight, bias = self.weight, self.get("bias")
        if weight.shape[1] == 1 and self.stride == 1 and self.padding == 0:
            x = _affine(self, x)
            more = more() if callable(more) else more
            return x if more is None else x + more
        stored = isinstance(weight, StoredWeight)
        if isinstance(weight, StoredWeight):
            weight = weight.expand()
        by = mx.conv2d if _on_gpu() else _conv_by_rows
        x = convolve(
            lambda x: by(x, weight, self.stride, self.padding),
            x,
            self.padding,
            self.stride,
            mx.concatenate,
        )
        more = more() if callable(more) else more
        x = _sum(x, *(part for part in (bias, more) if part is not None))
        return _before_the_next(x) if stored else x


class GroupNorm(Module):
    """Group normalization (Wu and He 2018) of (B, H, W, C), statistics in float32."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.weight = mx.zeros((num_channels,))
        self.bias = mx.zeros((num_channels,))

    def __call__(self, x: mx.array) -> mx.array:
        if _on_gpu():
            return self._by_rows(x, _scaled)
        return self.over([x])(x)

    def silu(self, x: mx.array) -> mx.array:
        """The silu of the normalized feature map."""
        if _on_gpu():
            return self._by_rows(x, _scaled_silu)
        return silu(self.over([x])(x))

    def over(self, bands: Sequence[mx.array]) -> Callable[[mx.array], mx.array]:
        """Take the statistics over all bands of rows; return the map for each band."""
        mean = self._group_mean(bands)
        variance = self._group_mean(bands, mean)
        scale = mx.rsqrt(variance + self.eps) * self.weight.astype(mx.float32)
        shift = self.bias.astype(mx.float32) - mean * scale
        return lambda x: (x.astype(mx.float32) * scale + shift).astype(x.dtype)

    def silu_over(self, bands: Sequence[mx.array]) -> Callable[[mx.array], mx.array]:
        """Take the statistics over all bands of rows; return ``silu`` for each band."""
        if len(bands) == 1:
            return self.silu
        if not _on_gpu():
            normalize = self.over(bands)
            return lambda x: silu(normalize(x))
        scale, shift = self._factors(bands)
        return lambda x: _scaled_silu(self._grouped(x), scale, shift).reshape(x.shape)

    def _by_rows(self, x: mx.array, apply: Callable[..., mx.array]) -> mx.array:
        """Normalize in three kernels: copy each group into a row, normalize rows, scale and shift.

        ``mx.fast.layer_norm`` takes the sums of a row in float32, and it has a gradient. Reductions
        would need four kernels, and in half precision a copy in float32 (``mx.sum`` of float16
        ends in float16).
        """
        grouped = self._grouped(x).transpose(0, 2, 1, 3)
        rows = mx.contiguous(grouped).reshape(len(x), self.num_groups, -1)
        normalized = mx.fast.layer_norm(rows, None, None, self.eps)
        normalized = normalized.reshape(grouped.shape).transpose(0, 2, 1, 3)
        return apply(normalized, *self._weight_bias()).reshape(x.shape)

    def _factors(self, bands: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """Scale and shift of each channel by statistics over all bands: (B, 1, groups, C / groups).

        For a GPU: one wait, after which the squares of all bands are freed.
        """
        count = sum(band[0].size for band in bands) // self.num_groups
        inverse, eps = mx.array(1 / count), mx.array(self.eps)
        grouped = [self._grouped(band) for band in bands]
        total = _group_sums([x.astype(mx.float32) for x in grouped])
        square = _group_sums([_squared_distance(x, total, inverse) for x in grouped])
        scale, shift = _scale_shift(total, square, inverse, eps, *self._weight_bias())
        mx.eval(scale, shift)
        return scale, shift

    def _grouped(self, x: mx.array) -> mx.array:
        """(B, H, W, C) as (B, H * W, groups, C / groups)."""
        batch, height, width, _ = x.shape
        return x.reshape(batch, height * width, self.num_groups, -1)

    def _weight_bias(self) -> tuple[mx.array, mx.array]:
        """Both in float32, (groups, C / groups)."""
        return self.view("weight", self._by_group), self.view("bias", self._by_group)

    def _by_group(self, values: mx.array) -> mx.array:
        return values.astype(mx.float32).reshape(self.num_groups, -1)

    def _group_mean(self, bands: Sequence[mx.array], centre: mx.array | None = None) -> mx.array:
        """(B, 1, 1, C), each channel with its group's mean, or mean square around a centre."""
        batch, channels = bands[0].shape[0], bands[0].shape[-1]
        rows, means = sum(band.shape[1] for band in bands), mx.array(0.0)
        for band in bands:
            x = band.astype(mx.float32)
            x = x if centre is None else mx.square(x - centre)
            # One axis at a time: sums of sums, ten times more accurate than one long float32 sum.
            part = x.mean(axis=2).mean(axis=1)
            if len(bands) > 1:
                part = part * (band.shape[1] / rows)
                mx.eval(part)
            means = means + part if len(bands) > 1 else part
        means = means.reshape(batch, self.num_groups, -1)
        means = mx.broadcast_to(means.mean(axis=-1, keepdims=True), means.shape)
        return means.reshape(batch, 1, 1, channels)


def _group_sums(bands: Sequence[mx.array]) -> mx.array:
    """Sums over (B, pixels, groups, channels) of several bands: (B, 1, groups, 1)."""
    # First over pixels, then over a group's channels: both are what reductions are quick at.
    parts = [band.sum(axis=1, keepdims=True) for band in bands]
    return mx.concatenate(parts, axis=1).sum(axis=(1, 3), keepdims=True)


class LayerNorm(Module):
    """Layer normalization (Ba et al. 2016) of the last axis; accumulates in float32."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = mx.zeros((dims,))
        self.bias = mx.zeros((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(Module):
    """Rows of a table by their number: (...) int -> (..., dims)."""

    def __init__(self, num_embeddings: int, dims: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_embeddings, dims))

    def __call__(self, ids: mx.array) -> mx.array:
        weight = self.weight
        return weight.take(ids) if isinstance(weight, StoredWeight) else weight[ids]


def _affine(layer: Linear | Conv2d, x: mx.array) -> mx.array:
    """Affine map of the last axis by a linear layer or a 1x1 convolution."""
    weight, bias = layer.weight, layer.get("bias")
    stored = isinstance(weight, StoredWeight)
    if isinstance(weight, StoredWeight):
        if weight.quantization is not None and _on_gpu():
            out = _add_beside(x, weight, _quantized_product(x, weight, weight.quantization))
            return out if bias is None else out + bias
        matrix = _matrix(weight.expand())
    else:
        matrix = layer.view("weight", _matrix)
    out = x @ matrix if bias is None else mx.addmm(bias, x, matrix)
    return _before_the_next(out) if stored else out


def _matrix(weight: mx.array) -> mx.array:
    """The weight of a linear layer or of a 1x1 convolution as (in, out)."""
    return weight.reshape(len(weight), -1).T


def _before_the_next(out: mx.array) -> mx.array:
    """Compute the product of an expanded weight now, on a CPU.

    Else MLX would expand the next weights ahead of their use, beside it.
    """
    if not _on_gpu():
        mx.eval(out)
    return out


def _quantized_product(x: mx.array, weight: StoredWeight, how: Quantization) -> mx.array:
    """x times the transposed weight, by kernels that expand it piece by piece."""
    rows, biases = weight.shape[0], weight.biases
    before, after = _split_scale(weight.global_scale)
    if before != 1:
        x = x * before
    out = mx.quantized_matmul(
        x,
        weight.weight.reshape(rows, -1),
        weight.scales.reshape(rows, -1),
        None if biases is None else biases.reshape(rows, -1),
        True,
        how.group_size,
        how.bits,
        how.mode,
    )
    return out if after == 1 else out * after


def _split_scale(scale: float | None) -> tuple[float, float]:
    """Return two factors of a global scale: for x, and for its product with the unscaled weight.

    The first is a power of two between 4 and 8 times the scale, at most 1. So the product is at
    most 8 times the result and fits float16 if that does, and x keeps its bits: a scale is about
    the largest weight / 448 (8 bits) or / 2688 (nvfp4), and then x = 0.1 stays above 2^-15.
    """
    if not scale:  # none; or 0, and then one factor is enough
        return 1.0, 1.0 if scale is None else scale
    before = min(1.0, 2.0 ** (math.frexp(abs(scale))[1] + 2))
    return before, scale / before


def _add_beside(x: mx.array, weight: StoredWeight, out: mx.array) -> mx.array:
    """Add the LoRA of a weight to ``out``, the product of x with the packed weight."""
    down, up = weight.down, weight.up
    if weight.gain is not None:
        out = out * weight.gain
    if down is None:
        return out
    added = x @ down.reshape(len(down), -1).T
    return out + (added if up is None else added @ up.T)


def _conv_by_rows(x: mx.array, weight: mx.array, stride: int, padding: int) -> mx.array:
    """A convolution by bands of output rows, each of which unfolds to at most _WORK_BYTES."""
    (batch, height, width, _), kernel = x.shape, weight.shape[1]
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    rows = max(1, _WORK_BYTES // (4 * batch * width * weight[0].size))
    if rows >= height:
        return mx.conv2d(x, weight, stride, padding)
    x = mx.pad(x, [(0, 0), (padding, padding), (0, 0), (0, 0)])
    bands = []
    for start in range(0, height, rows):
        last = min(start + rows, height) - 1
        lines = x[:, stride * start : stride * last + kernel]
        bands.append(mx.conv2d(lines, weight, stride, (0, padding)))
        mx.eval(bands[-1])
    return mx.concatenate(bands, axis=1)


def silu(x: mx.array) -> mx.array:
    """x times its logistic sigmoid."""
    return _swish(x, 1.0)


def geglu(x: mx.array) -> mx.array:
    """One half of the last axis, times the gelu of the other (Shazeer 2020)."""
    x, gate = mx.split(x, 2, axis=-1)
    return _gated(x, gate) if _on_gpu() else x * gelu(gate)


def gelu(x: mx.array) -> mx.array:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016), exactly."""
    if x.dtype != mx.float32:  # rounded once, to half
        return gelu(x.astype(mx.float32)).astype(x.dtype)
    if _exp_is_slow(x):
        return _in_blocks(_gelu_by_tail, x)
    return x * (0.5 * (1 + mx.erf(x * math.sqrt(0.5))))


def _tail_gelu(x: mx.array) -> mx.array:
    """max(x, 0) - |x| Q(|x|), where Q(a) exp(a^2 / 2) is a rational function of a.

    See numpy_layers.gelu. Beyond 13 the tail Q is zero in float32.
    """
    a = mx.minimum(mx.abs(x), 13)
    over, under = (_polynomial(coefficients, a) for coefficients in _TAIL)
    return mx.maximum(x, 0) - a * over / under * _exp2(a * a * (-0.5 * _LOG2_E))


def _gelu_slope(x: mx.array, cotangent: mx.array, out: mx.array) -> mx.array:
    """The derivative. That of the terms above is wrong at 0, where |x| and max(x, 0) bend."""
    density = mx.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return cotangent * (0.5 * (1 + mx.erf(x * math.sqrt(0.5))) + x * density)


_TAIL = (
    (0.5000000027524878, 0.4372523526944748, 0.18246261709172604, 0.04037273573961952,
     0.004077612920727744),
    (1.0, 1.6723896600898684, 1.1992946095192472, 0.46743110315571, 0.1012062493567782,
     0.010220931126342227),
)  # fmt: skip


def quick_gelu(x: mx.array) -> mx.array:
    """OpenAI CLIP's approximation of gelu."""
    return _swish(x, 1.702)


def _swish(x: mx.array, beta: float) -> mx.array:
    """x times the logistic sigmoid of beta x."""
    if x.dtype != mx.float32:  # rounded once, to half
        return _swish(x.astype(mx.float32), beta).astype(x.dtype)
    if not _exp_is_slow(x):
        return x * mx.sigmoid(x if beta == 1 else beta * x)
    # At the bound the quotient is 1e-38 x.
    return _in_blocks(lambda x: x / (1 + _exp2(mx.clip(x * (-beta * _LOG2_E), -126, 126))), x)


_LOG2_E = math.log2(math.e)
# 2 ** (f / 2) for f in [-1/2, 1/2], by interpolation at Chebyshev points; relative error 8e-8.
_ROOT_EXP2 = (1.0, 0.34657277573655787, 0.06005657970042337, 0.006951043949148044,
              0.0006018855981155807)  # fmt: skip


def _bits_exp2(x: mx.array) -> mx.array:
    """2 ** x for -126 <= x <= 126 in float32, to a relative error of 4e-7.

    Adding 1.5 * 2^23 rounds x to a whole number n, and leaves it in the lowest bits of the sum;
    shifted, they are added to the exponent of 2 ** (x - n). For other x, infinite ones and nan
    too, the result is any number.
    """
    shifted = x + 12582912.0
    root = _polynomial(_ROOT_EXP2, x - (shifted - 12582912.0))
    power = (root * root).view(mx.int32) + (shifted.view(mx.int32) << 23)
    return power.view(mx.float32)


def _exp2_slope(x: mx.array, cotangent: mx.array, power: mx.array) -> mx.array:
    """The derivative. MLX has none of a view of bits."""
    return cotangent * power * math.log(2)


def _with_slope(
    function: Callable[[mx.array], mx.array], slope: Callable[..., mx.array]
) -> Callable[[mx.array], mx.array]:
    """The function with a derivative of its own: slope(x, cotangent, function(x))."""
    made: Any = mx.custom_function(function)
    made.vjp(slope)
    result: Callable[[mx.array], mx.array] = made
    return result


_exp2 = _with_slope(_bits_exp2, _exp2_slope)
_gelu_by_tail = _with_slope(_tail_gelu, _gelu_slope)


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    """The sum of coefficients[i] * x ** i."""
    *rest, before_last, last = coefficients
    total = x * last + before_last
    for coefficient in reversed(rest):
        total = total * x + coefficient
    return total


def _exp_is_slow(x: mx.array) -> bool:
    return _SCALAR_EXP and x.dtype == mx.float32 and mx.default_device() == mx.cpu


def _in_blocks(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """An element-wise function, block by block."""
    if x.size <= _BLOCK:
        return function(x)
    flat, parts = x.reshape(-1), []
    for start in range(0, x.size, _BLOCK):
        parts.append(function(flat[start : start + _BLOCK]))
        mx.eval(parts[-1])
    return mx.concatenate(parts).reshape(x.shape)


def _sum(x: mx.array, *others: mx.array) -> mx.array:
    if len(others) > 1 and _on_gpu():
        return _sum_of_three(x, *others)
    return sum(others, x)


# ------------------------------------------------------------------------- kernels made on the GPU


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make one kernel of an element-wise function, on a GPU.

    Metal compiles a library for each function, each combination of types of its arguments, and each
    number that is not an array. So numbers that vary, with the size of a picture for example, are
    arrays. On a CPU the function runs as it is: to compile for one needs g++ at run time.
    """
    made: Callable[..., Any] = mx.compile(function)

    @wraps(function)
    def run(*arrays: mx.array) -> Any:
        return made(*arrays) if _on_gpu() else function(*arrays)

    return run


@_kernel
def _sum_of_three(x: mx.array, y: mx.array, z: mx.array) -> mx.array:
    return x + y + z


@_kernel
def _gated(x: mx.array, gate: mx.array) -> mx.array:
    """x times the gelu of the gate, rounded once."""
    wide = gate.astype(mx.float32)
    wide = x.astype(mx.float32) * (wide * (0.5 * (1 + mx.erf(wide * math.sqrt(0.5)))))
    return wide.astype(x.dtype)


@_kernel
def _scaled(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """x * scale + shift, with float32 factors, rounded once."""
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@_kernel
def _scaled_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """The silu of x * scale + shift, with float32 factors, rounded once."""
    wide = x.astype(mx.float32) * scale + shift
    return (wide * mx.sigmoid(wide)).astype(x.dtype)


@_kernel
def _squared_distance(x: mx.array, total: mx.array, inverse: mx.array) -> mx.array:
    """The squared distance from a mean, total * inverse, in float32."""
    return mx.square(x.astype(mx.float32) - total * inverse)


@_kernel
def _scale_shift(
    total: mx.array,
    square: mx.array,
    inverse: mx.array,
    eps: mx.array,
    weight: mx.array,
    bias: mx.array,
) -> tuple[mx.array, mx.array]:
    """Fold sums, the inverse of their count, weight and bias of a norm: x * scale + shift."""
    scale = weight * mx.rsqrt(square * inverse + eps)
    return scale, bias - total * inverse * scale


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """The function that a config calls by this name: silu, gelu or quick_gelu."""
    return {"silu": silu, "gelu": gelu, "quick_gelu": quick_gelu}[name]


# Head dimensions with a fused Metal kernel for any lengths, in every MLX that we support.
_METAL_HEAD_DIMS = (64, 80, 128)


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    heads: int,
    mask: mx.array | None = None,
    batch: int | None = None,
) -> mx.array:
    """Scaled dot-product attention (Vaswani et al. 2017).

    Where MLX has a fused kernel, heads are zero-padded to a dimension that it takes: the zeros add
    nothing to the scores and give zero columns, so the result is the same. Elsewhere the scores are
    float32 whatever the inputs are (float16 scores can overflow), for as many queries at a time as
    memory allows.

    Args:
        q: queries, (B, Lq, heads * D).
        k, v: keys and values, (B, Lk, heads * D), or what ``pad_heads`` makes of them.
        heads: number of heads.
        mask: bool (Lq, Lk), true where a query sees a key; None: everywhere.
        batch: B, where the vectors of all samples are the rows of one matrix, (B * L, heads * D).
    Returns: the shape and the dtype of q.
    """
    batch, shape = len(q) if batch is None else batch, q.shape
    head_dim = shape[-1] // heads
    scale = head_dim**-0.5
    q, k, v = (_by_head(x, heads, batch).transpose(0, 2, 1, 3) for x in (q, k, v))
    fused_dim = _fused_head_dim(head_dim, q.dtype)
    if mask is None and _exp_is_slow(q):
        out = _attention_by_blocks(q, k, v, scale)
    elif fused_dim is None:
        out = _unfused_attention(q, k, v, scale, mask)
    else:
        q, k, v = (_pad_last(x, fused_dim) for x in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        out = out[..., :head_dim]
    return out.transpose(0, 2, 1, 3).reshape(shape)


def pad_heads(x: mx.array, heads: int) -> mx.array:
    """Pad keys or values (B, L, heads * D) as ``attention`` would each time that it takes them."""
    fused_dim = _fused_head_dim(x.shape[-1] // heads, x.dtype)
    if fused_dim is None:
        return x
    return _pad_last(_by_head(x, heads, len(x)), fused_dim).reshape(*x.shape[:2], -1)


def _by_head(x: mx.array, heads: int, batch: int) -> mx.array:
    """(B, L, heads * D), or (B * L, heads * D), as (B, L, heads, D)."""
    return x.reshape(batch, -1, heads, x.shape[-1] // heads)


def _pad_last(x: mx.array, size: int) -> mx.array:
    """Add zeros at the end of the last axis of four."""
    if x.shape[-1] == size:
        return x
    return mx.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])])


def _fused_head_dim(head_dim: int, dtype: mx.Dtype) -> int | None:
    """The head dimension to run a fused kernel at, ``head_dim`` or more; None: there is none."""
    if not _on_gpu():
        return None
    if mx.metal.is_available():
        return next((dim for dim in _METAL_HEAD_DIMS if dim >= head_dim), None)
    # CUDA: cuDNN's attention, half precision only.
    return head_dim if dtype != mx.float32 and head_dim % 8 == 0 and head_dim <= 128 else None


def _unfused_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """Attention of (B, heads, L, D) by float32 scores, at most _WORK_BYTES of them at a time."""
    dtype = q.dtype
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    batch, heads, length, _ = q.shape
    rows = max(1, _WORK_BYTES // (4 * batch * heads * k.shape[2]))
    parts = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        part = mx.fast.scaled_dot_product_attention(
            q[:, :, start:stop],
            k,
            v,
            scale=scale,
            mask=None if mask is None else mask[start:stop],
        ).astype(dtype)
        if rows < length:
            mx.eval(part)
        parts.append(part)
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _attention_by_blocks(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Attention of (B, heads, L, D) with the scores of _BLOCK pairs at a time, by _exp2.

    The softmax's denominator comes out of the same product as its numerator: as a column of ones
    beside v. Its maximum is only taken where the scores' bound (the Cauchy-Schwarz inequality)
    leaves room for an overflow.
    """
    batch, heads, length, dims = q.shape
    q, k, v = (x.reshape(batch * heads, -1, dims) for x in (q * (scale * _LOG2_E), k, v))
    bound = float(mx.sqrt(mx.square(q).sum(-1).max() * mx.square(k).sum(-1).max()))
    if not math.isfinite(bound):
        return mx.full((batch, heads, length, dims), math.nan)
    v = mx.concatenate([v, mx.ones((*v.shape[:2], 1))], axis=-1)
    mx.eval(q, k, v)
    k = k.swapaxes(1, 2)
    rows = min(length, max(1, _BLOCK // k.shape[2]))
    several = max(1, _BLOCK // (length * k.shape[2]))
    parts = []
    for i in range(0, batch * heads, several):
        keys, values = k[i : i + several], v[i : i + several]
        for start in range(0, length, rows):
            scores = q[i : i + several, start : start + rows] @ keys
            if bound > 80:
                scores = mx.maximum(scores - scores.max(axis=-1, keepdims=True), -126)
            sums = _exp2(scores) @ values
            parts.append(sums[..., :-1] / sums[..., -1:])
            mx.eval(parts[-1])
    if rows < length:
        return mx.concatenate(parts, axis=1).reshape(batch, heads, length, dims)
    return mx.concatenate(parts, axis=0).reshape(batch, heads, length, dims)


def upsample_nearest(x: mx.array, height: int, width: int) -> mx.array:
    """Nearest-neighbour interpolation of (B, H, W, C) to this height and width.

    Output pixel i takes input pixel floor(i * size_in / size_out), as torch's mode "nearest".
    """
    batch, rows, columns, channels = x.shape
    if (height, width) == (2 * rows, 2 * columns):
        x = x[:, :, None, :, None, :]
        x = mx.broadcast_to(x, (batch, rows, 2, columns, 2, channels))
        return x.reshape(batch, height, width, channels)
    x = x[:, mx.arange(height) * rows // height]
    return x[:, :, mx.arange(width) * columns // width]


def timestep_embedding(
    timesteps: mx.array,
    embedding_dim: int,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
) -> mx.array:
    """Sines and cosines of the timesteps at geometrically spaced frequencies (Ho et al. 2020).

    Args:
        timesteps: (B,), may be fractional.
        embedding_dim: D; frequency i is 10000 ** (-i / (D // 2 - freq_shift)).
        flip_sin_to_cos: cosines come first.
        freq_shift: see embedding_dim.
    Returns: (B, D) float32; an odd D ends in a zero.
    """
    factors = mx.array(frequencies(embedding_dim, freq_shift))
    angles = timesteps.astype(mx.float32)[:, None] * factors
    parts = [mx.sin(angles), mx.cos(angles)]
    if flip_sin_to_cos:
        parts.reverse()
    if embedding_dim % 2:
        parts.append(mx.zeros((angles.shape[0], 1)))
    return mx.concatenate(parts, axis=-1)


# -------------------------------------------------------------------------------------- of arrays

float32 = mx.float32


def parameter(*shape: int) -> mx.array:
    """Zeros that take no memory: they are never computed, loading replaces them."""
    return mx.zeros(shape)


def relu(x: mx.array) -> mx.array:
    """max(x, 0)."""
    return mx.maximum(x, 0)


def leaky_relu(x: mx.array, slope: float | mx.array) -> mx.array:
    """max(x, 0) + slope * min(x, 0); the slope is a number, or one for each channel."""
    return mx.maximum(x, 0) + slope * mx.minimum(x, 0)


def tanh(x: mx.array) -> mx.array:
    """The hyperbolic tangent."""
    return mx.tanh(x)


def asarray(x: Any, dtype: mx.Dtype) -> mx.array:
    """An array of these numbers."""
    return mx.array(x, dtype)


def cast(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """The array in this dtype; itself if it has it."""
    return x.astype(dtype)


def arange(stop: int) -> mx.array:
    """The integers from 0 to stop - 1."""
    return mx.arange(stop)


def where(condition: mx.array, x: mx.array, y: mx.array) -> mx.array:
    """Values of x where the condition holds, else of y."""
    return mx.where(condition, x, y)


def clip(x: mx.array, low: float, high: float) -> mx.array:
    """The values, limited to [low, high]."""
    return mx.clip(x, low, high)


def concatenate(arrays: Sequence[mx.array], axis: int = 0) -> mx.array:
    """Join arrays along an axis."""
    return mx.concatenate(list(arrays), axis=axis)


def split(x: mx.array, parts: int, axis: int = 0) -> Sequence[mx.array]:
    """Equal parts of an array, along an axis."""
    return tuple(mx.split(x, parts, axis=axis))


def pad(x: mx.array, widths: Sequence[tuple[int, int]]) -> mx.array:
    """Add zeros before and after: (before, after) for each axis."""
    return mx.pad(x, list(widths))


def broadcast_to(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The array, repeated to this shape."""
    return mx.broadcast_to(x, shape)


def evaluate(*arrays: Any) -> None:
    """Compute arrays (or tuples and lists of them) now."""
    mx.eval(*arrays)
