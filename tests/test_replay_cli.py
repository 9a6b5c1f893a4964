"""``--from-image`` and ``info`` on pictures of other programs, as a user meets them.

The inputs of the public reports (cases 01 to 05, 14 and 20) are written again here, after their
programs' sources.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from foreign_files import SAMPLES, api_graph, comment, png, with_exif
from PIL import Image

from mlxdiff.cli import main
from mlxdiff.cli.replay import clip_skip_for_sdxl

BUILTIN = Path(__file__).parent.parent / "mlxdiff" / "builtin"
QUICK = ("--steps", "1", "-W", "64", "-H", "64")
HIRES = (
    "a red circle on a blue background\nNegative prompt: blue\nSteps: 2, Sampler: Euler a, "
    "Schedule type: Automatic, CFG scale: 4, Seed: 7, Size: 64x64, Model hash: abcdef, Model: "
    "trained, VAE hash: 735e4c3a44, VAE: vae-ft-mse-840000.safetensors, Denoising strength: 0.6, "
    "Clip skip: 2, ENSD: 31337, RNG: GPU, Variation seed: 11, Variation seed strength: 0.5, Hires "
    "upscale: 1.25, Hires steps: 2, Hires upscaler: Latent, Lora hashes: "
    '"pastel: 0123456789ab", Version: v1.9.4'
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def replay(picture: str | Path, *options: str, model: bool = True) -> Result:
    which = ("-m", str(BUILTIN)) if model else ()
    return run("generate", *which, "--backend", "numpy", "--from-image", picture, *options)


def notes(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("Note: ")]


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_case_01_fooocus() -> None:
    SAMPLES["fooocus"].write(Path())
    refused = replay("p.png", *QUICK)
    assert refused.exit_code == 2
    assert "was drawn with the LoRA pastel.safetensors:0.8" in refused.stderr
    assert sum("not taken over" in note for note in notes(refused)) == 1
    shown = json.loads(run("info", "p.png", "--json").stdout)
    assert (shown["prompt"], shown["seed"]) == ("a red circle", 42)


@pytest.mark.parametrize("name", ["mflux", "mflux, ascii", "easy diffusion, jpeg"])
def test_case_02_mflux_and_easy_diffusion(name: str) -> None:
    SAMPLES[name].write(Path())
    refused = replay("p.jpg", *QUICK, model=False)
    assert refused.exit_code == 2
    assert "names the model" in refused.stderr
    assert json.loads(run("info", "p.jpg", "--json").stdout)["prompt"] == "a red circle"


def test_case_03_swarmui() -> None:
    values = {
        "prompt": "a red circle on blue", "negativeprompt": "blurry", "model": "sd_xl_base_1.0",
        "seed": 1234, "steps": 20, "cfgscale": 7.0, "width": 1024, "height": 1024,
        "sampler": "euler", "swarm_version": "0.9.5.0",
    }  # fmt: skip
    png(Path("p.png"), {"parameters": json.dumps({"sui_image_params": values}, indent=2)})
    drawn = replay("p.png", *QUICK, "-o", "a.png", "--json")
    assert drawn.exit_code == 0, drawn.output
    said = json.loads(drawn.stdout)
    assert (said["seed"], said["sampler"], said["schedule"]) == (1234, "euler", "linspace")
    assert json.loads(run("info", "a.png", "--json").stdout)["prompt"] == "a red circle on blue"
    assert "sd_xl_base_1.0" in replay("p.png", model=False).stderr


def test_case_04_a1111_with_a_hires_pass() -> None:
    png(Path("p.png"), {"parameters": HIRES})
    drawn = replay("p.png", "-o", "a.png", "--json")
    assert drawn.exit_code == 0, drawn.output
    said = json.loads(drawn.stdout)
    assert (said["width"], said["height"], said["seed"]) == (80, 80, 7)
    expected = {
        "hires": 1.25, "hires_upscaler": "latent-bilinear", "hires_strength": 0.6,
        "hires_steps": 2, "rng": "gpu", "noise_seed_delta": 31337, "vary": [11, 0.5],
        "seed_order": "a1111", "prompt_syntax": "a1111", "schedule": "linspace",
    }  # fmt: skip
    assert {key: said[key] for key in expected} == expected
    (note,) = [one for one in notes(drawn) if "AUTOMATIC1111 v1.9.4" in one]
    for name in ("Model hash abcdef", "VAE hash", "vae vae-ft-mse", "Lora hashes pastel"):
        assert name in note
    # Each of these changes the picture.
    for option in (("--vary", "11:0"), ("--rng", "cpu"), ("--noise-seed-delta", "0")):
        assert replay("p.png", "-o", "b.png", "--force", *option).exit_code == 0
        assert not np.array_equal(pixels("a.png"), pixels("b.png")), option


def test_case_04_a1111_image_to_image() -> None:
    line = "Steps: 4, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 64x64, Denoising strength: 0.5"
    png(Path("p.png"), {"parameters": f"a red circle\n{line}, Version: v1.10.1"})
    refused = replay("p.png")
    assert refused.exit_code == 2 and "give it with --image" in refused.stderr
    drawn = replay("p.png", "-i", "p.png", "-o", "a.png", "--json")
    assert drawn.exit_code == 0, drawn.output
    assert json.loads(drawn.stdout)["strength"] == 0.5


def test_case_05_our_text_alone_draws_the_same() -> None:
    how = ("--sampler", "euler-a", "-s", "3", "--rng", "gpu", "--prompt-syntax", "a1111")
    first = run(
        "generate", "-m", BUILTIN, "--backend", "numpy", "a (red:1.3) circle", "-o", "a.png",
        "-n", "blue", "--hires", "1.25", "--hires-steps", "1", *QUICK, *how,
    )  # fmt: skip
    assert first.exit_code == 0, first.output
    with Image.open("a.png") as picture:
        text = picture.text["parameters"]  # type: ignore[attr-defined]
    png(Path("p.png"), {"parameters": text})
    for suffix in ("jpg", "webp"):
        with_exif(Path(f"p.{suffix}"), {0x9286: comment(text)})
    for copy in ("p.png", "p.jpg", "p.webp"):
        again = replay(copy, "-o", "b.png", "--force")
        assert again.exit_code == 0, again.output
        np.testing.assert_array_equal(pixels("a.png"), pixels("b.png"))


def test_case_05_an_old_text_of_ours_says_what_it_lacks() -> None:
    line = "Steps: 1, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 64x64, RNG: CPU"
    png(Path("p.png"), {"parameters": f"a red circle\n{line}, Version: mlxdiff 0.1.0"})
    drawn = replay("p.png", "-o", "a.png")
    assert drawn.exit_code == 0, drawn.output
    assert any("in which syntax" in note for note in notes(drawn))


def test_case_14_a_prompt_with_colons() -> None:
    text = "a portrait, style: oil, lens: 50mm, time: dusk"
    png(Path("p.png"), {"parameters": text})
    shown = json.loads(run("info", "p.png", "--json").stdout)
    assert shown["prompt"] == text
    drawn = replay("p.png", *QUICK, "-s", "1", "-o", "a.png")
    assert drawn.exit_code == 0, drawn.output
    assert json.loads(run("info", "a.png", "--json").stdout)["prompt"] == text


@pytest.mark.parametrize(
    ("version", "kind", "schedule"),
    [
        ("v1.6.0", "", "linspace"),
        ("v1.8.0", ", Schedule type: Karras", "karras"),
        ("v1.9.0", ", Schedule type: Automatic", "karras"),
        ("v1.10.1", "", "karras"),
    ],
)
def test_automatic_is_what_the_version_drew(version: str, kind: str, schedule: str) -> None:
    line = f"Steps: 2, Sampler: DPM++ 2M{kind}, CFG scale: 1, Seed: 7, Size: 64x64"
    png(Path("p.png"), {"parameters": f"a red circle\n{line}, Version: {version}"})
    drawn = replay("p.png", "-o", "a.png", "--json")
    assert drawn.exit_code == 0, drawn.output
    said = json.loads(drawn.stdout)
    assert (said["sampler"], said["schedule"]) == ("dpmpp-2m", schedule)


def test_a_prompt_that_is_not_read_is_asked_for() -> None:
    graph = api_graph(denoise=1.0)
    graph["6"]["inputs"]["text"] = ["50", 0]
    graph["50"] = {"class_type": "TextGenerate", "inputs": {"clip": ["4", 1], "prompt": "x"}}
    for name in ("10", "11"):  # no LoRA, no VAE
        graph[name] = {"class_type": "Reroute", "inputs": {"": ["4", 0]}}
    png(Path("p.png"), {"prompt": json.dumps(graph)})
    refused = replay("p.png", *QUICK)
    assert refused.exit_code == 2
    assert "does not say its prompt '(in the node TextGenerate)'" in refused.stderr
    drawn = run(
        "generate", "-m", BUILTIN, "--backend", "numpy", "--from-image", "p.png", "a red circle",
        "-o", "a.png", *QUICK,
    )  # fmt: skip
    assert drawn.exit_code == 0, drawn.output


def test_a_tiling_picture_of_a1111_with_brownian_noise() -> None:
    line = "Steps: 2, Sampler: DPM++ 2M SDE, CFG scale: 1, Seed: 7, Size: 64x64, Tiling: True"
    png(Path("p.png"), {"parameters": f"a red circle\n{line}, RNG: CPU, Version: v1.10.1"})
    drawn = replay("p.png", "-o", "a.png", "--json")
    assert drawn.exit_code == 0, drawn.output
    said = json.loads(drawn.stdout)
    assert (said["seamless"], said["step_noise"]) == ("xy", "brownian")
    for option in (("--step-noise", "independent"), ("--rng", "gpu")):
        assert replay("p.png", "-o", "b.png", "--force", *option).exit_code == 0
        assert not np.array_equal(pixels("a.png"), pixels("b.png")), option


def test_a_sampler_that_is_not_here_is_named() -> None:
    line = "Steps: 2, Sampler: DPM strange, CFG scale: 1, Seed: 7, Size: 64x64, Version: v1.6.0"
    png(Path("p.png"), {"parameters": f"a red circle\n{line}"})
    refused = replay("p.png")
    assert refused.exit_code == 2 and "DPM strange" in refused.stderr
    assert replay("p.png", "--sampler", "euler", "-o", "a.png").exit_code == 0


@pytest.mark.parametrize(
    ("written", "for_sd", "for_sdxl"), [(1, None, None), (2, 1, None), (3, 2, 1)]
)
def test_clip_skip_counts_from_another_layer_for_sdxl(
    written: int, for_sd: int | None, for_sdxl: int | None
) -> None:
    """diffusers' SDXL leaves out the last layer by itself; others write 2 for that."""
    line = f"Steps: 2, Sampler: Euler, CFG scale: 1, Seed: 7, Clip skip: {written}"
    png(Path("p.png"), {"parameters": f"a\n{line}, Version: v1.6.0"})
    shown = json.loads(run("info", "p.png", "--json").stdout)["clip_skip"] or None
    assert shown == for_sd
    assert clip_skip_for_sdxl({"clip_skip": shown}, "p.png", given=False)["clip_skip"] == for_sdxl
    # What the command line says, and what our own pictures say, is diffusers' count.
    assert clip_skip_for_sdxl({"clip_skip": 2}, "p.png", given=True)["clip_skip"] == 2
    png(Path("own.png"), {"parameters": f"a\n{line}, Version: mlxdiff 1"})
    assert clip_skip_for_sdxl({"clip_skip": 2}, "own.png", given=False)["clip_skip"] == 2


def test_a_shape_replaces_the_size_of_a_picture() -> None:
    png(Path("p.png"), {"parameters": HIRES.replace("1.25", "1.5")})
    drawn = replay("p.png", "--aspect", "2:1", "-o", "a.png", "--json")
    assert drawn.exit_code == 0, drawn.output
    shown = json.loads(run("info", "a.png", "--json").stdout)
    assert shown["width"] == 2 * shown["height"]


def test_variations_have_names_of_their_own() -> None:
    drawn = run(
        "generate", "-m", BUILTIN, "--backend", "numpy", "a red circle", "-s", "3", "-b", "2",
        "--vary", "11:0.3", *QUICK,
    )  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    assert sorted(path.name for path in Path().glob("*.png")) == [
        "mlxdiff-3-0.png",
        "mlxdiff-3-1.png",
    ]
