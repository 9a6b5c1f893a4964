"""The two sets of layers, for tests that run on both."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mlxdiff.loading import make_backend


class Side:
    """A backend with its layers, in float32.

    Args:
        name: "numpy" or "mlx".
    Attributes:
        nn: its layers (``networks.layers.Layers``).
        backend: its Backend.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend = make_backend(name, "float32")
        self.nn: Any = importlib.import_module(f"mlxdiff.backends.{name}_layers")

    def array(self, x: np.ndarray) -> Any:
        """The values as an array of this side."""
        return self.backend.asarray(x)

    def numpy(self, x: Any) -> np.ndarray:
        """The values as a float32 np.ndarray."""
        return self.backend.to_numpy(x)

    def run(self, function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
        """The function's float32 result."""
        out = function(self.array(x))
        assert "float32" in str(out.dtype)
        return self.numpy(out)

    def load(self, layer: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """The layer with random weights; the weights."""
        weights = {
            name: np.random.RandomState(i + 1).standard_normal(value.shape).astype(np.float32)
            for i, (name, value) in enumerate(layer.parameters().items())
        }
        layer.load_weights([(name, self.array(value)) for name, value in weights.items()])
        return layer, weights
