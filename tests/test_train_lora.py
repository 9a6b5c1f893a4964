"""examples/train_lora: lessons for the built-in model, and a script with torch that trains one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlxdiff
from examples.train_builtin import data
from examples.train_lora import lessons
from mlxdiff.training.data_folder import read_pictures

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


@pytest.mark.parametrize("lesson", ["shape", "style"])
def test_the_pictures_of_a_lesson_can_be_trained_on(lesson: str, tmp_path: Path) -> None:
    lessons.pictures(lesson, tmp_path, 12, seed=0)
    found = read_pictures(tmp_path, side=64)
    assert len(found.items) == 12 and not found.faults and not found.notes
    crosses = sum("cross" in picture.caption for picture in found.items)
    assert (crosses >= 8) if lesson == "shape" else (crosses == 0)
    assert "cross" not in data.SHAPES  # the world is as it was


@pytest.mark.parametrize("lesson", ["shape", "style"])
def test_the_judge_of_a_lesson_knows_true_pictures(lesson: str) -> None:
    with lessons.world(lesson):
        rows = lessons.rows(lesson, 4)
        drawn = {name: [data.render(spec) for _, spec in row] for name, row in rows.items()}
    specs = [spec for row in rows.values() for _, spec in row]
    true = [one for row in drawn.values() for one in row]
    judged = [lessons.right(lesson, one, spec) for one, spec in zip(true, specs, strict=True)]
    assert np.mean(judged) > 0.9
    # Pictures of the world as it is do not follow the lesson.
    filled = [data.render(spec) for spec in specs if all(t.shape != "cross" for t in spec.things)]
    if lesson == "style":
        assert not any(
            lessons.right(lesson, one, spec)[1] for one, spec in zip(filled, specs, strict=True)
        )
