"""Option exact: its variables are set before MLX reads them, and MLX must heed them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mlxdiff.errors import UsageError


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("MLX_CONV_WINOGRAD",)}
    environment.pop("MLX_ENABLE_TF32", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=False
    )


def test_the_environment_is_set() -> None:
    done = run(
        "import os, mlxdiff; mlxdiff.load(exact=True);"
        "print(os.environ['MLX_CONV_WINOGRAD'], os.environ['MLX_ENABLE_TF32'])"
    )
    assert done.stdout.split() == ["0", "0"], done.stderr


@pytest.mark.mlx
def test_too_late() -> None:
    code = "import mlx.core, mlxdiff; mlxdiff.load(exact=True)"
    done = run(code)
    assert "UsageError: exact must be set before MLX is imported" in done.stderr
    assert "MLX_CONV_WINOGRAD=0 MLX_ENABLE_TF32=0" in done.stderr
    # Set from outside, it is in time.
    wanted = "import os; os.environ.update(MLX_CONV_WINOGRAD='0', MLX_ENABLE_TF32='0');"
    assert run(wanted + code).returncode == 0


def test_without_a_gpu_there_is_a_note(tmp_path: object) -> None:
    code = "from mlxdiff.cli import main; main()"
    options = "generate circle --steps 1 --exact --backend numpy -o".split()
    environment = os.environ | {"MLX_CONV_WINOGRAD": "0", "MLX_ENABLE_TF32": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *options, f"{tmp_path}/out.png"],
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    assert "exact has no effect" in done.stderr


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLX that takes its CPU for Metal."""
    mx = pytest.importorskip("mlx.core")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    return mx


def winograd(heeds: bool) -> Any:
    """A convolution whose bits the variable changes, if MLX heeds it."""
    import mlx.core as mx

    def conv2d(*_: Any, **__: Any) -> Any:
        direct = heeds and os.environ.get("MLX_CONV_WINOGRAD", "1") == "0"
        return mx.array([1.0 if direct else 1.008])

    return conv2d


@pytest.mark.mlx
def test_a_switch_that_works(metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxdiff.backends.mlx import MLXBackend

    monkeypatch.setattr(metal, "conv2d", winograd(heeds=True))
    for value in ("0", None):
        if value is None:
            monkeypatch.delenv("MLX_CONV_WINOGRAD", raising=False)
        else:
            monkeypatch.setenv("MLX_CONV_WINOGRAD", value)
        MLXBackend().check_exact()
        assert os.environ.get("MLX_CONV_WINOGRAD") == value


@pytest.mark.mlx
def test_an_mlx_without_the_switch_is_refused(metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlxdiff
    from mlxdiff.backends.mlx import MLXBackend
    from mlxdiff.machine import exact

    monkeypatch.setattr(metal, "conv2d", winograd(heeds=False))
    with pytest.raises(UsageError, match=r"ignores MLX_CONV_WINOGRAD.*install MLX 0\.32\.4"):
        MLXBackend().check_exact()
    for name, value in exact.VARIABLES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"exact: MLX .* ignores"):
        mlxdiff.load(backend="mlx", exact=True)
    # CUDA has no Winograd's method to switch off.
    monkeypatch.setattr(metal.metal, "is_available", lambda: False)
    MLXBackend().check_exact()


@pytest.mark.mlx
def test_tf32_that_is_on_already_is_refused(metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxdiff.backends.mlx import MLXBackend

    def ten_bits(x: Any) -> Any:
        """float32 with 10 bits of mantissa."""
        bits = np.array(x).view(np.uint32) + np.uint32(1 << 12)
        return metal.array((bits & np.uint32(0xFFFFE000)).view(np.float32))

    monkeypatch.setattr(metal, "conv2d", winograd(heeds=True))
    full = metal.full
    monkeypatch.setattr(metal, "full", lambda *args: ten_bits(full(*args)))
    with pytest.raises(UsageError, match="MLX_ENABLE_TF32=0 in the environment"):
        MLXBackend().check_exact()


@pytest.mark.mlx
def test_nothing_is_computed_to_check_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlxdiff.backends.mlx import MLXBackend

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx, "conv2d", None)
    MLXBackend().check_exact()
