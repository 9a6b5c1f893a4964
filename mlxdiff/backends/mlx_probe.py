"""Probes of MLX itself: for `mlxdiff doctor --self-test`, and for --exact.

The self-test asks for everything else through the backend and its layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on MLX's CPU device inside the block."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def winograd_can_be_switched_off() -> bool:
    """Return whether MLX_CONV_WINOGRAD changes the bits of a convolution.

    MLX reads it at every convolution. Versions before 0.32.4 know no such variable.
    """
    x = mx.sin(mx.arange(64 * 64 * 320)).reshape(1, 64, 64, 320).astype(mx.float16)
    weight = mx.cos(mx.arange(320 * 9 * 320)).reshape(320, 3, 3, 320).astype(mx.float16)
    results = []
    before = os.environ.get("MLX_CONV_WINOGRAD")
    try:
        for value in ("1", "0"):
            os.environ["MLX_CONV_WINOGRAD"] = value
            results.append(mx.conv2d(x, weight, padding=1))
            mx.eval(results[-1])
    finally:
        if before is None:
            del os.environ["MLX_CONV_WINOGRAD"]
        else:
            os.environ["MLX_CONV_WINOGRAD"] = before
    return not bool(mx.array_equal(results[0], results[1]))


def multiplies_as_tf32() -> bool:
    """Return whether float32 matrices are multiplied with 10 bits of mantissa.

    MLX reads MLX_ENABLE_TF32 at its first float32 product, and never again.
    """
    side, small = 512, 2.0**-12  # 1 + small is 1 in TF32
    x = mx.full((side, side), 1 + small)
    return bool(((x @ x)[0, 0] < side * (1 + small)).item())


def compiled(constant: float) -> Callable[[mx.array], mx.array]:
    """Return a compiled element-wise function; each constant makes a new one."""
    return mx.compile(lambda x: x * constant + 1.0)


def active_bytes() -> int:
    """Return the bytes that arrays hold now."""
    return mx.get_active_memory()
