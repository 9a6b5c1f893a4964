"""examples/train_ddpm: pictures of shapes for a new model, and the judge of what it draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.train_builtin import checker
from examples.train_ddpm import shapes
from mlxdiff.training.data_folder import read_pictures


def test_the_pictures_can_be_trained_on(tmp_path: Path) -> None:
    shapes.pictures(tmp_path, 2, seed=0)
    found = read_pictures(tmp_path, texts=False, classes=True, side=shapes.SIDE)
    assert found.classes == shapes.SHAPES and len(found.items) == 12
    assert not found.faults and not found.notes


def test_the_judge_knows_true_pictures() -> None:
    rng = np.random.default_rng(1)
    right = []
    for shape in shapes.SHAPES:
        for _ in range(20):
            objects = checker.look(shapes.picture(shape, rng)).objects
            right.append(len(objects) == 1 and objects[0].shape == shape)
    assert np.mean(right) > 0.9
