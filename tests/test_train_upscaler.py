"""examples/train_upscaler and train_clip: the upscaler enlarges better than Lanczos; both train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlxdiff
from examples.train_builtin import data
from mlxdiff.convert.upscaler import open_upscaler

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILE = EXAMPLES / "train_upscaler" / "shapes-x4.safetensors"


def test_the_upscaler_of_the_built_in_model_beats_lanczos() -> None:
    """By more than 1 dB, on pictures that training never showed."""
    upscaler, rng, errors = (
        mlxdiff.load_upscaler(FILE, backend="numpy"),
        np.random.default_rng(7),
        [],
    )
    for i in range(6):
        spec = data.random_spec(rng, 1 + i % 2)
        small, large = data.render(spec), data.render(spec, 256).astype(float)
        lanczos = Image.fromarray(small).resize((256, 256), Image.Resampling.LANCZOS)
        ways = np.asarray(lanczos), np.asarray(upscaler.picture(small))
        errors.append([np.square(way - large).mean() for way in ways])
    by_lanczos, by_network = np.log10(errors).mean(axis=0)
    assert 10 * (by_lanczos - by_network) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["upscaler", "clip"])
def test_the_scripts_run_and_go_on(name: str, tmp_path: Path) -> None:
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    target = tmp_path / ("made.safetensors" if name == "upscaler" else "made")
    script = EXAMPLES / f"train_{name}" / "train.py"
    command = [sys.executable, str(script), "--run", "run", "--to", str(target), "--batch", "4"]
    if name == "upscaler":
        command += ["--pictures", "32"]
    for minutes in ("0.001", "0.002"):
        subprocess.run(
            [*command, "--minutes", minutes],
            cwd=tmp_path,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            timeout=300,
        )
    if name == "upscaler":
        assert open_upscaler(target).config == open_upscaler(FILE).config
    else:
        scores = mlxdiff.load_judge(target, backend="numpy").scores(
            [np.zeros((64, 64))], ["a star"]
        )
        assert np.isfinite(scores).all()
