"""Model storage: converted folders, quantization recipes, the hub, the catalogue of short names."""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
