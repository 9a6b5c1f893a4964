"""Both backends: strict loading, bounded memory, arrays in and out."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from mlxdiff.backends.numpy import NumPyBackend, ignore_false_warnings
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.loading import make_backend
from mlxdiff.networks.config import AutoencoderKLConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.weights.tensors import LazyTensor

VAE = tiny.config("vae", "kl")


def vae_tensors() -> dict[str, LazyTensor]:
    return tiny.lazy(tiny.random_arrays(VAE))


def mlx() -> Any:
    return importlib.import_module("mlx.core")


# -------------------------------------------------------------------------------------- the weights


def test_a_missing_tensor(backend: str) -> None:
    tensors = vae_tensors()
    del tensors["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"AutoencoderKL.*missing.*decoder\.conv_in\.bias"):
        make_backend(backend).load(VAE, tensors)


def test_an_unknown_tensor(backend: str) -> None:
    tensors = vae_tensors()
    tensors["decoder.conv_in.scale"] = tensors["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"unknown.*decoder\.conv_in\.scale"):
        make_backend(backend).load(VAE, tensors)


def test_a_misshapen_tensor(backend: str) -> None:
    tensors = vae_tensors()
    tensors["quant_conv.bias"] = tensors["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias is \(32,\), expected \(8,\)"):
        make_backend(backend).load(VAE, tensors)


def test_many_missing_tensors_are_counted_and_ten_are_named(backend: str) -> None:
    tensors = vae_tensors()
    names = [name for name in tensors if name.startswith("decoder")]
    for name in names:
        del tensors[name]
    with pytest.raises(CheckpointError) as caught:
        make_backend(backend).load(VAE, tensors)
    message = str(caught.value)
    assert f"{len(names)} missing" in message
    assert sum(name in message for name in names) == 10
    assert "\n" not in message


def test_faults_are_named_before_anything_is_read(backend: str) -> None:
    def refuse() -> np.ndarray:
        raise AssertionError("read")

    tensors = {
        name: LazyTensor(shape, "F32", refuse) for name, shape in expected_parameters(VAE).items()
    }
    del tensors["decoder.conv_in.bias"]
    tensors["decoder.scale"] = LazyTensor((1,), "F32", refuse)
    tensors["quant_conv.bias"] = LazyTensor((4,), "F32", refuse)
    with pytest.raises(CheckpointError, match=r"AutoencoderKL") as caught:
        make_backend(backend).load(VAE, tensors)
    message = str(caught.value)
    for part in ("decoder.conv_in.bias", "decoder.scale", "quant_conv.bias is (4,), expected (8,)"):
        assert part in message
    assert "\n" not in message


def test_numpy_copies_weights_one_by_one_to_float32() -> None:
    arrays = tiny.random_arrays(VAE)
    halves = {name: value.astype(np.float16) for name, value in arrays.items()}
    tensors = {
        name: LazyTensor(value.shape, "F16", lambda value=value: value)
        for name, value in halves.items()
    }
    parameters = NumPyBackend().load(VAE, tensors).parameters()
    for name, value in parameters.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, halves[name])
    parameters = NumPyBackend().load(VAE, tiny.lazy(arrays)).parameters()
    assert not any(np.shares_memory(value, arrays[name]) for name, value in parameters.items())


@pytest.mark.mlx
def test_mlx_weights_take_the_asked_dtype() -> None:
    mx = mlx()
    for default, dtype, expected in (
        ("float16", None, mx.float16),
        ("float16", "float32", mx.float32),
        ("float32", "bfloat16", mx.bfloat16),
    ):
        vae = make_backend("mlx", default).load(VAE, vae_tensors(), dtype)
        assert {p.dtype for p in (vae.decoder.conv_in.weight, vae.quant_conv.bias)} == {expected}


@pytest.mark.mlx
def test_mlx_loading_needs_little_more_than_the_result() -> None:
    mx, backend = mlx(), make_backend("mlx")
    config = AutoencoderKLConfig.from_dict(
        tiny.VAES["no attention"]
        | {"block_out_channels": [64, 256], "latent_channels": 4, "layers_per_block": 2}
    )
    tensors = {
        name: LazyTensor(shape, "F32", lambda shape=shape: np.ones(shape, np.float32))
        for name, shape in expected_parameters(config).items()
    }
    sizes = [tensor.size for tensor in tensors.values()]
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    vae = backend.load(config, tensors, "float16")
    # The result in float16, and one tensor in float32 and float16 beside it.
    bound = 2 * sum(sizes) + 6 * max(sizes)
    assert backend.peak_memory() - before < 1.1 * bound
    assert bound < 0.75 * 4 * sum(sizes)  # a whole float32 copy would not pass
    del vae


# --------------------------------------------------------------------------------------- the dtypes


@pytest.mark.mlx
@pytest.mark.parametrize("dtype", ["float64", "int8", ""])
def test_mlx_names_the_dtypes_that_it_knows(dtype: str) -> None:
    from mlxdiff.backends.mlx import MLXBackend

    with pytest.raises(UsageError, match="float32, float16, bfloat16"):
        MLXBackend(dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "float33"])
def test_numpy_knows_float32_only(dtype: str) -> None:
    with pytest.raises(UsageError, match=f"float32 only, not in {dtype}"):
        NumPyBackend(dtype)
    with pytest.raises(UsageError, match="float32 only"):
        NumPyBackend().load(VAE, vae_tensors(), dtype)


@pytest.mark.mlx
def test_mlx_has_half_precision_on_a_gpu_only() -> None:
    backend = make_backend("mlx")
    assert backend.default_dtype() == ("float16" if backend.has_gpu() else "float32")


# --------------------------------------------------------------------------------------- the arrays


def test_numpy_arrays_in_and_out() -> None:
    backend = NumPyBackend()
    x = np.arange(6.0).reshape(2, 3)
    assert (backend.name, backend.dtype, backend.default_dtype()) == ("numpy", "float32", "float32")
    assert not backend.has_gpu()
    assert backend.asarray(x).dtype == np.float64
    assert backend.asarray(x, "float32").dtype == np.float32
    assert backend.asarray(x, "int32").dtype == np.int32
    assert backend.to_numpy(x).dtype == np.float32
    np.testing.assert_array_equal(backend.concatenate([x, x], 1), np.concatenate([x, x], 1))
    backend.evaluate(x, (x, x))
    backend.clear_cache()
    assert backend.peak_memory() >= 0


@pytest.mark.mlx
def test_mlx_arrays_in_and_out() -> None:
    mx, backend = mlx(), make_backend("mlx", "float16")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert backend.asarray(x).dtype == mx.float32
    half = backend.asarray(x, "float16")
    assert half.dtype == mx.float16
    assert backend.asarray(half, "float32").dtype == mx.float32
    assert backend.asarray(np.array([1, 2], np.int32), "int32").dtype == mx.int32
    joined = backend.concatenate([half, half], 1)
    backend.evaluate(joined, [half])
    back = backend.to_numpy(joined)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, np.concatenate([x, x], 1))
    assert backend.to_numpy(backend.asarray(x, "bfloat16")).dtype == np.float32
    assert backend.peak_memory() > 0
    backend.clear_cache()


# ---------------------------------------------------------------------------------------- importing


@pytest.mark.mlx
def test_without_mlx_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    make_backend("mlx")  # so that it is imported, and imported anew below
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.delitem(sys.modules, "mlxdiff.backends.mlx")
    with pytest.raises(UsageError, match=r"MLX cannot be imported.*pip install.*backend="):
        importlib.import_module("mlxdiff.backends.mlx")


@pytest.mark.mlx
@pytest.mark.parametrize(
    "module", ["mlxdiff.backends.numpy", "mlxdiff.networks.registry", "mlxdiff"]
)
def test_only_the_mlx_backend_imports_mlx(module: str) -> None:
    check = f"import sys, {module}; sys.exit('mlx.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


# ------------------------------------------------------------------------------ limits and warnings


def test_false_warnings_of_numpy_on_accelerate() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for platform in ("linux", "darwin"):
            ignore_false_warnings(platform)
            for module in ("mlxdiff.backends.numpy_layers", "other"):
                text = "divide by zero encountered in matmul"
                warnings.warn_explicit(text, RuntimeWarning, "x.py", 1, module)
    assert len(seen) == 3  # all but that of mlxdiff on a Mac


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """What MLX's limits are set to, on a GPU of 5.7 GB; its own memory limit is 8 GB."""
    mx = pytest.importorskip("mlx.core")
    from mlxdiff.backends import mlx as module

    found = {"memory": 8_000_000_000}

    def set_memory_limit(size: int) -> int:
        before, found["memory"] = found["memory"], size
        return before

    monkeypatch.setattr(mx, "set_memory_limit", set_memory_limit)
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: found.update(cache=size))
    size = {"max_recommended_working_set_size": 5_700_000_000}
    monkeypatch.setattr(module, "_device_info", lambda: size)
    module._default_memory_limit.cache_clear()
    yield found
    module._default_memory_limit.cache_clear()


@pytest.mark.mlx
@pytest.mark.parametrize(("gpu", "usual"), [(True, 5_700_000_000), (False, 8_000_000_000)])
def test_the_memory_limit_of_mlx(
    limits: dict[str, int], gpu: bool, usual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = mlx().gpu if gpu else mlx().cpu
    monkeypatch.setattr(mlx(), "default_device", lambda: mlx().Device(device))
    backend = make_backend("mlx")
    assert limits["memory"] == usual
    backend.limit_memory(4_000_000_000)
    assert limits["memory"] == 4_000_000_000
    make_backend("mlx")  # another one leaves it
    assert limits["memory"] == 4_000_000_000
    backend.limit_memory(None)
    assert limits["memory"] == usual
    caches = []
    for low_memory in (False, True):
        backend.limit_cache(low_memory)
        caches.append(limits.get("cache"))
    assert caches == ([1 << 30, 256 << 20] if gpu else [None, 32 << 20])
