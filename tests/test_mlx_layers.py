"""What is particular to the MLX layers: half precision, GPU paths, memory, the graph.

The formulas of both sets are in test_layers.py.
"""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlxdiff.backends import mlx_layers as layers  # noqa: E402

pytestmark = pytest.mark.mlx
RANDOM = np.random.RandomState(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers whichever ran before it."""
    RANDOM.seed(0)


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


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    monkeypatch.setattr(layers, "_SCALAR_EXP", False)
    q, k, v = (mx.array(normal(2, 50, 24)) for _ in range(3))
    mask = mx.array(np.tril(np.ones((50, 50), dtype=bool))) if masked else None
    whole = layers.attention(q, k, v, 3, mask)
    # Seven queries at a time: the last part is smaller than the others.
    monkeypatch.setattr(layers, "_WORK_BYTES", 7 * 4 * 2 * 3 * 50)
    np.testing.assert_allclose(layers.attention(q, k, v, 3, mask), whole, atol=1e-6)


def test_attention_in_parts_bounds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_SCALAR_EXP", False)
    q, k, v = (mx.array(normal(1, 1024, 8)) for _ in range(3))
    mx.eval(q, k, v)
    peaks = []
    for limit in (1 << 30, 1 << 18):
        monkeypatch.setattr(layers, "_WORK_BYTES", limit)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(layers.attention(q, k, v, 1))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > 1024 * 1024 * 4  # all scores at once
    assert peaks[1] < 4 * (1 << 18)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials by MLX's vectorized operations, as on CPUs that are not Apple's; on the CPU."""
    monkeypatch.setattr(layers, "_SCALAR_EXP", True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("block", [7 * 50, 50 * 50 * 3 + 9, 1 << 20])
@pytest.mark.parametrize("size", [1.0, 6.0])  # at 6 the scores need their maximum taken off
def test_attention_by_blocks(monkeypatch: pytest.MonkeyPatch, block: int, size: float) -> None:
    monkeypatch.setattr(layers, "_BLOCK", block)
    q, k, v = size * normal(2, 50, 24), size * normal(2, 50, 24), normal(2, 50, 24)
    got = layers.attention(*map(mx.array, (q, k, v)), 3)
    tolerance = 2e-6 if size == 1 else 2e-5  # scores up to 200: their last bit is 1.5e-5
    np.testing.assert_allclose(got, plain_attention(q, k, v, 3), atol=tolerance)


@pytest.mark.usefixtures("blocks")
def test_attention_by_blocks_bounds_memory() -> None:
    q, k, v = (mx.array(normal(1, 4096, 8)) for _ in range(3))
    mx.eval(q, k, v)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(layers.attention(q, k, v, 1))
    assert mx.get_peak_memory() - before < 8 << 20  # all scores are 64 MB


@pytest.mark.usefixtures("blocks")
def test_attention_by_blocks_of_what_is_no_number() -> None:
    q = np.full((1, 4, 8), np.nan, np.float32)
    assert np.isnan(layers.attention(*map(mx.array, (q, q, q)), 1)).all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", ["silu", "gelu", "quick_gelu"])
def test_activations_by_blocks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(layers, "_BLOCK", 1000)
    x = np.concatenate([np.linspace(-20, 20, 4001), [-1e3, -100, 100, 1e3, np.nan]])
    x = x.astype(np.float32).reshape(2, -1)
    phi = np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))
    with np.errstate(over="ignore"):
        expected = {
            "silu": lambda v: v / (1 + np.exp(-v)),
            "quick_gelu": lambda v: v / (1 + np.exp(-1.702 * v)),
            "gelu": lambda v: v * phi(v),
        }[name](x.astype(np.float64))
    got = layers.activation(name)(mx.array(x))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("head_dim", [8, 40, 72])
def test_attention_with_padded_heads_is_the_same(
    monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    q, k, v = (mx.array(normal(2, 21, 2 * head_dim)) for _ in range(3))
    monkeypatch.setattr(layers, "_SCALAR_EXP", False)
    plain = layers.attention(q, k, v, 2)
    monkeypatch.setattr(layers, "_fused_head_dim", lambda *_: 80)
    np.testing.assert_allclose(layers.attention(q, k, v, 2), plain, atol=1e-6)


@pytest.mark.parametrize(
    ("metal", "dtype", "head_dims"),
    [
        (True, "float32", {8: 64, 40: 64, 64: 64, 72: 80, 96: 128, 160: None, 512: None}),
        (False, "float16", {40: 40, 64: 64, 28: None, 128: 128, 160: None}),
        (False, "float32", {40: None, 64: None}),
    ],
)
def test_where_kernels_are_fused(
    monkeypatch: pytest.MonkeyPatch, metal: bool, dtype: str, head_dims: dict[int, int | None]
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    for head_dim, expected in head_dims.items():
        assert layers._fused_head_dim(head_dim, getattr(mx, dtype)) == expected


def test_attention_scores_beyond_float16() -> None:
    # The largest score is 300 * 300 * 64 / 8 = 720000: infinite in float16, and then NaN.
    q = mx.full((1, 4, 64), 300.0, dtype=mx.float16)
    v = mx.array(normal(1, 4, 64)).astype(mx.float16)
    got = layers.attention(q, q, v, 1)
    assert got.dtype == mx.float16
    mean = np.broadcast_to(np.array(v.astype(mx.float32)).mean(axis=1, keepdims=True), v.shape)
    np.testing.assert_allclose(got.astype(mx.float32), mean, atol=2e-3)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_group_norm_in_half_precision(offset: float, dtype: str) -> None:
    x = mx.array(normal(2, 30, 20, 12) + np.float32(offset)).astype(getattr(mx, dtype))
    norm = layers.GroupNorm(3, 12, eps=1e-3)
    weight, bias = 1 + normal(12), normal(12)
    norm.load_weights([("weight", mx.array(weight)), ("bias", mx.array(bias))])
    got = norm(x)
    assert got.dtype == x.dtype
    x64 = np.array(x.astype(mx.float32)).astype(np.float64).reshape(2, 600, 3, 4)
    x64 = x64 - x64.mean(axis=(1, 3), keepdims=True)
    x64 = x64 / np.sqrt((x64**2).mean(axis=(1, 3), keepdims=True) + 1e-3)
    expected = x64.reshape(2, 30, 20, 12) * weight + bias
    # x * scale and its shift are rounded at |mean| / std; a half result is rounded once more.
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(
        got.astype(mx.float32), expected, rtol=rounding, atol=2e-6 + 1e-6 * offset
    )


def test_layer_norm_accumulates_in_float32() -> None:
    x = 200 + 100 * normal(3, 640)  # squares beyond float16
    norm = layers.LayerNorm(640)
    norm.load_weights([("weight", mx.ones(640)), ("bias", mx.zeros(640))])
    got = norm(mx.array(x).astype(mx.float16))
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(got.astype(mx.float32), expected, atol=5e-3)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (5, 1, 2), (3, 1, 0), (3, 2, 1), (3, 2, 0)]
)
def test_a_convolution_in_parts_is_the_same(
    monkeypatch: pytest.MonkeyPatch, kernel: int, stride: int, padding: int
) -> None:
    x = mx.array(normal(2, 20, 9, 8))
    conv = layers.Conv2d(8, 4, kernel, stride, padding)
    weight, bias = normal(4, kernel, kernel, 8), normal(4)
    conv.load_weights([("weight", mx.array(weight)), ("bias", mx.array(bias))])
    whole = conv(x)
    # Three rows at a time; the last part may be smaller.
    monkeypatch.setattr(layers, "_WORK_BYTES", 4 * 2 * 3 * whole.shape[2] * 8 * kernel**2)
    calls = []
    convolve = mx.conv2d
    monkeypatch.setattr(mx, "conv2d", lambda *args: calls.append(args) or convolve(*args))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    np.testing.assert_allclose(conv(x), whole, atol=1e-5)
    assert len(calls) == -(-whole.shape[1] // 3)


def test_a_convolution_in_parts_bounds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.default_device() == mx.gpu:
        pytest.skip("a GPU does not unfold")
    x, weight = mx.array(normal(1, 128, 64, 16)), mx.array(normal(4, 3, 3, 16))
    mx.eval(x, weight)
    conv = layers.Conv2d(16, 4, 3, padding=1, bias=False)
    conv.load_weights([("weight", weight)])
    peaks = []
    for limit in (1 << 30, 1 << 18):
        monkeypatch.setattr(layers, "_WORK_BYTES", limit)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(conv(x))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > 9 * x.nbytes
    assert peaks[1] < 4 * x.nbytes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_group_norm_in_few_kernels(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """As on a GPU; here its element-wise kernels are compiled for the CPU or not at all."""
    norm = layers.GroupNorm(4, 24)
    norm.weight, norm.bias = mx.array(normal(24)), mx.array(normal(24))
    x = mx.array(3 + normal(2, 9, 7, 24)).astype(getattr(mx, dtype))
    wide = np.array(x.astype(mx.float32)).astype(np.float64).reshape(2, 63, 4, 6)
    centred = wide - wide.mean(axis=(1, 3), keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + norm.eps)
    plain = scaled.reshape(x.shape) * np.array(norm.weight) + np.array(norm.bias)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    # MLX's CPU adds up a row of n = 378 values about 3 one by one. Each partial sum 3 k is rounded
    # by u: the mean is off by u 3 sqrt(n / 3) in the mean square. (A GPU has many threads.)
    weight = np.abs(np.array(norm.weight)).max()
    atol = 5 * weight * 2.0**-24 * 3 * math.sqrt(378 / 3)
    rtol = 2e-6
    if dtype == "float16":  # the row is rounded, and then the result
        atol, rtol = atol + 2.0**-11 * weight * np.abs(scaled).max(), rtol + 2.0**-11
    for got, expected in ((norm(x), plain), (norm.silu(x), plain / (1 + np.exp(-plain)))):
        assert got.dtype == x.dtype
        # The slope of silu is at most 1.1.
        np.testing.assert_allclose(got.astype(mx.float32), expected, rtol=rtol, atol=1.1 * atol)


def test_group_norm_in_few_kernels_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, cotangent = mx.array(normal(2, 5, 4, 12)), mx.array(normal(2, 5, 4, 12))
    weight, bias = mx.array(normal(12)), mx.array(normal(12))

    def loss(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        norm = layers.GroupNorm(3, 12)
        norm.weight, norm.bias = weight, bias
        return (norm.silu(x) * cotangent).sum() + (norm(x) * cotangent).sum()

    slopes = []
    for device in (mx.cpu, mx.gpu):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        slopes.append(mx.grad(loss, argnums=(0, 1, 2))(x, weight, bias))
    for one, other in zip(*slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [(5, 4), (3, 3, 3)])
def test_group_norm_of_bands_as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...]
) -> None:
    norm = layers.GroupNorm(4, 24)
    norm.weight, norm.bias = mx.array(normal(24)), mx.array(normal(24))
    x = mx.array(3 + normal(1, 9, 7, 24))
    whole = np.array(norm.silu(x))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    bands = mx.split(x, list(np.cumsum(rows)[:-1]), axis=1)
    apply = norm.silu_over(bands)
    np.testing.assert_allclose(
        np.concatenate([apply(b) for b in bands], 1), whole, rtol=1e-6, atol=4e-6
    )


def test_geglu_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mx.array(normal(3, 5, 16))
    plain = np.array(layers.geglu(x))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    np.testing.assert_allclose(layers.geglu(x), plain, atol=1e-6)


def operations(x: mx.array) -> list[str]:
    """Names of the operations that lead to an array from what is computed already."""
    text = io.StringIO()
    mx.export_to_dot(text, x)
    return sorted(re.findall(r'label ?="([A-Za-z]\w*)[^"]*", shape=rectangle', text.getvalue()))


def test_a_weight_is_transposed_once() -> None:
    layer, x = layers.Linear(64, 50), mx.array(normal(3, 64))
    layer.load_weights([("weight", mx.array(normal(50, 64))), ("bias", mx.array(normal(50)))])
    mx.eval(layer(x))
    before = mx.get_active_memory()
    assert operations(layer(x)) == ["AddMM", "Broadcast"]
    assert set(layer.parameters()) == {"weight", "bias"}
    # A new weight is seen, and the old one's memory given back.
    weight = mx.array(normal(50, 64))
    layer.put("weight", weight)
    expected = np.array(x) @ np.array(weight).T + np.array(layer.bias)
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)
    assert mx.get_active_memory() < before + weight.nbytes // 2


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (2, 1, 1, 7)])
def test_a_convolution_with_more_added_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, kernel: int, shape: tuple[int, ...]
) -> None:
    x, more = mx.array(normal(2, 5, 6, 8)), mx.array(normal(*shape))
    conv = layers.Conv2d(8, 7, kernel, padding=kernel // 2)
    weight, bias = normal(7, kernel, kernel, 8), normal(7)
    conv.load_weights([("weight", mx.array(weight)), ("bias", mx.array(bias))])
    expected = np.array(conv(x)) + np.array(more)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    np.testing.assert_allclose(conv(x, more), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu", "quick_gelu"])
def test_gradients_of_activations_by_blocks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    x = mx.array(np.linspace(-6, 6, 25, dtype=np.float32))  # 0 among them
    slopes = []
    for scalar in (False, True):
        monkeypatch.setattr(layers, "_SCALAR_EXP", scalar)
        slopes.append(mx.grad(lambda x: layers.activation(name)(x).sum())(x))
    np.testing.assert_allclose(slopes[1], slopes[0], atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 6.0])
def test_gradients_of_attention_by_blocks(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    q, k, v = (mx.array(size * normal(2, 20, 24)) for _ in range(3))

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.square(layers.attention(q, k, v, 3)).sum()

    slopes = []
    for scalar in (False, True):
        monkeypatch.setattr(layers, "_SCALAR_EXP", scalar)
        slopes.append(mx.grad(loss, argnums=(0, 1, 2))(q, k, v))
    for got, expected in zip(slopes[1], slopes[0], strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * float(mx.abs(expected).max()))
