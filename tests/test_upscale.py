"""Models that enlarge a picture (the Stable Diffusion x4 upscaler), against diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from folders import diffusers_folder, random_tensors, write_json
from golden_data import (
    assert_latents_close,
    assert_picture_close,
    cases,
    checkpoint,
    mask,
    photo,
    picture_difference,
)
from golden_runs import Opened, assert_drawn_again
from PIL import Image
from safetensors.numpy import save_file
from single_files import real_names, single_file, sparse_file

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import convert, describe, open_source
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.networks.config import UNet2DConditionConfig
from mlxdiff.report import bench
from mlxdiff.store.folder import open_folder
from mlxdiff.store.selection import needed_files

NAME = "x4-upscaler"
CASES = cases(NAME)
RUN = {"image": photo(16, 12), "steps": 3, "seed": 5, "sampler": "ddim", "schedule": "normal"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny upscaler."""
    return Path(shutil.copytree(checkpoint(NAME), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_pictures_equal_diffusers(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend, NAME)


def test_every_input_shows_in_the_picture(opened: Opened) -> None:
    """Or the goldens would prove nothing: each of these is far beyond the picture bound."""
    pipe = opened(NAME)
    expected = np.asarray(pipe.generate("a", **RUN).images[0])
    other = photo(16, 12)[::-1]
    for change in ({"noise_level": 21}, {"image": other}, {"guidance": 8.0}, {"seed": 6}):
        got = np.asarray(pipe.generate("a", **RUN | change).images[0])
        assert picture_difference(got, expected)[1] > 0.25, change


def test_defaults_and_what_stands_in_the_metadata(opened: Opened) -> None:
    result = opened(NAME).generate("a", image=photo(13, 18), seed=0, steps=1)
    settings = result.settings
    assert result.images[0].size == (settings.width, settings.height) == (64, 48)
    assert (settings.guidance, settings.noise_level, settings.strength) == (9.0, 20, None)
    assert opened(NAME).settings("a", image=photo(8, 8)).steps == 20
    assert result.metadata[0].extra == {"image": "(pixels)", "noise_level": 20}
    assert "image" not in result.timings  # the VAE encodes nothing


def test_the_command_line_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(13, 18)).save("low.png")

    def run(*arguments: str) -> Any:
        model = ["generate", "--backend", "numpy", "-m", str(checkpoint(NAME)), "-i", "low.png"]
        return CliRunner().invoke(main, [*model, *arguments])

    first = run("a", "--noise-level", "100", "--steps", "2", "-s", "1", "-o", "1.png", "--json")
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)
    assert (record["width"], record["height"], record["noise_level"]) == (64, 48, 100)
    again = run("--from-image", "1.png", "-o", "2.png")
    assert again.exit_code == 0, again.output
    with Image.open("1.png") as a, Image.open("2.png") as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert "0 to 350" in run("a", "--noise-level", "351").output


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (NAME, {"image": None}, r"enlarges a picture .* it needs one \(image\)"),
    (NAME, {"noise_level": 351}, "0 to 350"),
    (NAME, {"noise_level": -1}, "0 to 350"),
    (NAME, {"noise_level": 20.0}, "a whole number"),
    (NAME, {"noise_level": True}, "a whole number"),
    (NAME, {"mask": mask("disc", 32, 32)}, "no part for mask or outpaint"),
    (NAME, {"outpaint": (4, 4, 4, 4)}, "no part for mask or outpaint"),
    (NAME, {"strength": 0.5}, "strength: .*noise_level"),
    (NAME, {"image_guidance": 1.5}, "8 channels"),
    (NAME, {"hires": 2}, "hires: this is a model that enlarges"),
    (NAME, {"denoising_end": 0.5}, "only SDXL"),
    (NAME, {"width": 30}, "multiple of 4"),
    (NAME, {"image": photo(3, 40)}, "too small"),
    ("sd15", {"noise_level": 20}, "only models that enlarge"),
    ("pix2pix", {"noise_level": 20}, "only models that enlarge"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), REFUSED)
def test_what_cannot_be_honoured_is_refused(
    name: str, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        opened(name).settings("a", **{"image": photo(16, 16), **arguments})
    assert "\n" not in str(caught.value)


def test_networks_beside_it_are_refused() -> None:
    with pytest.raises(UsageError, match="this VAE has factor 8, the model's own 4"):
        mlxdiff.load(checkpoint(NAME), vae=checkpoint("taesd"), backend="numpy")
    pipe = mlxdiff.load(checkpoint(NAME), backend="numpy")
    for add, says in (
        (pipe.set_controlnets, "a ControlNet"),
        (pipe.set_ip_adapters, "an IP-Adapter"),
    ):
        with pytest.raises(UsageError, match=f"enlarges .* cannot be combined with {says}"):
            add(["anything"])


# -------------------------------------------------------------------------- forms, memory, previews


def test_after_conversion(tmp_path: Path, opened: Opened) -> None:
    convert(checkpoint(NAME), tmp_path / "out", dtype="float32")
    folder = open_folder(tmp_path / "out")
    assert folder.image_noise_config["_class_name"] == "DDPMScheduler"
    assert describe(tmp_path / "out")["resolution"] == [64, 64]
    got = mlxdiff.load(tmp_path / "out", backend="numpy").generate("a", **RUN).latents
    np.testing.assert_array_equal(got, opened(NAME).generate("a", **RUN).latents)


def test_quantized_and_with_low_memory(backend: str, tmp_path: Path, opened: Opened) -> None:
    plain = opened(NAME, backend)
    expected = plain.generate("a", **RUN)
    low = mlxdiff.load(checkpoint(NAME), backend=backend, dtype="float32", low_memory=True)
    got = low.generate("a", **RUN)
    assert np.abs(got.latents - expected.latents).max() < 1e-4 * expected.latents.std()
    assert low.model.band_bytes(64, 48, True) and not plain.model.band_bytes(64, 48, False)
    assert_picture_close(np.asarray(got.images[0]), np.asarray(expected.images[0]))
    convert(checkpoint(NAME), tmp_path / "q", quantize=8)
    packed = open_folder(tmp_path / "q").quantization["tensors"]["unet"]
    assert "class_embedding.weight" in {name for names in packed.values() for name in names}
    rounded = [
        mlxdiff.load(tmp_path / "q", backend=backend, dtype="float32", low_memory=memory)
        .generate("a", **RUN)
        .latents
        for memory in (False, True)
    ]
    assert_latents_close(rounded[1], rounded[0])
    assert 0 < (rounded[0] - expected.latents).std() < 0.1 * expected.latents.std()


def test_the_memory_is_that_of_its_vae(opened: Opened) -> None:
    """No encoder; four pixels to a latent: a result of 64 pixels has 16 latents a side."""
    pipe = opened(NAME)
    needed = pipe.memory(pipe.settings("a", image=photo(16, 16)))
    assert "image" not in needed.work
    larger = pipe.memory(pipe.settings("a", image=photo(32, 32)))
    assert 3.5 < larger.work["vae"] / needed.work["vae"] < 4.5
    small = mlxdiff.load(checkpoint(NAME), backend="numpy", memory_limit=0.105)
    small.settings("a", image=photo(16, 16))
    with pytest.raises(UsageError, match=r"GB of memory .*half the size .64x64"):
        small.settings("a", image=photo(32, 32))


def test_previews(opened: Opened) -> None:
    *_, last = opened(NAME).stream("a", **RUN)
    assert last.sketch().size == (12, 16)
    assert last.preview().size == (48, 64)


def test_feature_reuse_and_intervals(opened: Opened) -> None:
    pipe = opened(NAME)
    expected = pipe.generate("a", **RUN).latents
    part = pipe.generate("a", **RUN, guidance_interval=(0.0, 0.5), feature_reuse=2).latents
    assert np.isfinite(part).all() and np.abs(part - expected).max() > 0.01


def test_a_single_file_draws_the_same(tmp_path: Path, opened: Opened) -> None:
    path = single_file(checkpoint(NAME), tmp_path / "x.safetensors")
    pipe = mlxdiff.load(path, config=checkpoint(NAME), backend="numpy")
    got = pipe.generate("a", **RUN).latents
    np.testing.assert_array_equal(got, opened(NAME).generate("a", **RUN).latents)


def test_a_real_single_file_tells_all_that_a_folder_does(tmp_path: Path) -> None:
    """As published: the schedules of x4-upscaler-ema, which the tiny folder has too."""
    path = sparse_file(tmp_path / "x4-upscaler-ema.safetensors", real_names(NAME))
    shutil.copytree(checkpoint(NAME) / "tokenizer", tmp_path / "tokenizer")
    found, folder = open_source(path), open_source(checkpoint(NAME))
    assert found.image_noise_config.items() <= folder.image_noise_config.items()
    assert found.scheduler_config.items() <= folder.scheduler_config.items()
    assert found.model_index["max_noise_level"] == 350
    assert json.loads(found.documents()["low_res_scheduler/scheduler_config.json"])
    vae, unet = found.config("vae"), found.config("unet")
    assert (vae.scaling_factor, vae.factor, unet.sample_size) == (0.08333, 4, (128, 128))
    pipe = mlxdiff.load(path, backend="numpy", memory_limit=1000)
    assert pipe.settings("a", image=photo(128, 96)).noise_level == 20


def test_the_hub_gives_its_second_scheduler() -> None:
    parts = ("unet", "vae", "text_encoder")
    files = {f"{part}/{file}" for part in parts for file in ("config.json", "model.safetensors")}
    files |= {"model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
    schedulers = {f"{s}/scheduler_config.json" for s in ("scheduler", "low_res_scheduler")}
    assert schedulers <= set(needed_files(files | schedulers))


def test_a_bench_run_gives_it_a_picture(opened: Opened) -> None:
    model = opened(NAME).model
    assert bench.needed(model, {})["image"].shape == (16, 16, 3)
    assert bench.needed(model, {"width": 32})["image"].shape == (16, 8, 3)


# ------------------------------------------------------------------------------------ wrong folders


def test_the_scale_of_its_latents_is_its_own(
    model: Path, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the reference, whose files of 2022 gave none."""
    edit(model / "vae/config.json", scaling_factor=0.18215)
    pipe = mlxdiff.load(model, backend="numpy")
    assert "is taken for 0.08333, not 0.18215" in caplog.text
    got, expected = (p.generate("a", **RUN).images[0] for p in (pipe, opened(NAME)))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def change_index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **changes)


WRONG: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "none": (change_index(low_res_scheduler=[None, None]), CheckpointError, "no low_res_scheduler"),
    "no folder": (
        lambda folder: shutil.rmtree(folder / "low_res_scheduler"),
        CheckpointError,
        "folder low_res_scheduler is missing",
    ),
    "another class": (
        change_index(low_res_scheduler=["diffusers", "EulerDiscreteScheduler"]),
        CheckpointError,
        "low_res_scheduler is a EulerDiscreteScheduler",
    ),
    "another pipeline": (
        change_index(_class_name="StableDiffusionPipeline"),
        CheckpointError,
        "unsupported part: low_res_scheduler",
    ),
    "another schedule": (
        lambda folder: edit(
            folder / "low_res_scheduler/scheduler_config.json", beta_schedule="steep"
        ),
        ConfigError,
        "low_res_scheduler: .*beta_schedule",
    ),
    "latent upscaler": (
        change_index(_class_name="StableDiffusionLatentUpscalePipeline"),
        CheckpointError,
        "latent upscaler .* not supported; .*x4",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_folders_that_are_wrong_are_refused(kind: str, model: Path) -> None:
    damage, fault, says = WRONG[kind]
    damage(model)
    with pytest.raises(fault, match=says) as caught:
        mlxdiff.load(model, backend="numpy").settings("a", image=photo(8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [4, 8])
def test_other_models_that_are_told_a_class_are_refused(channels: int, tmp_path: Path) -> None:
    changes = {"in_channels": channels, "num_class_embeds": 10}
    diffusers_folder(tmp_path / "model", unet=changes)
    config = json.loads((tmp_path / "model/unet/config.json").read_text())
    tensors = random_tensors(UNet2DConditionConfig.from_dict(config))
    save_file(tensors, tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(UsageError, match="takes a class"):
        mlxdiff.load(tmp_path / "model", backend="numpy").settings("a", image=photo(16, 16))
