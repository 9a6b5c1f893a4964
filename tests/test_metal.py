"""What is only true on Metal; skipped elsewhere. See docs/metal.md."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlxdiff.backends import mlx_layers as layers  # noqa: E402

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(
        not mx.metal.is_available() or mx.default_device() != mx.gpu, reason="needs Metal"
    ),
]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", layers._METAL_HEAD_DIMS)
def test_attention_runs_fused(head_dim: int, dtype: str) -> None:
    """force_fused raises where there is no fused kernel for the shape."""
    if "force_fused" not in (mx.fast.scaled_dot_product_attention.__doc__ or ""):
        pytest.skip("this MLX cannot say")
    q = mx.random.normal((1, 2, 256, head_dim)).astype(getattr(mx, dtype))
    out = mx.fast.scaled_dot_product_attention(q, q, q, scale=head_dim**-0.5, force_fused=True)
    mx.eval(out)


def test_half_precision_of_a_large_convolution() -> None:
    """Winograd's method in float16 is expected to lose up to 1 %; more would be news."""
    random = np.random.RandomState(0)
    x = random.standard_normal((1, 64, 64, 320)).astype(np.float32)
    weight = (0.02 * random.standard_normal((320, 3, 3, 320))).astype(np.float32)
    exact = np.array(mx.conv2d(mx.array(x), mx.array(weight), padding=1, stream=mx.cpu))
    half = mx.conv2d(mx.array(x).astype(mx.float16), mx.array(weight).astype(mx.float16), padding=1)
    error = np.linalg.norm(np.array(half.astype(mx.float32)) - exact) / np.linalg.norm(exact)
    assert error < 0.02
