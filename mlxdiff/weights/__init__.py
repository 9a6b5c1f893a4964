"""Contents of weight files: tensors, pickles, quantized forms and their arithmetic."""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
