"""The layers of each backend against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sides import Side

from mlxdiff.backends.frequencies import frequencies
from mlxdiff.machine import threads


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def side(backend: str) -> Side:
    return Side(backend)


@pytest.fixture
def in_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy in small blocks, on two threads."""
    if backend == "numpy":
        monkeypatch.setattr(Side(backend).nn, "_BLOCK", 600)
        monkeypatch.setattr(Side(backend).nn, "_LEAST_BLOCKS", 1)
        monkeypatch.setattr(Side(backend).nn, "_LEAST_MACS", 100)
        monkeypatch.setattr(threads, "count", lambda: 2)


# ------------------------------------------------------------------------------------ convolutions


def plain_convolution(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, stride: int, padding: int
) -> np.ndarray:
    """One output value after the other, in float64."""
    size = weight.shape[1]
    x = np.pad(x.astype(np.float64), [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)])
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((len(x), height, width, len(weight)))
    for b, row, column, channel in np.ndindex(out.shape):
        top, left = row * stride, column * stride
        window = x[b, top : top + size, left : left + size]
        out[b, row, column, channel] = (window * weight[channel]).sum()
    return out if bias is None else out + bias


@pytest.mark.parametrize(
    ("size", "stride", "padding", "bias"),
    [(3, 1, 1, True), (3, 2, 1, True), (3, 2, 0, True), (5, 1, 2, False), (1, 1, 0, True),
     (1, 1, 0, False), (1, 2, 0, True), (3, 1, 0, True)],
)  # fmt: skip
def test_convolution(side: Side, size: int, stride: int, padding: int, bias: bool) -> None:
    conv, weights = side.load(side.nn.Conv2d(4, 6, size, stride, padding, bias))
    x = normal(2, 7, 6, 4)
    expected = plain_convolution(x, weights["weight"], weights.get("bias"), stride, padding)
    np.testing.assert_allclose(side.run(conv, x), expected, atol=2e-5)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (2, 1, 1, 7)])
def test_a_convolution_with_more_added(side: Side, size: int, shape: tuple[int, ...]) -> None:
    x, more = side.array(normal(2, 5, 6, 8)), side.array(normal(*shape, seed=1))
    conv, _ = side.load(side.nn.Conv2d(8, 7, size, padding=size // 2))
    expected = side.numpy(conv(x)) + side.numpy(more)
    np.testing.assert_allclose(side.numpy(conv(x, more)), expected, atol=1e-6)
    # A function is called when the convolution is done.
    np.testing.assert_allclose(side.numpy(conv(x, lambda: more)), expected, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(side: Side, bias: bool) -> None:
    linear, weights = side.load(side.nn.Linear(5, 3, bias))
    x = normal(2, 4, 5)
    expected = x @ weights["weight"].T + weights.get("bias", 0)
    np.testing.assert_allclose(side.run(linear, x), expected, atol=1e-5)


def test_embedding(side: Side) -> None:
    embedding, weights = side.load(side.nn.Embedding(7, 4))
    ids = np.array([[0, 6, 3], [3, 3, 1]], np.int32)
    np.testing.assert_array_equal(side.run(embedding, ids), weights["weight"][ids])


# ------------------------------------------------------------------------------------------- norms


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("offset", [0, 100])
def test_group_norm(side: Side, offset: int) -> None:
    norm, weights = side.load(side.nn.GroupNorm(3, 12, eps=1e-3))
    x = normal(2, 30, 20, 12) + np.float32(offset)
    y = x.astype(np.float64).reshape(2, 600, 3, 4)
    y = y - y.mean(axis=(1, 3), keepdims=True)
    y = y / np.sqrt(y.var(axis=(1, 3), keepdims=True) + 1e-3)
    expected = y.reshape(x.shape) * weights["weight"] + weights["bias"]
    # MLX rounds x * scale and its shift at |mean| / std; NumPy takes the mean off first.
    rounding = 1e-6 * offset if side.name == "mlx" else 0
    np.testing.assert_allclose(side.run(norm, x), expected, atol=2e-6 + rounding)


def test_layer_norm(side: Side) -> None:
    norm, weights = side.load(side.nn.LayerNorm(40, eps=1e-3))
    x = 5 + normal(2, 7, 40)
    y = x.astype(np.float64)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y / np.sqrt(y.var(axis=-1, keepdims=True) + 1e-3)
    expected = y * weights["weight"] + weights["bias"]
    np.testing.assert_allclose(side.run(norm, x), expected, atol=5e-6)


# ------------------------------------------------------------------------------------- activations

FORMULAS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("name", FORMULAS)
def test_activations(side: Side, name: str) -> None:
    """NumPy's are right to a few units in the last place, in the tails too."""
    x = np.linspace(-9, 9, 40_001, dtype=np.float32)
    got = side.run(side.nn.activation(name), x[None])[0]
    expected = np.array([FORMULAS[name](float(v)) for v in x])
    bounds = {"numpy": {"rtol": 1e-5, "atol": 1e-9}, "mlx": {"rtol": 1e-6, "atol": 1e-6}}
    np.testing.assert_allclose(got, expected, **bounds[side.name])
    right = x > 0
    if side.name == "numpy":
        np.testing.assert_allclose(got[right], expected[right], rtol=6e-7)


def test_geglu_relu_and_tanh(side: Side) -> None:
    x = normal(3, 5, 16)
    left, right = np.split(x, 2, axis=-1)
    expected = left * np.vectorize(FORMULAS["gelu"])(right)
    np.testing.assert_allclose(side.run(side.nn.geglu, x), expected, atol=1e-6)
    np.testing.assert_array_equal(side.run(side.nn.relu, x), np.maximum(x, 0))
    np.testing.assert_allclose(side.run(side.nn.tanh, x), np.tanh(x), atol=1e-6)


# --------------------------------------------------------------------------------------- attention


def plain_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, mask: np.ndarray | None = None
) -> np.ndarray:
    """softmax(q k / sqrt(D)) v, head by head, in float64."""
    out, dim = np.empty(q.shape), q.shape[-1] // heads
    for h in range(heads):
        part = slice(h * dim, (h + 1) * dim)
        scores = q[..., part].astype(np.float64) @ k[..., part].swapaxes(1, 2) / math.sqrt(dim)
        if mask is not None:
            scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
    return out


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("lengths", [(33, 7), (9, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(side: Side, lengths: tuple[int, int], masked: bool) -> None:
    (queries, keys), nn = lengths, side.nn
    q, k, v = normal(2, queries, 40), normal(2, keys, 40, seed=1), normal(2, keys, 40, seed=2)
    mask = np.tri(queries, keys, dtype=bool) if masked else None
    expected = plain_attention(q, k, v, 5, mask)
    given = [side.array(x) for x in (q, k, v)]
    on_side = None if mask is None else side.array(mask)
    got = side.numpy(nn.attention(*given, 5, on_side))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    # The vectors of both samples as the rows of one matrix.
    rows = nn.attention(*(x.reshape(-1, 40) for x in given), 5, on_side, batch=2)
    np.testing.assert_array_equal(side.numpy(rows), got.reshape(-1, 40))
    for x, before in zip(given, (q, k, v), strict=True):
        np.testing.assert_array_equal(side.numpy(x), before)


# ----------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (7, 9), (6, 7), (3, 4), (10, 3)])
def test_upsample_nearest(side: Side, size: tuple[int, int]) -> None:
    x = normal(2, 3, 4, 5)
    got = side.run(lambda x: side.nn.upsample_nearest(x, *size), x)
    assert got.shape == (2, *size, 5)
    for row, column in np.ndindex(size):
        source = x[:, row * 3 // size[0], column * 4 // size[1]]
        np.testing.assert_array_equal(got[:, row, column], source)


@pytest.mark.parametrize(
    ("dim", "flip", "shift"), [(32, True, 0.0), (320, False, 1.0), (7, True, 0.0)]
)
def test_timestep_embedding(side: Side, dim: int, flip: bool, shift: float) -> None:
    steps = np.array([0, 1, 501.5, 999], dtype=np.float32)
    half = dim // 2
    angles = steps[:, None] * 10000.0 ** (-np.arange(half) / (half - shift))
    parts = [np.cos(angles), np.sin(angles)] if flip else [np.sin(angles), np.cos(angles)]
    expected = np.concatenate([*parts, np.zeros((4, dim % 2))], axis=1)
    got = side.run(lambda t: side.nn.timestep_embedding(t, dim, flip, shift), steps)
    # Frequencies and angles are rounded to float32: a phase of up to 999 * 1e-7.
    np.testing.assert_allclose(got, expected, atol=2e-4)
    # With these roundings, which the reference makes too, only a sine's last bit is left.
    rounded = np.float32(steps)[:, None] * frequencies(dim, shift)
    parts = [f(rounded.astype(np.float64)) for f in (np.sin, np.cos)]
    expected = np.concatenate([*(parts[::-1] if flip else parts), np.zeros((4, dim % 2))], axis=1)
    np.testing.assert_allclose(got, expected, atol=1.2e-7, rtol=0)


def test_frequencies_are_rounded_once() -> None:
    exponents = np.float32(np.arange(160)) * np.float32(-np.log(10000)) / np.float32(160)
    np.testing.assert_array_equal(frequencies(320, 0.0), np.float32(np.exp(np.float64(exponents))))


def test_functions_of_arrays(side: Side) -> None:
    nn, x = side.nn, normal(2, 4, 6)
    y, numbers = side.array(x), np.arange(6)
    cases: list[tuple[Any, np.ndarray]] = [
        (nn.arange(6), numbers),
        (nn.asarray(3, nn.float32), np.float32(3)),
        (nn.where(y > 0, y, 0), np.where(x > 0, x, 0)),
        (nn.clip(y, -1.0, 0.5), np.clip(x, -1, 0.5)),
        (nn.concatenate([y, y], axis=-1), np.concatenate([x, x], axis=-1)),
        (nn.split(y, 2, axis=-1)[1], x[..., 3:]),
        (nn.pad(y, [(0, 0), (0, 1), (2, 0)]), np.pad(x, [(0, 0), (0, 1), (2, 0)])),
        (nn.broadcast_to(y, (3, 2, 4, 6)), np.broadcast_to(x, (3, 2, 4, 6))),
        (nn.parameter(2, 3), np.zeros((2, 3))),
        (nn.cast(y, nn.float32), x),
    ]
    for got, expected in cases:
        np.testing.assert_array_equal(side.numpy(got), expected)
    nn.evaluate(y, (y, [y]))
