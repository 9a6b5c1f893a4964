"""The operations of the models in float64 and plain NumPy, as judges for the self-test.

They share no code with the backends. Arrays are float64; feature maps are (B, H, W, C).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float64]


def convolution(x: Array, weight: Array, bias: Array, stride: int = 1, padding: int = 0) -> Array:
    """Convolve (B, H, W, in) with (out, k, k, in) -> (B, H', W', out)."""
    size = weight.shape[1]
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    windows = sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.tensordot(windows, weight, axes=([3, 4, 5], [3, 1, 2])) + bias


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """Map the last axis by a matrix (out, in)."""
    return x @ weight.T + bias


def group_norm(x: Array, weight: Array, bias: Array, groups: int, eps: float = 1e-5) -> Array:
    """Normalize each group of channels over all pixels."""
    batch, height, width, _ = x.shape
    grouped = x.reshape(batch, height * width, groups, -1)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    normalized = (grouped - mean) / np.sqrt(variance + eps)
    return normalized.reshape(x.shape) * weight + bias


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Normalize the last axis."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def silu(x: Array, beta: float = 1.0) -> Array:
    """Multiply x by the logistic sigmoid of beta x; quick_gelu has beta 1.702."""
    return x / (1 + np.exp(-beta * x))


def gelu(x: Array) -> Array:
    """Multiply x by the normal distribution function of x."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return x * 0.5 * (1 + erf(x * math.sqrt(0.5)))


def geglu(x: Array) -> Array:
    """Multiply one half of the last axis by the gelu of the other."""
    value, gate = np.split(x, 2, axis=-1)
    return value * gelu(gate)


def attention(q: Array, k: Array, v: Array, heads: int, mask: Array | None = None) -> Array:
    """Attend with scaled dot products; q (B, Lq, heads * D), k and v (B, Lk, heads * D)."""

    def split(x: Array) -> Array:
        return x.reshape(len(x), x.shape[1], heads, -1).transpose(0, 2, 1, 3)

    queries, keys, values = split(q), split(k), split(v)
    scores = queries @ keys.swapaxes(2, 3) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ values).transpose(0, 2, 1, 3).reshape(q.shape)


def timestep_embedding(timesteps: Array, dims: int) -> Array:
    """Return cosines and sines of the timesteps (B,) -> (B, dims); dims is even."""
    half = dims // 2
    angles = timesteps[:, None] * np.exp(-math.log(10000) * np.arange(half) / half)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


# -------------------------------------------------------------------- Winograd's method F(6x6, 3x3)

# Y = A^T [(G g G^T) * (B^T d B)] A (Lavin and Gray 2016), points 0, +-1, +-2, +-1/2 and infinity.
_INPUT = np.array([
    [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0],
    [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0],
    [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
    [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0],
    [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
    [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0],
    [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0],
    [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
])  # fmt: skip
_KERNEL = np.array([
    [1, 0, 0],
    [-2 / 9, -2 / 9, -2 / 9],
    [-2 / 9, 2 / 9, -2 / 9],
    [1 / 90, 1 / 45, 2 / 45],
    [1 / 90, -1 / 45, 2 / 45],
    [32 / 45, 16 / 45, 8 / 45],
    [32 / 45, -16 / 45, 8 / 45],
    [0, 0, 1],
])  # fmt: skip
_POINTS = (0, 1, -1, 2, -2, 1 / 2, -1 / 2)
_OUTPUT = np.array([[point**i for point in _POINTS] + [float(i == 5)] for i in range(6)])


def winograd(x: Array, kernel: Array) -> Array:
    """Correlate 8 values with a kernel of 3 by the method's matrices -> 6 values."""
    return _OUTPUT @ ((_KERNEL @ kernel) * (_INPUT @ x))


def winograd_growth(transforms_rounded: bool) -> float:
    """Return how many unit roundoffs a 3x3 convolution by F(6x6, 3x3) loses, in the mean square.

    The working type stores transformed inputs, kernels and products: three roundings, each with a
    relative error of up to u, and of u / sqrt(3) in the mean square. For independent inputs of unit
    variance the transforms have the variances |B_i|^2 and |G_i|^2 along each axis. Output row p
    then has the error variance sum_i A_pi^2 |B_i|^2 |G_i|^2 u^2, relative to the 3 terms of the
    direct method. The two axes multiply. The result is that of the worst output, a corner.

    Args:
        transforms_rounded: count the roundings inside the transforms too: two passes of 8 terms
            each. True for float32; half precision sums in float32.
    """
    variances = (_INPUT**2).sum(axis=1) * (_KERNEL**2).sum(axis=1)
    along_one_axis = (_OUTPUT**2 @ variances) / 3
    return float(along_one_axis.max()) * (math.sqrt(17) if transforms_rounded else 1.0)
