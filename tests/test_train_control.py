"""examples/train_control: with its ControlNet the built-in model follows edges; it trains one."""

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
from examples.train_control import judge

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "train_control"


def test_the_edge_controlnet_makes_the_built_in_model_follow() -> None:
    """What no prompt can say: exactly where two objects stand. The colors are the prompt's."""
    pipe = mlxdiff.load(backend="numpy", controlnets=[FOLDER / "edges"])
    task = judge.tasks(2)[1]
    told = {"control_image": Image.fromarray(task.picture), "control_preprocess": "edges"}
    for scale in (1.0, 0.0):
        drawn = pipe.generate(
            task.prompt, **told, control_scale=scale, seed=1, steps=6, guidance=4
        ).images[0]
        found = judge.follows(np.asarray(drawn), task.picture)
        if scale:
            assert min(found["edges found"], found["edges that belong"]) > 0.95
            assert found["overlap"] > 0.85
            assert judge.checker.check(drawn, task.asked)["color"]
        else:
            assert found["edges found"] < 0.8


def test_what_follows_is_measured() -> None:
    """A picture follows itself; one pixel aside it does still, five aside no more."""
    thing = data.Thing("square", "red", "large", 0.5, 0.5, 0.2)
    picture = data.render(data.Spec("white", (thing,)))
    assert set(judge.follows(picture, picture).values()) == {1.0}
    near, far = (judge.follows(np.roll(picture, by, axis=1), picture) for by in (1, 5))
    assert near["edges found"] == near["edges that belong"] == 1
    assert far["edges found"] < 0.7 and far["overlap"] < 0.8


@pytest.mark.slow
def test_the_script_runs_and_goes_on(tmp_path: Path) -> None:
    for package in ("torch", "diffusers"):
        pytest.importorskip(package)
    command = [sys.executable, str(FOLDER / "train.py"), "--run", "run", "--pictures", "8"]
    for minutes in ("0.001", "0.002"):
        subprocess.run(
            [*command, "--batch", "2", "--look", "1", "--minutes", minutes],
            cwd=tmp_path,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            timeout=300,
        )
    pipe = mlxdiff.load(backend="numpy", controlnets=[tmp_path / "edges"])
    assert pipe.model.controlnets
