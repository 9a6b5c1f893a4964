"""Parse prompts and encode them with a model's text encoders."""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
