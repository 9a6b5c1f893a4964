"""Inpainting and outpainting, on plain and on inpainting models, against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import INPAINTING, cases, checkpoint, mask, photo
from golden_runs import Opened, assert_drawn_again
from PIL import Image

from mlxdiff.cli import main
from mlxdiff.errors import UsageError
from mlxdiff.pictures.canvas import crop_region, make_canvas

CASES = [(name, case) for name in INPAINTING for case in cases(name)]
SMALL = {"width": 64, "height": 64, "steps": 2, "seed": 0}
DISC = {"image": photo(64, 64), "mask": mask("disc", 64, 64)}


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c['case']}" for n, c in CASES])
def test_pictures_equal_diffusers(
    name: str, case: dict[str, Any], backend: str, opened: Opened
) -> None:
    assert_drawn_again(opened, case, backend, name)


# -------------------------------------------------------------------------------------------- masks


def test_a_mask_of_any_kind_is_the_same_mask(tmp_path: Path, opened: Opened) -> None:
    """Grey, black and white, palette, with alpha, 16 bits, bools, turned by EXIF."""
    grey = Image.fromarray(mask("disc", 64, 64)).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 3
    kinds = {
        "grey": grey,
        "1-bit": grey.convert("1"),
        "palette": grey.convert("P"),
        "alpha": Image.merge("LA", [grey, Image.new("L", grey.size, 0)]),
        "16-bit": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "cmyk": grey.convert("RGB").convert("CMYK"),
        "turned": grey.transpose(Image.Transpose.ROTATE_180),
    }
    sources: dict[str, Any] = {}
    for kind, picture in kinds.items():
        sources[kind] = tmp_path / f"{kind}.{'jpg' if kind == 'cmyk' else 'png'}"
        options = {"exif": exif} if kind == "turned" else {}
        picture.save(sources[kind], **options, **({"quality": 100} if kind == "cmyk" else {}))
    array = np.asarray(grey) > 0
    sources |= {"bools": array, "floats": array.astype(np.float32), "image": grey}
    pipe = opened("sd15")
    for kind, source in sources.items():
        canvas = pipe.settings("a", image=photo(64, 64), mask=source).canvas
        assert canvas is not None
        np.testing.assert_array_equal(canvas.mask, array, err_msg=kind)
        np.testing.assert_array_equal(canvas.cover > 127, array, err_msg=kind)


def test_a_mask_with_its_shape_in_its_alpha(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 11. What drawing programs save: a layer of white strokes; a picture with a hole."""
    shape, pipe = mask("disc", 64, 64)[..., 0], opened("sd15")
    white, black = np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64, 3), np.uint8)

    def canvas(colours: np.ndarray, alpha: np.ndarray) -> Any:
        caplog.clear()
        given = np.dstack([colours, alpha])
        return pipe.settings("a", image=photo(64, 64), mask=given).canvas

    np.testing.assert_array_equal(canvas(white, shape).mask, shape > 127)
    assert "what is opaque is repainted" in caplog.text
    np.testing.assert_array_equal(canvas(mask("disc", 64, 64), 255 - shape).mask, shape > 127)
    assert "transparency is ignored: what is white is repainted" in caplog.text
    with pytest.raises(UsageError, match="black, so nothing would be repainted"):
        canvas(black, shape)


def test_one_half_is_repainted() -> None:
    grey = np.full((16, 16, 3), 127, np.uint8)
    grey[:, 8:] = 128
    canvas = make_canvas(photo(16, 16), grey, 16, 16, 8)
    np.testing.assert_array_equal(canvas.mask, grey[..., 0] == 128)
    np.testing.assert_array_equal(canvas.latent_mask(8)[0, ..., 0], [[0, 1], [0, 1]])
    assert (canvas.masked_image[0, :, 8:] == 0).all()


def test_the_original_is_pasted_back_exactly(backend: str, opened: Opened) -> None:
    pipe = opened("sd15", backend)
    given = {**DISC, "sampler": "euler", **SMALL}
    plain = np.asarray(pipe.generate("a", **given).images[0])
    result = pipe.generate("a", paste_original=True, **given)
    pasted, repainted = np.asarray(result.images[0]), DISC["mask"][..., 0] > 0
    np.testing.assert_array_equal(pasted[~repainted], DISC["image"][~repainted])
    np.testing.assert_array_equal(pasted[repainted], plain[repainted])
    assert (plain[~repainted] != pasted[~repainted]).any()
    assert result.metadata[0].extra["paste_original"] is True


def test_a_grey_mask_is_pasted_softly() -> None:
    """As diffusers' apply_overlay has it; within a level of the mean that the mask weighs."""
    canvas = make_canvas(photo(64, 64), mask("soft", 64, 64), 64, 64, 8)
    drawn = 255 - photo(64, 64)
    pasted = np.asarray(canvas.paste_original(Image.fromarray(drawn))).astype(float)
    share = canvas.cover[..., None] / 255
    assert np.abs(pasted - (share * drawn + (1 - share) * photo(64, 64))).max() < 2.5
    assert 0 < ((share > 0) & (share < 1)).mean() < 1


@pytest.mark.parity
def test_the_overlay_is_that_of_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    for kind in ("disc", "soft"):
        canvas = make_canvas(photo(40, 72), mask(kind, 40, 72), 72, 40, 8)
        drawn = Image.fromarray(255 - photo(40, 72))
        expected = VaeImageProcessor().apply_overlay(
            Image.fromarray(canvas.cover), Image.fromarray(canvas.image), drawn
        )
        np.testing.assert_array_equal(
            np.asarray(canvas.paste_original(drawn)), np.asarray(expected)
        )


@pytest.mark.parity
def test_a_mask_of_any_size_is_that_of_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    for kind, rows, columns in (("soft", 31, 77), ("disc", 200, 90), ("soft", 64, 64)):
        given = mask(kind, rows, columns)
        canvas = make_canvas(photo(50, 50), given, 72, 56, 8)
        expected = processor.preprocess(Image.fromarray(given), height=56, width=72)[0, 0].numpy()
        np.testing.assert_array_equal(canvas.mask, expected == 1)


# -------------------------------------------------------------------------------------- outpainting


def test_a_wider_canvas() -> None:
    image = photo(16, 24)
    canvas = make_canvas(image, None, 48, 40, 8, (4, 16, 20, 8))
    np.testing.assert_array_equal(canvas.image[16:32, 4:28], image)
    assert (canvas.image[:16, 4:28] == image[:1]).all() and (
        canvas.image[16:32, :4] == image[:, :1]
    ).all()
    kept = np.zeros((40, 48), bool)
    kept[16:32, 4:28] = True
    np.testing.assert_array_equal(canvas.cover == 0, kept)
    whole = np.zeros((40, 48), bool)  # latents that lie in the picture altogether
    whole[16:32, 8:24] = True
    np.testing.assert_array_equal(canvas.mask, ~whole)


def test_outpainting_keeps_the_picture(opened: Opened) -> None:
    image = photo(40, 48)
    for name in ("sd15", "sd15-inpainting"):
        result = opened(name).generate(
            "a", image=image, outpaint=(8, 4, 9, 21), paste_original=True, steps=2, seed=0
        )
        drawn = np.asarray(result.images[0])
        assert drawn.shape == (64, 64, 3), "65x65, rounded down"
    result = opened("sd15").generate(
        "a", image=image, outpaint=[8, 4, 8, 20], paste_original=True, steps=2, seed=0
    )
    np.testing.assert_array_equal(np.asarray(result.images[0])[4:44, 8:56], image)
    assert result.metadata[0].extra["outpaint"] == [8, 4, 8, 20]
    assert "mask" not in result.metadata[0].extra


def test_outpainting_with_a_mask(opened: Opened) -> None:
    settings = opened("sd15").settings(
        "a", image=photo(32, 32), mask=mask("half", 32, 32), outpaint=(0, 0, 0, 32)
    )
    canvas = settings.canvas
    assert canvas is not None and (settings.width, settings.height) == (32, 64)
    expected = np.zeros((64, 32), bool)
    expected[32:], expected[:, 16:] = True, True
    np.testing.assert_array_equal(canvas.mask, expected)


# --------------------------------------------------------------------------------- what is promised


def test_defaults(opened: Opened) -> None:
    """Strength 1, and the model's own size, whatever the image's."""
    for name, side in (("sd15", 64), ("sdxl", 64), ("sd15-inpainting", 64)):
        settings = opened(name).settings("a", image=photo(40, 48), mask=mask("disc", 9, 9))
        assert settings.strength == 1.0
        own = opened(name).model.default_size
        assert (settings.height, settings.width) == own
        assert side <= own[0]


def test_each_picture_is_what_it_is_alone(opened: Opened) -> None:
    for name in ("sd15", "sd15-inpainting"):
        pipe, arguments = opened(name), {**DISC, **SMALL, "sampler": "euler-a"}
        both = pipe.generate("a", **arguments | {"seed": 3}, count=2)
        alone = pipe.generate("a", **arguments | {"seed": 4})
        assert np.array_equal(both.latents[1], alone.latents[0])
        assert both.metadata[0].extra["mask"] == "(pixels)"


def test_given_noise_is_the_noise_of_the_seed(opened: Opened) -> None:
    """It takes the place of the second draw; the others stay."""
    from mlxdiff.noise import Generator
    from mlxdiff.run.model import draw_noise

    pipe, arguments = opened("sd15"), {**DISC, **SMALL, "sampler": "euler"}
    generator = Generator(0)
    noise = [draw_noise(generator, (8, 8, 4)) for _ in range(2)][1]
    expected = pipe.generate("a", **arguments)
    given = pipe.generate("a", noise=noise, **arguments)
    assert np.array_equal(given.latents, expected.latents)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("sd15", {"image": None}, "needs an image"),
        ("sd15", {"image": None, "mask": None, "outpaint": (8, 8, 8, 8)}, "needs an image"),
        ("sd15", {"mask": np.zeros((64, 64), np.uint8)}, "the mask is black"),
        ("sd15", {"mask": "none.png"}, "the mask: none.png: no such picture"),
        ("sd15", {"mask": np.eye(64)[:, ::-1] > 0}, "too fine"),
        ("sd15", {"mask": None, "paste_original": True}, "paste_original needs mask"),
        ("sd15", {"outpaint": (8, 8)}, "four whole numbers"),
        ("sd15", {"outpaint": (8, 8, -8, 8)}, "at least 0"),
        ("sd15", {"outpaint": (8, 8.5, 8, 8)}, "whole numbers"),
        ("sd15", {"outpaint": (0, 0, 0, 0)}, "adds nothing"),
        ("sd15", {"width": 60}, "multiple of 8"),
        ("sd15", {"strength": 0.0}, "at least"),
        ("sd15", {"strength": 1.1}, "0 to 1"),
        ("sd15-inpainting", {"mask": None}, "it needs image, and mask"),
        ("sd15-inpainting", {"image": None, "mask": None}, "it needs image, and mask"),
        ("sd15-inpainting", {"denoising_end": 0.5}, "only SDXL"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    name: str, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says):
        opened(name).generate("a", **{**DISC, **SMALL, **arguments})


def test_the_command_line_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture's metadata bring back all but the two files, which are asked for."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(48, 64)).save("photo.png")
    Image.fromarray(mask("disc", 48, 64)).save("mask.png")

    def run(*arguments: str) -> Any:
        model = ["generate", "--backend", "numpy", "-m", str(checkpoint("sd15"))]
        return CliRunner().invoke(main, [*model, *arguments])

    files = "-i", "photo.png", "--mask", "mask.png"
    options = "--outpaint", "8,0,8,16", "--paste-original", "--strength", "0.9", "--steps", "3"
    first = run("a", "-s", "1", *files, *options, "-o", "1.png", "--json")
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)
    assert (record["width"], record["height"], record["outpaint"]) == (80, 64, [8, 0, 8, 16])
    assert (record["image"], record["mask"]) == ("photo.png", "mask.png")
    assert "give it with --mask" in run("--from-image", "1.png", *files[:2]).stderr
    assert "give it with --image" in run("--from-image", "1.png", *files[2:]).stderr
    again = run("--from-image", "1.png", *files, "-o", "2.png")
    assert again.exit_code == 0, again.output
    with Image.open("1.png") as a, Image.open("2.png") as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    wrong = run("a", *files, "--outpaint", "8,8")
    assert wrong.exit_code == 2 and "LEFT,TOP,RIGHT,BOTTOM" in wrong.stderr


def test_notes(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    opened("sd15").settings("a", image=photo(32, 64), mask=mask("disc", 64, 64))
    assert "the mask is 64x64 pixels and the image 64x32" in caplog.text
    caplog.clear()
    opened("sd15").settings("a", image=photo(32, 64), mask=mask("disc", 64, 128))
    assert not caplog.text


# ------------------------------------------------------------------------ only what is repainted


def test_only_masked_is_its_definition(opened: Opened) -> None:
    """Crop, draw at the size of the run, put back: the same by hand; nothing else changes."""
    image, white = photo(96, 128), mask("disc", 96, 128)
    pipe = opened("sd15")
    given = {"sampler": "euler", **SMALL}
    result = pipe.generate("a", image=image, mask=white, only_masked=6, **given)
    got, kept = np.asarray(result.images[0]), white[..., 0] == 0
    assert got.shape == image.shape
    np.testing.assert_array_equal(got[kept], image[kept])
    canvas = result.settings.canvas
    assert canvas is not None and canvas.whole is not None
    left, top, right, bottom = canvas.whole.box
    _, columns = np.nonzero(~kept)
    assert (left, right) == (columns.min() - 6, columns.max() + 7)
    assert right - left == bottom - top  # the shape of the run
    part = Image.fromarray(image).crop(canvas.whole.box)
    shown = Image.fromarray(white).crop(canvas.whole.box)
    large = part.resize((64, 64), Image.Resampling.LANCZOS)
    drawn = pipe.generate(
        "a", image=large, mask=shown.resize((64, 64), Image.Resampling.LANCZOS), **given
    ).images[0]
    back = np.asarray(drawn.resize(part.size, Image.Resampling.LANCZOS))
    inside = white[top:bottom, left:right, 0] == 255
    np.testing.assert_array_equal(got[top:bottom, left:right][inside], back[inside])


@pytest.mark.parametrize(
    ("box", "size", "padding", "expected"),
    [
        ((10, 10, 20, 20), (64, 64), 0, (10, 10, 20, 20)),
        ((10, 10, 20, 20), (64, 64), 5, (5, 5, 25, 25)),
        ((10, 10, 40, 20), (64, 64), 0, (10, 0, 40, 30)),
        ((10, 40, 40, 48), (64, 64), 0, (10, 18, 40, 48)),
        ((0, 10, 60, 48), (64, 16), 99, (0, 0, 60, 48)),
    ],
)
def test_the_region_has_the_shape_of_the_run_where_there_is_room(
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    padding: int,
    expected: tuple[int, int, int, int],
) -> None:
    left, top, right, bottom = box
    grey = np.zeros((48, 60), np.uint8)
    grey[top:bottom, left:right] = 1
    assert crop_region(grey, *size, padding) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image": photo(64, 64), "only_masked": 4}, r"needs a mask \(mask\)"),
        ({**DISC, "only_masked": -1}, "0 or more"),
        ({**DISC, "only_masked": 4, "outpaint": (8, 0, 0, 0)}, "borders"),
        ({**DISC, "mask": np.zeros((64, 64), np.uint8), "only_masked": 4}, "black"),
    ],
)
def test_what_only_masked_cannot_do_is_refused(
    arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says):
        opened("sd15").generate("a", **SMALL | arguments)
