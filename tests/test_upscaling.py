"""Upscalers: alone, of finished pictures, and in a hires pass; what a picture says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import checkpoint, photo
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from upscaler_files import FORMS, write_upscaler

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert.upscaler import open_upscaler
from mlxdiff.errors import CheckpointError, MlxdiffError, UsageError
from mlxdiff.networks.config import CompactConfig, RRDBNetConfig
from mlxdiff.pictures.grid import cell_of, parse_cell
from mlxdiff.pictures.image import resize_values
from mlxdiff.pictures.kept import kept_text
from mlxdiff.run import inputs
from mlxdiff.run.kind import Network
from mlxdiff.run.memory import Device
from mlxdiff.run.upscaling import EXACT, OVERLAP, choose_tiles
from mlxdiff.serve.request import Limits, order_of

X4, X2 = "compact-x4.pth", "realesrgan-x2.safetensors"
RUN: dict[str, Any] = {"width": 32, "height": 32, "steps": 2, "guidance": 3.0, "seed": 5}
SD15 = checkpoint("sd15")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("upscalers")
    return {name: write_upscaler(name, folder) for name in FORMS}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


# ------------------------------------------------------------------------------------------- alone


def test_transparency_grey_and_size(files: dict[str, Path], backend: str) -> None:
    upscaler = mlxdiff.load_upscaler(files[X4], backend=backend, dtype="float32")
    color = photo(11, 14)
    plain = upscaler.picture(color)
    assert plain.mode == "RGB" and plain.size == (56, 44)
    alpha = photo(11, 14)[..., 1]
    both = upscaler.picture(Image.fromarray(np.dstack([color, alpha]), "RGBA"))
    assert both.mode == "RGBA"
    np.testing.assert_array_equal(pixels(both)[..., :3], pixels(plain))
    alone = pixels(upscaler.picture(np.repeat(alpha[..., None], 3, axis=2)))
    off = pixels(both)[..., 3].astype(int) - alone.mean(axis=2).round().astype(int)
    assert abs(off).max() <= 1  # the mean of rounded values
    opaque = upscaler.picture(Image.fromarray(np.dstack([color, np.full((11, 14), 7, np.uint8)])))
    assert set(pixels(opaque)[..., 3].flat) == {7}
    grey = upscaler.picture(Image.fromarray(alpha))
    assert grey.mode == "L" and grey.size == (56, 44)
    assert upscaler.picture(color, scale=2.5).size == (35, 28)


def test_low_memory_makes_the_same_picture(files: dict[str, Path]) -> None:
    """In tiles, with weights as they are stored; and whichever tiles are asked for."""
    expected = pixels(mlxdiff.load_upscaler(files[X4], backend="numpy").picture(photo(40, 30)))
    for more in ({"low_memory": True}, {"tile": 16}, {"tile": 0}, {"tile": 7, "tile_overlap": 9}):
        upscaler = mlxdiff.load_upscaler(files[X4], backend="numpy", **more)
        off = pixels(upscaler.picture(photo(40, 30))).astype(int) - expected
        assert abs(off).max() <= 1  # a sum in another order at the edge of a level


def test_tiles_are_exact_where_they_can_be(caplog: pytest.LogCaptureFixture) -> None:
    device = Device("numpy", False, "float32")
    small = choose_tiles(CompactConfig(), device, 64, 64)
    assert small.side is None
    large = choose_tiles(CompactConfig(), device, 3000, 3000)
    assert large.side is not None and large.overlap == CompactConfig().reach == 34 <= EXACT
    deep = choose_tiles(RRDBNetConfig(), device, 3000, 3000, low_memory=True)
    assert deep.overlap == OVERLAP < RRDBNetConfig().reach == 349
    assert deep.side is not None and large.side > deep.side
    assert choose_tiles(RRDBNetConfig(), device, 3000, 3000, side=0).side is None


def test_an_overlap_that_is_too_small_is_told(
    files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    upscaler = mlxdiff.load_upscaler(files[X4], backend="numpy", tile=8, tile_overlap=1)
    upscaler.picture(photo(20, 20))
    assert "overlap by 1 pixels; this network sees up to 5" in caplog.text


def test_the_command_keeps_what_a_picture_says(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5")
    info.add_text("Comment", "mine")
    Image.fromarray(photo(10, 12)).save("cat.png", pnginfo=info, icc_profile=b"a profile")
    Image.fromarray(photo(10, 12)).save("plain.jpg")

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["upscale", *arguments, "--backend", "numpy"])

    done = run("cat.png", "plain.jpg", "-m", str(files[X4]), "--json")
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["path"], r["width"], r["scale"]) for r in records] == [
        ("cat-x4.png", 48, 4),
        ("plain-x4.png", 48, 4),
    ]
    with Image.open("cat-x4.png") as large:
        assert large.text["parameters"].endswith(
            f"Seed: 5, Postprocess upscale by: 4, Postprocess upscaler: {X4}"
        )
        assert large.text["Comment"] == "mine" and large.info["icc_profile"] == b"a profile"
    assert kept_text("plain.jpg", "x", 4) == ({}, None)
    bare = run("cat.png", "-m", str(files[X4]), "-o", "bare.png", "--no-metadata")
    assert bare.exit_code == 0
    with Image.open("bare.png") as large:
        assert not large.text
    for arguments, says in (
        (("cat.png", "-m", str(files[X4])), "already exists"),
        (("cat.png", "plain.jpg", "-m", str(files[X4]), "-o", "a.png"), "put {name} into it"),
        (("cat.png", "-m", "none.pth"), "no such file"),
        (("none.png", "-m", str(files[X4])), "no such picture"),
        (("cat.png", "-m", str(files[X4]), "--scale", "0"), "above 0"),
        (("cat.png", "-m", str(files[X4]), "--cell", "3,1/2x2"), "ROW,COLUMN"),
        (
            ("cat.png", "-m", str(files[X4]), "-o", "c.png", "--cell", "1,1/3x2"),
            "cannot be divided",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and says in result.output.replace("\n", " "), result.output


def test_one_picture_of_a_grid(files: dict[str, Path], tmp_path: Path) -> None:
    sheet = photo(20, 36)
    Image.fromarray(sheet).save(tmp_path / "grid.png")
    cell = cell_of(tmp_path / "grid.png", parse_cell("2,3/2x3"))
    np.testing.assert_array_equal(pixels(cell), sheet[10:, 24:])
    target = tmp_path / "one.png"
    command = ["upscale", str(tmp_path / "grid.png"), "-m", str(files[X2]), "-o", str(target)]
    done = CliRunner().invoke(main, [*command, "--cell", "2,3/2x3", "--backend", "numpy"])
    assert done.exit_code == 0, done.output
    expected = mlxdiff.load_upscaler(files[X2], backend="numpy").picture(sheet[10:, 24:])
    with Image.open(target) as drawn:
        np.testing.assert_array_equal(pixels(drawn), pixels(expected))


# -------------------------------------------------------------------------------- finished pictures


def test_a_finished_picture_is_enlarged_as_its_file_would_be(
    files: dict[str, Path], backend: str
) -> None:
    base = mlxdiff.load(SD15, backend=backend).generate("a", **RUN)
    pipe = mlxdiff.load(SD15, backend=backend, upscaler=files[X2])
    result = pipe.generate("a", **RUN)
    upscaler = mlxdiff.load_upscaler(files[X2], backend=backend)
    np.testing.assert_array_equal(
        pixels(result.images[0]), pixels(upscaler.picture(base.images[0]))
    )
    np.testing.assert_array_equal(result.latents, base.latents)
    assert result.metadata[0].extra["upscaler"] == X2 and result.timings["upscaler"] > 0
    pipe.save_memory()
    again = pipe.generate("a", **RUN)
    np.testing.assert_array_equal(pixels(again.images[0]), pixels(result.images[0]))
    assert pipe.model.cache.loaded == {Network("upscaler", 0)}
    estimate = pipe.memory(result.settings)
    assert estimate.stages["upscaler"] > 0 and list(estimate.stages)[-1] == "upscaler"
    pipe.set_upscaler(None)
    assert pipe.generate("a", **RUN).images[0].size == (32, 32)


def test_a_model_that_draws_pixels_is_enlarged(files: dict[str, Path]) -> None:
    pipe = mlxdiff.load(checkpoint("ddpm"), backend="numpy", upscaler=files[X4])
    assert pipe.generate(steps=2, seed=0).images[0].size == (64, 64)
    grey = mlxdiff.load(checkpoint("ddpm-labels"), backend="numpy", upscaler=files[X4])
    assert grey.generate(steps=2, seed=0, label=1).images[0].mode == "L"


def test_the_cascade_of_two_models_is_two_runs() -> None:
    """Base, then the x4 upscaler, with the same prompt and seed: what two commands would draw."""
    backend = "numpy"
    first = mlxdiff.load(SD15, backend=backend).generate("a", negative_prompt="b", **RUN)
    x4 = checkpoint("x4-upscaler")
    second = mlxdiff.load(x4, backend=backend).generate(
        "a", negative_prompt="b", image=first.images[0], steps=2, seed=5, guidance=4, noise_level=9
    )
    pipe = mlxdiff.load(SD15, backend=backend, upscaler=x4)
    how = {"upscaler_steps": 2, "upscaler_guidance": 4.0, "upscaler_noise_level": 9}
    result = pipe.generate("a", negative_prompt="b", **how, **RUN)
    np.testing.assert_array_equal(pixels(result.images[0]), pixels(second.images[0]))
    assert result.images[0].size == (128, 128)
    said = result.metadata[0].extra
    assert {key: said[key] for key in how} == how and said["upscaler"]
    pipe.save_memory()
    again = pipe.generate("a", negative_prompt="b", **how, **RUN)
    np.testing.assert_array_equal(pixels(again.images[0]), pixels(result.images[0]))
    with pytest.raises(UsageError, match="0 to 350"):
        pipe.settings("a", **RUN, upscaler_noise_level=351)


def test_the_command_line_and_back(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command from prompt to the large picture; drawn again from it, and from an enlarged
    small one."""
    monkeypatch.chdir(tmp_path)
    write_upscaler(X2, tmp_path)

    def run(*arguments: str) -> None:
        done = CliRunner().invoke(main, [*arguments, "--backend", "numpy"])
        assert done.exit_code == 0, done.output

    prompt = ["generate", "a red circle", "-s", "7", "--steps", "2", "--sampler", "euler"]
    run(*prompt, "--upscaler", X2, "-o", "whole.png")
    run(*prompt, "-o", "small.png")
    run("upscale", "small.png", "-m", X2, "-o", "parts.png")
    run("generate", "--from-image", "whole.png", "-o", "again.png")
    run("generate", "--from-image", "parts.png", "-o", "third.png")
    drawn = []
    for name in ("whole", "parts", "again", "third"):
        with Image.open(f"{name}.png") as picture:
            drawn.append(pixels(picture))
            assert picture.size == (128, 128)
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


# ------------------------------------------------------------------------------------- hires passes


@pytest.mark.parametrize("name", [X4, X2])
def test_a_network_enlarges_for_a_hires_pass(
    name: str, files: dict[str, Path], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To at least the size that is wanted, in at most three passes; then Lanczos to that size."""
    pipe = mlxdiff.load(SD15, backend=backend)
    model, side = pipe.model, 96 if name == X2 else 64
    run = RUN | {"hires": side / 32, "hires_strength": 0.5, "sampler": "ddim"}
    result = pipe.generate("a", hires_upscaler=files[name], **run)
    assert result.images[0].size == (side, side)
    assert result.metadata[0].extra["hires_upscaler"] == name
    base = pipe.generate("a", **RUN, sampler="ddim")
    values = (np.clip(model.decode_pixels(base.latents[0]), -1, 1) + 1) / 2
    upscaler = mlxdiff.load_upscaler(files[name], backend=backend)
    while values.shape[0] < side:
        values = upscaler.values(values.astype(np.float32))
    large = resize_values(values * 2 - 1, side, side)
    # The same second pass over a picture that is enlarged by hand.
    monkeypatch.setattr(inputs, "resize_values", lambda *_: large)
    by_hand = pipe.generate("a", hires_upscaler="lanczos", **run)
    np.testing.assert_array_equal(pixels(by_hand.images[0]), pixels(result.images[0]))


def test_a_hires_picture_replays_and_requests_name_no_file(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_upscaler(X4, tmp_path)
    hires = ["--hires", "2", "--hires-upscaler", X4, "-o", "1.png", "--backend", "numpy"]
    first = CliRunner().invoke(
        main, ["generate", "a red circle", "--steps", "2", "-s", "1", *hires]
    )
    assert first.exit_code == 0, first.output
    again = ["generate", "--from-image", "1.png", "-o", "2.png", "--backend", "numpy"]
    assert CliRunner().invoke(main, again).exit_code == 0
    with Image.open("1.png") as a, Image.open("2.png") as b:
        np.testing.assert_array_equal(pixels(a), pixels(b))

    class Shelf:
        default = "m"

        def find(self, kind: str, name: str) -> str:
            return name

    asked = {"prompt": "a", "hires": 2, "hires_upscaler": str(files[X4])}
    with pytest.raises(UsageError, match="expected one of lanczos"):
        order_of(asked, Shelf(), Limits())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"upscaler_steps": 3}, r"there is no upscaler; give one \(upscaler\)"),
        ({"hires": 2, "hires_upscaler": "esrgan"}, "expected one of lanczos"),
        ({"hires": 2, "hires_upscaler": "none.pth"}, "no such file"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments: dict[str, Any], says: str) -> None:
    pipe = mlxdiff.load(SD15, backend="numpy")
    with pytest.raises(MlxdiffError, match=says):
        pipe.generate("a", **RUN | arguments)


def test_what_does_not_enlarge_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    pipe = mlxdiff.load(SD15, backend="numpy")
    with pytest.raises(UsageError, match="only models that enlarge"):
        pipe.set_upscaler(SD15)
    with pytest.raises(UsageError, match="does not enlarge"):
        pipe.generate("a", hires=2, hires_upscaler=files["realesrgan-x1.safetensors"], **RUN)
    pipe.set_upscaler(files[X4])
    with pytest.raises(UsageError, match="the upscaler is a network"):
        pipe.settings("a", upscaler_steps=3, **RUN)
    (tmp_path / "damaged.pth").write_bytes(files[X4].read_bytes()[:2000])
    with pytest.raises(CheckpointError):
        open_upscaler(tmp_path / "damaged.pth")
