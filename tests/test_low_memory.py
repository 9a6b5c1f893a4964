"""Low memory: the same pictures, from networks that come and go."""

from __future__ import annotations

import gc
import weakref

import golden_data
import numpy as np
import pytest

import mlxdiff
from mlxdiff.run.kind import Network

SIDES = ["numpy", pytest.param("mlx", marks=pytest.mark.mlx)]
SMALL = {"width": 64, "height": 64}
MODELS = {"builtin": None, "sd15": "sd15", "sdxl": "sdxl"}


def load(name: str, side: str, **options) -> mlxdiff.Pipeline:
    model = MODELS[name]
    folder = None if model is None else golden_data.checkpoint(model)
    return mlxdiff.load(folder, backend=side, dtype="float32", **options)


@pytest.mark.parametrize("side", SIDES)
def test_the_same_picture(side: str) -> None:
    """SD 1.5 and SDXL, with all that can be added: test_combinations.py."""
    run = SMALL | {"seed": 3, "steps": 3, "guidance": 4.0, "count": 2}
    expected = load("builtin", side).generate("a red circle", **run)
    pipe = load("builtin", side, low_memory=True)
    held = []
    got = pipe.generate(
        "a red circle", **run, on_step=lambda _: held.append(pipe.model.cache.loaded)
    )
    assert all(names == set() for names in held)  # the U-Net is the run's own
    assert pipe.model.cache.loaded == {Network("vae")}
    scale = expected.latents.std()
    assert np.abs(got.latents - expected.latents).max() < 1e-4 * scale
    for one, other in zip(got.images, expected.images, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
    # And once more: what was given up is read again.
    again = pipe.generate("a red circle", **run)
    assert np.array_equal(again.latents, got.latents)


@pytest.mark.parametrize("side", SIDES)
def test_from_a_picture_and_with_a_changing_prompt(side: str) -> None:
    image = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    run = {"seed": 3, "steps": 5, "guidance": 4.0, "image": image, "strength": 0.8}
    run |= {"prompt_syntax": "a1111"}
    prompt = "a [red:blue:0.5] circle"
    expected = load("builtin", side).generate(prompt, **run)
    got = load("builtin", side, low_memory=True).generate(prompt, **run)
    assert np.abs(got.latents - expected.latents).max() < 1e-4 * expected.latents.std()


def test_it_can_be_switched() -> None:
    pipe = load("builtin", "numpy")
    pipe.generate("a circle", seed=0, steps=1)
    assert Network("unet") in pipe.model.cache.loaded
    pipe.save_memory()
    assert pipe.model.cache.loaded == set()
    assert pipe.model.low_memory
    pipe.save_memory(False)
    pipe.generate("a circle", seed=0, steps=1)
    assert Network("unet") in pipe.model.cache.loaded


@pytest.mark.mlx
def test_a_step_holds_little_more_than_what_is_stored() -> None:
    mx = pytest.importorskip("mlx.core")
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU computes in float16")
    sizes = []
    for low in (False, True):
        gc.collect()
        others = mx.get_active_memory()  # what tests before this one still hold
        pipe = load("builtin", "mlx", low_memory=low)
        held = []
        pipe.generate(
            "a circle", seed=0, steps=2, on_step=lambda _, h=held: h.append(mx.get_active_memory())
        )
        sizes.append(max(held) - others)
        del pipe
    stored = 1.0 * sum(t.nbytes for t in load("builtin", "mlx").source.tensors("unet").values())
    assert sizes[1] < 1.3 * stored + 1e6
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.mlx
@pytest.mark.parametrize("pictures", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_nothing_grows_from_picture_to_picture(pictures: int) -> None:
    mx = pytest.importorskip("mlx.core")
    pipe = load("builtin", "mlx")
    held = []
    for seed in range(pictures):
        pipe.generate("a circle", seed=seed, steps=1, **SMALL)
        gc.collect()
        held.append(mx.get_active_memory() + mx.get_cache_memory())
    assert held[-1] <= held[1]


@pytest.mark.mlx
@pytest.mark.parametrize("name", MODELS)
def test_float16_draws_the_same_and_not_black(name: str) -> None:
    """Rounded by 2^-11 in each of some hundred layers, over some steps: a few levels."""
    pytest.importorskip("mlx.core")
    run = {"seed": 1, "steps": 3, "guidance": 4.0}
    whole = load(name, "mlx").generate("a red circle", **run)
    model = MODELS[name]
    folder = None if model is None else golden_data.checkpoint(model)
    half = mlxdiff.load(folder, backend="mlx", dtype="float16").generate("a red circle", **run)
    assert np.isfinite(half.latents).all()
    one, other = (np.asarray(r.images[0], np.float32) for r in (whole, half))
    assert np.abs(one - other).mean() < 2.0
    assert other.std() > 0.5 * one.std()


@pytest.mark.parametrize("side", SIDES)
def test_the_unet_is_gone_before_the_vae_comes(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load("builtin", side, low_memory=True)
    live: list[weakref.ref] = []
    read = pipe.backend.load

    def spy(*args):
        assert [ref() for ref in live if ref() is not None] == []
        network = read(*args)
        live.append(weakref.ref(network))
        return network

    monkeypatch.setattr(pipe.backend, "load", spy)
    pipe.generate("a circle", seed=0, steps=1, guidance=4.0)
    assert len(live) == 3
