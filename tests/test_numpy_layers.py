"""What is particular to the NumPy layers: work in parts, on threads, and rounding.

The formulas of both sets are in test_layers.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlxdiff.backends import numpy_layers as layers
from mlxdiff.errors import CheckpointError
from mlxdiff.machine import threads


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def load(layer: layers.Module) -> layers.Module:
    """The layer with random weights."""
    shapes = {name: value.shape for name, value in layer.parameters().items()}
    layer.load_weights([(n, normal(*s, seed=i + 1)) for i, (n, s) in enumerate(shapes.items())])
    return layer


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count", lambda: 2)
    monkeypatch.setattr(layers, "_LEAST_MACS", 1)
    monkeypatch.setattr(layers, "_LEAST_BLOCKS", 1)


# ------------------------------------------------------------------------------------ convolutions


def plain_convolution(x: np.ndarray, conv: layers.Conv2d) -> np.ndarray:
    """One output value after the other, in float64."""
    padding, stride, size = conv.padding, conv.stride, conv.weight.shape[1]
    x = np.pad(x.astype(np.float64), [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)])
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((len(x), height, width, len(conv.weight)))
    for b, row, column, channel in np.ndindex(out.shape):
        top, left = row * stride, column * stride
        window = x[b, top : top + size, left : left + size]
        out[b, row, column, channel] = (window * conv.weight[channel]).sum()
    return out if conv.bias is None else out + conv.bias


@pytest.mark.parametrize("lines", [1, 5, 1000])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "bias"),
    [(3, 1, 1, True), (3, 2, 1, True), (3, 2, 0, True), (5, 1, 2, False), (1, 1, 0, True),
     (1, 1, 0, False), (1, 2, 0, True), (3, 1, 0, True)],
)  # fmt: skip
def test_convolution(
    monkeypatch: pytest.MonkeyPatch, size: int, stride: int, padding: int, bias: bool, lines: int
) -> None:
    conv = load(layers.Conv2d(4, 6, size, stride, padding, bias))
    x = normal(2, 7, 6, 4)
    expected = plain_convolution(x, conv)
    # So many lines of output at a time: they end inside a picture, and the last part is smaller.
    monkeypatch.setattr(layers, "_COLUMNS", lines * expected.shape[2] * size * size * 4)
    got = conv(x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_allclose(conv(x, got), 2 * expected, atol=4e-5)


def test_convolution_of_a_view() -> None:
    conv = load(layers.Conv2d(4, 6, 3, padding=0))
    x = normal(2, 7, 4, 6).transpose(0, 1, 3, 2)[..., :4]
    np.testing.assert_allclose(conv(x), plain_convolution(x, conv), atol=2e-5)


# ------------------------------------------------------------------------------------------- norms


def test_group_norm_of_many_pixels_is_accurate() -> None:
    """A plain float32 sum of so many values would be off by 1e-4 of their standard deviation."""
    norm = load(layers.GroupNorm(1, 32))
    x = 1 + np.float32(0.01) * normal(1, 256, 256, 32)
    y = x.astype(np.float64)
    expected = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * norm.weight + norm.bias
    np.testing.assert_allclose(norm(x), expected, atol=5e-6)


# ------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ["silu", "gelu", "quick_gelu"])
def test_activations_far_out(name: str) -> None:
    x = np.array([[-3e38, -1e4, -100, -0.0, 0, 100, 1e4, 3e38]], np.float32)
    np.testing.assert_allclose(layers.activation(name)(x), np.maximum(x, 0), atol=1e-30)


def test_gelu_against_erf() -> None:
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    nonzero = x[x != 0]
    erf = 2 * layers.gelu(nonzero * np.float32(math.sqrt(2))) / (nonzero * np.float32(math.sqrt(2)))
    np.testing.assert_allclose(erf - 1, [math.erf(v) for v in nonzero], atol=4e-7)


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


@pytest.mark.parametrize("factor", [1, 30], ids=["small scores", "scores beyond exp"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_attention(
    monkeypatch: pytest.MonkeyPatch, rows: int, masked: bool, factor: int, two_threads: None
) -> None:
    monkeypatch.setattr(layers, "_SCORES", rows * 33)
    monkeypatch.setattr(layers, "_BLOCK", 3 * 33)
    q, k, v = (normal(2, 33, 40, seed=i) for i in range(3))
    q *= factor
    mask = np.tri(33, dtype=bool) if masked else None
    got = layers.attention(q, k, v, 5, mask)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, plain_attention(q, k, v, 5, mask), atol=2e-6 * factor)


def test_attention_leaves_its_inputs_alone() -> None:
    arrays = [normal(1, 5, 8, seed=i) for i in range(3)]
    copies = [x.copy() for x in arrays]
    layers.attention(*arrays, 2, np.tri(5, dtype=bool))
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


# ----------------------------------------------------------------------------------------- the rest


def test_blocks_and_threads_keep_the_order(two_threads: None) -> None:
    blocks = layers._blocks(10 * layers._BLOCK, 3)
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, 10 * layers._BLOCK)
    assert layers._for_each(lambda block: block.start, blocks) == [b.start for b in blocks]


def test_threads_hand_on_errors(two_threads: None) -> None:
    def fail(block: slice) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        layers._for_each(fail, layers._blocks(4 * layers._BLOCK, 1))


# ------------------------------------------------------------------------------------------ weights


class Tree(layers.Module):
    def __init__(self) -> None:
        self.first = layers.Linear(2, 3)
        self.none = None
        self.rest = [layers.Module(), layers.Linear(1, 2, bias=False)]


def test_parameters_take_their_names_from_the_tree() -> None:
    shapes = {name: value.shape for name, value in Tree().parameters().items()}
    assert shapes == {"first.weight": (3, 2), "first.bias": (3,), "rest.1.weight": (2, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first.bias": None}, r"weights for Tree: 1 missing tensor: first\.bias"),
        ({"rest.0.weight": normal(1)}, r"1 unknown tensor: rest\.0\.weight"),
        ({"first.bias": normal(2)}, r"first\.bias is \(2,\), expected \(3,\)"),
    ],
)
def test_weights_must_fit(change: dict[str, np.ndarray | None], message: str) -> None:
    tree = Tree()
    weights = {name: normal(*value.shape) for name, value in tree.parameters().items()} | change
    with pytest.raises(CheckpointError, match=message):
        tree.load_weights([(name, value) for name, value in weights.items() if value is not None])
    assert not tree.first.weight.any()  # nothing is half loaded
