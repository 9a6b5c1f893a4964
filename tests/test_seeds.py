"""Which generator draws what: the orders of diffusers, A1111 and ComfyUI; variations; shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mlxdiff
from mlxdiff.errors import UsageError
from mlxdiff.noise import Generator, NumpyGenerator, PhiloxGenerator, interpolated
from mlxdiff.run.aspect import SDXL_SIZES, nearest_size
from mlxdiff.run.model import ImageLatents, draw_noise
from mlxdiff.run.seeds import Draws

SHAPE, LARGER = (4, 5, 3), (8, 10, 3)
SEED = 7


def draws(**options: Any) -> Draws:
    """Draws of one picture with these options of a run."""
    vary, smaller = options.pop("vary", None), options.pop("smaller", None)
    defaults = {
        "rng": "cpu", "sampler_rng": None, "noise_seed_delta": 0, "seed_order": "diffusers",
        "frames": None,
    }  # fmt: skip
    return Draws(SimpleNamespace(**defaults | options), SEED, vary, smaller)  # type: ignore[arg-type]


def test_diffusers_draws_all_from_one_stream() -> None:
    found, stream = draws(), Generator(SEED)
    image = ImageLatents(np.zeros((1, *SHAPE), np.float32), np.ones((1, *SHAPE), np.float32))
    for made in (
        found.sample(image),
        found.first(SHAPE),
        found.step(SHAPE),
        found.second(LARGER),
        found.step(LARGER),
    ):
        np.testing.assert_array_equal(made, draw_noise(stream, made.shape[1:]))


def test_a1111_begins_each_pass_with_its_noise() -> None:
    found = draws(rng="gpu", seed_order="a1111")
    image = ImageLatents(np.ones((1, *SHAPE), np.float32), np.ones((1, *SHAPE), np.float32))
    np.testing.assert_array_equal(found.sample(image), image.mean)
    for first, shape in ((found.first, SHAPE), (found.second, LARGER)):
        stream = PhiloxGenerator(SEED)
        np.testing.assert_array_equal(first(shape), draw_noise(stream, shape))
        for _ in range(2):
            np.testing.assert_array_equal(found.step(shape), draw_noise(stream, shape))


def test_ensd_draws_the_steps_from_another_seed() -> None:
    found = draws(rng="gpu", seed_order="a1111", noise_seed_delta=31337)
    np.testing.assert_array_equal(found.first(SHAPE), draw_noise(PhiloxGenerator(SEED), SHAPE))
    stream = PhiloxGenerator(SEED + 31337)
    for _ in range(2):
        np.testing.assert_array_equal(found.step(SHAPE), draw_noise(stream, SHAPE))


def test_comfyui_draws_the_steps_on_the_gpu() -> None:
    found = draws(rng="cpu", sampler_rng="gpu", seed_order="a1111")
    np.testing.assert_array_equal(found.first(SHAPE), draw_noise(Generator(SEED), SHAPE))
    np.testing.assert_array_equal(found.step(SHAPE), draw_noise(PhiloxGenerator(SEED), SHAPE))


def test_numpy() -> None:
    found = draws(rng="numpy")
    np.testing.assert_array_equal(found.first(SHAPE), draw_noise(NumpyGenerator(SEED), SHAPE))


def test_a_variation_leaves_the_steps_alone() -> None:
    plain, varied = draws(rng="gpu"), draws(rng="gpu", vary=(11, 0.3))
    own, other = (draw_noise(PhiloxGenerator(seed), SHAPE) for seed in (SEED, 11))
    np.testing.assert_array_equal(varied.first(SHAPE), interpolated(own, other, 0.3))
    plain.first(SHAPE)
    np.testing.assert_array_equal(varied.step(SHAPE), plain.step(SHAPE))
    np.testing.assert_array_equal(draws(vary=(11, 0.0)).first(SHAPE), draws().first(SHAPE))


def test_a_seed_resized_from_a_smaller_picture() -> None:
    found = draws(smaller=(2, 3, 3)).first(SHAPE)
    own, small = draw_noise(Generator(SEED), SHAPE), draw_noise(Generator(SEED), (2, 3, 3))
    np.testing.assert_array_equal(found[:, 1:3, 1:4], small)
    np.testing.assert_array_equal(found[:, 0], own[:, 0])


@pytest.fixture(scope="module")
def pipe() -> mlxdiff.Pipeline:
    return mlxdiff.load(backend="numpy")


def test_a_run_takes_the_noise_of_its_generator(pipe: mlxdiff.Pipeline) -> None:
    how: dict[str, Any] = {"seed": 7, "steps": 1}
    noise = draw_noise(PhiloxGenerator(7), pipe.model.latent_shape(64, 64))
    drawn = pipe.generate("a red circle", rng="gpu", **how)
    same = pipe.generate("a red circle", noise=noise, **how)
    np.testing.assert_array_equal(drawn.latents, same.latents)
    assert drawn.metadata[0].extra["rng"] == "gpu"
    assert "rng" not in same.metadata[0].extra


def test_variations_count_on_and_keep_the_seed(pipe: mlxdiff.Pipeline) -> None:
    how: dict[str, Any] = {"seed": 7, "steps": 1}
    both = pipe.generate("a red circle", vary=(11, 0.5), count=2, **how)
    assert both.seeds == [7, 7]
    assert [one.extra["vary"] for one in both.metadata] == [[11, 0.5], [12, 0.5]]
    alone = pipe.generate("a red circle", vary="12:0.5", **how)
    np.testing.assert_array_equal(both.latents[1], alone.latents[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vary": (1, 1.5)}, "SEED:STRENGTH"),
        ({"vary": "x:0.5"}, "SEED:STRENGTH"),
        ({"vary": "11"}, "SEED:STRENGTH"),
        ({"rng": "cuda"}, "cpu, gpu, numpy"),
        ({"rng": "numpy", "seed": -1}, "2\\*\\*32"),
        ({"aspect": "16"}, "16:9"),
        ({"aspect": (0, 1)}, "16:9"),
        ({"aspect": "1000:1"}, "100:1"),
        ({"aspect": "16:9", "width": 64}, "aspect and width"),
        ({"vary": (1, 0.5), "noise": np.zeros((1, 8, 8, 4))}, "vary and noise"),
        ({"noise_size": (60, 3)}, "noise_size"),
        ({"hires_steps": 3}, "hires_steps has no effect"),
    ],
)
def test_what_cannot_be_is_refused(
    pipe: mlxdiff.Pipeline, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        pipe.generate("a", steps=1, **options)


def test_steps_of_a_hires_pass(pipe: mlxdiff.Pipeline) -> None:
    """As many as asked for, from the level that the strength says, as in A1111."""
    run = pipe.stream("a", steps=2, hires=1.25, hires_strength=0.4, hires_steps=3, seed=1)
    assert run.steps == 5
    assert pipe.stream("a", steps=10, hires=1.25, hires_strength=0.4, seed=1).steps == 14
    assert run.metadata[0].extra["hires_steps"] == 3


# Shapes


def _kind(side: int, is_sdxl: bool = False) -> Any:
    return SimpleNamespace(default_size=(side, side), is_sdxl=is_sdxl)


@pytest.mark.parametrize(
    ("shape", "of_512", "of_768", "of_sdxl"),
    [
        ((1, 1), (512, 512), (768, 768), (1024, 1024)),
        ((16, 9), (704, 384), (1024, 576), (1344, 768)),
        ((9, 16), (384, 704), (576, 1024), (768, 1344)),
        ((4, 3), (576, 448), (832, 640), (1152, 896)),
        ((3, 2), (576, 384), (960, 640), (1216, 832)),
        ((21, 9), (768, 320), (1216, 512), (1536, 640)),
    ],
)
def test_sizes_for_a_shape(shape: Any, of_512: Any, of_768: Any, of_sdxl: Any) -> None:
    assert nearest_size(_kind(512), *shape) == of_512
    assert nearest_size(_kind(768), *shape) == of_768
    assert nearest_size(_kind(1024, is_sdxl=True), *shape) == of_sdxl
    assert of_sdxl in SDXL_SIZES


def test_a_run_has_the_size_of_its_shape(pipe: mlxdiff.Pipeline) -> None:
    found = pipe.settings("a", aspect=(16, 9))
    assert (found.width, found.height) == nearest_size(pipe.model, 16, 9) == (88, 48)
