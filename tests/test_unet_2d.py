"""Models that draw pixels (UNet2DModel): networks, pictures and files against diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_hub import serve
from golden_data import (
    arrays,
    assert_component_close,
    assert_latents_close,
    assert_picture_close,
    cases,
    checkpoint,
)
from PIL import Image

import mlxdiff
from mlxdiff import samplers
from mlxdiff.cli import main
from mlxdiff.convert import convert, describe, open_source
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.loading import make_backend
from mlxdiff.networks.config import UNet2DConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.pipeline import Pipeline
from mlxdiff.weights.tensors import LazyTensor

NAMES = ("ddpm", "ddpm-labels", "ddim-numbers")
CASES = [(name, case) for name in NAMES for case in cases(name)]


@pytest.fixture(scope="module")
def pipes() -> dict[Any, Pipeline]:
    return {}


def opened(pipes: dict[Any, Pipeline], name: str, backend: str = "numpy") -> Pipeline:
    key = name, backend
    if key not in pipes:
        pipes[key] = mlxdiff.load(checkpoint(name), backend=backend, dtype="float32")
    return pipes[key]


# ------------------------------------------------------------------------------ against diffusers


@pytest.mark.parametrize("name", NAMES)
def test_the_network(name: str, pipes: dict[Any, Pipeline], backend: str) -> None:
    pipe = opened(pipes, name, backend)
    inputs = {key.split("/")[1]: value for key, value in arrays(name).items()}
    expected = inputs.pop("output")
    given = {key: pipe.backend.asarray(value) for key, value in inputs.items()}
    output = pipe.model.component("unet")(**given)
    assert_component_close(pipe.backend.to_numpy(output), expected)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c['case']}" for n, c in CASES])
def test_pictures(
    name: str, case: dict[str, Any], pipes: dict[Any, Pipeline], backend: str
) -> None:
    result = opened(pipes, name, backend).generate(**case["arguments"])
    assert_latents_close(result.latents, case["latents"])
    images = np.stack([np.asarray(image) for image in result.images])
    assert_picture_close(images.reshape(case["image"].shape), case["image"])


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", NAMES)
def test_after_conversion(name: str, tmp_path: Path) -> None:
    report = convert(checkpoint(name), tmp_path / "model", dtype="float32")
    assert report.family == "ddpm" and [c.name for c in report.components] == ["unet"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md",
        "mlxdiff.json",
        "model_index.json",
        "scheduler",
        "unet",
    ]
    case = cases(name)[0]
    result = mlxdiff.load(tmp_path / "model", backend="numpy").generate(**case["arguments"])
    assert_latents_close(result.latents, case["latents"])
    once_more = convert(tmp_path / "model", tmp_path / "half", dtype="float16")
    assert once_more.components[0].converted == report.components[0].converted


def test_files_in_the_root_and_in_folders_are_the_same_model(tmp_path: Path) -> None:
    """As the repositories of 2022 have them, with pickles beside, and as diffusers writes today."""
    old = checkpoint("ddpm")
    for part, files in (
        ("unet", ("config.json", "diffusion_pytorch_model.safetensors")),
        ("scheduler", ("scheduler_config.json",)),
    ):
        (tmp_path / part).mkdir()
        for file in files:
            shutil.copy(old / file, tmp_path / part)
    shutil.copy(old / "model_index.json", tmp_path)
    one, other = open_source(old), open_source(tmp_path)
    assert one.config("unet") == other.config("unet")
    assert one.scheduler_config == other.scheduler_config
    first, second = one.tensors("unet"), other.tensors("unet")
    assert list(first) == list(second)
    assert all(np.array_equal(first[n].read(), second[n].read()) for n in first)


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of 2022: files in the root, a pickle and pictures beside them."""
    for key in ("HF_HUB_OFFLINE", "HF_HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MLXDIFF_HOME", str(tmp_path / "home"))
    files = {path.name: path.read_bytes() for path in checkpoint("ddpm").iterdir()}
    more = {"README.md": b"DDPM", "diffusion_pytorch_model.bin": b"PK", "images/a.png": b"PNG"}
    with serve(files | more, monkeypatch) as server:
        pipe = mlxdiff.load("org/name", backend="numpy", dtype="float32")
    assert set(server.got) == set(files)
    case = cases("ddpm")[2]
    assert_latents_close(pipe.generate(**case["arguments"]).latents, case["latents"])


@pytest.mark.parity
def test_pickled_weights(tmp_path: Path) -> None:
    """The .bin that stood alone in the first repositories."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    name = "diffusion_pytorch_model.safetensors"
    shutil.copytree(checkpoint("ddpm"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / name)
    (tmp_path / "model" / name).unlink()
    torch.save(tensors, tmp_path / "model" / name.replace("safetensors", "bin"))
    first = open_source(checkpoint("ddpm")).tensors("unet")
    second = open_source(tmp_path / "model").tensors("unet")
    assert list(first) == list(second)
    assert all(np.array_equal(first[n].read(), second[n].read()) for n in first)


def test_info() -> None:
    facts = describe(checkpoint("ddpm-labels"))
    assert facts["family"] == "ddpm" and facts["pipeline"] == "DDPMPipeline"
    assert facts["resolution"] == [12, 16] and list(facts["components"]) == ["unet"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vae": ["diffusers", "AutoencoderKL"]}, "vae is missing|has vae beside a UNet2DModel"),
        ({"_class_name": "LDMPipeline"}, "is a LDMPipeline; supported: .*DDPMPipeline"),
        ({"scheduler": [None, None]}, "has no scheduler"),
    ],
)
def test_what_is_no_such_model_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("ddpm-labels"), tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        open_source(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 4}, "'ResnetDownsampleBlock2D' is not"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, "'SkipDownBlock2D' is not supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier' is not supported"),
        ({"downsample_type": "resnet"}, "downsample_type = 'resnet' is not supported"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift = 'spatial'"),
        ({"class_embed_type": "projection"}, "class_embed_type = 'projection'"),
        ({"attention_head_dim": 5}, "attention_head_dim = 5 is not supported; expected a divisor"),
        ({"attn_norm_num_groups": 5}, "attn_norm_num_groups = 5"),
        ({"norm_num_groups": 9}, "norm_num_groups = 9"),
        ({"up_block_types": ["UpBlock2D"]}, "one for each of the 4"),
        ({"sample_size": [32]}, r"sample_size = \[32\] is not supported; expected one or two"),
        ({"num_train_timestep": 1}, "unknown key"),
    ],
)
def test_configs_that_are_not_understood_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        UNet2DConfig.from_dict({"_class_name": "UNet2DModel", "sample_size": 32} | change)


def test_defaults_are_those_of_the_class() -> None:
    config = UNet2DConfig.from_dict({})
    assert config.block_out_channels == (224, 448, 672, 896) and config.attention_head_dim == 8
    assert [b.num_attention_heads for b in config.down_blocks] == [28, 56, 84, 112]
    assert [b.type for b in config.up_blocks] == ["AttnUpBlock2D"] * 3 + ["UpBlock2D"]
    one_head = UNet2DConfig.from_dict({"attention_head_dim": None})
    assert [b.num_attention_heads for b in one_head.down_blocks] == [1] * 4


# ---------------------------------------------------------------------------------------- settings


def test_defaults_are_those_of_the_pipelines(pipes: dict[Any, Pipeline]) -> None:
    def found(name: str, **arguments: Any) -> tuple[str, str, int]:
        settings = opened(pipes, name).settings(**arguments)
        return settings.sampler, settings.schedule, settings.steps

    assert found("ddpm") == ("ddpm", "normal", 1000)
    assert found("ddpm", sampler="ddim") == ("ddim", "normal", 50)
    assert found("ddim-numbers", label=1) == ("ddim", "normal", 50)
    assert found("ddim-numbers", label=1, sampler="ddpm")[2] == 1000
    settings = opened(pipes, "ddpm-labels").settings(label=2)
    assert (settings.height, settings.width, settings.label) == (12, 16, 2)
    assert found("ddpm", sampler="euler", sigmas=[10.0, 3.0, 1.0, 0.0]) == ("euler", "normal", 3)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_pixel_models_clip_unless_their_file_says_no(sampler: str) -> None:
    for config, clips in (({}, True), ({"clip_sample": False}, False)):
        config = {"num_train_timesteps": 1000, **config}
        limits = {row.limit for row in samplers.plan(config, sampler, steps=3, family="ddpm").rows}
        assert (None not in limits) == clips
        assert samplers.plan(config, sampler, steps=3, family="sd1").rows[0].limit is None


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("ddpm", {"prompt": "a cat"}, "prompt: this model draws from noise alone"),
        ("ddpm", {"negative_prompt": "", "guidance": 7.5}, "negative_prompt, guidance: this model"),
        ("ddpm", {"image": np.zeros((16, 16, 3), np.uint8)}, "image: this model draws from noise"),
        ("ddpm", {"width": 32}, "32x16 pixels: this model draws 16x16 only"),
        ("ddpm", {"label": 1}, "label: this model has no classes"),
        ("ddpm-labels", {}, "this model needs a label .*0 to 9"),
        ("ddpm-labels", {"label": 10}, "label is 10; expected 0 to 9"),
        ("ddpm-labels", {"label": True}, "label is True; expected a whole number"),
        ("ddim-numbers", {"label": -1}, "label is -1; expected a whole number of at least 0"),
        ("ddpm", {"sampler": "ddpm", "eta": 0.5}, "sampler ddpm has no eta"),
        ("ddpm", {"steps": 1001}, "1001"),
        ("ddpm", {"step_noise": "brownian"}, "sampler ddpm draws independent noise"),
    ],
)
def test_what_such_a_model_has_no_part_for_is_an_error(
    name: str, arguments: dict[str, Any], words: str, pipes: dict[Any, Pipeline]
) -> None:
    with pytest.raises(UsageError, match=words):
        opened(pipes, name).settings(**arguments)


def test_stages_that_are_not_there(pipes: dict[Any, Pipeline]) -> None:
    pipe = opened(pipes, "ddpm")
    with pytest.raises(UsageError, match="has no text encoder"):
        pipe.encode_prompt("a cat")
    with pytest.raises(UsageError, match="has no VAE"):
        pipe.encode_image(np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(UsageError, match="no part for a VAE"):
        mlxdiff.load(checkpoint("ddpm"), vae=checkpoint("taesd"))
    with pytest.raises(UsageError, match="no part for a refiner"):
        pipe.set_refiner(pipe)


def test_a_label_is_for_models_without_text() -> None:
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    with pytest.raises(UsageError, match="label: this model draws from a prompt"):
        pipe.settings("a cat", label=1)
    with pytest.raises(UsageError, match="no prompt is given"):
        pipe.settings()


@pytest.mark.parametrize("kind", ["identity", "timestep"])
def test_kinds_of_labels(kind: str, backend: str) -> None:
    """An identity embedding is added as it is; a U-Net without a label says that it needs one."""
    config = UNet2DConfig.from_dict(
        {
            "sample_size": 8,
            "block_out_channels": [8, 8],
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"],
            "norm_num_groups": 4,
            "class_embed_type": kind,
        }
    )
    random = np.random.default_rng(0)
    values = {
        name: random.standard_normal(shape, np.float32) * 0.2
        for name, shape in expected_parameters(config).items()
    }
    tensors = {n: LazyTensor(v.shape, "F32", lambda v=v: v) for n, v in values.items()}
    ours = make_backend(backend, "float32")
    unet = ours.load(config, tensors)
    x = ours.asarray(np.ones((1, 8, 8, 3), np.float32))
    with pytest.raises(UsageError, match="needs class_labels"):
        unet(x, 10.0)
    shape = (1, config.time_embed_dim) if kind == "identity" else (1,)
    outputs = [
        ours.to_numpy(unet(x, 10.0, ours.asarray(np.full(shape, value, np.float32))))
        for value in (0.0, 0.0, 3.0)
    ]
    assert np.array_equal(outputs[0], outputs[1]) and not np.allclose(outputs[0], outputs[2])


# ------------------------------------------------------------------------------------ command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["generate", "--backend", "numpy", "--quiet", *arguments])


def test_generate_and_replay(tmp_path: Path) -> None:
    """No prompt, grey pictures, a seed for each; --from-image draws the same again."""
    model, out = str(checkpoint("ddpm-labels")), str(tmp_path / "{seed}.png")
    options = ["-m", model, "--label", "9", "--sampler", "ddim", "--steps", "5"]
    done = run(*options, "-s", "4", "-b", "2", "-o", out)
    assert done.exit_code == 0, done.output
    case = cases("ddpm-labels")[2]
    for seed, expected in zip((4, 5), case["image"], strict=True):
        with Image.open(tmp_path / f"{seed}.png") as image:
            assert image.mode == "L"
            assert_picture_close(np.asarray(image), expected[..., 0])
    again = str(tmp_path / "again.png")
    done = run("-m", model, "--from-image", str(tmp_path / "5.png"), "-o", again)
    assert done.exit_code == 0, done.output
    assert Path(again).read_bytes() == (tmp_path / "5.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ddpm", ["a cat"], "prompt: this model draws from noise alone"),
        ("ddpm", ["-g", "7.5"], "guidance: this model draws from noise alone"),
        ("ddpm-labels", [], "this model needs a label (--label)"),
        ("sd15", [], "no prompt is given"),
        ("sd15", ["a cat", "--label", "1"], "this model draws from a prompt"),
    ],
)
def test_one_line_errors(name: str, options: list[str], words: str, tmp_path: Path) -> None:
    done = run("-m", str(checkpoint(name)), *options, "-o", str(tmp_path / "x.png"))
    assert done.exit_code == 2 and words in done.output and done.output.count("\n") == 1
    assert not list(tmp_path.iterdir())
