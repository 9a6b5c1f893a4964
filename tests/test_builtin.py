"""The built-in model: the pictures that diffusers draws with it, and of what was asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_data import GOLDEN, assert_latents_close, assert_picture_close

import mlxdiff
from mlxdiff.loading import BUILTIN

CASES = json.loads((GOLDEN / "builtin" / "cases.json").read_text(encoding="utf-8"))
DEMO = "a small red circle left of a large blue square on a yellow background"


@pytest.fixture(scope="module", autouse=True)
def training_code() -> None:
    """The captions and the checker live with the training scripts."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "train_builtin"))


MLX = pytest.mark.mlx
SIDES = [
    *[(case, "numpy") for case in range(len(CASES))],
    pytest.param(0, "mlx", marks=MLX),
    pytest.param(1, "mlx", marks=MLX),
    # 25 steps, and nothing of MLX's own: another number, another prompt.
    pytest.param(2, "mlx", marks=[MLX, pytest.mark.slow]),
]


@pytest.mark.parametrize(("case", "side"), SIDES)
def test_the_same_picture_as_diffusers(case: int, side: str) -> None:
    arguments = dict(CASES[case])
    pipe = mlxdiff.load(backend=side, dtype="float32")
    result = pipe.generate(arguments.pop("prompt"), sampler="dpmpp-2m", **arguments)
    with np.load(GOLDEN / "builtin" / "pictures.npz") as golden:
        assert_latents_close(result.latents, golden[f"{case}/latents"])
        assert_picture_close(
            np.stack([np.asarray(i) for i in result.images]), golden[f"{case}/image"]
        )


@pytest.mark.parametrize("case", [0, 1])
def test_fast_draws_the_picture_of_diffusers_with_the_same_weights(backend: str, case: int) -> None:
    pipe = mlxdiff.load(backend=backend, dtype="float32", fast=True)
    with np.load(GOLDEN / "builtin" / "fast.npz") as golden:
        result = pipe.generate(str(golden["prompts"][case]), seed=int(golden["seeds"][case]))
        assert_latents_close(result.latents, golden[f"{case}/latents"])
        assert_picture_close(
            np.stack([np.asarray(i) for i in result.images]), golden[f"{case}/image"]
        )


def test_it_is_small() -> None:
    few_step = (BUILTIN / "few_step.safetensors").stat().st_size  # what --fast adds
    whole = sum(f.stat().st_size for f in BUILTIN.rglob("*") if f.is_file())
    assert whole - few_step <= 12_000_000 and few_step <= 8_000_000


def test_the_demo_prompt_is_right() -> None:
    """As `make demo` draws it."""
    import checker

    pipe = mlxdiff.load(backend="numpy")
    for seed in range(3):
        image = pipe.generate(DEMO, seed=seed, steps=12, guidance=4.0).images[0]
        verdict = checker.check(np.asarray(image), DEMO)
        assert verdict.right, (seed, verdict)


def test_words_that_it_does_not_know_are_named(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = mlxdiff.load(backend=backend)
    pipe.encode_prompt(DEMO, "a yellow ring")
    assert not caplog.messages
    pipe.encode_prompt("a red Horse, on a red circle", "blurry")
    first, listing, second, again = caplog.messages
    assert "'horse'" in first and "circle" not in first and "'blurry'" in second
    assert listing == again and "circle, cyan" in listing and "sd15" in listing


def test_its_list_of_words_is_that_of_its_data() -> None:
    import data

    tokenizer = mlxdiff.load(backend="numpy").source.tokenizer()
    assert tokenizer.known_words == tuple(data.words())
