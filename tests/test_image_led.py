"""Models that a picture's embedding leads: Stable unCLIP, image variations, Zero-1-to-3.

The pictures are those of diffusers (of its community pipeline for Zero-1-to-3).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from folders import write_json
from golden_data import assert_latents_close, cases, checkpoint, mask, photo, picture_difference
from golden_runs import Opened, assert_drawn_again
from PIL import Image
from single_files import real_names, single_file, sparse_file

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import convert, describe, open_source
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.pictures.image import on_white, to_clip_aligned
from mlxdiff.report import bench
from mlxdiff.run.image_led import pose
from mlxdiff.store.folder import OWN_PARTS, open_folder
from mlxdiff.store.selection import needed_files

NAMES = ("unclip", "unclip-l", "variation", "zero123")
CASES = [(name, case) for name in NAMES for case in cases(name)]
RUNS: dict[str, dict[str, Any]] = {
    "unclip": {"prompt": "a", "image": photo(64, 64), "noise_level": 200},
    "variation": {"image": photo(64, 64)},
    "zero123": {"image": photo(64, 64), "azimuth": 30.0},
}
RUNS = {name: {"steps": 2, "seed": 5, **given} for name, given in RUNS.items()}


@pytest.mark.parametrize(
    ("name", "case"), CASES, ids=[f"{name}-{case['case']}" for name, case in CASES]
)
def test_pictures_equal_diffusers(
    name: str, case: dict[str, Any], backend: str, opened: Opened
) -> None:
    assert_drawn_again(opened, case, backend, name)


CHANGES: dict[str, list[dict[str, Any]]] = {
    "unclip": [{"noise_level": 900}, {"image": photo(64, 64)[::-1]}, {"prompt": "b"}],
    "variation": [{"image": photo(64, 64)[::-1]}, {"guidance": 3.0}],
    "zero123": [
        {"image": photo(64, 64)[::-1]},
        {"azimuth": 60.0},
        {"elevation": 30.0},
        {"distance": 0.5},
        {"picture_elevation": 0.0},
    ],
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_input_shows_in_the_picture(name: str, opened: Opened) -> None:
    """Or the goldens would prove nothing: each of these is far beyond the picture bound."""
    pipe = opened(name)
    expected = np.asarray(pipe.generate(**RUNS[name]).images[0])
    for change in CHANGES[name]:
        got = np.asarray(pipe.generate(**{**RUNS[name], **change}).images[0])
        assert picture_difference(got, expected)[1] > 0.25, change


def test_defaults(opened: Opened) -> None:
    image = photo(40, 72)
    for name, guidance in (("unclip", 10.0), ("variation", 7.5), ("zero123", 3.0)):
        settings = opened(name).settings(image=image)
        assert (settings.width, settings.height, settings.guidance) == (64, 64, guidance)
        assert (settings.steps, settings.strength, settings.prompt) == (20, None, "")
    assert opened("unclip").settings(image=image).noise_level == 0
    assert opened("variation").settings(image=image).noise_level is None
    # CLIP crops the picture itself; Zero-1-to-3 gets it on white, at the size of the result.
    assert opened("variation").settings(image=image).leading.shape == image.shape
    shown = opened("zero123").settings(image=image).leading
    assert shown.shape == (64, 64, 3) and (shown[:14] == 255).all() and (shown[15:49] < 255).any()


def test_cameras(opened: Opened) -> None:
    pipe = opened("zero123")

    def numbers(**camera: float) -> list[float]:
        return pose(pipe.settings(image=photo(64, 64), **camera))[0].tolist()

    assert numbers() == [0, 0, 1, 0]
    assert numbers(elevation=90.0, distance=0.25) == pytest.approx([-np.pi / 2, 0, 1, 0.25])
    assert numbers(azimuth=90.0) == pytest.approx([0, 1, 0, 0], abs=1e-6)
    assert numbers(picture_elevation=30.0) == pytest.approx([0, 0, 1, np.pi / 3])


def test_stable_zero123_is_known_by_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(checkpoint("zero123"), tmp_path / "stable-zero123"))
    pipe = mlxdiff.load(folder, backend="numpy")
    assert pipe.settings(image=photo(64, 64)).picture_elevation == 0.0
    assert "Stable Zero123 by its name" in caplog.text
    caplog.clear()
    assert pipe.settings(image=photo(64, 64), picture_elevation=5.0).picture_elevation == 5.0
    assert not caplog.text
    with pytest.raises(UsageError, match="reads no distance"):
        pipe.settings(image=photo(64, 64), distance=0.1)


def test_variations_are_pictures_of_seeds_that_follow(opened: Opened) -> None:
    pipe, run = opened("variation"), RUNS["variation"]
    result = pipe.generate(**run, variations=2)
    assert result.seeds == [5, 6]
    np.testing.assert_array_equal(result.latents, pipe.generate(**run, count=2).latents)
    alone = pipe.generate(**{**run, "seed": 6}).latents[0]
    np.testing.assert_array_equal(result.latents[1], alone)
    with pytest.raises(UsageError, match="variations and count both"):
        pipe.settings(**run, variations=2, count=3)
    with pytest.raises(UsageError, match=r"ip_adapters.*image, strength.*count"):
        opened("sd15").settings("a", image=photo(64, 64), variations=2)


def test_the_noise_of_an_embedding_is_that_of_the_picture(opened: Opened) -> None:
    """Each picture of several has its own, as it would alone."""
    pipe, run = opened("unclip"), RUNS["unclip"]
    both = pipe.generate(**run, count=2).latents
    np.testing.assert_array_equal(both[1], pipe.generate(**{**run, "seed": 6}).latents[0])


def test_a_second_pass_sees_the_same_picture(opened: Opened) -> None:
    pipe, run = opened("unclip"), {**RUNS["unclip"], "steps": 2, "hires": 1.5}
    picture = np.asarray(pipe.generate(**run).images[0])
    assert picture.shape == (96, 96, 3)
    other = np.asarray(pipe.generate(**{**run, "image": photo(64, 64)[::-1]}).images[0])
    assert picture_difference(picture, other)[1] > 0.25


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unclip", {"image": None}, r"leads beside the prompt.*needs a picture \(image\)"),
    ("unclip", {"noise_level": 1000}, "0 to 999"),
    ("unclip", {"noise_level": -1}, "0 to 999|at least 0"),
    ("unclip", {"strength": 0.5}, "strength: .*noise_level says how far"),
    ("unclip", {"mask": mask("disc", 64, 64)}, "no part for mask or outpaint"),
    ("unclip", {"azimuth": 1.0}, "only models that show .* from another side"),
    ("variation", {"prompt": "a"}, "prompt: .*it reads no text"),
    ("variation", {"negative_prompt": "a", "clip_skip": 1}, "negative_prompt, clip_skip: "),
    ("variation", {"style": "photo"}, "style: .*it reads no text"),
    ("variation", {"noise_level": 1}, "only models that enlarge"),
    ("variation", {"image": None}, r"needs a picture \(image\)"),
    ("variation", {"strength": 0.5}, "sees the picture as a whole"),
    ("zero123", {"prompt": "a"}, "prompt: this is a model that turns.*it reads no text"),
    ("zero123", {"hires": 2.0}, "draw with it first"),
    ("zero123", {"variations": 2}, "only models that a picture leads"),
    ("zero123", {"distance": 0.1, "picture_elevation": 1.0}, "picture_elevation and distance"),
    ("zero123", {"azimuth": 361.0}, "azimuth is 361"),
    ("sd15", {"elevation": 1.0, "prompt": "a"}, "elevation: only models that show"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), REFUSED)
def test_what_cannot_be_honoured_is_refused(
    name: str, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        opened(name).settings(**{"image": photo(64, 64), **arguments})
    assert "\n" not in str(caught.value)


def test_additions_are_refused_by_name(opened: Opened) -> None:
    for name in RUNS:
        pipe = opened(name)
        for add in (pipe.set_controlnets, pipe.set_t2i_adapters, pipe.set_ip_adapters):
            with pytest.raises(UsageError, match="cannot be combined with a"):
                add(["anything"])
    for name in ("variation", "zero123"):
        pipe = opened(name)
        for refuse in (
            lambda pipe=pipe: pipe.set_loras(["x"]),
            lambda pipe=pipe: pipe.set_embeddings(["x"]),
            lambda pipe=pipe: pipe.set_judge("x"),
            lambda pipe=pipe: pipe.encode_prompt("a"),
        ):
            with pytest.raises(UsageError, match=r"no text|no prompt"):
                refuse()
    with pytest.raises(UsageError, match="no few-step LoRA is published"):
        opened("unclip").set_fast()


# ------------------------------------------------------------------- command line, forms, memory


def command(model: str, *arguments: str) -> Any:
    given = ["generate", "--backend", "numpy", "-m", str(checkpoint(model)), *arguments]
    return CliRunner().invoke(main, given)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(64, 64)).save("photo.png")
    return tmp_path


def test_the_command_line_and_back(here: Path) -> None:
    run = "-i photo.png --steps 2 -s 1 --variations 2 -o {seed}.png --json".split()
    first = command("variation", *run)
    assert first.exit_code == 0, first.output
    records = [json.loads(line) for line in first.stdout.splitlines()]
    assert [record["path"] for record in records] == ["1.png", "2.png"]
    again = command("variation", "--from-image", "2.png", "-i", "photo.png", "-o", "again.png")
    assert again.exit_code == 0, again.output
    with Image.open("2.png") as a, Image.open("again.png") as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert "reads no text" in command("variation", "a dog", "-i", "photo.png").output


def test_a_turn(here: Path) -> None:
    run = "-i photo.png --steps 1 -s 1 --turntable 3 --elevation 20".split()
    done = command("zero123", *run, "-o", "turn.gif")
    assert done.exit_code == 0, done.output
    with Image.open("turn.gif") as turn:
        assert (turn.n_frames, turn.size, turn.info["loop"]) == (3, (64, 64), 0)
    said = []
    for view in range(3):
        with Image.open(f"turn-{view}.png") as picture:
            assert isinstance(picture.text, dict)
            said.append(picture.text["mlxdiff"])
    assert [json.loads(one)["azimuth"] for one in said] == [0.0, 120.0, 240.0]
    for arguments, says in (
        (["-o", "turn.jpg"], "end the name in .gif, .webp, .png or .mp4"),
        (["-o", "turn.gif"], "exists"),
        (["-o", "b.gif", "-b", "2"], "one turn around one object"),
    ):
        refused = command("zero123", *run, *arguments)
        assert refused.exit_code == 2 and says in refused.output, refused.output
    refused = command("sd15", "a", "--turntable", "3", "-o", "c.gif")
    assert refused.exit_code == 2 and "from another side" in refused.output
    assert not Path("c-0.png").exists() and not Path("c.gif").exists()


@pytest.mark.parametrize("name", RUNS)
def test_after_conversion_and_with_low_memory(name: str, tmp_path: Path, opened: Opened) -> None:
    expected = opened(name).generate(**RUNS[name]).latents
    convert(checkpoint(name), tmp_path / "out", dtype="float32")
    folder = open_folder(tmp_path / "out")
    assert set(OWN_PARTS[folder.model_index["_class_name"]]) >= set(folder.components[2:]) - {
        "unet",
        "vae",
    }
    assert describe(tmp_path / "out")["resolution"] == [64, 64]
    convert(tmp_path / "out", tmp_path / "back", dtype="float32", to="diffusers")
    for place in ("out", "back"):
        got = mlxdiff.load(tmp_path / place, backend="numpy", low_memory=True)
        np.testing.assert_array_equal(got.generate(**RUNS[name]).latents, expected)
        assert not any(network.name == "image_encoder" for network in got.model.cache.loaded)
    with pytest.raises(UsageError, match=r"image_encoder.* cannot be written in one file"):
        convert(checkpoint(name), tmp_path / "x.safetensors", to="single")


@pytest.mark.parametrize("name", RUNS)
def test_quantized(name: str, opened: Opened) -> None:
    plain, small = opened(name), opened(name, quantize=8)
    got, expected = (pipe.generate(**RUNS[name]).latents for pipe in (small, plain))
    assert 0 < np.abs(got - expected).max() < 0.3 * expected.std()
    settings = plain.settings(**RUNS[name])
    needs = plain.memory(settings)
    assert {str(held) for held in needs.weights} >= {"image_encoder", "unet", "vae"}
    assert ("image" in needs.stages) == (name == "zero123")
    assert bench.needed(plain.model, {})["image"].shape == (64, 64, 3)


def test_unclip_as_one_file(tmp_path: Path, opened: Opened) -> None:
    """With the folder's configs, as heads and activation are not in the file."""
    folder = checkpoint("unclip")
    path = single_file(folder, tmp_path / "sd21-unclip-h.safetensors")
    got = mlxdiff.load(path, config=folder, backend="numpy", dtype="float32")
    expected = opened("unclip").generate(**RUNS["unclip"]).latents
    assert_latents_close(got.generate(**RUNS["unclip"]).latents, expected)


@pytest.mark.parametrize("name", ["variation", "zero123"])
def test_picture_models_as_one_file(name: str, tmp_path: Path, opened: Opened) -> None:
    folder = checkpoint(name)
    path = single_file(folder, tmp_path / f"{name}.ckpt.safetensors")
    got = mlxdiff.load(path, config=folder, backend="numpy", dtype="float32")
    expected = opened(name).generate(**RUNS[name]).latents
    assert_latents_close(got.generate(**RUNS[name]).latents, expected)


def test_what_published_files_imply(tmp_path: Path) -> None:
    names = real_names("sd21-unclip-h")
    model = open_source(sparse_file(tmp_path / "sd21-unclip-h.safetensors", names))
    encoder = model.config("image_encoder")
    assert (encoder.hidden_act, encoder.num_attention_heads, encoder.image_size) == (
        "gelu",
        16,
        224,
    )
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    assert model.image_noise_config["beta_schedule"] == "squaredcos_cap_v2"
    assert model.config("unet").sample_size == (96, 96)
    assert model.config("unet").projection_class_embeddings_input_dim == 2048
    assert float(model.tensors("image_normalizer")["std"].read().mean()) == 1.0
    index = model.model_index
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    # l has OpenAI's encoder, and a mean and deviation that are in a file of their own.
    small = {
        n.replace("cond_stage_model.", "embedder."): s
        for n, s in real_names("image-variation").items()
        if n.startswith("cond_stage_model.")
    }
    names = {n: s for n, s in names.items() if not n.startswith("embedder.")} | small
    names["model.diffusion_model.label_emb.0.0.weight"] = (1280, 1536)
    with pytest.raises(CheckpointError, match=r"unCLIP l.*not in the file.*config"):
        open_source(sparse_file(tmp_path / "sd21-unclip-l.safetensors", names))
    names |= {"noise_augmentor.data_mean": (1, 768), "noise_augmentor.data_std": (1, 768)}
    model = open_source(sparse_file(tmp_path / "sd21-unclip-l.safetensors", names))
    assert model.config("image_encoder").hidden_act == "quick_gelu"
    turns = open_source(sparse_file(tmp_path / "zero123-xl.safetensors", real_names("zero123")))
    assert turns.config("cc_projection").in_channel == 772
    assert turns.config("unet").sample_size == (32, 32)


def test_damaged_and_unfit_folders(tmp_path: Path) -> None:
    def edited(name: str, file: str, **changes: Any) -> Path:
        folder = Path(
            shutil.copytree(checkpoint(name), tmp_path / f"{len(list(tmp_path.iterdir()))}")
        )
        path = folder / file
        write_json(path, json.loads(path.read_text()) | changes)
        return folder

    index = "model_index.json"
    for folder, says in (
        (edited("unclip", index, image_normalizer=[None, None]), "no image_normalizer"),
        (
            edited("unclip", index, _class_name="StableDiffusionPipeline"),
            "unsupported part: image_n",
        ),
        (edited("unclip", index, _class_name="StableUnCLIPPipeline"), "Karlo's prior"),
        (edited("variation", index, feature_extractor=[None, None]), "no feature_extractor"),
        (edited("zero123", index, _class_name="Zero123Pipeline"), "community pipeline"),
        (edited("zero123", "cc_projection/config.json", in_channel=20), "expected|projection"),
        (
            edited("variation", "feature_extractor/preprocessor_config.json", image_mean=[0, 0, 0]),
            "not those of CLIP",
        ),
        (edited("unclip", "unet/config.json", num_class_embeds=10), "class_embed_type"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=says):
            mlxdiff.load(folder, backend="numpy")


def test_the_files_of_a_repository() -> None:
    files = [
        path.relative_to(checkpoint("unclip")).as_posix()
        for path in sorted(checkpoint("unclip").rglob("*.*"))
    ]
    needed = needed_files([*files, "safety_checker/model.safetensors"])
    assert set(files) - set(needed) == set()
    assert "feature_extractor/preprocessor_config.json" in needed


def test_preparation_of_pictures() -> None:
    image = photo(20, 30)
    assert to_clip_aligned(image, 20).shape == (1, 20, 20, 3)
    same = to_clip_aligned(photo(28, 28), 28)  # each pixel is its own
    assert np.abs(same[0, 3, 4] - to_clip_aligned(photo(28, 28)[3:4, 4:5], 2)[0, 0, 0]).max() < 1e-5
    clear = np.zeros((20, 30), np.uint8)
    assert (on_white(image, clear, 32, 32) == 255).all()
    wide = on_white(image, None, 30, 30)
    assert (wide[:5] == 255).all() and (wide[25:] == 255).all()
    np.testing.assert_array_equal(wide[5:25], image)
