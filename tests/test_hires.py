"""Hires runs: a picture drawn, enlarged and drawn over, against diffusers' pipelines in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import cases, checkpoint, mask, photo
from golden_runs import Opened, assert_drawn_again
from PIL import Image

from mlxdiff.cli import main
from mlxdiff.errors import UsageError
from mlxdiff.pictures.hires import enlarge_latents

CASES = cases("hires")
SMALL = {"width": 32, "height": 32, "steps": 4, "seed": 0, "hires": 2}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_pictures_equal_diffusers(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_latents_are_enlarged_as_torch_does(mode: str) -> None:
    import torch

    latents = np.random.default_rng(0).standard_normal((1, 9, 7, 4)).astype(np.float32)
    for height, width in ((18, 14), (13, 7), (10, 25)):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(latents).permute(0, 3, 1, 2), (height, width), mode=mode
        )
        found = enlarge_latents(latents, height, width, f"latent-{mode}")
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_sizes_and_steps(opened: Opened) -> None:
    pipe = opened("bk-sdm-tiny")
    steps = list(pipe.stream("a", **SMALL | {"hires": 1.6, "sampler": "euler"}))
    assert [s.index for s in steps] == list(range(4 + 2))
    assert {s.total for s in steps} == {6}
    assert [s.latents.shape[:2] for s in steps] == [(4, 4)] * 4 + [(6, 6)] * 2
    assert steps[-1].preview().size == (48, 48)


def test_what_is_said_of_it(opened: Opened) -> None:
    result = opened("sdxl").generate("a", **SMALL, hires_strength=0.6)
    assert result.images[0].size == (64, 64)
    metadata = result.metadata[0]
    assert (metadata.width, metadata.height) == (32, 32)
    found = {k: v for k, v in metadata.extra.items() if k.startswith("hires")}
    assert found == {
        "hires": 2.0,
        "hires_upscaler": "lanczos",
        "hires_strength": 0.6,
        "hires_size": [64, 64],
    }
    text = "Denoising strength: 0.6, Hires upscale: 2, Hires upscaler: Lanczos"
    assert text in metadata.to_parameters()
    enlarged = result.settings.enlarged
    assert enlarged is not None and enlarged.original_size == enlarged.target_size == (64, 64)
    assert result.timings["hires"] > 0


def test_each_picture_is_what_it_is_alone(opened: Opened) -> None:
    pipe, given = opened("bk-sdm-tiny"), {**SMALL, "sampler": "euler-a"}
    both = pipe.generate("a", **given | {"seed": 3}, count=2)
    alone = pipe.generate("a", **given | {"seed": 4})
    assert np.array_equal(both.latents[1], alone.latents[0])


def test_the_command_line_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        model = ["generate", "--backend", "numpy", "-m", str(checkpoint("bk-sdm-tiny"))]
        return CliRunner().invoke(main, [*model, *arguments])

    small = "-W", "32", "-H", "40", "--steps", "3", "-s", "1"
    hires = "--hires", "1.5", "--hires-upscaler", "latent-nearest", "--hires-strength", "0.7"
    first = run("a", *small, *hires, "-o", "1.png", "--json")
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)
    assert (record["width"], record["height"], record["hires"]) == (48, 64, 1.5)
    again = run("--from-image", "1.png", "-o", "2.png")
    assert again.exit_code == 0, again.output
    with Image.open("1.png") as a, Image.open("2.png") as b:
        assert a.size == (48, 64)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("sd15", {"hires": 1}, "above 1"),
        ("sd15", {"hires": "2"}, "expected a number above 1"),
        ("sd15", {"hires": float("nan")}, "above 1"),
        ("sd15", {"hires": 1.1}, "does not enlarge"),
        ("sd15", {"hires_upscaler": "esrgan"}, "expected one of lanczos"),
        ("sd15", {"hires": None, "hires_upscaler": "lanczos"}, "without hires"),
        ("sd15", {"hires": None, "hires_strength": 0.5}, "without hires"),
        ("sd15", {"hires_strength": 1.5}, "0 to 1"),
        ("sd15", {"hires_strength": 0.1}, "hires: strength 0.1 leaves none of 4 steps"),
        ("sd15", {"image": photo(32, 32), "mask": mask("disc", 32, 32)}, "with mask or outpaint"),
        ("sdxl", {"denoising_end": 0.5}, "denoising_end"),
        ("pix2pix", {"image": photo(32, 32)}, "by instruction"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    name: str, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says):
        opened(name).generate("a", **SMALL | arguments)
