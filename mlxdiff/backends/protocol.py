"""The interface of a backend: it loads networks, converts arrays, and reports on its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mlxdiff.networks.config import ComponentConfig
from mlxdiff.networks.layers import Array, Module
from mlxdiff.weights.tensors import LazyTensor


class Backend(Protocol):
    """Loads networks and converts arrays.

    Attributes:
        name: "numpy" or "mlx".
        dtype: name of the dtype of weights and activations: float32, float16 or bfloat16.
    """

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def load(
        self,
        config: ComponentConfig,
        tensors: Mapping[str, LazyTensor],
        dtype: str | None = None,
        keep_stored: bool | None = None,
    ) -> Module:
        """Build the network of a config and give it its weights."""
        ...

    def asarray(self, x: Array, dtype: str | None = None) -> Array:
        """Make an array of these values, in the dtype of this name (or int32). None: in theirs."""
        ...

    def to_numpy(self, x: Array) -> Any:
        """Return the values as a float32 np.ndarray."""
        ...

    def evaluate(self, *arrays: Any) -> None:
        """Compute arrays (or tuples and lists of them) now."""
        ...

    def concatenate(self, arrays: list[Array], axis: int = 0) -> Array:
        """Join arrays along an axis."""
        ...

    @staticmethod
    def has_gpu() -> bool:
        """Return whether a GPU computes."""
        ...

    @staticmethod
    def device() -> str:
        """Name what computes: "CPU", or "Metal" or "CUDA" with the name of the GPU."""
        ...

    @staticmethod
    def memory_size() -> int | None:
        """Return how many bytes all arrays can take. None: the system does not say."""
        ...

    @staticmethod
    def default_dtype() -> str:
        """Name the dtype that suits the device."""
        ...

    def peak_memory(self) -> int:
        """Return the most bytes held at once so far. 0: the system does not say."""
        ...

    def reset_peak_memory(self) -> None:
        """Start to count the most bytes anew, where the backend can."""
        ...

    def limit_memory(self, most: int | None) -> None:
        """Hold at most this many bytes, where the backend can. None: what suits the device."""
        ...

    def limit_cache(self, low_memory: bool) -> None:
        """Limit the freed buffers that are kept for later."""
        ...

    def check_exact(self) -> None:
        """Raise UsageError where the variables of ``machine.exact`` have no effect on a GPU."""
        ...

    def clear_cache(self) -> None:
        """Give freed buffers back to the system."""
        ...
