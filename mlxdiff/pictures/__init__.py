"""Open, save, describe, prepare and preview pictures, as files and arrays."""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
