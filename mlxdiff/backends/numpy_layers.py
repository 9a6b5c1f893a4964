"""The layers that the networks are made of, in NumPy (``networks.layers.Layers``).

Feature maps are (B, H, W, C), everything is float32. Matrix products (BLAS) take most of the time.
All else is done in blocks that stay in a core's cache. Large work is divided among threads
(``machine.threads``; NumPy releases its lock inside an operation), small work is not: it takes some
50 us until another thread begins. Memory beyond inputs and outputs is bounded by the constants
below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mlxdiff.backends.frequencies import frequencies
from mlxdiff.machine import threads
from mlxdiff.networks.layers import convolve
from mlxdiff.weights.quantization import Beside, Packed, dequantize
from mlxdiff.weights.tensors import raise_faults

_BLOCK = 1 << 16  # values in a block of element-wise work: 256 KB
_SCORES = 1 << 20  # attention scores that a thread holds at a time: 4 MB
_ADDENDS = 16  # values that a float32 sum of a group norm adds one after the other
_COLUMNS = 1 << 23  # values of unfolded input that a convolution holds at a time: 32 MB
_LEAST_BLOCKS = 4  # that make another thread worth its start
_LEAST_MACS = 1 << 23  # multiply-adds that do: about 0.2 ms

Part = TypeVar("Part")
Result = TypeVar("Result")


# ------------------------------------------------------------------------------- blocks and threads


def _blocks(rows: int, row_size: int) -> list[slice]:
    """Slices that cover this many rows of this many values, _BLOCK values or one row each."""
    step = max(1, _BLOCK // max(1, row_size))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _for_each(function: Callable[[Part], Result], blocks: Sequence[Part]) -> list[Result]:
    """The function's results for all blocks, in order. Many blocks are shared among threads."""
    return threads.for_each(function, blocks, len(blocks) // _LEAST_BLOCKS)


def _shares(size: int, count: int) -> list[slice]:
    """Slices that cover this size: ``count`` of almost equal length, none of them empty."""
    edges = [size * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges) if pair[0] < pair[1]]


def _threads_for(macs: int) -> int:
    """The number of threads among which matrix products of this many multiply-adds are divided."""
    return max(1, min(threads.for_products(), macs // _LEAST_MACS))


def _product(
    a: np.ndarray, b: np.ndarray, bias: np.ndarray | None, out: np.ndarray | None = None
) -> np.ndarray:
    """The matrix product a b, plus the bias in each row."""
    (rows, inner), columns = a.shape, b.shape[1]
    out = np.empty((rows, columns), np.float32) if out is None else out
    by_rows = rows >= columns  # BLAS copies the undivided factor once for each part

    def compute(share: slice) -> None:
        if by_rows:
            part = np.matmul(a[share], b, out=out[share])
        else:
            part = np.matmul(a, b[:, share], out=out[:, share])
        if bias is not None:
            part += bias if by_rows else bias[share]

    shares = _shares(rows if by_rows else columns, _threads_for(rows * inner * columns))
    with threads.one_blas_thread:
        threads.for_each(compute, shares, len(shares))
    return out


def _rows(x: np.ndarray) -> np.ndarray:
    """The values as a matrix whose rows are the last axis."""
    return x.reshape(-1, x.shape[-1])


def _elementwise(function: Callable[[np.ndarray, np.ndarray], None], x: np.ndarray) -> np.ndarray:
    """A new array that the function fills: it is given blocks of x, and where their values go."""
    out = np.empty(x.shape, np.float32)
    source, target = _rows(x), _rows(out)
    _for_each(lambda block: function(source[block], target[block]), _blocks(*source.shape))
    return out


# ------------------------------------------------------------------------------------------- layers


class Module:
    """Base of all layers and networks: a tree of attributes and lists whose leaves are parameters.

    A parameter is an array. Before ``load_weights`` it is zeros of its shape that take no memory.
    """

    dtype: Any = np.float32

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute; each kind of module says from what."""
        raise NotImplementedError(type(self).__name__)

    def parameters(self) -> dict[str, np.ndarray]:
        """All parameters by name, in order of construction."""
        return {name: getattr(owner, key) for name, owner, key in self._leaves()}

    def load_weights(self, weights: list[tuple[str, np.ndarray]]) -> None:
        """Replace every parameter.

        Args:
            weights: name and float32 array of each; they are kept, not copied.
        Raises: CheckpointError that names what is missing, unknown or misshapen; nothing is
            replaced then.
        """
        given = dict(weights)
        leaves = {name: (owner, key) for name, owner, key in self._leaves()}
        shapes = {name: getattr(owner, key).shape for name, (owner, key) in leaves.items()}
        raise_faults(
            f"weights for {type(self).__name__}",
            missing=[name for name in leaves if name not in given],
            unknown=[name for name in given if name not in leaves],
            misshapen=[
                f"{name} is {given[name].shape}, expected {shape}"
                for name, shape in shapes.items()
                if name in given and given[name].shape != shape
            ],
        )
        for name, (owner, key) in leaves.items():
            setattr(owner, key, given[name])

    def put(self, name: str, weight: np.ndarray | StoredWeight) -> None:
        """Replace the parameter of this name, of this module or of one below it."""
        *path, key = name.split(".")
        owner: Any = self
        for part in path:
            owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
        setattr(owner, key, weight)

    def _leaves(self, prefix: str = "") -> Iterator[tuple[str, Module, str]]:
        """Name of each parameter, the module that owns it, and the attribute there."""
        for key, value in vars(self).items():
            if isinstance(value, np.ndarray):
                yield prefix + key, self, key
            elif isinstance(value, Module):
                yield from value._leaves(f"{prefix}{key}.")
            elif isinstance(value, list):
                for i, child in enumerate(value):
                    yield from child._leaves(f"{prefix}{key}.{i}.")


def _zeros(*shape: int) -> np.ndarray:
    """Zeros that take no memory."""
    return np.broadcast_to(np.float32(0), shape)


class StoredWeight(Module):
    """A weight that is kept smaller than it is computed with, and expanded whenever it is used.

    Args:
        stored: quantized, or in another dtype.
        dtype: what it is expanded to.
        beside: what is added to it, never rounded to its bits (a LoRA).
    """

    def __init__(
        self,
        stored: Packed | np.ndarray,
        dtype: type = np.float32,
        beside: Beside | None = None,
    ) -> None:
        self.beside = beside
        self.stored = stored
        self.dtype = dtype
        self.shape = tuple(stored.shape)

    def expand(self) -> np.ndarray:
        """The whole weight."""
        weight = _expand(self.stored, self.dtype)
        if self.beside is None:
            return weight
        down, up, gain = self.beside
        if gain is not None:
            weight *= gain.reshape(-1, *(1,) * (weight.ndim - 1))
        change = down if up is None else _product(up, down.reshape(len(down), -1), None)
        weight += change.reshape(weight.shape)
        return weight

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the weight by their number."""
        if not isinstance(self.stored, Packed):
            return _expand(self.stored[ids], self.dtype)
        return _expand(self.stored.rows(lambda part: part[ids]), self.dtype)


def _expand(stored: Packed | np.ndarray, dtype: type) -> np.ndarray:
    if isinstance(stored, Packed):
        return dequantize(stored, dtype)
    return stored.astype(dtype)


def _value(weight: np.ndarray | StoredWeight) -> np.ndarray:
    return weight.expand() if isinstance(weight, StoredWeight) else weight


class Linear(Module):
    """Affine map of the last axis; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        self.weight = _zeros(out_features, in_features)
        self.bias = _zeros(out_features) if bias else None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out = _product(_rows(x), _value(self.weight).T, self.bias)
        return out.reshape(*x.shape[:-1], -1)


class Conv2d(Module):
    """Convolution with a square kernel and zero padding; weight (out, kH, kW, in).

    One matrix product for some lines of output at a time, of the unfolded input with the kernel.

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
        self.stride = stride
        self.padding = padding
        self.weight = _zeros(out_channels, kernel_size, kernel_size, in_channels)
        self.bias = _zeros(out_channels) if bias else None

    def __call__(
        self, x: np.ndarray, more: np.ndarray | Callable[[], np.ndarray] | None = None
    ) -> np.ndarray:
        out = convolve(self._convolve, x, self.padding, self.stride, np.concatenate)
        if more is not None:
            out += more() if callable(more) else more
        return out

    def _convolve(self, x: np.ndarray) -> np.ndarray:
        outputs, size, _, inputs = self.weight.shape
        kernel = _value(self.weight).reshape(outputs, -1).T
        if size == 1 and self.stride == 1 and self.padding == 0:
            return _product(_rows(x), kernel, self.bias).reshape(*x.shape[:-1], outputs)
        windows = self._windows(x)
        batch, height, width = windows.shape[:3]
        out = np.empty((batch * height, width, outputs), np.float32)
        taps = size * size * inputs
        macs, many_rows = len(out) * width * taps * outputs, len(out) * width >= outputs
        # Threads take lines of the output. Few wide lines: _product divides itself.
        shares = _shares(len(out), _threads_for(macs) if many_rows else 1)
        step = max(1, _COLUMNS // (len(shares) * width * taps))

        def compute(share: slice) -> None:
            size = min(step, share.stop - share.start)
            unfolded = np.empty((size, *windows.shape[2:]), np.float32)

            def unfold(block: slice) -> None:
                for i in range(block.start, block.stop):
                    unfolded[i] = windows[divmod(start + i, height)]

            for start in range(share.start, share.stop, size):
                lines = out[start : min(start + size, share.stop)]
                _for_each(unfold, _blocks(len(lines), width * taps))
                columns = unfolded[: len(lines)].reshape(-1, taps)
                _product(columns, kernel, self.bias, _rows(lines))

        with threads.one_blas_thread:
            threads.for_each(compute, shares, len(shares))
        return out.reshape(batch, height, width, outputs)

    def _windows(self, x: np.ndarray) -> np.ndarray:
        """The input under the kernel at each output, a view (B, H', W', size, size * C).

        In memory the pixels of a line of the kernel lie side by side, hence the last axis.
        """
        size, stride, padding = self.weight.shape[1], self.stride, self.padding
        batch, height, width, channels = x.shape
        if padding:
            shape = (batch, height + 2 * padding, width + 2 * padding, channels)
            padded = np.zeros(shape, np.float32)
            padded[:, padding : padding + height, padding : padding + width] = x
            x, height, width = padded, shape[1], shape[2]
        x = np.ascontiguousarray(x)
        image, line, pixel, channel = x.strides
        return as_strided(
            x,
            (
                batch,
                (height - size) // stride + 1,
                (width - size) // stride + 1,
                size,
                size * channels,
            ),
            (image, stride * line, stride * pixel, line, channel),
            writeable=False,
        )


class GroupNorm(Module):
    """Group normalization (Wu and He 2018) of (B, H, W, C): over H, W and the group's channels.

    Mean and variance are taken around a first mean, so that no digits are lost where the mean is
    far from zero. A wrong mean or variance moves the whole group, so their sums are long in
    float64 (``_column_sums``).
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        self.num_groups = num_groups
        self.eps = eps
        self.weight = _zeros(num_channels)
        self.bias = _zeros(num_channels)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.over([x])(x)

    def silu(self, x: np.ndarray) -> np.ndarray:
        """The silu of the normalized feature map."""
        return silu(self(x))

    def over(self, bands: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function that normalizes each band of a feature map given as bands of rows."""
        factors = [self._factors([_rows(b[i]) for b in bands]) for i in range(len(bands[0]))]

        def normalize(x: np.ndarray) -> np.ndarray:
            out = np.empty(x.shape, np.float32)
            for picture, target, (centre, scale, shift) in zip(x, out, factors, strict=True):
                rows, results = _rows(picture), _rows(target)

                def apply(block: slice) -> None:
                    part = np.subtract(rows[block], centre, out=results[block])  # noqa: B023
                    part *= scale  # noqa: B023
                    part += shift  # noqa: B023

                _for_each(apply, _blocks(*rows.shape))
            return out

        return normalize

    def silu_over(self, bands: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function that gives the silu of each normalized band."""
        normalize = self.over(bands)
        return lambda x: silu(normalize(x))

    def _factors(self, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre, scale and shift of each channel, for one picture's pixels (N, C) in parts."""
        count = sum(map(len, parts))
        blocks = [x[block] for x in parts for block in _blocks(*x.shape)]

        def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            centred = x - centre
            first = _column_sums(centred)
            centred *= centred
            return first, _column_sums(centred)

        sums = _for_each(_column_sums, blocks)
        centre = self._by_group(sums, count).astype(np.float32)
        first, second = (
            self._by_group(sums, count) for sums in zip(*_for_each(moments, blocks), strict=True)
        )
        factor = self.weight / np.sqrt(second - first * first + self.eps)
        scale, shift = (v.astype(np.float32) for v in (factor, self.bias - first * factor))
        return centre, scale, shift

    def _by_group(self, sums: Sequence[np.ndarray], count: int) -> np.ndarray:
        """Mean over its group for each channel, (C,) float64, from sums (C,) over ``count``."""
        total = np.sum(sums, axis=0)
        groups = total.reshape(self.num_groups, -1).mean(axis=1) / count
        return np.repeat(groups, len(total) // self.num_groups)


def _column_sums(x: np.ndarray) -> np.ndarray:
    """Sums of the columns of (N, C) float32: (C,) float64.

    At most _ADDENDS values are added one after the other in float32, which is fast; their sums are
    added in float64. (NumPy adds rows one after the other: in float32 alone, the error would grow
    with N.)
    """
    whole = len(x) // _ADDENDS * _ADDENDS
    sums = x[:whole].reshape(_ADDENDS, -1).sum(axis=0).reshape(-1, x.shape[1])
    rest = x[whole:].sum(axis=0, dtype=np.float64)
    return sums.sum(axis=0, dtype=np.float64) + rest


class LayerNorm(Module):
    """Layer normalization (Ba et al. 2016) of the last axis."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        self.eps = eps
        self.weight = _zeros(dims)
        self.bias = _zeros(dims)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        def normalize(part: np.ndarray, out: np.ndarray) -> None:
            np.subtract(part, part.mean(axis=1, keepdims=True), out=out)
            variance = np.einsum("nc,nc->n", out, out) / out.shape[1]
            out /= np.sqrt(variance + self.eps)[:, None]
            out *= self.weight
            out += self.bias

        return _elementwise(normalize, x)


class Embedding(Module):
    """Rows of a table by their number: (...) int -> (..., dims)."""

    def __init__(self, num_embeddings: int, dims: int) -> None:
        self.weight = _zeros(num_embeddings, dims)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        weight = self.weight
        return weight.take(ids) if isinstance(weight, StoredWeight) else weight[ids]


# -------------------------------------------------------------------------------------- activations


def silu(x: np.ndarray) -> np.ndarray:
    """x times its logistic sigmoid."""
    return _swish(x, 1.0)


def geglu(x: np.ndarray) -> np.ndarray:
    """One half of the last axis, times the gelu of the other (Shazeer 2020)."""
    x, gate = np.split(x, 2, axis=-1)
    out = gelu(gate)
    out *= x
    return out


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016), exactly.

    With Q(a) = 1 - Phi(a) the upper tail of the normal distribution, x Phi(x) is
    max(x, 0) - |x| Q(|x|): no digits cancel, on neither side. Q(a) exp(a^2 / 2) is smooth; _TAIL is
    its rational approximation on [0, 14], fitted by us to a relative error of 6e-9. Beyond, Q is
    zero in float32.
    """

    def compute(part: np.ndarray, out: np.ndarray) -> None:
        a = np.abs(part)
        np.minimum(a, 14, out=a)
        over, under = (_polynomial(coefficients, a) for coefficients in _TAIL)
        over /= under
        over *= a
        a *= a
        a *= -0.5
        over *= np.exp(a, out=a)
        np.maximum(part, 0, out=out)
        out -= over

    return _elementwise(compute, x)


_TAIL = (
    (0.5000000027524878, 0.4372523526944748, 0.18246261709172604, 0.04037273573961952,
     0.004077612920727744),
    (1.0, 1.6723896600898684, 1.1992946095192472, 0.46743110315571, 0.1012062493567782,
     0.010220931126342227),
)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """The sum of coefficients[i] * x ** i."""
    *rest, before_last, last = coefficients
    total = x * last
    total += before_last
    for coefficient in reversed(rest):
        total *= x
        total += coefficient
    return total


def quick_gelu(x: np.ndarray) -> np.ndarray:
    """OpenAI CLIP's approximation of gelu."""
    return _swish(x, 1.702)


def _swish(x: np.ndarray, beta: float) -> np.ndarray:
    """x / (1 + exp(-beta x))."""

    def compute(part: np.ndarray, out: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # to infinity: the quotient is then 0, as it should be
            np.multiply(part, -beta, out=out)
            np.exp(out, out=out)
        out += 1
        np.divide(part, out, out=out)

    return _elementwise(compute, x)


def activation(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function that a config calls by this name: silu, gelu or quick_gelu."""
    return {"silu": silu, "gelu": gelu, "quick_gelu": quick_gelu}[name]


# ---------------------------------------------------------------------------------------- functions


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    heads: int,
    mask: np.ndarray | None = None,
    batch: int | None = None,
) -> np.ndarray:
    """Scaled dot-product attention (Vaswani et al. 2017): softmax(q k^T / sqrt(D)) v for each head.

    Some queries at a time, so that the scores stay in the cache whatever the length. The softmax's
    denominator comes out of the same product as its numerator: as a column of ones beside v.

    Args:
        q: queries, (B, Lq, heads * D).
        k, v: keys and values, (B, Lk, heads * D).
        heads: number of heads.
        mask: bool (Lq, Lk), true where a query sees a key; None: everywhere.
        batch: B, where the vectors of all samples are the rows of one matrix, (B * L, heads * D).
    Returns: the shape of q.
    """
    batch, shape = len(q) if batch is None else batch, q.shape
    q, k, v = (x.reshape(batch, -1, shape[-1]) for x in (q, k, v))
    length, keys_length, head_dim = q.shape[1], k.shape[1], shape[-1] // heads
    if mask is None and _is_many_short(batch * heads, length, keys_length):
        return _attention_of_short(q, k, v, heads).reshape(shape)
    q = q * head_dim**-0.5
    out = np.empty(q.shape, np.float32)
    count = _threads_for(2 * q.size * keys_length)
    # More parts than threads, so that none waits long for another.
    queries_shares = _shares(length, math.ceil(4 * count / (batch * heads)) if count > 1 else 1)
    head_slices = [slice(i * head_dim, (i + 1) * head_dim) for i in range(heads)]
    parts = list(product(range(batch), head_slices, queries_shares))
    step = min(max(1, _SCORES // keys_length), length)

    def compute(parts: Sequence[tuple[int, slice, slice]]) -> None:
        values = np.ones((keys_length, head_dim + 1), np.float32)
        workspace = np.empty((step, keys_length), np.float32)
        for b, head, share in parts:
            keys = k[b, :, head]
            values[:, :-1] = v[b, :, head]
            for start in range(share.start, share.stop, step):
                rows = slice(start, min(start + step, share.stop))
                queries = q[b, rows, head]
                scores = np.matmul(queries, keys.T, out=workspace[: len(queries)])
                if mask is not None:
                    np.copyto(scores, -np.inf, where=~mask[rows])
                _exponentials(scores, _longest(queries) * _longest(keys))
                sums = np.matmul(scores, values)
                np.divide(sums[:, :-1], sums[:, -1:], out=out[b, rows, head])

    with threads.one_blas_thread:
        threads.for_each(compute, [parts[i::count] for i in range(count)], count)
    return out.reshape(shape)


_SHORT, _MANY = 64, 256


def _is_many_short(sequences: int, length: int, keys_length: int) -> bool:
    """True where attention is quicker for many sequences at once (frames at many places)."""
    return sequences >= _MANY and max(length, keys_length) <= _SHORT


def _by_head(x: np.ndarray, heads: int) -> np.ndarray:
    """(B, L, heads * D) as (B, heads, L, D)."""
    return x.reshape(len(x), x.shape[1], heads, -1).transpose(0, 2, 1, 3)


def _softmax_of_scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The softmax of scores: (B, heads, Lq, D), (B, heads, Lk, D) -> (B, heads, Lq, Lk)."""
    scores = (q * np.float32(q.shape[-1] ** -0.5)) @ k.swapaxes(2, 3)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _attention_of_short(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
    """Attention of (B, L, heads * D) for many sequences at once."""
    out = np.empty(q.shape, np.float32)
    step = max(1, _SCORES // (heads * k.shape[1] ** 2))

    def compute(starts: Sequence[int]) -> None:
        for start in starts:
            part = slice(start, start + step)
            found = _softmax_of_scores(_by_head(q[part], heads), _by_head(k[part], heads))
            found = found @ _by_head(v[part], heads)
            out[part] = found.transpose(0, 2, 1, 3).reshape(out[part].shape)

    starts = list(range(0, len(q), step))
    count = min(_threads_for(2 * q.size * k.shape[1]), len(starts))
    with threads.one_blas_thread:
        threads.for_each(compute, [starts[i::count] for i in range(count)], count)
    return out


def pad_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """Keys or values (B, L, heads * D) as ``attention`` takes them: as they are."""
    return x


def _longest(vectors: np.ndarray) -> float:
    """The largest Euclidean norm of a row."""
    return math.sqrt(np.einsum("nd,nd->n", vectors, vectors).max())


def _exponentials(scores: np.ndarray, bound: float) -> None:
    """Replace scores by their exponentials, up to a factor for each row.

    The factor exp(-maximum) guards against overflow. It costs two more passes over the scores, and
    is left out where their bound (the Cauchy-Schwarz inequality) rules that out anyway.
    """

    def compute(block: slice) -> None:
        part = scores[block]
        if not bound < 60:  # so that not even sums overflow or underflow; true for nan
            part -= part.max(axis=1, keepdims=True)
        np.exp(part, out=part)

    _for_each(compute, _blocks(*scores.shape))


def upsample_nearest(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour interpolation of (B, H, W, C) to this height and width.

    Output pixel i takes input pixel floor(i * size_in / size_out), as torch's mode "nearest".
    """
    _, rows, columns, _ = x.shape
    x = x[:, np.arange(height) * rows // height]
    return x[:, :, np.arange(width) * columns // width]


def timestep_embedding(
    timesteps: np.ndarray,
    embedding_dim: int,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
) -> np.ndarray:
    """Sines and cosines of the timesteps at geometrically spaced frequencies (Ho et al. 2020).

    Args:
        timesteps: (B,), may be fractional.
        embedding_dim: D; frequency i is 10000 ** (-i / (D // 2 - freq_shift)).
        flip_sin_to_cos: cosines come first.
        freq_shift: see embedding_dim.
    Returns: (B, D) float32; an odd D ends in a zero.
    """
    angles = timesteps.astype(np.float32)[:, None] * frequencies(embedding_dim, freq_shift)
    sine, cosine = (f(angles.astype(np.float64)).astype(np.float32) for f in (np.sin, np.cos))
    parts = [cosine, sine] if flip_sin_to_cos else [sine, cosine]
    if embedding_dim % 2:
        parts.append(np.zeros((len(angles), 1), np.float32))
    return np.concatenate(parts, axis=1)


# -------------------------------------------------------------------------------------- of arrays

float32 = np.float32


def parameter(*shape: int) -> np.ndarray:
    """Zeros that take no memory; loading replaces them."""
    return _zeros(*shape)


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    out: np.ndarray = np.maximum(x, 0)
    return out


def leaky_relu(x: np.ndarray, slope: float | np.ndarray) -> np.ndarray:
    """max(x, 0) + slope * min(x, 0); the slope is a number, or one for each channel."""

    def compute(part: np.ndarray, out: np.ndarray) -> None:
        np.minimum(part, 0, out=out)
        out *= slope
        out += np.maximum(part, 0)

    return _elementwise(compute, x)


def tanh(x: np.ndarray) -> np.ndarray:
    """The hyperbolic tangent."""
    out: np.ndarray = np.tanh(x)
    return out


def asarray(x: Any, dtype: Any) -> np.ndarray:
    """An array of these numbers; itself if it is one of this dtype."""
    return np.asarray(x, dtype)


def cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in this dtype; itself if it has it."""
    return x.astype(dtype, copy=False)


def arange(stop: int) -> np.ndarray:
    """The integers from 0 to stop - 1."""
    return np.arange(stop)


def where(condition: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of x where the condition holds, else of y."""
    return np.where(condition, x, y)


def clip(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """The values, limited to [low, high]."""
    out: np.ndarray = np.clip(x, low, high)
    return out


def concatenate(arrays: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
    """Join arrays along an axis."""
    return np.concatenate(arrays, axis=axis)


def split(x: np.ndarray, parts: int, axis: int = 0) -> Sequence[np.ndarray]:
    """Equal parts of an array, along an axis: views of it."""
    return np.split(x, parts, axis=axis)


def pad(x: np.ndarray, widths: Sequence[tuple[int, int]]) -> np.ndarray:
    """Add zeros before and after: (before, after) for each axis."""
    return np.pad(x, widths)


def broadcast_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array, repeated to this shape: a view of it."""
    return np.broadcast_to(x, shape)


def evaluate(*arrays: Any) -> None:
    """Do nothing: NumPy computes at once."""
