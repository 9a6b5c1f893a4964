"""Time a model on this machine, and diagnose the machine."""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
