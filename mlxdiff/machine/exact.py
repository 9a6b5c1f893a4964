"""Environment variables that make MLX's arithmetic exact.

On Metal, MLX computes large 3x3 convolutions by Winograd's method. It stores the transforms in the
working type: float16 loses up to 0.8 % in such a layer, bfloat16 6 %, and the choice of method
depends on the batch size. Newer GPUs multiply float32 matrices as TF32 (10 bits of mantissa). These
variables switch both off (docs/metal.md). MLX reads the first at every convolution and the second
at its first float32 product. They must be set before MLX is imported: then it cannot be too late.
"""

from __future__ import annotations

import os
import sys

from mlxdiff.errors import UsageError, argument

VARIABLES = {"MLX_CONV_WINOGRAD": "0", "MLX_ENABLE_TF32": "0"}


def require() -> None:
    """Set these variables. Raises: UsageError if MLX was imported without them."""
    missing = {name: value for name, value in VARIABLES.items() if os.environ.get(name) != value}
    if missing and "mlx.core" in sys.modules:
        wanted = " ".join(f"{name}={value}" for name, value in missing.items())
        raise UsageError(
            f"{argument('exact')} must be set before MLX is imported; set {wanted} in the "
            f"environment, or load the first model with {argument('exact', True)}"
        )
    os.environ.update(missing)
