"""examples/train_ddpm: pictures of digits for a new model, and the judge of what it draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.train_ddpm import digits
from mlxdiff.training.data_folder import read_pictures


def test_the_pictures_can_be_trained_on(tmp_path: Path) -> None:
    digits.pictures(tmp_path, 2, seed=0)
    found = read_pictures(tmp_path, texts=False, classes=True, side=digits.SIDE)
    assert found.classes == tuple("0123456789") and len(found.items) == 20
    assert not found.faults


def test_the_judge_reads_every_digit() -> None:
    rng = np.random.default_rng(1)
    for digit in range(10):
        for ink in digits.INKS:
            exact = digits.picture(digit, ink, digits.PLACES[int(rng.integers(8))])
            assert digits.read(exact) == (digit, 0.0)
            rough = np.clip(exact + rng.normal(0, 40, exact.shape), 0, 255)
            assert digits.read(rough)[0] == digit
