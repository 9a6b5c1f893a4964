"""Whole pictures against diffusers, and what a Pipeline promises beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import (
    NAMES,
    assert_latents_close,
    assert_picture_close,
    cases,
    checkpoint,
    picture_difference,
)

import mlxdiff
from mlxdiff.convert import convert
from mlxdiff.errors import UsageError
from mlxdiff.pipeline import Pipeline
from mlxdiff.run.seeds import pick_seeds

CASES = [(name, case) for name in NAMES for case in cases(name)]
SMALL = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def pipes() -> dict[tuple[str, str], Pipeline]:
    return {}


def opened(pipes: dict[tuple[str, str], Pipeline], name: str, backend: str) -> Pipeline:
    if (name, backend) not in pipes:
        pipes[name, backend] = mlxdiff.load(checkpoint(name), backend=backend, dtype="float32")
    return pipes[name, backend]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c['case']}" for n, c in CASES])
def test_pictures_equal_diffusers(
    name: str, case: dict[str, Any], backend: str, pipes: dict[tuple[str, str], Pipeline]
) -> None:
    arguments = dict(case["arguments"])
    result = opened(pipes, name, backend).generate(arguments.pop("prompt"), **arguments)
    assert_latents_close(result.latents, case["latents"])
    assert_picture_close(np.stack([np.asarray(i) for i in result.images]), case["image"])


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_bound_catches_a_wrong_scale(
    name: str, pipes: dict[tuple[str, str], Pipeline]
) -> None:
    """The bound above would mean nothing if a guidance scale 2 % off passed it."""
    case = next(c for c in cases(name) if c["arguments"]["guidance"] > 1)
    arguments = case["arguments"] | {"guidance": 1.02 * case["arguments"]["guidance"]}
    result = opened(pipes, name, "numpy").generate(**arguments)
    within, mean = picture_difference(np.asarray(result.images[0]), case["image"][0])
    assert within < 0.998 or mean > 0.05


def test_a_converted_model_draws_the_same_latents(
    tmp_path: Path, pipes: dict[tuple[str, str], Pipeline]
) -> None:
    convert(checkpoint("sdxl"), tmp_path / "model", dtype="float32")
    expected = opened(pipes, "sdxl", "numpy").generate("a", seed=1, **SMALL).latents
    pipe = mlxdiff.load(tmp_path / "model", backend="numpy")
    assert np.array_equal(pipe.generate("a", seed=1, **SMALL).latents, expected)


@pytest.fixture
def pipe(backend: str, pipes: dict[tuple[str, str], Pipeline]) -> Pipeline:
    return opened(pipes, "sd15", backend)


def test_stream_yields_every_step(pipe: Pipeline) -> None:
    steps = list(pipe.stream("a", seed=5, count=2, **SMALL))
    result = pipe.generate("a", seed=5, count=2, **SMALL)
    assert [(s.picture, s.index, s.total, s.seed) for s in steps] == [
        (0, 0, 2, 5),
        (0, 1, 2, 5),
        (1, 0, 2, 6),
        (1, 1, 2, 6),
    ]
    for picture in range(2):
        assert np.array_equal(steps[2 * picture + 1].latents, result.latents[picture])
    assert steps[1].preview().tobytes() == result.images[0].tobytes()
    assert result.latents.dtype == np.float32 and result.seeds == [5, 6]


def test_noise_replaces_the_seed(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    first, second = (pipe.generate("a", seed=s, noise=noise, **SMALL) for s in (1, 2))
    assert np.array_equal(first.latents, second.latents)
    with pytest.raises(UsageError, match="noise has shape"):
        pipe.generate("a", noise=noise[:, :3], **SMALL)


def test_images_go_there_and_back(pipe: Pipeline) -> None:
    image = (np.arange(32 * 32 * 3) % 255).astype(np.uint8).reshape(32, 32, 3)
    mean = pipe.encode_image(image)
    assert mean.shape == (1, 4, 4, 4) and mean.dtype == np.float32
    assert not np.array_equal(mean, pipe.encode_image(image, seed=1))
    assert pipe.decode(mean)[0].size == (32, 32)
    with pytest.raises(UsageError, match="multiple of 8"):
        pipe.encode_image(image[:30])


def test_timings_and_metadata(pipe: Pipeline) -> None:
    result = pipe.generate("a", seed=9, count=2, **SMALL)
    assert {"load", "text_encoder", "unet", "vae"} <= set(result.timings)
    assert len(result.timings["steps"]) == 4
    assert [m.seed for m in result.metadata] == [9, 10]
    assert result.metadata[0].sampler == result.settings.sampler != "auto"
    assert result.peak_memory > 0


def test_defaults_are_those_of_the_reference(pipes: dict[tuple[str, str], Pipeline]) -> None:
    guidance = {n: opened(pipes, n, "numpy").settings("a").guidance for n in NAMES}
    assert guidance == {"sd15": 7.5, "sd21v": 7.5, "sdxl": 5.0}
    settings = opened(pipes, "sdxl", "numpy").settings("a", width=64, height=32)
    assert settings.original_size == settings.target_size == (32, 64)
    assert settings.crop == (0, 0)


def test_notes(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mlxdiff"):
        pipe.generate("a", negative_prompt="b", guidance=1.0, seed=0, **SMALL)
    assert "negative_prompt has no effect" in caplog.text


def test_seeds() -> None:
    assert pick_seeds(3, 3) == [3, 4, 5]
    assert 0 <= pick_seeds(None, 1)[0] < 2**32
    assert pick_seeds(None, 1) != pick_seeds(None, 1)


@pytest.mark.mlx
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_finite_and_near(name: str) -> None:
    """float16 on MLX: no NaN, no black picture."""
    pytest.importorskip("mlx.core")
    latents = [
        mlxdiff.load(checkpoint(name), backend="mlx", dtype=dtype)
        .generate("a red circle", seed=0, **SMALL)
        .latents
        for dtype in ("float32", "float16")
    ]
    assert np.isfinite(latents[1]).all()
    assert np.abs(latents[0] - latents[1]).max() < 0.05 * latents[0].std()
