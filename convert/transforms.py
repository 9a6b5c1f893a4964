"""Changes of layout between a checkpoint and us: named, invertible, all that happens to values.

PyTorch stores a convolution as (out, in, kH, kW), MLX as (out, kH, kW, in). A 1x1 convolution and a
linear layer are the same thing; checkpoints of different age store one or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxdiff.weights.tensors import Shape


@dataclass(frozen=True)
class Transform:
    """A change of layout.

    Attributes:
        name: what reports call it.
        shape: shape of the source -> shape of the result; None where it does not apply.
        forward: values of the source -> values in our layout.
        inverse: the way back, exactly; None where it takes several results together.
    """

    name: str
    shape: Callable[[Shape], Shape | None]
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray] | None


def _is_conv1x1(shape: Shape) -> bool:
    return len(shape) == 4 and shape[2:] == (1, 1)


identity = Transform("identity", lambda s: s if len(s) < 4 else None, lambda x: x, lambda x: x)
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
    # Copied: the order in memory decides in which order BLAS adds, and so the last bits.
    lambda x: np.ascontiguousarray(x.T),
    lambda x: np.ascontiguousarray(x.T),
)


def _part(name: str, index: int, count: int) -> Transform:
    def part(x: np.ndarray) -> np.ndarray:
        size = len(x) // count
        return x[index * size : (index + 1) * size]

    def shape(s: Shape) -> Shape | None:
        return (s[0] // count, *s[1:]) if s and s[0] % count == 0 else None

    return Transform(name, shape, part, None)


thirds = tuple(_part("third_of_fused", i, 3) for i in range(3))
"""Queries, keys and values out of one tensor that has them below one another."""
halves = tuple(_part("half_of_fused", i, 2) for i in range(2))
"""The same of keys and values."""

TRANSFORMS = (identity, oihw_to_ohwi, conv1x1_to_linear, linear_to_conv1x1)
"""Those that shapes tell apart."""


def choose(source: Shape, target: Shape) -> Transform | None:
    """The transform that takes the one shape to the other; None where none does.

    At most one does: source and target have the same number of dimensions for the first two (below
    four, and four), 4 -> 2 and 2 -> 4 for the others.
    """
    for transform in TRANSFORMS:
        if transform.shape(source) == target:
            return transform
    return None
