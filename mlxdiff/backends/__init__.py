"""The two backends, NumPy and MLX. Only this package imports mlx; importing it loads nothing.

``protocol`` defines what a backend offers. ``numpy`` and ``mlx`` implement it, each on its layers.
"""

from mlxdiff.machine.lazy import submodules

__getattr__ = submodules(__name__)
