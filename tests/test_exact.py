"""Option exact must be set before MLX reads its environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


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
    assert "UsageError: exact (--exact) must be set before MLX is imported" in done.stderr
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
