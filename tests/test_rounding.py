"""How far float32 is from float64: the NumPy networks against torch, and what derives from it.

``golden/rounding.npz`` (made by golden/make_rounding.py) has what each network says in float64, and
the error of torch's float32. Nothing here needs torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_runs import Opened
from rounding_cases import CASES, errors

from mlxdiff.backends import numpy_layers as layers

WORST = 1.5
"""NumPy's error, times torch's. It was 0.5 to 1.1 times torch's with OpenBLAS's kernels for
SkylakeX, Haswell, Zen and Prescott, with and without NumPy's AVX code, on one thread and on two.
"""
UNIT = 2.0**-24
"""Largest relative error of one operation in float32."""


@pytest.mark.parametrize("component", CASES)
def test_networks_round_like_torch(component: str, opened: Opened) -> None:
    """Float64 is the judge."""
    ours, theirs = errors(component, "numpy", opened)
    assert ours <= WORST * theirs, f"{ours:.1e}, torch {theirs:.1e}"


# -------------------------------------------------------------------------------------- group norm


def group_norm_bound(norm: layers.GroupNorm, y: np.ndarray) -> np.ndarray:
    """The largest error that a group norm's float32 may have, for its exact result y.

    To first order in u = UNIT. Before weight and bias, the result is n = (x - m) / s. A sum in
    float32 adds 16 values, so its relative error is at most 15 u, taken over the sum of the sizes.

    - x - centre, times scale, plus shift, and the two factors rounded to float32: u each for
      x - centre, scale and product, u |bias| for shift, u |y| for the sum. (The centre's own error
      is in the first moment; it costs nothing.)
    - The first moment: x - centre is off by u, the sum by 15 u, of the mean of |n| <= 1.
    - The second moment: 2 u from x - centre, u from the square, 15 u from the sum; half of it
      counts, as s is a square root.
    """
    scaled = np.abs(y - norm.bias)
    return UNIT * ((3 + 18 / 2) * scaled + 16 * np.abs(norm.weight) + np.abs(norm.bias) + np.abs(y))


def exact_group_norm(norm: layers.GroupNorm, x: np.ndarray) -> np.ndarray:
    y = x.astype(np.float64).reshape(len(x), -1, norm.num_groups, x.shape[-1] // norm.num_groups)
    y = y - y.mean(axis=(1, 3), keepdims=True)
    y = y / np.sqrt(np.square(y).mean(axis=(1, 3), keepdims=True) + norm.eps)
    return y.reshape(x.shape) * norm.weight + norm.bias


def plane(height: int, width: int, channels: int) -> np.ndarray:
    """Two flat colours, as in a drawing: rounding does not average out in the sums."""
    values = np.random.RandomState(1).uniform(-1, 1, (2, channels)).astype(np.float32)
    return np.repeat(values, height // 2, axis=0)[None, :, None].repeat(width, axis=2)


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.RandomState(2).standard_normal((1, height, width, channels)).astype(np.float32)


@pytest.mark.parametrize("picture", [plane, noise])
@pytest.mark.parametrize(
    "shape", [(2, 3, 8), (6, 6, 64), (64, 64, 8), (256, 256, 16), (130, 70, 96)], ids=str
)
@pytest.mark.parametrize("offset", [0, 30])
def test_group_norm_rounds_alike_at_any_size(
    offset: int, shape: tuple[int, int, int], picture: Any
) -> None:
    norm = layers.GroupNorm(4, shape[-1], eps=1e-6)
    random = np.random.RandomState(0)
    weights = {name: random.standard_normal(shape[-1]) for name in ("weight", "bias")}
    norm.load_weights([(name, w.astype(np.float32)) for name, w in weights.items()])
    x = picture(*shape) + np.float32(offset)
    expected = exact_group_norm(norm, x)
    off = np.abs(norm(x) - expected) / group_norm_bound(norm, expected)
    assert off.max() <= 1
