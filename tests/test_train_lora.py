"""examples/train_lora: the script trains, and what it writes is a LoRA of the built-in model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlxdiff

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_lora" / "train.py"


def test_the_style_lora_fits_the_built_in_model() -> None:
    pipe = mlxdiff.load(backend="numpy", loras=[SCRIPT.with_name("outline.safetensors")])
    assert "of unet" in pipe.loras[0].report()


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path) -> None:
    for package in ("torch", "diffusers", "peft"):
        pytest.importorskip(package)
    subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "2", "--batch", "2", "--pictures", "4"],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=300,
    )
    pipe = mlxdiff.load(backend="numpy", loras=[tmp_path / "outline.safetensors"])
    assert "LoRA of rank 8" in pipe.loras[0].report()
