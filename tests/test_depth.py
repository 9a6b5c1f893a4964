"""Depth: a model that sees a depth map, models that make maps (Marigold), against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import (
    GOLDEN,
    assert_latents_close,
    assert_picture_close,
    cases,
    checkpoint,
    photo,
)
from golden_runs import Opened, assert_drawn_again
from PIL import Image

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import convert
from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.pictures import maps
from mlxdiff.pictures.image import load_levels
from mlxdiff.run.map_model import MapModel

DEPTH = photo(48, 80)[..., 0]
SMALL = {"image": photo(32, 32), "depth_image": DEPTH, "steps": 2, "seed": 0}
MAPS = [
    (name, label, dict(arguments))
    for name in ("marigold-depth", "marigold-normals")
    for label, arguments in json.loads((GOLDEN / name / "cases.json").read_text())[
        "pictures"
    ].items()
]

# ------------------------------------------------------------------------ a model that sees depth


@pytest.mark.parametrize("case", cases("sd2-depth"), ids=lambda case: case["case"])
def test_pictures_equal_diffusers(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend, "sd2-depth")


def test_a_map_of_16_bits_or_of_any_numbers_is_the_same(tmp_path: Path, opened: Opened) -> None:
    pipe = opened("sd2-depth")
    Image.fromarray(DEPTH.astype(np.uint16) * 257).save(tmp_path / "depth.png")
    results = [
        pipe.generate("a", **{**SMALL, "depth_image": depth}).latents
        for depth in (DEPTH, DEPTH * -0.01 + 5.0, tmp_path / "depth.png")
    ]
    assert_latents_close(results[0], results[2])
    assert np.abs(results[0] - results[1]).max() > 0.01  # the same map turned round


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"depth_image": None}, "give depth_image; a Marigold model makes"),
        ({"image": None}, "give image; a Marigold"),
        ({"mask": photo(32, 32)}, "it has no part for mask or outpaint"),
        ({"hires": 2.0}, "draw with it first"),
        ({"depth_image": np.ones((8, 8))}, "the same depth everywhere"),
        ({"depth_image": np.full((8, 8), np.nan)}, "not finite"),
        ({"depth_image": photo(8, 8)}, "has colours"),
        ({"processing_resolution": 64}, "Marigold"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says):
        opened("sd2-depth").generate("a", **{**SMALL, **arguments})


def test_a_model_that_sees_no_depth_names_the_way_out(opened: Opened) -> None:
    with pytest.raises(UsageError, match=r"diffusion-2-depth.*controlnets.*control_image"):
        opened("sd15").generate("a", **SMALL)
    with pytest.raises(UsageError, match="cannot be combined with a ControlNet"):
        opened("sd2-depth", controlnets=["first"])


def test_the_command_line_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(32, 40)).save("photo.png")

    def run(model: str, *arguments: str) -> None:
        given = ["generate", "-m", str(checkpoint(model)), "--backend", "numpy", *arguments]
        done = CliRunner().invoke(main, given)
        assert done.exit_code == 0, done.output

    photograph = "-i", "photo.png"
    run("marigold-depth", *photograph, "-s", "3", "--depth-as", "near", "-o", "depth.png")
    with Image.open("depth.png") as picture:
        assert (picture.size, picture.mode) == ((40, 32), "I;16")
    run("marigold-depth", *photograph, "--from-image", "depth.png", "-o", "again.png")
    assert Path("depth.png").read_bytes() == Path("again.png").read_bytes()
    given = *photograph, "--depth-image", "depth.png"
    run("sd2-depth", "a", *given, "--steps", "2", "-s", "1", "-o", "1.png")
    run("sd2-depth", *given, "--from-image", "1.png", "-o", "2.png")
    assert Path("1.png").read_bytes() == Path("2.png").read_bytes()
    run("marigold-depth", *photograph, "--depth-as", "colors", "-o", "depth.jpg")


# --------------------------------------------------------------------------- models that make maps


def made(opened: Opened, name: str, backend: str = "numpy", **arguments: Any) -> Any:
    return opened(name, backend).generate(**{"image": photo(30, 44), "seed": 0} | arguments)


@pytest.mark.parametrize(("name", "label", "arguments"), MAPS, ids=[f"{m[0]}-{m[1]}" for m in MAPS])
def test_maps_equal_diffusers(
    name: str, label: str, arguments: dict[str, Any], backend: str, opened: Opened
) -> None:
    golden = np.load(GOLDEN / name / "maps.npz")
    result = made(opened, name, backend, **arguments | {"image": photo(*arguments["image"])})
    assert_latents_close(result.latents[0], golden[f"{label}/latents"][0])
    np.testing.assert_allclose(result.maps[0], golden[f"{label}/map"][0], atol=1e-4)
    if f"{label}/colors" not in golden.files:
        return
    model: MapModel = opened(name, backend).model
    painted = np.asarray(model.paint(result.maps[0], "colors"))
    assert_picture_close(painted[None], golden[f"{label}/colors"][None])
    if name == "marigold-depth":
        near = maps.control_picture(result.maps[0], near_is_large=False)
        assert_picture_close(near[None], golden[f"{label}/near"][None])
        grey = np.asarray(result.images[0]).astype(int)
        assert np.abs(grey - golden[f"{label}/grey"]).max() <= 8  # of 65535: 1e-4


def test_the_forms_of_depth(opened: Opened) -> None:
    grey, near = (
        np.asarray(made(opened, "marigold-depth", depth_as=form).images[0]).astype(int)
        for form in ("grey", "near")
    )
    assert np.abs(grey + near - 65535).max() <= 1
    assert made(opened, "marigold-depth", width=20, height=10).maps[0].shape == (10, 20, 1)


def test_an_ensemble_is_the_maps_of_its_seeds(opened: Opened) -> None:
    given = {"steps": 2, "sampler": "ddim", "seed": 4}
    joined = made(opened, "marigold-depth", ensemble=3, **given)
    assert (joined.seeds, len(joined.images)) == ([4], 1)
    assert joined.metadata[0].extra["ensemble"] == 3
    assert 0.0 <= joined.maps[0].min() < 0.1 and 0.9 < joined.maps[0].max() <= 1.0
    two = made(opened, "marigold-depth", ensemble=2, count=2, **given)
    assert two.seeds == [4, 6]


def test_maps_that_differ_by_scale_and_shift_join_to_their_own_form() -> None:
    depth = photo(20, 30)[..., :1].astype(np.float32) / 255
    depth = (depth - depth.min()) / (depth.max() - depth.min())
    for shift in (True, False):
        found = [scale * depth + shift * add for scale, add in ((0.3, 0.5), (0.9, 0.0), (0.5, 0.2))]
        joined = maps.join_depths(found, scale=True, shift=shift)
        np.testing.assert_allclose(joined, depth, atol=1e-5)
    flat = maps.join_depths([depth, np.full_like(depth, 0.5), depth], scale=True, shift=True)
    assert np.isfinite(flat).all()
    noisy = [np.clip(0.8 * depth + 0.1 + error, 0, 1) for error in (-0.02, 0.0, 0.02)]
    assert np.abs(maps.join_depths(noisy, scale=True, shift=True) - depth).max() < 0.01


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("marigold-depth", {"prompt": "a"}, "makes a depth map of a picture; it has no part"),
        ("marigold-depth", {"image": None}, r"give one \(image\)"),
        ("marigold-depth", {"guidance": 3.0}, "it has no part for that"),
        ("marigold-depth", {"strength": 0.5}, "starts from noise"),
        ("marigold-depth", {"aspect": (1, 1)}, "shape of the image"),
        ("marigold-depth", {"noise_size": (8, 8)}, "shape of the picture"),
        ("marigold-depth", {"processing_resolution": 63}, "a multiple of 8"),
        ("marigold-depth", {"image": photo(8, 1), "processing_resolution": 0, "width": 0}, "1 to"),
        ("marigold-depth", {"image": photo(100, 1)}, "less than one row or column"),
        ("marigold-normals", {"depth_as": "grey"}, "which has one form"),
        ("marigold-normals", {"depth_image": DEPTH}, "surface normals of a picture; it has no"),
        ("sd15", {"prompt": "a", "ensemble": 2}, "Marigold"),
    ],
)
def test_what_a_map_has_no_use_for_is_refused(
    name: str, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says):
        made(opened, name, **arguments)


def changed(tmp_path: Path, name: str, **index: Any) -> Path:
    """A model with other settings in its model_index.json."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoint(name), folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    return folder


def test_what_model_index_says_counts(tmp_path: Path) -> None:
    none = {"default_denoising_steps": None, "default_processing_resolution": None}
    pipe = mlxdiff.load(
        changed(tmp_path, "marigold-depth", prediction_type="disparity", **none), backend="numpy"
    )
    given = {"image": photo(16, 24), "seed": 0}
    with pytest.raises(UsageError, match="default_denoising_steps; say steps"):
        pipe.generate(**given)
    with pytest.raises(UsageError, match="default_processing_resolution; say processing_res"):
        pipe.generate(**given, steps=1)
    given |= {"processing_resolution": 0, "steps": 1}
    grey, near = (pipe.generate(**given, depth_as=form).images[0] for form in ("grey", "near"))
    assert np.array_equal(np.asarray(grey), np.asarray(near))  # large is near


def test_an_unknown_prediction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prediction_type is 'albedo'; expected depth or dispar"):
        mlxdiff.load(changed(tmp_path, "marigold-depth", prediction_type="albedo"))


def test_converted_quantized_and_with_low_memory(tmp_path: Path, opened: Opened) -> None:
    given = {"image": photo(30, 44), "seed": 0, "steps": 1}
    expected = opened("marigold-depth").generate(**given)
    convert(checkpoint("marigold-depth"), tmp_path / "float32", dtype="float32")
    low = mlxdiff.load(tmp_path / "float32", backend="numpy", low_memory=True).generate(**given)
    np.testing.assert_allclose(low.maps[0], expected.maps[0], atol=1e-4)
    few = mlxdiff.load(tmp_path / "float32", backend="numpy", quantize=8).generate(**given)
    assert np.abs(few.maps[0] - expected.maps[0]).mean() < 0.05
    with pytest.raises(UsageError, match="one file cannot say that the model makes maps"):
        convert(tmp_path / "float32", tmp_path / "x.safetensors", to="single")


# ------------------------------------------------------------------------------- control pictures


def test_a_map_model_makes_the_control_picture(opened: Opened) -> None:
    pipe, picture = opened("sd15", controlnets=["first"]), photo(40, 40)
    given: dict[str, Any] = {"width": 32, "height": 32, "steps": 2, "seed": 1}
    depth = made(opened, "marigold-depth", image=picture, depth_as="near").images[0]
    ready = pipe.generate("a", control_image=maps_picture(depth), **given)
    pipe.set_map_models([checkpoint("marigold-depth"), checkpoint("marigold-normals")])
    with pytest.raises(UsageError, match="normals has no effect without control_pre"):
        pipe.generate("a", control_image=picture, control_preprocess="depth", **given)
    pipe.set_map_models(checkpoint("marigold-depth"))
    result = pipe.generate("a", control_image=picture, control_preprocess="depth", **given)
    assert_latents_close(result.latents, ready.latents)
    extra = result.metadata[0].extra
    assert (extra["control_preprocess"], extra["map_model"]) == (["depth"], ["marigold-depth"])
    assert result.timings["map"] > 0
    with pytest.raises(UsageError, match="there is no model that makes normals"):
        pipe.generate("a", control_image=picture, control_preprocess="normal", **given)
    with pytest.raises(UsageError, match=r"map_models .*Marigold"):
        pipe.set_map_models(checkpoint("sd15"))
    pipe.set_map_models([])


def maps_picture(depth: Image.Image) -> np.ndarray:
    """A depth picture of 16 bits as diffusers' 8 bits."""
    levels = (np.asarray(depth) / 65535 * 255 + 1e-4).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


def test_levels_of_a_file_are_read_as_they_are(tmp_path: Path) -> None:
    levels = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(levels).save(tmp_path / "map.png")
    assert np.array_equal(load_levels(tmp_path / "map.png"), levels.astype(np.float32))
    assert load_levels(levels[..., None] * 0.5).shape == (3, 4)
