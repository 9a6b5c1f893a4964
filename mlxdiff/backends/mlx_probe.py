"""Probes of MLX itself, which `mlxdiff doctor --self-test` times and compares.

The self-test asks for everything else through the backend and its layers.
"""

from __future__ import annotations

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


def compiled(constant: float) -> Callable[[mx.array], mx.array]:
    """Return a compiled element-wise function; each constant makes a new one."""
    return mx.compile(lambda x: x * constant + 1.0)


def active_bytes() -> int:
    """Return the bytes that arrays hold now."""
    return mx.get_active_memory()
