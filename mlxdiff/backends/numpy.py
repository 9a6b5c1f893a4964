"""NumPy as a backend: how the pipeline loads networks and moves arrays."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxdiff.backends import numpy_layers
from mlxdiff.backends.numpy_layers import StoredWeight
from mlxdiff.errors import UsageError
from mlxdiff.machine.probe import memory_bytes
from mlxdiff.networks.config import ComponentConfig
from mlxdiff.networks.layers import Layers, Module
from mlxdiff.networks.params import check_parameters
from mlxdiff.networks.registry import build
from mlxdiff.weights.tensors import AdaptedTensor, LazyTensor, QuantizedTensor

nn: Layers = numpy_layers


def ignore_false_warnings(platform: str = sys.platform) -> None:
    """Ignore what NumPy before 2.3.5 says of matrix products on Accelerate (numpy issue 28687).

    Its floating-point flags are false there. A run whose latents are not finite ends anyway.
    """
    if platform == "darwin":
        message = ".* encountered in matmul"
        warnings.filterwarnings("ignore", message, RuntimeWarning, r"mlxdiff\.")


ignore_false_warnings()


class NumPyBackend:
    """Loads networks and converts arrays.

    Attributes:
        name: "numpy".
        dtype: "float32"; nothing else is fast, or even exact, in NumPy on any machine.
    Raises: UsageError for another dtype.
    """

    name = "numpy"

    def __init__(self, dtype: str = "float32") -> None:
        _dtype(dtype)
        self.dtype = dtype

    def load(
        self,
        config: ComponentConfig,
        tensors: Mapping[str, LazyTensor],
        dtype: str | None = None,
        keep_stored: bool | None = None,
    ) -> Module:
        """Build the network of a config and give it its weights.

        Tensors are read and converted one by one: memory peaks at the network and one tensor.

        Args:
            config: decides the class.
            tensors: exactly those of ``expected_parameters(config)``.
            dtype: what is computed in; None: the backend's.
            keep_stored: keep matrices and kernels as they are stored, quantized or in a smaller
                type, and expand them whenever they are used. None: no, expanding them once is
                faster.
        Raises: CheckpointError for a missing, unknown or misshapen tensor; UsageError for the
            dtype.
        """
        model = build(nn, config)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        check_parameters(shapes, config, f"weights for {type(model).__name__}")
        target = _dtype(dtype or self.dtype)
        for name, tensor in tensors.items():
            model.put(name, _weight(tensor, target, bool(keep_stored)))
        return model

    def asarray(self, x: np.ndarray, dtype: str | None = None) -> np.ndarray:
        """An array of these values, in the dtype of this name (or int32); None: as they are."""
        return np.asarray(x, None if dtype is None else _dtype(dtype, "int32"))

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        """The values as float32."""
        return np.asarray(x, np.float32)

    def evaluate(self, *arrays: Any) -> None:
        """Nothing: NumPy computes at once."""

    def concatenate(self, arrays: list[np.ndarray], axis: int = 0) -> np.ndarray:
        """Join arrays along an axis."""
        return np.concatenate(arrays, axis=axis)

    @staticmethod
    def has_gpu() -> bool:
        """Return False: no GPU computes."""
        return False

    @staticmethod
    def device() -> str:
        """Name what computes: "CPU"."""
        return "CPU"

    @staticmethod
    def memory_size() -> int | None:
        """Bytes that arrays can take together; None where the system cannot tell."""
        return memory_bytes()

    @staticmethod
    def default_dtype() -> str:
        """float32."""
        return "float32"

    def peak_memory(self) -> int:
        """The most bytes that this process held at once so far; 0 where the system cannot tell."""
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def reset_peak_memory(self) -> None:
        """Nothing: the system counts from the start of the process."""

    def limit_memory(self, most: int | None) -> None:
        """Nothing: what is computed at once is bounded as it is."""

    def limit_cache(self, low_memory: bool) -> None:
        """Nothing: NumPy keeps none."""

    def check_exact(self) -> None:
        """Nothing: NumPy computes on no GPU."""

    def clear_cache(self) -> None:
        """Nothing: NumPy keeps none."""


def _weight(tensor: LazyTensor, dtype: type, keep_stored: bool) -> np.ndarray | StoredWeight:
    if keep_stored and isinstance(tensor, QuantizedTensor):
        # Copied, because what was read can be a view of the file.
        packed = tensor.read_packed().rows(np.array)
        beside = tensor.read_beside() if isinstance(tensor, AdaptedTensor) else None
        return StoredWeight(packed, dtype, beside)
    values = tensor.read()
    if keep_stored and len(tensor.shape) in (2, 4) and values.itemsize < np.dtype(dtype).itemsize:
        return StoredWeight(np.array(values), dtype)
    # Copied even where the type is right: what was read may be a view of the file.
    return np.array(values, dtype)


def _dtype(name: str, *more: str) -> type:
    known = ("float32", *more)
    if name not in known:
        raise UsageError(
            f"the NumPy backend computes in float32 only, not in {name}; leave the dtype out, or "
            "use the MLX backend"
        )
    return {"float32": np.float32, "int32": np.int32}[name]
