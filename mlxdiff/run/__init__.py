"""One run, from its arguments to its latents."""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
