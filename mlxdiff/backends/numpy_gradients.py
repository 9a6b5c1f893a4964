"""Gradients of the layers of ``numpy_layers``: for each function, what its inputs receive.

``x`` is an input of the layer, ``g`` the gradient of the loss with respect to its output. Nothing
of the forward pass is kept but the inputs: a gradient takes statistics and exponentials again.
Everything is float32. Shapes are those of ``numpy_layers``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from mlxdiff.backends.numpy_layers import (
    _SCORES,
    _TAIL,
    Conv2d,
    GroupNorm,
    _blocks,
    _by_head,
    _exponentials,
    _for_each,
    _is_many_short,
    _longest,
    _polynomial,
    _product,
    _rows,
    _softmax_of_scores,
    _threads_for,
)
from mlxdiff.machine import threads

# ------------------------------------------------------------------------------ maps by a matrix


def linear_input(g: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Gradient of x in x W^T: (..., out), (out, in) -> (..., in)."""
    return _product(_rows(g), weight, None).reshape(*g.shape[:-1], -1)


def linear_weight(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Gradient of W in x W^T: (..., in), (..., out) -> (out, in)."""
    return _product(np.ascontiguousarray(_rows(g).T), _rows(x), None)


def convolution_input(
    shape: tuple[int, ...], g: np.ndarray, weight: np.ndarray, stride: int, padding: int
) -> np.ndarray:
    """Gradient of the input of a convolution.

    One matrix product gives what each output sends to each place under its kernel; the places are
    then added up.

    Args:
        shape: of the input, (B, H, W, in).
        g: (B, H', W', out).
        weight: (out, kH, kW, in).
    """
    batch, height, width, channels = shape
    _, rows, columns, outputs = g.shape
    size = weight.shape[1]
    kernel = weight.reshape(outputs, -1)
    if size == 1 and stride == 1 and padding == 0:
        return linear_input(g, kernel)
    padded = np.zeros((batch, height + 2 * padding, width + 2 * padding, channels), np.float32)
    for picture, total in zip(g, padded, strict=True):
        # Some lines of the output at a time: what they send is `size` squared times as large.
        step = max(1, (4 * _SCORES) // max(1, columns * kernel.shape[1]))
        for start in range(0, rows, step):
            lines = picture[start : start + step]
            sent = _product(_rows(lines), kernel, None)
            sent = sent.reshape(len(lines), columns, size, size, channels)
            for i, j in product(range(size), range(size)):
                top = stride * start + i
                place = total[
                    top : top + stride * (len(lines) - 1) + 1 : stride,
                    j : j + stride * (columns - 1) + 1 : stride,
                ]
                place += sent[:, :, i, j]
    return padded[:, padding : padding + height, padding : padding + width]


def convolution_weight(
    x: np.ndarray, g: np.ndarray, size: int, stride: int, padding: int
) -> np.ndarray:
    """Gradient of the weight of a convolution: (out, size, size, in)."""
    outputs, channels = g.shape[-1], x.shape[-1]
    layer = Conv2d(channels, outputs, size, stride, padding, bias=False)
    windows = layer._windows(x)
    total = np.zeros((outputs, size * size * channels), np.float32)
    step = max(1, (4 * _SCORES) // max(1, g.shape[2] * total.shape[1]))
    for seen, picture in zip(windows, g, strict=True):
        for start in range(0, len(picture), step):
            unfolded = seen[start : start + step].reshape(-1, total.shape[1])
            lines = _rows(picture[start : start + step])
            total += _product(np.ascontiguousarray(lines.T), unfolded, None)
    return total.reshape(outputs, size, size, channels)


# ---------------------------------------------------------------------------------- activations


def _slope_of(slope: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """The gradient of an element-wise function from its derivative, block by block."""

    def gradient(x: np.ndarray, g: np.ndarray) -> np.ndarray:
        out = np.empty(x.shape, np.float32)
        source, given, target = _rows(x), _rows(g), _rows(out)

        def compute(block: slice) -> None:
            np.multiply(slope(source[block]), given[block], out=target[block])

        _for_each(compute, _blocks(*source.shape))
        return out

    return gradient


def _swish_slope(x: np.ndarray, beta: float = 1.0) -> np.ndarray:
    """s + beta x s (1 - s), with s the logistic sigmoid of beta x."""
    with np.errstate(over="ignore"):  # to infinity: s is then 0, as it should be
        s = np.exp(-beta * x)
    s += 1
    np.reciprocal(s, out=s)
    slope = 1 - s
    slope *= x
    if beta != 1:
        slope *= beta
    slope += 1
    slope *= s
    return slope


def _gelu_parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gelu of x and its derivative: x Phi(x), and Phi(x) + x phi(x)."""
    a = np.abs(x)
    np.minimum(a, 14, out=a)
    over, under = (_polynomial(coefficients, a) for coefficients in _TAIL)
    over /= under
    a *= a
    a *= -0.5
    np.exp(a, out=a)
    over *= a  # the upper tail at |x|
    a *= x
    a *= 1 / math.sqrt(2 * math.pi)
    phi = np.where(x > 0, 1 - over, over)
    return x * phi, phi + a


silu = _slope_of(_swish_slope)
quick_gelu = _slope_of(lambda x: _swish_slope(x, 1.702))
gelu = _slope_of(lambda x: _gelu_parts(x)[1])


def geglu(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Gradient of (..., 2 C) from that of (..., C)."""
    half = g.shape[-1]
    out = np.empty(x.shape, np.float32)
    source, given, target = _rows(x), _rows(g), _rows(out)

    def compute(block: slice) -> None:
        values, gate, part = source[block, :half], source[block, half:], given[block]
        gated, slope = _gelu_parts(gate)
        np.multiply(part, gated, out=target[block, :half])
        slope *= values
        np.multiply(part, slope, out=target[block, half:])

    _for_each(compute, _blocks(*source.shape))
    return out


# --------------------------------------------------------------------------------------- norms


def group_norm(
    layer: GroupNorm, x: np.ndarray, g: np.ndarray, silu: bool, trained: bool = False
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gradients of a group norm, or of the silu of one: of x, and if trained of weight and bias.

    With n = (x - mean) / deviation, the gradient of x is (h - mean(h) - n mean(h n)) / deviation,
    the means taken over the group, h = g weight.
    """
    groups, channels = layer.num_groups, x.shape[-1]
    out = np.empty(x.shape, np.float32)
    weights, biases = np.zeros(channels), np.zeros(channels)
    for picture, given, target in zip(x, g, out, strict=True):
        rows, received, results = _rows(picture), _rows(given), _rows(target)
        mean, inverse = _group_statistics(layer, rows)

        def sums(block: slice) -> tuple[np.ndarray, np.ndarray]:
            n = rows[block] - mean  # noqa: B023
            n *= inverse  # noqa: B023
            h = results[block]  # noqa: B023
            if silu:
                np.multiply(
                    received[block],  # noqa: B023
                    _swish_slope(n * layer.weight + layer.bias),
                    out=h,
                )
            else:
                h[:] = received[block]  # noqa: B023
            n *= h
            return h.sum(axis=0, dtype=np.float64), n.sum(axis=0, dtype=np.float64)

        blocks = _blocks(*rows.shape)
        first, second = (
            np.sum(part, axis=0) for part in zip(*_for_each(sums, blocks), strict=True)
        )
        biases += first
        weights += second
        count = len(rows) * channels // groups
        shift, slope = (
            np.repeat(
                (part * layer.weight).reshape(groups, -1).sum(axis=1) / count, channels // groups
            )
            for part in (first, second)
        )
        # (h w - shift - n slope) inverse, by one factor of each channel for each term.
        by_h = (layer.weight * inverse).astype(np.float32)
        by_x = (slope * inverse * inverse).astype(np.float32)
        constant = (shift * inverse).astype(np.float32)

        def apply(block: slice) -> None:
            part = results[block]  # noqa: B023
            part *= by_h  # noqa: B023
            centred = rows[block] - mean  # noqa: B023
            centred *= by_x  # noqa: B023
            part -= centred
            part -= constant  # noqa: B023

        _for_each(apply, blocks)
    if not trained:
        return out, None, None
    return out, weights.astype(np.float32), biases.astype(np.float32)


def _group_statistics(layer: GroupNorm, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse deviation of each channel's group, (C,) float32, for one picture (N, C)."""
    centre, scale, shift = layer._factors([rows])
    weight = np.where(layer.weight == 0, 1, layer.weight)
    if (layer.weight == 0).any():  # then the factors do not say; take them from a norm of ones
        plain = GroupNorm(layer.num_groups, len(weight), layer.eps)
        plain.weight, plain.bias = np.ones_like(weight), np.zeros_like(weight)
        centre, scale, shift = plain._factors([rows])
        return (centre - shift / scale).astype(np.float32), scale
    inverse = scale / weight
    return (centre - (shift - layer.bias) / scale).astype(np.float32), inverse


def layer_norm(
    x: np.ndarray, weight: np.ndarray, eps: float, g: np.ndarray, trained: bool = False
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gradients of a layer norm: of x, and if trained of weight and bias."""
    out = np.empty(x.shape, np.float32)
    source, given, target = _rows(x), _rows(g), _rows(out)

    def compute(block: slice) -> tuple[np.ndarray, np.ndarray] | None:
        n = source[block] - source[block].mean(axis=1, keepdims=True)
        variance = np.einsum("nc,nc->n", n, n) / n.shape[1]
        inverse = (1 / np.sqrt(variance + eps))[:, None].astype(np.float32)
        n *= inverse
        h = np.multiply(given[block], weight, out=target[block])
        slope = np.einsum("nc,nc->n", h, n)[:, None] / n.shape[1]
        h -= h.mean(axis=1, keepdims=True)
        sums = None
        if trained:
            part = given[block]
            sums = (np.einsum("nc,nc->c", part, n), part.sum(axis=0))
        n *= slope
        h -= n
        h *= inverse
        return sums

    parts = _for_each(compute, _blocks(*source.shape))
    if not trained:
        return out, None, None
    weights, biases = (np.sum(part, axis=0) for part in zip(*parts, strict=True))
    return out, weights, biases


# ------------------------------------------------------------------------------------ attention


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    g: np.ndarray,
    heads: int,
    mask: np.ndarray | None = None,
    batch: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of q, k and v.

    The weights P = softmax(q k^T / sqrt(D)) are computed again, some queries at a time, so that the
    memory does not grow with the square of the length (Dao et al. 2022). With D_i = g_i out_i:
    dV = P^T g, dS = P (g V^T - D), dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D).

    Args:
        out: the result, the shape of q.
        g: the gradient of the result.
        The others: as of ``numpy_layers.attention``.
    """
    batch, shape, context = len(q) if batch is None else batch, q.shape, k.shape
    q, k, v, out, g = (x.reshape(batch, -1, shape[-1]) for x in (q, k, v, out, g))
    length, keys_length, head_dim = q.shape[1], k.shape[1], shape[-1] // heads
    scale = np.float32(head_dim**-0.5)
    if mask is None and _is_many_short(batch * heads, length, keys_length):
        found = _attention_of_short(q, k, v, out, g, heads)
        return found[0].reshape(shape), found[1].reshape(context), found[2].reshape(context)
    dq, dk, dv = (np.empty(x.shape, np.float32) for x in (q, k, v))
    step = min(max(1, _SCORES // keys_length), length)
    slices = [slice(i * head_dim, (i + 1) * head_dim) for i in range(heads)]
    parts = list(product(range(batch), slices))
    count = min(_threads_for(5 * q.size * keys_length), len(parts))

    def compute(parts: Sequence[tuple[int, slice]]) -> None:
        first, second = (np.empty((step, keys_length), np.float32) for _ in range(2))
        # A column of ones beside V: its product with -D is the subtraction of D.
        values = np.ones((keys_length, head_dim + 1), np.float32)
        received = np.empty((step, head_dim + 1), np.float32)
        for b, head in parts:
            keys = np.ascontiguousarray(k[b, :, head])
            values[:, :-1] = v[b, :, head]
            longest = _longest(keys)
            keys_sum, values_sum = np.zeros_like(keys), np.zeros_like(keys)
            for start in range(0, length, step):
                rows = slice(start, min(start + step, length))
                size = rows.stop - rows.start
                queries = q[b, rows, head] * scale
                weights = np.matmul(queries, keys.T, out=first[:size])
                if mask is not None:
                    np.copyto(weights, -np.inf, where=~mask[rows])
                _exponentials(weights, _longest(queries) * longest)
                # The softmax's denominator divides g and D, not each weight.
                given, part = received[:size], g[b, rows, head]
                inverse = 1 / weights.sum(axis=1)
                np.multiply(part, inverse[:, None], out=given[:, :-1])
                given[:, -1] = -np.einsum("nd,nd->n", part, out[b, rows, head]) * inverse
                shared = np.matmul(given, values.T, out=second[:size])
                shared *= weights
                values_sum += weights.T @ given[:, :-1]
                keys_sum += shared.T @ queries
                np.multiply(shared @ keys, scale, out=dq[b, rows, head])
            dk[b, :, head], dv[b, :, head] = keys_sum, values_sum

    with threads.one_blas_thread:
        threads.for_each(compute, [parts[i::count] for i in range(count)], count)
    return dq.reshape(shape), dk.reshape(context), dv.reshape(context)


def _attention_of_short(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, g: np.ndarray, heads: int
) -> list[np.ndarray]:
    """Gradients of q, k and v, (B, L, heads * D) each, for many sequences at once."""
    scale = np.float32((q.shape[-1] // heads) ** -0.5)
    queries, keys, values, given = (_by_head(x, heads) for x in (q, k, v, g))
    weights = _softmax_of_scores(queries, keys)
    dv = weights.swapaxes(2, 3) @ given
    scores = given @ values.swapaxes(2, 3)
    scores -= (given * _by_head(out, heads)).sum(axis=-1, keepdims=True)
    scores *= weights
    scores *= scale
    found = scores @ keys, scores.swapaxes(2, 3) @ queries, dv
    return [
        one.transpose(0, 2, 1, 3).reshape(x.shape) for one, x in zip(found, (q, k, v), strict=True)
    ]
