"""MLX as a backend: how the pipeline loads networks and moves arrays without knowing mlx.

Import this module, not ``mlx_layers``: without mlx it raises an error that says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.machine.probe import memory_bytes
from mlxdiff.networks.config import ComponentConfig
from mlxdiff.networks.layers import Layers, Module
from mlxdiff.networks.params import check_parameters
from mlxdiff.networks.registry import build
from mlxdiff.weights.tensors import AdaptedTensor, LazyTensor, QuantizedTensor

try:
    import mlx.core as mx
except ImportError as error:
    raise UsageError(
        f"MLX cannot be imported ({error}); install it with `pip install mlx` (Apple silicon) or "
        "`pip install 'mlx[cpu]'` (Linux), or use the NumPy backend "
        f"({argument('backend', 'numpy')})"
    ) from None

from mlxdiff.backends import mlx_layers, mlx_probe
from mlxdiff.backends.mlx_layers import StoredWeight

# Bytes of freed buffers that are kept. On a GPU, what is not kept is mapped and cleared anew: a
# step of SDXL 1024x1024 maps 6.7 GB with 32 MiB, 3.0 GB with 256 MiB, 1.9 GB with 1 GiB
# (tests/test_gpu_work.py).
_CACHE, _LITTLE_CACHE, _LITTLE_CACHE_ON_GPU = 1 << 30, 32 << 20, 256 << 20
_FLOATS = ("float32", "float16", "bfloat16")

nn: Layers = mlx_layers

_PROCESS = os.getpid()  # that imported MLX


class MLXBackend:
    """Loads networks and converts arrays.

    Attributes:
        name: "mlx".
        dtype: name of the default dtype of weights: float32, float16 or bfloat16.
    Raises: UsageError for another dtype.
    """

    name = "mlx"
    _layers: Layers = mlx_layers

    def __init__(self, dtype: str = "float32") -> None:
        _dtype(dtype)
        _require_own_process()
        self.dtype = dtype
        _default_memory_limit()

    def load(
        self,
        config: ComponentConfig,
        tensors: Mapping[str, LazyTensor],
        dtype: str | None = None,
        keep_stored: bool | None = None,
    ) -> Module:
        """Build the network of a config and give it its weights.

        Tensors are read, converted and dropped one by one: memory peaks at the network and one
        tensor.

        Args:
            config: decides the class.
            tensors: exactly those of ``expected_parameters(config)``.
            dtype: what is computed in; None: the backend's.
            keep_stored: keep matrices and kernels as they are stored, quantized or in a smaller
                type, and expand them whenever they are used. None: quantized ones on a GPU, which
                has kernels for them; elsewhere expanding them once is faster.
        Raises: CheckpointError for a missing, unknown or misshapen tensor; UsageError for the
            dtype.
        """
        model = build(self._layers, config)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        check_parameters(shapes, config, f"weights for {type(model).__name__}")
        target = _dtype(dtype or self.dtype)
        model.dtype = target
        for name, tensor in tensors.items():
            weight = _weight(tensor, target, keep_stored)
            mx.eval(weight.parameters() if isinstance(weight, StoredWeight) else weight)
            model.put(name, weight)
        return model

    def asarray(self, x: np.ndarray | mx.array, dtype: str | None = None) -> mx.array:
        """An MLX array of these values, in the dtype of this name (or int32); None: as they are."""
        _require_own_process()
        return mx.array(x, None if dtype is None else _dtype(dtype, "int32"))

    def to_numpy(self, x: mx.array) -> np.ndarray:
        """The values as float32."""
        return np.array(x.astype(mx.float32))

    def evaluate(self, *arrays: Any) -> None:
        """Compute arrays (or tuples of them) now."""
        mx.eval(*arrays)

    def concatenate(self, arrays: list[mx.array], axis: int = 0) -> mx.array:
        """Join arrays along an axis."""
        return mx.concatenate(arrays, axis=axis)

    @staticmethod
    def has_gpu() -> bool:
        """Return whether a GPU computes."""
        return mx.default_device() == mx.gpu

    @staticmethod
    def device() -> str:
        """Name what computes: "CPU", or "Metal" or "CUDA" with the name of the GPU."""
        if not MLXBackend.has_gpu():
            return "CPU"
        kind = "Metal" if mx.metal.is_available() else "CUDA"
        name = _device_info().get("device_name")
        return f"{kind} ({name})" if name else kind

    @staticmethod
    def memory_size() -> int | None:
        """Bytes that arrays can take together; None where the system cannot tell."""
        info, machine = _device_info(), memory_bytes()
        # On a Mac the GPU shares the machine's memory, all but a part that the system keeps.
        size = info.get("max_recommended_working_set_size") or info.get("memory_size")
        return int(size) if MLXBackend.has_gpu() and size else machine

    @staticmethod
    def default_dtype() -> str:
        """float16 on a GPU; float32 on a CPU, where half precision is far slower."""
        return "float16" if MLXBackend.has_gpu() else "float32"

    def peak_memory(self) -> int:
        """The most bytes that MLX held at once so far."""
        return mx.get_peak_memory()

    def reset_peak_memory(self) -> None:
        """Count the most bytes held at once from here on."""
        mx.reset_peak_memory()

    def limit_memory(self, most: int | None) -> None:
        """Wait for kernels before more bytes than this are handed out.

        None: than ``memory_size`` on a GPU, elsewhere than MLX's own limit.
        """
        mx.set_memory_limit(_default_memory_limit() if most is None else most)

    def limit_cache(self, low_memory: bool) -> None:
        """Keep few freed buffers for later: MLX's own limit on a GPU is all of its memory."""
        if self.has_gpu():
            mx.set_cache_limit(_LITTLE_CACHE_ON_GPU if low_memory else _CACHE)
        elif low_memory:
            mx.set_cache_limit(_LITTLE_CACHE)

    def check_exact(self) -> None:
        """Compute on a GPU to see whether the variables of ``machine.exact`` have an effect.

        Raises: UsageError if MLX ignores one of them.
        """
        if not self.has_gpu():
            return
        if mx.metal.is_available() and not mlx_probe.winograd_can_be_switched_off():
            raise UsageError(
                f"{argument('exact')}: MLX {version('mlx')} ignores MLX_CONV_WINOGRAD, so its "
                "large convolutions are not exact; install MLX 0.32.4 or newer (pip install -U "
                f"mlx), or leave {argument('exact')} out"
            )
        if mlx_probe.multiplies_as_tf32():
            raise UsageError(
                f"{argument('exact')}: MLX already multiplies float32 as TF32 in this process; set "
                "MLX_ENABLE_TF32=0 in the environment before it starts"
            )

    def clear_cache(self) -> None:
        """Give freed buffers back to the system."""
        mx.clear_cache()


def _require_own_process() -> None:
    """Refuse a forked process: the threads of MLX do not survive a fork, and it would hang."""
    if os.getpid() != _PROCESS:
        raise UsageError(
            "MLX does not work in a forked process; start it with "
            "multiprocessing.get_context('spawn'), or use the NumPy backend"
        )


def _weight(
    tensor: LazyTensor, dtype: mx.Dtype, keep_stored: bool | None
) -> mx.array | StoredWeight:
    if isinstance(tensor, QuantizedTensor):
        if MLXBackend.has_gpu() if keep_stored is None else keep_stored:
            beside = tensor.read_beside() if isinstance(tensor, AdaptedTensor) else None
            return StoredWeight(tensor.read_packed(), dtype, beside)
    elif keep_stored and len(tensor.shape) in (2, 4):
        values = tensor.read()
        if values.itemsize < dtype.size:
            return StoredWeight(values, dtype)
        return mx.array(values).astype(dtype)
    return mx.array(tensor.read()).astype(dtype)


def _device_info() -> dict[str, Any]:
    """MLX's facts on its default device. The keys differ between devices."""
    try:
        return dict(mx.device_info())
    except (AttributeError, RuntimeError):  # an MLX that tells of Metal only
        return dict(mx.metal.device_info()) if mx.metal.is_available() else {}


@cache
def _default_memory_limit() -> int:
    """Set and return the limit of a process that asks for none.

    MLX's own on a GPU is 1.5 times the recommended working set: a small Mac would swap.
    """
    own = mx.set_memory_limit(1 << 40)  # it can only be read by setting another
    size = MLXBackend.memory_size() if MLXBackend.has_gpu() else None
    limit = own if size is None else size
    mx.set_memory_limit(limit)
    return limit


def _dtype(name: str, *more: str) -> mx.Dtype:
    if name not in (*_FLOATS, *more):
        raise UsageError(f"dtype {name!r} is not one of {', '.join((*_FLOATS, *more))}")
    dtype: mx.Dtype = getattr(mx, name)
    return dtype
