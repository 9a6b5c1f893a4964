"""Read files that change a model (LoRA) or add words (textual inversion); match them to a model.

This part does not depend on a backend: it computes with NumPy, and the networks take the results.
"""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
