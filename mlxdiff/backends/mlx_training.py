"""MLX as the backend of training: its networks are built from ``mlx_training_layers``.

Importing it without mlx raises the error of ``backends.mlx``.
"""

from __future__ import annotations

from mlxdiff.backends import mlx_training_layers
from mlxdiff.backends.mlx import MLXBackend
from mlxdiff.machine.heap import keep_freed
from mlxdiff.networks.layers import Layers


class TrainingBackend(MLXBackend):
    """Loads networks that can be trained, frozen weights as they are stored."""

    _layers: Layers = mlx_training_layers

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__(dtype)
        if not self.has_gpu():
            keep_freed()
