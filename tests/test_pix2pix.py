"""Models that edit a picture by instruction (InstructPix2Pix), against diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import EDITING, cases, checkpoint, photo
from golden_runs import Opened, assert_drawn_again
from PIL import Image

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.errors import UsageError

CASES = [(name, case) for name in EDITING for case in cases(name)]
SMALL = {"image": photo(32, 32), "steps": 2, "seed": 0}


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c['case']}" for n, c in CASES])
def test_pictures_equal_diffusers(
    name: str, case: dict[str, Any], backend: str, opened: Opened
) -> None:
    assert_drawn_again(opened, case, backend, name)


def test_what_stands_in_the_metadata(opened: Opened) -> None:
    result = opened("pix2pix").generate("a", **SMALL)
    assert result.metadata[0].extra == {"image": "(pixels)", "image_guidance": 1.5}
    assert (result.settings.width, result.settings.height) == (32, 32)
    assert result.settings.strength is None


def test_the_command_line_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(41, 50)).save("photo.png")

    def run(*arguments: str) -> None:
        model = ["generate", "-m", str(checkpoint("pix2pix")), "--backend", "numpy"]
        done = CliRunner().invoke(main, [*model, *arguments, "-i", "photo.png"])
        assert done.exit_code == 0, done.output

    run(
        "make it red",
        "-s",
        "1",
        "--steps",
        "2",
        "--image-guidance",
        "1.8",
        "-g",
        "7",
        "-o",
        "1.png",
    )
    run("--from-image", "1.png", "-o", "2.png")
    assert Path("1.png").read_bytes() == Path("2.png").read_bytes()
    with Image.open("1.png") as picture:
        assert picture.size == (48, 40)


def test_a_controlnet_is_refused(opened: Opened) -> None:
    with pytest.raises(UsageError, match=r"edits .* cannot be combined with a ControlNet"):
        opened("pix2pix", controlnets=["first"])


def test_the_interval_and_deep_features_work_as_elsewhere(opened: Opened) -> None:
    """Guidance everywhere is no interval; features that are made anew every step change nothing."""
    pipe, given = opened("pix2pix"), {**SMALL, "steps": 4, "sampler": "euler"}
    expected = pipe.generate("a", **given).latents
    for more in ({"guidance_interval": (0.0, 1.0)}, {"feature_reuse": 1}):
        np.testing.assert_allclose(pipe.generate("a", **given, **more).latents, expected, atol=1e-5)
    part = pipe.generate("a", **given, guidance_interval=(0.0, 0.5), feature_reuse=2).latents
    assert np.isfinite(part).all() and np.abs(part - expected).max() > 0.01


def test_cosxl_edit_sees_scaled_latents(tmp_path: Path, opened: Opened) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("sdxl-pix2pix"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_cosxl_edit": True}))
    given = {**SMALL, "sampler": "euler", "guidance": 1.0}
    scaled = mlxdiff.load(folder, backend="numpy").generate("a", **given).latents
    plain = opened("sdxl-pix2pix").generate("a", **given).latents
    assert np.abs(scaled - plain).max() > 0.1 * plain.std()


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("pix2pix", {"image": None}, r"it needs one \(image\)"),
        ("pix2pix", {"mask": photo(32, 32)}, "no part for mask or outpaint"),
        ("pix2pix", {"outpaint": (8, 8, 8, 8)}, "no part for mask or outpaint"),
        ("pix2pix", {"strength": 0.5}, "image_guidance says"),
        ("pix2pix", {"image_guidance": -1.0}, "at least 0"),
        ("pix2pix", {"image_guidance": "much"}, "expected a number"),
        ("sdxl-pix2pix", {"denoising_start": 0.5}, "image_guidance says"),
        ("sd15", {"image_guidance": 1.5}, "8 channels"),
        ("sd15-inpainting", {"image_guidance": 1.5, "mask": photo(32, 32)}, "8 channels"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    name: str, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says):
        opened(name).generate("a", **{**SMALL, **arguments})


def test_notes_on_what_has_no_effect(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    pipe = opened("pix2pix")
    pipe.settings("a", image=photo(32, 32))
    assert not caplog.text
    pipe.settings("a", image=photo(32, 32), guidance=1.0, image_guidance=2.0)
    assert "image_guidance has no effect: there is no guidance at 1" in caplog.text
    pipe.settings("a", image=photo(32, 32), image_guidance=0.5, negative_prompt="b")
    assert "negative_prompt and guidance has no effect: image guidance 0.5 is below" in caplog.text
