"""Pictures in and out; what becomes of a file when writing it goes wrong."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.pictures import image as image_module
from mlxdiff.pictures.image import (
    check_writable,
    load_image,
    load_with_alpha,
    resize,
    resize_values,
    save_png,
    to_model,
    to_pil,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


# In


def test_a_picture_comes_as_path_image_or_array(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path)
    for source in (path, str(path), Image.fromarray(PICTURE), PICTURE, PICTURE.astype(float) / 255):
        loaded = load_image(source)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, PICTURE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F", "HSV"])
def test_every_mode_is_converted_as_pillow_does(mode: str) -> None:
    picture = Image.fromarray(PICTURE).convert("L" if mode == "LA" else "RGB").convert(mode)
    loaded = load_image(picture)
    assert loaded.shape == PICTURE.shape
    np.testing.assert_array_equal(loaded, np.asarray(picture.convert("RGB")))


def test_alpha_is_dropped_not_blended() -> None:
    rgba = np.dstack([PICTURE, np.zeros((5, 7), np.uint8)])
    np.testing.assert_array_equal(load_image(Image.fromarray(rgba)), PICTURE)
    np.testing.assert_array_equal(load_image(rgba), PICTURE)


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for suffix in (".png", ".tif"):
        path = tmp_path / f"grey{suffix}"
        Image.fromarray(values).save(path)
        np.testing.assert_array_equal(load_image(path)[..., 1], [[0, 0, 1, 128, 255]])
    assert load_image(path).shape == (1, 5, 3)


@pytest.mark.parametrize(
    ("values", "suffix", "expected"),
    [
        (np.array([[0, 256, 65535]], np.int32), ".tif", [0, 1, 255]),
        (np.array([[0, 1, 255]], np.int32), ".tif", [0, 1, 255]),
        (np.array([[0, 0.5, 1]], np.float32), ".tif", [0, 128, 255]),
        (np.array([[0, 128, 255]], np.float32), ".tif", [0, 128, 255]),
        (np.array([[0, 200, 256]], np.uint16), ".pgm", [0, 0, 1]),  # dark, and 16 bits all the same
        (np.array([[0, -1]], np.int32), ".tif", "from -1 to 0; expected 0 to 255 or 65535"),
        (np.array([[0, 1 << 20]], np.int32), ".tif", "save it as 8-bit or 16-bit grey"),
        (np.array([[0, 300]], np.float32), ".tif", "from 0 to 300; expected 0 to 1 or 255"),
        (np.array([[0, np.nan]], np.float32), ".tif", "not finite"),
        (np.array([[0, np.inf]], np.float32), ".tif", "not finite"),
    ],
)
def test_wide_grey_is_read_by_its_range(
    values: np.ndarray, suffix: str, expected: Any, tmp_path: Path
) -> None:
    """Case 10 of the public reports."""
    path = tmp_path / f"wide{suffix}"
    if suffix == ".pgm":
        path.write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            load_image(path)
    else:
        np.testing.assert_array_equal(load_image(path)[0, :, 1], expected)


def swapped_profile() -> bytes:
    """sRGB's colour profile with red and green exchanged, and another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 1], data[green : green + 1] = b"g", b"r"
    return bytes(data).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_converted_by_their_profile(mode: str, tmp_path: Path) -> None:
    picture, path = Image.fromarray(PICTURE // 32 * 32).convert(mode), tmp_path / "a.png"
    plain = np.asarray(picture.convert("RGB")).astype(int)
    picture.save(path, icc_profile=swapped_profile())
    assert np.abs(load_image(path)[..., [1, 0, 2]] - plain).max() <= 1
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for other in (srgb, b"no profile", swapped_profile()[:200], None):
        picture.save(path, icc_profile=other)
        np.testing.assert_array_equal(load_image(path), plain)


def test_grey_keeps_its_levels_whatever_its_profile(tmp_path: Path) -> None:
    grey, path = Image.fromarray(PICTURE[..., 0]), tmp_path / "a.png"
    grey.save(path, icc_profile=swapped_profile())
    np.testing.assert_array_equal(load_image(path)[..., 0], PICTURE[..., 0])


def test_a_heic_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    if importlib.util.find_spec("pillow_heif") is not None:
        pytest.skip("pillow-heif is installed")
    path = tmp_path / "phone.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    with pytest.raises(UsageError, match="it is HEIC: run `pip install pillow-heif`"):
        load_image(path)


def test_alpha_is_read_in_every_form(tmp_path: Path) -> None:
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    rgba = np.dstack([PICTURE, alpha])
    grey = np.dstack([PICTURE[..., 0], alpha])
    for source in (rgba, rgba / 255.0, Image.fromarray(rgba), Image.fromarray(grey)):
        np.testing.assert_array_equal(load_with_alpha(source)[1], alpha)
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgba).save(path, exif=exif)
    np.testing.assert_array_equal(load_with_alpha(path)[1], np.rot90(alpha, -1))
    Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P").save(path, transparency=1)
    np.testing.assert_array_equal(load_with_alpha(path)[1], [[255, 0]])
    rgba[..., 3] = 255
    for opaque in (PICTURE, rgba, Image.fromarray(PICTURE)):
        assert load_with_alpha(opaque)[1] is None


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(PICTURE).save(path, exif=exif)
    np.testing.assert_array_equal(load_image(path), np.rot90(PICTURE, -1))


FILES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> mode, how it is saved
    **{f"{mode}.png": (mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "one-transparent.png": ("P", {"transparency": 3}),
    "a-colour-transparent.png": ("RGB", {"transparency": (1, 2, 3)}),
    **{f"{mode}.jpg": (mode, {}) for mode in ("L", "RGB", "CMYK")},
    **{f"{mode}.tif": (mode, {}) for mode in ("CMYK", "LAB", "F")},
    **{f"moving.{kind}": ("RGB", {"save_all": True}) for kind in ("gif", "webp", "png")},
    **{f"a.{kind}": ("RGB", {}) for kind in ("bmp", "ppm", "tga")},
    **{f"turned-{o}.{kind}": ("RGB", {}) for o in range(1, 9) for kind in ("jpg", "png", "webp")},
}


@pytest.mark.parity
@pytest.mark.parametrize("name", FILES)
def test_any_picture_is_read_as_diffusers_reads_it(name: str, tmp_path: Path) -> None:
    from diffusers.utils import load_image as reference

    mode, options = FILES[name]
    picture = Image.fromarray(PICTURE).convert("L" if mode in ("LA", "F") else "RGB").convert(mode)
    if "save_all" in options:
        options = options | {"append_images": [Image.fromarray(255 - PICTURE)]}
    if name.startswith("turned"):
        exif = Image.Exif()
        exif[0x0112] = int(name[7])
        options = {"exif": exif}
    picture.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as opened:  # diffusers would leave the file open
        expected = np.asarray(reference(opened))
    np.testing.assert_array_equal(load_image(tmp_path / name), expected)


def test_values_are_resized_as_pictures_are() -> None:
    # Quiet ones: 8 bits clip what overshoots between the two directions, values do not. What 8 bits
    # round there (half a level, up to 1.3 times by the filter) and at the end is the difference.
    picture = (PICTURE // 4 + 96).astype(np.uint8)
    found = resize_values(to_model(picture)[0], 20, 11)
    assert found.dtype == np.float32 and found.shape == (11, 20, 3)
    assert np.abs((found + 1) * 127.5 - resize(picture, 20, 11)).max() < 1.2
    assert np.abs(resize_values(to_model(PICTURE)[0], 20, 11)).max() == 1.0


def test_grey_arrays() -> None:
    grey = PICTURE[..., 0]
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(load_image(array), np.dstack([grey] * 3))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 5), np.uint8), r"not \(2, 2, 5\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"not \(1, 2, 2, 3\)"),
        (np.zeros((0, 2, 3), np.uint8), r"not \(0, 2, 3\)"),
        (np.zeros((2, 2, 3), np.int32), "not int32"),
        (np.full((2, 2, 3), -1.0), r"\[0, 1\]"),
        (np.full((2, 2, 3), np.nan), r"\[0, 1\]"),
        (None, r"not \(\)"),
    ],
)
def test_an_array_that_is_no_picture(array: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_image(array)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    text, cut, whole = tmp_path / "a.txt", tmp_path / "cut.png", tmp_path / "whole.png"
    text.write_text("hello")
    Image.fromarray(PICTURE).resize((300, 300)).save(whole)
    cut.write_bytes(whole.read_bytes()[:2000])
    for path, message in (
        (text, "is not a picture in a format that Pillow reads"),
        (cut, "cannot be decoded"),
        (tmp_path, "is a folder; give a picture file"),
        (tmp_path / "none.png", "no such picture file"),
    ):
        with pytest.raises(UsageError) as error:
            load_image(path)
        assert str(error.value).startswith(f"{path}: {message}")
        assert "\n" not in str(error.value)


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for suffix in (".png", ".jpg", ".gif", ".webp", ".tif", ".bmp"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(PICTURE).save(path)
        data = path.read_bytes()
        for _ in range(25):
            broken = bytearray(data[: rng.integers(1, len(data) + 1)])
            for at in rng.integers(0, len(broken), 3):
                broken[at] = rng.integers(256)
            path.write_bytes(broken)
            try:
                load_image(path)
            except UsageError as error:
                assert "\n" not in str(error)


# Numbers


def test_to_model_and_back_is_exact() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    model = to_model(ramp)
    assert model.shape == (1, 16, 16, 3) and model.dtype == np.float32
    assert model.min() == -1 and model.max() == 1
    np.testing.assert_array_equal(np.asarray(to_pil(model[0])), ramp)


def test_to_pil_rounds_half_to_even_and_clips() -> None:
    # Values whose level is exactly k + 1/2 do not exist in float32, except a few; 0 -> 127.5 does.
    values = np.array([-9, -1, 0, 1 / 255 * 0.99, 1, 9, np.inf, -np.inf], np.float32)
    levels = np.asarray(to_pil(np.tile(values[None, :, None], (1, 1, 3))))[0, :, 0]
    assert levels.tolist() == [0, 0, 128, 128, 255, 255, 255, 0]


def test_no_picture_rather_than_a_black_one() -> None:
    with pytest.raises(MlxdiffError, match="NaN"):
        to_pil(np.full((2, 2, 3), np.nan))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        to_pil(np.zeros((2, 2)))


@pytest.mark.parity
def test_parity_with_diffusers() -> None:
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    rng = np.random.default_rng(2)
    floats = rng.normal(0, 0.8, (64, 64, 3)).astype(np.float32)
    theirs = processor.postprocess(torch.from_numpy(floats.transpose(2, 0, 1)[None]), "pil")[0]
    np.testing.assert_array_equal(np.asarray(to_pil(floats)), np.asarray(theirs))
    picture = rng.integers(0, 256, (70, 50, 3), np.uint8)
    theirs = processor.preprocess(Image.fromarray(picture), height=48, width=40)
    ours = to_model(resize(picture, width=40, height=48))
    np.testing.assert_array_equal(ours, theirs.numpy().transpose(0, 2, 3, 1))


def test_resize() -> None:
    assert resize(PICTURE, width=12, height=9).shape == (9, 12, 3)
    assert resize(PICTURE, width=7, height=5) is PICTURE
    flat = np.full((8, 8, 3), 77, np.uint8)
    assert (resize(flat, width=3, height=5) == 77).all()


# Out


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_png_holds_picture_and_text(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    text = {"parameters": "café\nSteps: 1", "mlxdiff": "{}", "kanji": "漢字 😀"}
    save_png(PICTURE, path, text)
    with Image.open(path) as saved:
        assert saved.format == "PNG"
        assert isinstance(saved, PngImagePlugin.PngImageFile)
        assert saved.text == text
        np.testing.assert_array_equal(np.asarray(saved), PICTURE)
    assert listing(tmp_path) == ["a.png"]
    umask = os.umask(0)
    os.umask(umask)
    assert sys.platform == "win32" or stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"a.png: already exists; .* overwrite=True"):
        save_png(PICTURE, path)
    assert path.read_text() == "mine"
    save_png(PICTURE, path, overwrite=True)
    np.testing.assert_array_equal(load_image(path), PICTURE)
    assert listing(tmp_path) == ["a.png"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    save = Image.Image.save

    def slow_save(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        path.write_text("theirs")

    monkeypatch.setattr(Image.Image, "save", slow_save)
    with pytest.raises(UsageError, match="already exists"):
        save_png(PICTURE, path)
    assert path.read_text() == "theirs"
    assert listing(tmp_path) == ["a.png"]


def _no_links(*args: Any, **kwargs: Any) -> None:
    raise OSError(95, "Operation not supported")


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    save_png(PICTURE, tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), PICTURE)
    monkeypatch.setattr(os, "replace", _no_links)
    with pytest.raises(UsageError, match=r"cannot be written \(Operation not supported\)"):
        save_png(PICTURE, tmp_path / "b.png")
    assert listing(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, ValueError])
@pytest.mark.parametrize("overwrite", [True, False])
def test_no_half_written_file_remains(
    error: type[BaseException],
    overwrite: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.png"
    if overwrite:
        path.write_text("old")

    def interrupted(self: Any, file: Any, **kwargs: Any) -> None:
        file.write(b"half a pic")
        raise error

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(error):
        save_png(PICTURE, path, overwrite=overwrite)
    assert listing(tmp_path) == (["a.png"] if overwrite else [])
    assert not overwrite or path.read_text() == "old"


def test_a_full_disk_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
        save_png(PICTURE, tmp_path / "a.png")
    assert listing(tmp_path) == []


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "no" / "a.png", f"the folder {tmp_path / 'no'} does not exist"),
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "a.jpg", "pictures are written as PNG"),
        (tmp_path / "a.WebP", "pictures are written as PNG"),
        (tmp_path / ("x" * 300 + ".png"), "cannot be written"),
    ):
        with pytest.raises(UsageError, match=message):
            save_png(PICTURE, path)
    check_writable(tmp_path / "a.v1.5")
    assert listing(tmp_path) == []


def test_importing_does_not_load_pillow() -> None:
    source = Path(image_module.__file__).read_text("utf-8")
    assert "\nimport PIL" not in source and "\nfrom PIL" not in source
