"""Networks: their configs, the networks themselves, their parameters and their cost."""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
