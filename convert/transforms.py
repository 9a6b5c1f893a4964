"""Layout changes between a checkpoint and mlxdiff, named and invertible.

PyTorch stores a convolution as (out, in, kH, kW), MLX as (out, kH, kW, in). A 1x1 convolution and a
linear layer are equivalent; older and newer checkpoints store one or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxdiff.weights.tensors import Shape


@dataclass(frozen=True)
class Transform:
    """A layout change.

    Attributes:
        name: name in reports.
        shape: source shape -> result shape, or None if the transform does not apply.
        forward: source values -> values in our layout.
        inverse: exact inverse of ``forward``, or None if the inverse needs several results.
        keeps_rows: True if ``forward`` only selects rows, so that it also fits arrays that have
            other columns (the packed integers and the scales of a quantized matrix).
    """

    name: str
    shape: Callable[[Shape], Shape | None]
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray] | None
    keeps_rows: bool = False


def _is_conv1x1(shape: Shape) -> bool:
    return len(shape) == 4 and shape[2:] == (1, 1)


identity = Transform(
    "identity", lambda s: s if len(s) < 4 else None, lambda x: x, lambda x: x, True
)
oihw_to_ohwi = Transform(
    "oihw_to_ohwi",
    lambda s: (s[0], s[2], s[3], s[1]) if len(s) == 4 else None,
    lambda x: x.transpose(0, 2, 3, 1),
    lambda x: x.transpose(0, 3, 1, 2),
)
conv1x1_to_linear = Transform(
    "conv1x1_to_linear",
    lambda s: s[:2] if _is_conv1x1(s) else None,
    lambda x: x[:, :, 0, 0],
    lambda x: x[:, :, None, None],
)
linear_to_conv1x1 = Transform(
    "linear_to_conv1x1",
    lambda s: (s[0], 1, 1, s[1]) if len(s) == 2 else None,
    lambda x: x[:, None, None, :],
    lambda x: x[:, 0, 0, :],
)

transpose = Transform(
    "transpose",
    lambda s: s[::-1] if len(s) == 2 else None,
    # A copy, because the memory order decides the order of BLAS's sums, and so the last bits.
    lambda x: np.ascontiguousarray(x.T),
    lambda x: np.ascontiguousarray(x.T),
)


conv_among_frames_to_linear = Transform(
    "conv_among_frames_to_linear",
    lambda s: (s[0], s[1] * s[2]) if len(s) == 5 and s[3:] == (1, 1) else None,
    lambda x: x[:, :, :, 0, 0].transpose(0, 2, 1).reshape(len(x), -1),
    lambda x: x.reshape(len(x), 3, -1).transpose(0, 2, 1)[..., None, None],
)
"""Three frames at one place, (out, in, 3, 1, 1) -> (out, 3 * in): before, itself, after."""


def _part(name: str, index: int, count: int) -> Transform:
    def part(x: np.ndarray) -> np.ndarray:
        size = len(x) // count
        return x[index * size : (index + 1) * size]

    def shape(s: Shape) -> Shape | None:
        return (s[0] // count, *s[1:]) if s and s[0] % count == 0 else None

    return Transform(name, shape, part, None, True)


thirds = tuple(_part("third_of_fused", i, 3) for i in range(3))
"""Queries, keys and values from one tensor that stacks them."""
halves = tuple(_part("half_of_fused", i, 2) for i in range(2))
"""Keys and values from one tensor that stacks them."""

TRANSFORMS = (
    identity,
    oihw_to_ohwi,
    conv1x1_to_linear,
    linear_to_conv1x1,
    conv_among_frames_to_linear,
)
"""The transforms that shapes can select."""


def choose(source: Shape, target: Shape) -> Transform | None:
    """Return the transform between two shapes, or None if there is none.

    At most one fits. The first two keep the number of dimensions (below four, and four); the others
    change it from 4 to 2, from 2 to 4, and from 5 to 2.
    """
    for transform in TRANSFORMS:
        if transform.shape(source) == target:
            return transform
    return None
