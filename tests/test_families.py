"""Every family of models, and drawing from a given image, against diffusers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import serve
from folders import diffusers_folder, write_json
from golden_data import (
    FAMILIES,
    arrays,
    assert_component_close,
    cases,
    checkpoint,
    photo,
)
from golden_runs import Opened, assert_drawn_again
from PIL import Image
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.convert import convert, describe, open_vae
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.loading import make_backend

CASES = [(name, case) for name in FAMILIES for case in cases(name)]
NETWORKS = ("sdxl-refiner", "lcm", "ssd-1b", "segmind-vega", "bk-sdm-small", "bk-sdm-tiny")
SMALL = {"width": 32, "height": 32, "steps": 2}


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c['case']}" for n, c in CASES])
def test_pictures_equal_diffusers(
    name: str, case: dict[str, Any], backend: str, opened: Opened
) -> None:
    assert_drawn_again(opened, case, backend, name)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_unet_equals_diffusers(name: str, backend: str, opened: Opened) -> None:
    model, to = opened(name, backend).model, make_backend(backend, "float32").asarray
    given = {k.removeprefix("unet/"): v for k, v in arrays(name).items()}
    expected = given.pop("output")
    output = model.component("unet")(**{name: to(value) for name, value in given.items()})
    assert_component_close(model.backend.to_numpy(output), expected)


def test_taesd_equals_diffusers(backend: str) -> None:
    chosen, part = make_backend(backend, "float32"), open_vae(checkpoint("taesd"))
    vae = chosen.load(part.config, part.tensors())
    given = arrays("taesd")
    latents, variance = vae.encode(chosen.asarray(given["vae/image"]))
    assert variance is None
    assert_component_close(chosen.to_numpy(latents), given["vae/encoded"])
    decoded = vae.decode(chosen.asarray(given["vae/latents"]))
    assert_component_close(chosen.to_numpy(decoded), given["vae/decoded"])


# --------------------------------------------------------------------------------- what is promised


def test_defaults_by_family(opened: Opened) -> None:
    """Guidance, steps, sampler and strength where nothing is said."""
    image = photo(64, 64)
    found = {}
    for name in ("sd15", "sdxl", "sdxl-refiner", "lcm", "sd-turbo", "sdxl-turbo", "ssd-1b"):
        s = opened(name).settings("a", image=image)
        found[name] = s.guidance, s.steps, s.sampler, s.schedule, s.strength
    assert found == {
        "sd15": (7.5, 20, "dpmpp-2m", "karras", 0.8),
        "sdxl": (5.0, 20, "dpmpp-2m", "karras", 0.3),
        "sdxl-refiner": (5.0, 20, "dpmpp-2m", "karras", 0.3),
        "lcm": (8.5, 4, "lcm", "normal", 0.8),
        "sd-turbo": (0.0, 4, "euler", "normal", 0.8),
        "sdxl-turbo": (0.0, 4, "euler-a", "normal", 0.3),
        "ssd-1b": (5.0, 20, "dpmpp-2m", "karras", 0.3),
    }
    scores = opened("sdxl-refiner").settings("a", image=image)
    assert (scores.aesthetic_score, scores.negative_aesthetic_score) == (6.0, 2.5)
    split = opened("sdxl", refiner="sdxl-refiner").settings("a")
    assert (split.denoising_end, split.denoising_start) == (0.8, 0.8)


def test_an_image_gives_the_size(tmp_path: Path, opened: Opened) -> None:
    pipe = opened("sd15")
    path = tmp_path / "photo.png"
    Image.fromarray(photo(70, 101)).save(path)
    settings = pipe.settings("a", image=path)
    assert (settings.width, settings.height, settings.image_name) == (96, 64, "photo.png")
    assert settings.image is not None and settings.image.shape == (64, 96, 3)
    assert pipe.settings("a", image=path, width=32).image_name == "photo.png"
    assert pipe.settings("a", image=Image.open(path), width=32, height=40).height == 40
    with pytest.raises(UsageError, match="too small"):
        pipe.settings("a", image=photo(7, 64))


def test_each_picture_is_what_it_is_alone(opened: Opened) -> None:
    pipe = opened("sd15")
    arguments = {"image": photo(32, 32), "steps": 4, "sampler": "euler-a"}
    both = pipe.generate("a", seed=3, count=2, **arguments)
    assert np.array_equal(both.latents[1], pipe.generate("a", seed=4, **arguments).latents[0])
    assert both.metadata[0].extra == {"strength": 0.8, "image": "(pixels)"}
    assert both.timings["image"] > 0


def test_a_stream_counts_the_refiners_steps(opened: Opened) -> None:
    pipe = opened("sdxl", refiner="sdxl-refiner")
    steps = list(pipe.stream("a", seed=0, width=32, height=32, steps=5, sampler="euler"))
    assert [s.index for s in steps] == list(range(5))
    assert {s.total for s in steps} == {5}
    extra = pipe.generate("a", seed=0, **SMALL | {"steps": 5}).metadata[0].extra
    assert extra["refiner"] == "checkpoint" and extra["denoising_end"] == 0.8


def test_a_model_with_a_tiny_vae_of_its_own(tmp_path: Path, backend: str, opened: Opened) -> None:
    """TAESD in the model's own folder, and that folder converted, draw what --vae draws."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint("sd15"), model)
    shutil.rmtree(model / "vae")
    shutil.copytree(checkpoint("taesd"), model / "vae")
    index = json.loads((model / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (model / "model_index.json").write_text(json.dumps(index))
    convert(model, tmp_path / "converted", dtype="float32")
    expected = opened("sd15", backend, vae="taesd").generate("a", seed=0, **SMALL)
    assert expected.metadata[0].extra == {"vae": "checkpoint"}
    for path in (model, tmp_path / "converted"):
        for options in ({}, {"vae": tmp_path / "converted"}):
            result = mlxdiff.load(path, backend=backend, dtype="float32", **options).generate(
                "a", seed=0, **SMALL
            )
            assert np.array_equal(np.asarray(result.images[0]), np.asarray(expected.images[0]))


def test_another_autoencoder(opened: Opened) -> None:
    """The VAE folder of another model, given alone, is that model's."""
    alone = open_vae(checkpoint("sd21v") / "vae")
    assert alone.config == open_vae(checkpoint("sd21v")).config
    assert alone.tensors().keys() == open_vae(checkpoint("sd21v")).tensors().keys()
    with pytest.raises(CheckpointError, match="UNet2DConditionModel, not a VAE"):
        open_vae(checkpoint("sd15") / "unet")


def test_a_vae_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = checkpoint("taesd")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for prefix in ("", "vae/"):
        with serve({prefix + name: data for name, data in files.items()}, monkeypatch) as server:
            server.commit = hashlib.sha1(prefix.encode()).hexdigest()
            part = open_vae(f"org/name@{server.commit}")
            assert part.config == open_vae(folder).config
            assert part.provenance == {"source": "org/name", "revision": server.commit}


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("name", "vae", "schedule"),
    [
        # On trailing, which auto takes here, this random network multiplies a difference of 1e-6
        # by 500 (float32 on two backends shows it): it says nothing of half precision then.
        ("sdxl-refiner", None, "karras"),
        ("lcm", None, "auto"),
        ("ssd-1b", None, "auto"),
        ("playground", None, "auto"),
        # Its own levels in 4 steps are far apart (120, 3, 0.08, 0.002): the one evaluation at 3,
        # five times the guidance, decides all, with 0.03 of float16 in the random network.
        ("cosxl", None, "karras"),
        ("sd15", "taesd", "auto"),
    ],
)
def test_half_precision_is_finite_and_near(name: str, vae: str | None, schedule: str) -> None:
    drawn = [
        mlxdiff.load(
            checkpoint(name),
            backend="mlx",
            dtype=dtype,
            vae=None if vae is None else checkpoint(vae),
        ).generate("a", seed=0, image=photo(32, 32), steps=4, strength=0.8, schedule=schedule)
        for dtype in ("float32", "float16")
    ]
    latents = [result.latents for result in drawn]
    assert np.isfinite(latents[1]).all()
    assert np.abs(latents[0] - latents[1]).max() < 0.05 * latents[0].std()


@pytest.mark.parametrize(("channels", "says"), [(9, "and mask"), (8, "by instruction .*image")])
def test_models_that_need_more_open_and_say_so(tmp_path: Path, channels: int, says: str) -> None:
    path = tmp_path / "model"
    unet = diffusers_folder(path)["unet"]
    config = json.loads((path / "unet/config.json").read_text())
    write_json(path / "unet/config.json", config | {"in_channels": channels})
    unet["conv_in.weight"] = np.ones((32, channels, 3, 3), np.float16)
    save_file(unet, path / "unet/diffusion_pytorch_model.safetensors")
    assert describe(path)["family"] == "sd1"
    convert(path, tmp_path / "converted")
    pipe = mlxdiff.load(tmp_path / "converted", backend="numpy")
    with pytest.raises(UsageError, match=says):
        pipe.generate("a")


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("sd15", {"strength": 0.5}, "strength needs an image"),
        ("sd15", {"image": (32, 32), "strength": 1.5}, "0 to 1"),
        ("sd15", {"image": (32, 32), "strength": 0.0}, "at least 0.05"),
        ("sd15", {"image": (32, 32), "strength": 0.1, "steps": 3}, "at least 0.34"),
        ("sd15", {"denoising_end": 0.5}, "only SDXL"),
        ("sd15", {"eta": 0.5}, "ddim and tcd"),
        ("sd15", {"aesthetic_score": 6.0}, "only SDXL"),
        ("sd15", {"prompt": 3}, "prompt is 3; expected a text"),
        ("sd15", {"image": "none.png"}, "none.png"),
        ("sdxl", {"aesthetic_score": 6.0}, "with refiner"),
        ("sdxl", {"denoising_start": 0.5}, "needs an image"),
        ("sdxl", {"denoising_end": 0.0}, "denoising_end"),
        ("sdxl", {"image": (32, 32), "denoising_start": 0.5, "denoising_end": 0.4}, "less than"),
        ("sdxl", {"image": (32, 32), "denoising_start": 0.0}, "between 0 and 1"),
        ("sdxl-refiner", {}, "\\(image\\)"),
        ("sdxl-refiner", {"image": (32, 32), "prompt_2": "b"}, "no second text encoder"),
        ("sdxl-refiner", {"image": (32, 32), "target_size": (32, 32)}, "target_size"),
        ("lcm", {"image": (32, 32), "strength": 0.05}, "higher strength"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    name: str, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    if isinstance(arguments.get("image"), tuple):
        arguments = arguments | {"image": photo(*arguments["image"])}
    with pytest.raises(UsageError, match=says):
        opened(name).generate(**{"prompt": "a"} | arguments)


def test_parts_that_do_not_go_together(opened: Opened) -> None:
    with pytest.raises(UsageError, match="no SDXL model"):
        opened("sd15").set_refiner(opened("sdxl-refiner"))


def test_notes_on_what_has_no_effect(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    opened("lcm").settings("a", negative_prompt="b")
    assert "takes the guidance scale as an input" in caplog.text
    opened("sdxl").settings("a", image=photo(32, 32), denoising_start=0.5, strength=0.5)
    assert "strength has no effect" in caplog.text
