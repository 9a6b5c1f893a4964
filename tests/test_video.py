"""Videos (AnimateDiff) against diffusers; adapters, how they are opened, told and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from folders import write_json
from golden_data import GOLDEN, assert_latents_close, assert_picture_close, checkpoint, photo
from golden_runs import Opened
from motion_files import (
    motion_config,
    motion_lora,
    original_names,
    with_positions,
    write_motion,
)
from PIL import Image
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import open_motion_adapter
from mlxdiff.convert.keymap import MOTION_ORIGINAL, map_names
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.condition import Frames
from mlxdiff.networks.config import MotionAdapterConfig, UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.pictures import metadata
from mlxdiff.pictures.videos import describe, encode_video, load_video
from mlxdiff.pipeline import Pipeline, Result
from mlxdiff.report.info import describe as describe_file
from mlxdiff.run.memory import Device, activation_bytes

CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "motion/cases.json").read_text())["videos"]
SMALL: dict[str, Any] = {"seed": 0, "width": 32, "height": 32, "steps": 2}
QUICK = "four sixteen windows sdxl video control".split()


def given_video(kind: str, count: int) -> np.ndarray:
    """As the script of the goldens has it."""
    return np.stack([photo(32 + 4 * i * (kind == "video"), 32)[:32] for i in range(count)])


def unet_of(model: str) -> UNet2DConditionConfig:
    return UNet2DConditionConfig.from_dict(read_json(checkpoint(model) / "unet/config.json"))


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "motion/videos.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize(
    "label",
    [pytest.param(one, marks=[] if one in QUICK else [pytest.mark.slow]) for one in CASES],
)
def test_videos_equal_diffusers(
    label: str, backend: str, opened: Opened, goldens: dict[str, np.ndarray], tmp_path: Any
) -> None:
    arguments = dict(CASES[label])
    model = arguments.pop("model")
    named = {
        part: arguments.pop(part)
        for part in ("motion_adapter", "controlnets", "ip_adapters", "loras")
        if part in arguments
    }
    pipe = opened(model, backend, **named)
    if "motion_lora" in arguments:
        tensors = motion_lora(named["motion_adapter"], model)
        save_file(tensors, tmp_path / "zoom.safetensors")
        pipe.set_loras([(tmp_path / "zoom.safetensors", arguments.pop("motion_lora"))])
    if "image" in arguments:
        kind, count = arguments["image"]
        shown = given_video(kind, count)
        arguments["image"] = list(shown) if kind == "video" else shown[0]
    if "control_video" in arguments:
        frames = given_video("video", *arguments.pop("control_video"))
        arguments["control_image"] = frames[:, ::-1]
    if "ip_image" in arguments:
        arguments["ip_image"] = [photo(*size) for size in arguments["ip_image"]]
    result = pipe.generate(**arguments)
    assert_latents_close(result.latents, goldens[f"{label}/latents"][None])
    assert_picture_close(
        np.stack([np.asarray(frame) for frame in result.videos[0]]), goldens[f"{label}/frames"]
    )


def drawn(pipe: Pipeline, **more: Any) -> Result:
    return pipe.generate("a cat", **SMALL | {"frames": 3} | more)


@pytest.fixture
def pipe(opened: Opened) -> Pipeline:
    return opened("sd15", motion_adapter="v2")


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(("name", "model"), [("v1", "sd15"), ("v2", "sd15"), ("xl", "sdxl")])
@pytest.mark.parametrize("form", ["original", "module.", "diffusers"])
def test_one_file_is_what_the_folder_is(tmp_path: Path, name: str, model: str, form: str) -> None:
    expected = open_motion_adapter(write_motion(tmp_path / "net", name, model), unet_of(model))
    names = with_positions if form == "diffusers" else original_names
    prefix = form if form == "module." else ""
    tensors = {prefix + k: v.astype(np.float16) for k, v in names(name, model).items()}
    save_file(tensors, tmp_path / "mm.safetensors")
    found = open_motion_adapter(tmp_path / "mm.safetensors", unet_of(model))
    assert found.config == expected.config
    assert found.tensors().keys() == expected.tensors().keys()
    key = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_out.0.weight"
    assert np.array_equal(found.tensors()[key].read(), expected.tensors()[key].read())


PUBLISHED = {
    # The counts of tensors and of parameters (in millions) that the original code prints.
    "v1": ({"use_motion_mid_block": False, "motion_max_seq_length": 24}, 560, 417.1376),
    "v2, AnimateLCM, Lightning": ({}, 588, 453.20928),
    "v3": ({"use_motion_mid_block": False}, 560, 417.1376),
    "SDXL beta": (
        {"use_motion_mid_block": False, "block_out_channels": [320, 640, 1280]},
        420,
        None,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_adapter_has_its_place(name: str) -> None:
    """Without weights: the names of the original file, from the shapes that it has."""
    changes, count, millions = PUBLISHED[name]
    config = MotionAdapterConfig.from_dict(changes)
    shapes = expected_parameters(config)
    original = {}
    for key, shape in shapes.items():
        for spelled in spelled_as(key, shape, config.motion_max_seq_length):
            original |= spelled
    assert len(original) == count
    mapped = map_names(original, shapes, MOTION_ORIGINAL, name)
    assert mapped.uses.keys() == shapes.keys()
    if millions is not None:
        assert sum(math.prod(shape) for shape in shapes.values()) == round(millions * 1e6)


def spelled_as(key: str, shape: tuple[int, ...], length: int) -> list[dict[str, Any]]:
    """A parameter in the original names; beside a first norm both tables of positions."""
    place, _, inside = key.partition(".motion_modules.")
    number, _, rest = inside.partition(".")
    whole = f"{place}.motion_modules.{number}.temporal_transformer."
    for new, old in (
        ("attn1.", "attention_blocks.0."),
        ("attn2.", "attention_blocks.1."),
        ("norm1.", "norms.0."),
        ("norm2.", "norms.1."),
        ("norm3.", "ff_norm."),
    ):
        rest = rest.replace(new, old)
    found: list[dict[str, Any]] = [{whole + rest: shape}]
    if rest.endswith("norms.0.weight"):
        block = whole + rest.removesuffix("norms.0.weight")
        for i in range(2):
            table = f"{block}attention_blocks.{i}.pos_encoder.pe"
            found.append({table: (1, length, shape[0])})
    return found


def test_files_that_are_no_adapter_of_this_model(tmp_path: Path) -> None:
    sd15 = unet_of("sd15")
    with pytest.raises(
        CheckpointError, match=r"this motion adapter is for .*its blocks are 16, 24"
    ):
        open_motion_adapter(write_motion(tmp_path / "xl", "xl", "sdxl"), sd15)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_motion_adapter(tmp_path / "nothing", sd15)
    with pytest.raises(CheckpointError, match="is a whole model"):
        open_motion_adapter(checkpoint("sd15"), sd15)
    save_file(motion_lora("v2", "sd15", original=True), tmp_path / "zoom.safetensors")
    with pytest.raises(CheckpointError, match=r"looks like a LoRA; give it with loras"):
        open_motion_adapter(tmp_path / "zoom.safetensors", sd15)
    bent = original_names("v1", "sd15")
    table = next(name for name in bent if name.endswith(".pe"))
    save_file(bent | {table: bent[table] + 0.1}, tmp_path / "bent.safetensors")
    with pytest.raises(CheckpointError, match="positions of another kind"):
        open_motion_adapter(tmp_path / "bent.safetensors", sd15)
    less = {name: one for name, one in bent.items() if not name.endswith(".ff_norm.bias")}
    save_file(less, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        open_motion_adapter(tmp_path / "less.safetensors", sd15)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"conv_in.weight": (8, 9, 3, 3)}, "an AnimateDiff-PIA adapter.*image.*model='svd'"),
        ({"img_encoder.conv_in.weight": (8, 4, 3, 3)}, "an AnimateLCM-I2V adapter.*start from"),
        (
            {"controlnet_cond_embedding.conv_in.weight": (8, 4, 3, 3)},
            "a SparseCtrl encoder.*; use a ControlNet .*control_image",
        ),
        ({"controlnet_cond_embedding.weight": (8, 5, 3, 3)}, "a SparseCtrl encoder"),
        (None, "a HotShot-XL motion adapter.*; use .*animatediff-motion-adapter-sdxl"),
    ],
)
def test_relatives_of_motion_adapters_are_refused_by_name(
    more: dict[str, Any] | None, says: str, tmp_path: Path, pipe: Pipeline
) -> None:
    """Wherever they are given: PIA, AnimateLCM-I2V, SparseCtrl, HotShot-XL."""
    tensors = original_names("v1", "sd15")
    if more is None:
        named = "motion_modules.", "temporal_attentions."
        short = {n: n.replace(*named).replace(".temporal_transformer", "") for n in tensors}
        tensors = {short[name]: tensor for name, tensor in tensors.items()}
    else:
        tensors |= {name: np.zeros(shape, np.float32) for name, shape in more.items()}
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    give: tuple[Callable[[], Any], ...] = (
        lambda: pipe.set_motion_adapter(path),
        lambda: pipe.set_controlnets([path]),
        lambda: mlxdiff.load(path, backend="numpy"),
    )
    for one in give:
        with pytest.raises(CheckpointError, match=f"looks like {says}") as caught:
            one()
        assert "\n" not in str(caught.value)


def test_their_folders_are_refused_by_name(tmp_path: Path, pipe: Pipeline) -> None:
    write_json(tmp_path / "pia/config.json", motion_config("v1", "sd15", conv_in_channels=9))
    with pytest.raises(CheckpointError, match="is an AnimateDiff-PIA adapter, not supported"):
        pipe.set_motion_adapter(tmp_path / "pia")
    write_json(tmp_path / "sparse/config.json", {"_class_name": "SparseControlNetModel"})
    for give in (pipe.set_motion_adapter, lambda path: pipe.set_controlnets([path])):
        with pytest.raises(CheckpointError, match=r"is a SparseControlNetModel.*use a ControlNet"):
            give(tmp_path / "sparse")
    with pytest.raises(CheckpointError, match=r"one component alone \(SparseControlNetModel\)"):
        mlxdiff.load(tmp_path / "sparse", backend="numpy")
    for name, says in (
        ("HotshotXLPipeline", "use an AnimateDiff adapter for SDXL"),
        ("PIAPipeline", "start from the picture"),
        ("AnimateDiffPipeline", "a motion adapter in it; give a model of pictures"),
        ("AnimateDiffSparseControlNetPipeline", "use a ControlNet"),
    ):
        write_json(tmp_path / name / "model_index.json", {"_class_name": name})
        with pytest.raises(CheckpointError, match=f"is a {name}: .*{says}"):
            mlxdiff.load(tmp_path / name, backend="numpy")


def test_the_name_says_how_an_adapter_is_used(tmp_path: Path) -> None:
    tensors = with_positions("v2", "sd15")
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    ways = {
        "animatediff_lightning_4step_diffusers": ("euler", "trailing", 4, 1.0),
        "AnimateLCM_sd15_t2v": ("lcm", "normal", 6, 2.0),
        "mm_sd_v15_v2": ("ddim", "linspace", 20, 7.5),
    }
    for name, way in ways.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        pipe.set_motion_adapter(tmp_path / f"{name}.safetensors")
        found = pipe.settings("a", width=32, height=32)
        assert (found.sampler, found.schedule, found.steps, found.guidance) == way
        assert pipe.settings("a", width=32, height=32, steps=3).steps == 3
    assert describe_file(str(tmp_path / "mm_sd_v15_v2.safetensors"))["use"] == (
        "give it with motion_adapter"
    )


def test_a_motion_lora_of_the_original_code_is_the_same(tmp_path: Path, pipe: Pipeline) -> None:
    for original in (False, True):
        save_file(
            motion_lora("v2", "sd15", original=original), tmp_path / f"{original}.safetensors"
        )
    pipe.set_loras([tmp_path / "False.safetensors"])
    first = pipe.loras[0].deltas["unet"]
    pipe.set_loras([tmp_path / "True.safetensors"])
    assert pipe.loras[0].deltas["unet"].keys() == first.keys()
    with pytest.raises(CheckpointError):  # its weights would be gone
        pipe.set_motion_adapter(None)
    assert pipe.model.draws_video
    pipe.set_loras([])
    pipe.set_motion_adapter(None)
    assert not pipe.model.draws_video


# ------------------------------------------------------------------------------------------ windows


def test_windows_weigh_each_frame_once() -> None:
    assert Frames(16).windows == Frames(16, 16).windows == [(0, [1.0] * 16)]
    windows = Frames(24, 16, 4).windows
    assert [start for start, _ in windows] == [0, 4, 8]
    assert [start for start, _ in Frames(26, 16, 4).windows] == [0, 4, 8, 10]
    for frames in (Frames(24, 16, 4), Frames(26, 16, 4), Frames(7, 3, 2)):
        totals = np.zeros(frames.count)
        for start, weights in frames.windows:
            totals[start : start + len(weights)] += weights
        np.testing.assert_allclose(totals, 1.0)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hires": 2.0}, "hires: it is for pictures, and this model draws videos"),
        ({"region": "0,0,1,1:a"}, "region: it is for pictures"),
        ({"feature_reuse": 3}, "feature_reuse: it is for pictures"),
        ({"vary": (1, 0.5)}, "vary: it is for pictures"),
        ({"image": photo(32, 32), "mask": photo(32, 32)}, "mask: it is for pictures"),
        ({"context_length": 40, "frames": 50}, "knows at most 32 frames at a time"),
        ({"context_length": 4, "context_stride": 5}, "leave no frame out"),
        ({"frames": 20, "rng": "gpu"}, "how CUDA shuffles is not known"),
        ({"image": [photo(32, 32)] * 2, "frames": 3}, "the video to start from has 2"),
        ({"noise": np.zeros((1, 3, 4, 4), np.float32), "frames": 3}, r"\(videos, F, H/f, W/f, C\)"),
    ],
)
def test_what_a_video_does_not_take(pipe: Pipeline, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.settings("a", **{"width": 32, "height": 32, **options})


def test_what_an_adapter_is_not_combined_with(opened: Opened) -> None:
    pipe = opened("sd15", motion_adapter="v2", t2i_adapters=["full"])
    with pytest.raises(UsageError, match="t2i_adapters cannot be combined with a motion adapter"):
        pipe.settings("a", width=32, height=32, control_image=photo(32, 32))
    pipe = opened("sd15", motion_adapter="v2", controlnets=["first"])
    with pytest.raises(UsageError, match="the video has 2 frames, and frames is 3"):
        video = np.stack([photo(32, 32)] * 2)
        pipe.settings("a", width=32, height=32, frames=3, control_image=video)
    pipe = opened("sdxl", motion_adapter="xl", controlnets=["first"])
    with pytest.raises(UsageError, match="only ControlNets of Stable Diffusion 1"):
        pipe.settings("a", width=32, height=32, control_image=photo(32, 32))
    inpainting = mlxdiff.load(checkpoint("sd15-inpainting"), backend="numpy")
    with pytest.raises(UsageError, match="it cannot be combined with a motion adapter"):
        inpainting.set_motion_adapter("anything")


def test_a_model_of_pictures_takes_no_frames(opened: Opened) -> None:
    pipe = opened("sd15")
    for options in ({"frames": 4}, {"fps": 8}, {"context_length": 4}, {"image": [photo(32, 32)]}):
        with pytest.raises(UsageError, match="to draw videos give a motion adapter"):
            pipe.settings("a", width=32, height=32, **options)


# ------------------------------------------------------------------------------------------- memory


def test_parts_draw_the_same(pipe: Pipeline, opened: Opened) -> None:
    """In low memory layers see some frames at a time, and the predictions come one by one."""
    expected = drawn(pipe, frames=6).latents
    pipe.save_memory()
    try:
        found = drawn(pipe, frames=6).latents
    finally:
        pipe.save_memory(False)
    assert_latents_close(found, expected)


def test_sixteen_frames_fit_into_three_gigabytes_and_a_half() -> None:
    """Stable Diffusion 1.5 at 512x512 and 4 bits, its adapter in 8: as the estimate has it."""
    motion = MotionAdapterConfig.from_dict({})
    data = {"cross_attention_dim": 768, "attention_head_dim": 8}
    unet = UNet2DConditionConfig.from_dict(data)
    whole = UNet2DConditionConfig(**{**vars(unet), "motion": motion})
    device = Device("mlx", True, "float16")

    def need(frames: Frames) -> int:
        return activation_bytes(whole, device, 64, 64, batch=2, expands=True, frames=frames)

    parts, at_once = need(Frames(16, at_once=4)), need(Frames(16))
    assert parts < 0.6 * at_once
    weights = sum(math.prod(s) for s in expected_parameters(unet).values()) * 4.7 / 8
    weights += sum(math.prod(s) for s in expected_parameters(motion).values()) * 8.6 / 8
    assert parts + weights < 3.5 * 2**30


# ------------------------------------------------------------------------------------------- output


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    opened = Opened(tmp_path_factory.mktemp("video"))
    return drawn(opened("sd15", motion_adapter="v2"), fps=10)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.mp4"])
def test_a_video_file_says_how_it_was_made(tmp_path: Path, result: Result, name: str) -> None:
    if name == "a.mp4":
        pytest.importorskip("av")
    (path,) = result.save(tmp_path / name)
    said = describe(path)
    assert (said["frames"], said["fps"], said["prompt"]) == (3, 10.0, "a cat")
    frames = load_video(path)
    assert len(frames) == 3 and frames[0].shape == (32, 32, 3)
    if name == "a.png":
        assert np.array_equal(frames[2], np.asarray(result.videos[0][2]))
    if name != "a.mp4":
        assert metadata.read(path).seed == 0
    with pytest.raises(UsageError, match="already exists"):
        result.save(path)


def test_frames_are_files(tmp_path: Path, result: Result) -> None:
    paths = result.save(tmp_path / "f-{frame:02d}.png")
    assert [path.name for path in paths] == ["f-00.png", "f-01.png", "f-02.png"]
    assert np.array_equal(load_video(tmp_path)[1], np.asarray(result.videos[0][1]))
    with pytest.raises(UsageError, match="frame by frame"):
        result.save(tmp_path / "a.jpg")


def test_steps_and_results_of_videos(pipe: Pipeline) -> None:
    shapes = []
    result = drawn(pipe, count=2, on_step=lambda step: shapes.append(step.latents.shape))
    assert shapes == [(3, 4, 4, 4)] * 4
    assert result.latents.shape == (2, 3, 4, 4, 4)
    assert [len(video) for video in result.videos] == [3, 3]
    assert repr(result).startswith("<Result: 2 videos, 32x32")
    step = next(iter(pipe.stream("a cat", **SMALL, frames=3)))
    assert step.denoised.shape == (3, 4, 4, 4) and step.sketch().size == (4, 4)
    assert step.preview().size == (32, 32)


def test_the_command_writes_videos(tmp_path: Path, opened: Opened) -> None:
    adapter = opened.motion_adapter("sd15", "v2")
    words = ["generate", "a cat", "-m", str(checkpoint("sd15")), "--motion-adapter", str(adapter)]
    words += "--frames 3 -W 32 -H 32 --steps 2 -s 1 --backend numpy --quiet".split()
    path = tmp_path / "cat.gif"
    done = CliRunner().invoke(main, [*words, "-o", str(path), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["path"], said["frames"], said["fps"]) == (str(path), 3, 8.0)
    with Image.open(path) as picture:
        assert picture.n_frames == 3
    each = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "f{frame}.png"), "-i", str(path)])
    assert each.exit_code == 0 and (tmp_path / "f2.png").exists()
    for name, match in (("a.jpg", "frame by frame"), ("f{frame}.png", "already exists")):
        failed = CliRunner().invoke(main, [*words, "-o", str(tmp_path / name)])
        assert failed.exit_code == 2 and match in failed.output


def test_a_damaged_video_is_an_error_of_one_line(tmp_path: Path) -> None:
    frames = [Image.fromarray(photo(16, 16)) for _ in range(3)]
    data = encode_video(frames, ".gif", 8)
    (tmp_path / "cut.gif").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError) as caught:
        load_video(tmp_path / "cut.gif")
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no frame"):
        load_video(tmp_path / "empty")
