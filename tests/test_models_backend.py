"""The MLX backend: strict loading, bounded memory, arrays in and out."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest
import tiny_models as tiny

mx = pytest.importorskip("mlx.core")

from mlxdiff.backends.mlx import MLXBackend  # noqa: E402
from mlxdiff.errors import CheckpointError, UsageError  # noqa: E402
from mlxdiff.networks.config import AutoencoderKLConfig  # noqa: E402
from mlxdiff.networks.params import expected_parameters  # noqa: E402
from mlxdiff.weights.tensors import LazyTensor  # noqa: E402

pytestmark = pytest.mark.mlx
VAE = tiny.config("vae", "kl")


def vae_tensors() -> dict[str, LazyTensor]:
    return tiny.lazy(tiny.random_arrays(VAE))


def test_a_missing_tensor() -> None:
    tensors = vae_tensors()
    del tensors["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"AutoencoderKL.*missing.*decoder\.conv_in\.bias"):
        MLXBackend().load(VAE, tensors)


def test_an_unknown_tensor() -> None:
    tensors = vae_tensors()
    tensors["decoder.conv_in.scale"] = tensors["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"unknown.*decoder\.conv_in\.scale"):
        MLXBackend().load(VAE, tensors)


def test_a_misshapen_tensor() -> None:
    tensors = vae_tensors()
    tensors["quant_conv.bias"] = tensors["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias is \(32,\), expected \(8,\)"):
        MLXBackend().load(VAE, tensors)


def test_many_missing_tensors_are_counted_and_ten_are_named() -> None:
    tensors = vae_tensors()
    names = [name for name in tensors if name.startswith("decoder")]
    for name in names:
        del tensors[name]
    with pytest.raises(CheckpointError) as caught:
        MLXBackend().load(VAE, tensors)
    message = str(caught.value)
    assert f"{len(names)} missing" in message
    assert sum(name in message for name in names) == 10
    assert "\n" not in message


def test_weights_take_the_asked_dtype() -> None:
    for backend, dtype, expected in (
        (MLXBackend("float16"), None, mx.float16),
        (MLXBackend("float16"), "float32", mx.float32),
        (MLXBackend(), "bfloat16", mx.bfloat16),
    ):
        vae = backend.load(VAE, vae_tensors(), dtype)
        assert {p.dtype for p in (vae.decoder.conv_in.weight, vae.quant_conv.bias)} == {expected}


def test_loading_needs_little_more_than_the_result() -> None:
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
    vae = MLXBackend().load(config, tensors, "float16")
    # The result in float16, and one tensor in float32 and float16 beside it.
    bound = 2 * sum(sizes) + 6 * max(sizes)
    assert MLXBackend().peak_memory() - before < 1.1 * bound
    assert bound < 0.75 * 4 * sum(sizes)  # a whole float32 copy would not pass
    del vae


@pytest.mark.parametrize("dtype", ["float64", "int8", ""])
def test_an_unknown_dtype(dtype: str) -> None:
    with pytest.raises(UsageError, match="float32, float16, bfloat16"):
        MLXBackend(dtype)


def test_arrays_in_and_out() -> None:
    backend = MLXBackend("float16")
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


def test_half_precision_only_on_a_gpu() -> None:
    assert MLXBackend.default_dtype() == ("float16" if MLXBackend.has_gpu() else "float32")


def test_without_mlx_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.delitem(sys.modules, "mlxdiff.backends.mlx")
    with pytest.raises(UsageError, match=r"MLX cannot be imported.*pip install.*--backend numpy"):
        importlib.import_module("mlxdiff.backends.mlx")


def test_importing_the_package_does_not_import_mlx() -> None:
    check = "import sys, mlxdiff.backends.numpy; sys.exit('mlx.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
