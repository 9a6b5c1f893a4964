"""Every program in examples/ runs as its README says, in an empty folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.train_control import judge

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 45
    if example.stem == "follow_edges":
        given, _, *drawn = np.split(
            np.asarray(Image.open(tmp_path / "follow_edges.png")), 4, axis=1
        )
        for picture in drawn:
            found = judge.follows(picture, given)
            assert min(found["edges found"], found["edges that belong"]) > 0.9
