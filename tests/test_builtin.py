"""The built-in model: the pictures that diffusers draws with it, and of what was asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_data import GOLDEN, assert_latents_close, assert_picture_close

import mlxdiff
from mlxdiff.pipeline import BUILTIN

CASES = json.loads((GOLDEN / "builtin" / "cases.json").read_text(encoding="utf-8"))
DEMO = "a small red circle left of a large blue square on a yellow background"


@pytest.fixture(scope="module", autouse=True)
def training_code() -> None:
    """The captions and the checker live with the training scripts."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "train_builtin"))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_same_picture_as_diffusers(case: int, backend: str) -> None:
    arguments = dict(CASES[case])
    pipe = mlxdiff.load(backend=backend, dtype="float32")
    result = pipe.generate(arguments.pop("prompt"), sampler="dpmpp-2m", **arguments)
    with np.load(GOLDEN / "builtin" / "pictures.npz") as golden:
        assert_latents_close(result.latents, golden[f"{case}/latents"])
        assert_picture_close(
            np.stack([np.asarray(i) for i in result.images]), golden[f"{case}/image"]
        )


def test_it_is_small() -> None:
    assert sum(f.stat().st_size for f in BUILTIN.rglob("*") if f.is_file()) <= 12_000_000


def test_the_demo_prompt_is_right() -> None:
    """As `make demo` draws it."""
    import checker

    pipe = mlxdiff.load(backend="numpy")
    for seed in range(3):
        image = pipe.generate(DEMO, seed=seed, steps=12, guidance=4.0).images[0]
        verdict = checker.check(np.asarray(image), DEMO)
        assert verdict.right, (seed, verdict)
