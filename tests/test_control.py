"""ControlNet against diffusers; how it is opened, told and refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from control_files import controlnet_config, controlnet_tensors, write_controlnet
from fake_hub import serve
from folders import write_json
from golden_data import cases, checkpoint, photo
from golden_runs import Opened, assert_drawn_again
from PIL import Image
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import open_controlnet
from mlxdiff.convert.keymap import ldm_controlnet
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import ControlNetConfig, UNet2DConditionConfig
from mlxdiff.pictures.preprocess import PREPROCESSORS, edges
from mlxdiff.run.additions.controlnet import Control

CASES = cases("control")
SMALL: dict[str, Any] = {"seed": 0, "width": 32, "height": 32, "steps": 2}


@pytest.mark.parametrize("case", CASES, ids=[c["case"] for c in CASES])
def test_pictures_equal_diffusers(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend)


# ---------------------------------------------------------------------------------------- the files


def unet_of(model: str) -> UNet2DConditionConfig:
    return UNet2DConditionConfig.from_dict(read_json(checkpoint(model) / "unet/config.json"))


def ldm_names(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """A ControlNet's tensors under the names of the original code, without prefix."""
    tensors = controlnet_tensors(config, seed)
    names = ldm_controlnet(ControlNetConfig.from_dict(config)).names
    assert names is not None and len(names) == len(tensors)
    return {name: tensors[piece.target].astype(np.float16) for name, (piece,) in names.items()}


def test_the_names_of_the_original_code() -> None:
    """Some of the names in control_sd15_canny.pth, and where diffusers' conversion puts them."""
    config = ControlNetConfig.from_dict({"_class_name": "ControlNetModel"})
    names = ldm_controlnet(config).names
    assert names is not None
    for source, target in {
        "input_hint_block.0.weight": "controlnet_cond_embedding.conv_in.weight",
        "input_hint_block.2.weight": "controlnet_cond_embedding.blocks.0.weight",
        "input_hint_block.12.bias": "controlnet_cond_embedding.blocks.5.bias",
        "input_hint_block.14.weight": "controlnet_cond_embedding.conv_out.weight",
        "zero_convs.0.0.weight": "controlnet_down_blocks.0.weight",
        "zero_convs.11.0.bias": "controlnet_down_blocks.11.bias",
        "middle_block_out.0.weight": "controlnet_mid_block.weight",
        "time_embed.2.bias": "time_embedding.linear_2.bias",
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.11.0.in_layers.2.weight": "down_blocks.3.resnets.1.conv1.weight",
        "middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
    }.items():
        assert [piece.target for piece in names[source]] == [target]


@pytest.mark.parametrize("model", ["sd15", "sd21v", "sdxl"])
@pytest.mark.parametrize("form", ["ldm", "ldm in a whole model", "ldm bare", "diffusers"])
def test_one_file_is_what_the_folder_is(tmp_path: Path, model: str, form: str) -> None:
    config, path = controlnet_config(model), tmp_path / "control.safetensors"
    if form == "diffusers":
        tensors = controlnet_tensors(config, 7)
        save_file({k: v.astype(np.float16) for k, v in tensors.items()}, path)
    else:
        prefix = "" if form == "ldm bare" else "control_model."
        named = {f"{prefix}{name}": array for name, array in ldm_names(config, 7).items()}
        if form == "ldm in a whole model":
            named["model.diffusion_model.out.2.bias"] = np.ones(4, np.float16)
        save_file(named, path)
    unet = unet_of(model)
    found = open_controlnet(path, unet)
    expected = open_controlnet(write_controlnet(tmp_path / "folder", model, 7), unet)
    for name in (
        "down_blocks mid_block residual_channels factor use_linear_projection flip_sin_to_cos "
        "freq_shift norm_eps addition_time_embed_dim projection_class_embeddings_input_dim"
    ).split():
        assert getattr(found.config, name) == getattr(expected.config, name), name
    ours, theirs = found.tensors(), expected.tensors()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert np.array_equal(tensor.read(), theirs[name].read()), name


def test_a_shuffle_file_is_known_by_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    save_file(ldm_names(controlnet_config("sd15"), 1), path)
    config: Any = open_controlnet(path, unet_of("sd15")).config
    assert config.global_pool_conditions and "shuffle" in caplog.text


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["lora_controlnet", "input_blocks.0.0.up"], "a Control-LoRA"),
        (["difference", "control_model.input_blocks.0.0.weight"], "difference to a model's U-Net"),
        (["body.0.resnets.0.block1.weight"], "a T2I-Adapter"),
        (["lora_unet_down.lora_up.weight"], "a LoRA"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a whole model in one file"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, names: list[str], says: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: np.ones((2, 2), np.float16) for name in names}, path)
    with pytest.raises(CheckpointError, match=says):
        open_controlnet(path, unet_of("sd15"))


@pytest.mark.parametrize("shape", [None, (), (2, 2), (0, 8, 3, 3), (7, 9, 3, 3)])
def test_files_that_are_damaged(tmp_path: Path, shape: tuple[int, ...] | None) -> None:
    """Whatever tensor has another shape, or is not there, it is named or the structure refused."""
    tensors = ldm_names(controlnet_config("sdxl"), 1)
    path, unet = tmp_path / "net.safetensors", unet_of("sdxl")
    for name in list(tensors)[::9]:
        other = {} if shape is None else {name: np.zeros(shape, np.float16)}
        save_file({k: v for k, v in tensors.items() if k != name} | other, path)
        with pytest.raises((CheckpointError, ConfigError)):
            open_controlnet(path, unet)


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize(
    ("made_for", "used_with", "says"),
    [
        ("sd15", "sd21v", "another kind of model"),
        ("sd21v", "sd15", "another kind of model"),
        ("sd15", "sdxl", "another kind of model"),
    ],
)
def test_another_family_is_refused(
    tmp_path: Path, form: str, made_for: str, used_with: str, says: str
) -> None:
    path = tmp_path / "net"
    if form == "folder":
        write_controlnet(path, made_for)
    else:
        path = path.with_suffix(".safetensors")
        save_file(ldm_names(controlnet_config(made_for), 1), path)
    with pytest.raises(CheckpointError, match=says):
        mlxdiff.load(checkpoint(used_with), backend="numpy", controlnets=path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cross_attention_dim": 40}, "its text is 40 wide, the model's 32"),
        ({"conditioning_embedding_out_channels": [4, 8, 8]}, "4 pixels for each latent"),
        ({"in_channels": 9}, "9 latent channels"),
        ({"layers_per_block": 1}, "another kind of model"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "is for an SDXL model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = write_controlnet(tmp_path / "net", "sd15", **changes)
    with pytest.raises((CheckpointError, UsageError), match=says):
        mlxdiff.load(checkpoint("sd15"), backend="numpy", controlnets=[path])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_class_name": "ControlNetXSAdapter"}, "is a ControlNetXSAdapter"),
        ({"num_control_type": 6}, "num_control_type"),
        ({"mid_block_type": None}, "a mid block"),
        ({"conditioning_channels": 4}, "conditioning_channels"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "'rgb' or 'bgr'"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"new_key": 1}, "unknown key"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = write_controlnet(tmp_path / "net", "sd15")
    write_json(path / "config.json", controlnet_config("sd15", **changes))
    with pytest.raises((ConfigError, CheckpointError), match=says):
        open_controlnet(path, unet_of("sd15"))


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of its own, a folder of a model's, a file (as the original ones are called)."""
    folder = write_controlnet(tmp_path / "net", "sd15")
    unet = unet_of("sd15")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    original = tmp_path / "control.pth"
    save_file(ldm_names(controlnet_config("sd15"), 0), original)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    expected = open_controlnet(folder, unet)
    for i, (there, path) in enumerate(
        (
            (files, "org/name"),
            ({f"controlnet/{name}": data for name, data in files.items()}, "org/name"),
            ({"a/control_sd15.pth": original.read_bytes()}, "org/name/a/control_sd15.pth"),
        )
    ):
        with serve(there, monkeypatch) as server:
            server.commit = f"{i}" * 40
            found = open_controlnet(f"{path}@{server.commit}", unet)
        assert found.provenance == {"source": path, "revision": server.commit}
        assert found.config.down_blocks == expected.config.down_blocks
        ours, theirs = found.tensors(), expected.tensors()
        assert all(np.array_equal(t.read(), theirs[name].read()) for name, t in ours.items())


def test_paths_that_hold_no_controlnet(tmp_path: Path) -> None:
    unet = unet_of("sd15")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_controlnet(tmp_path / "none", unet)
    with pytest.raises(CheckpointError, match="is a whole model"):
        open_controlnet(checkpoint("sd15"), unet)
    with pytest.raises(CheckpointError, match="not a ControlNet"):
        open_controlnet(checkpoint("sd15") / "vae", unet)
    path = write_controlnet(tmp_path / "net", "sd15")
    (path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_controlnet(path, unet)


# ----------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize(
    ("count", "arguments", "says"),
    [
        (0, {"control_image": photo(8, 8)}, "there is no ControlNet"),
        (0, {"control_scale": 0.5, "control_end": 0.5}, "control_scale, control_end"),
        (0, {"guess_mode": True}, "there is no ControlNet"),
        (1, {}, "1 ControlNet and no control image"),
        (1, {"control_image": [photo(8, 8)] * 2}, "1 ControlNet and 2 control images"),
        (2, {"control_image": photo(8, 8)}, "2 ControlNets and 1 control image"),
        (2, {"control_scale": [1.0] * 3}, "3 values of control_scale for 2 ControlNets"),
        (1, {"control_scale": "strong"}, "control_scale is 'strong'; expected a number"),
        (1, {"control_scale": float("nan")}, "expected a number"),
        (1, {"control_start": -0.1}, "control_start is -0.1; expected a number, 0 to 1"),
        (1, {"control_end": 1.5}, "control_end is 1.5"),
        (1, {"control_start": 0.5, "control_end": 0.5}, "must be less than"),
        (1, {"control_preprocess": "canny"}, "none, edges, grey, tile"),
        (1, {"control_preprocess": "depth"}, "give a Marigold model"),
        (1, {"guess_mode": "yes"}, "true or false"),
        (1, {"control_image": "none.png"}, "none.png"),
    ],
)
def test_arguments_that_are_refused(
    count: int, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    pipe = opened("sd15", controlnets=["first"] * count)
    if count and "control image" not in says:
        arguments = {"control_image": [photo(8, 8)] * count} | arguments
    with pytest.raises(UsageError, match=says):
        pipe.settings("a", **arguments)


def test_a_net_of_no_scale_changes_nothing(opened: Opened) -> None:
    without = opened("sd15").generate("a", **SMALL)
    pipe = opened("sd15", controlnets=["first"])
    off = pipe.generate("a", control_image=photo(32, 32), control_scale=0, **SMALL)
    assert np.array_equal(off.latents, without.latents)
    assert not np.array_equal(
        pipe.generate("a", control_image=photo(32, 32), **SMALL).latents, without.latents
    )


def test_which_evaluations_count() -> None:
    control = Control(photo(8, 8), "a", start=0.25, end=0.75)
    assert [control.counts(i, 8) for i in range(8)] == [False, False, *[True] * 4, False, False]


def test_metadata_and_files(
    tmp_path: Path, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "shown.png"
    Image.fromarray(photo(40, 90)).save(path)
    pipe = opened("sd15", controlnets=["first", "second"])
    result = pipe.generate(
        "a", control_image=[path, photo(32, 32)], control_scale=[1, 0.5], guess_mode=True, **SMALL
    )
    assert result.metadata[0].extra == {
        "controlnet": ["first", "second"],
        "control_image": ["shown.png", "(pixels)"],
        "control_scale": [1.0, 0.5],
        "control_start": [0.0, 0.0],
        "control_end": [1.0, 1.0],
        "guess_mode": True,
    }
    assert "90x40 pixels, is stretched to 32x32" in caplog.text


def test_the_command_line_and_back_from_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(opened.controlnet("sd15", "first"), "first")
    Image.fromarray(photo(40, 90)).save("shown.png")

    def run(*arguments: str) -> Result:
        always = ["-m", str(checkpoint("sd15")), "--backend", "numpy"]
        return CliRunner().invoke(main, ["generate", *always, *arguments])

    given = "--controlnet first --control-image shown.png --control-scale 0.5 --control-end 0.8 "
    given += "--control-preprocess edges --guess-mode -s 3 --steps 2 -W 32 -H 32 -o a.png"
    assert run("a", *given.split()).exit_code == 0
    again = run("--from-image", "a.png", "-o", "b.png")
    assert again.exit_code == 2 and "shown.png: give it with --control-image" in again.stderr
    again = run("--from-image", "a.png", "-o", "b.png", "--control-image", "shown.png")
    assert again.exit_code == 0, again.output
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    wrong = run(
        "a", "--controlnet", "first", "--control-image", "shown.png", "--control-scale", "x"
    )
    assert wrong.exit_code == 2 and "'x'; expected a number" in wrong.stderr


@pytest.mark.mlx
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_half_precision_is_finite_and_near(model: str, opened: Opened) -> None:
    net = opened.controlnet(model, "first")
    drawn = [
        mlxdiff.load(checkpoint(model), backend="mlx", dtype=dtype, controlnets=[net])
        .generate("a", control_image=photo(32, 32), **SMALL)
        .latents
        for dtype in ("float32", "float16")
    ]
    assert np.isfinite(drawn[1]).all()
    assert np.abs(drawn[0] - drawn[1]).max() < 0.05 * drawn[0].std()


# ------------------------------------------------------------------------------------ preprocessors


def disc(size: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    inside = np.hypot(x - size / 2, y - size / 2) < size / 4
    return np.repeat(np.where(inside, 220, 30).astype(np.uint8)[..., None], 3, axis=2)


def test_edges_are_thin_and_where_they_belong() -> None:
    found = edges(disc())
    assert found.shape == (64, 64, 3) and set(np.unique(found)) == {0, 255}
    y, x = np.nonzero(found[..., 0])
    assert np.abs(np.hypot(x - 32, y - 32) - 16).max() < 1.6
    # Once round: as many pixels as a circle of this radius has, not twice as many.
    assert 0.8 * 2 * np.pi * 16 < len(y) < 1.2 * 2 * np.pi * 16
    angles = np.sort(np.arctan2(y - 32, x - 32))
    assert np.diff(angles).max() < 0.2


def test_edges_go_on_from_strong_to_weak() -> None:
    """A step whose height falls along it is followed below the upper threshold, not alone."""
    image = np.full((40, 80), 100.0)
    image[20:] += np.linspace(90, 0, 80)
    weak = image.copy()
    weak[:, :40] = 100  # without its strong part
    both, alone = (
        edges(np.repeat(i.astype(np.uint8)[..., None], 3, axis=2))[..., 0] for i in (image, weak)
    )
    assert both[:, 2:44].any(axis=0).all() and not both[:, 55:].any()
    assert not alone[:, 45:].any() and both[:, 20:44].any()


def test_edges_see_colours_of_the_same_brightness() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16], image[:, 16:] = (255, 0, 0), (0, 130, 0)
    assert edges(image)[4:-4, 14:18].any()
    assert not edges(np.full((16, 16, 3), 90, np.uint8)).any()


def test_grey_and_tile() -> None:
    picture = photo(40, 56)
    expected = np.asarray(Image.fromarray(picture).convert("L")).astype(int)
    grey = PREPROCESSORS["grey"](picture)
    assert np.abs(grey.astype(int) - expected[..., None]).max() <= 1
    tile = PREPROCESSORS["tile"](picture)
    assert tile.shape == picture.shape
    means = picture.reshape(5, 8, 7, 8, 3).mean(axis=(1, 3))
    assert np.abs(tile[3::8, 3::8] - means).max() < 60
    assert np.abs(np.diff(tile.astype(int), axis=1)).mean() < 8
    assert PREPROCESSORS["none"](picture) is picture
    assert PREPROCESSORS["tile"](picture[:5, :3]).shape == (5, 3, 3)


def test_a_preprocessor_is_used(opened: Opened) -> None:
    pipe = opened("sd15", controlnets=["first"])
    drawn = pipe.generate("a", control_image=disc(32), control_preprocess="edges", **SMALL)
    ready = pipe.generate("a", control_image=edges(disc(32)), **SMALL)
    assert np.array_equal(drawn.latents, ready.latents)
    assert drawn.metadata[0].extra["control_preprocess"] == ["edges"]


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [
        {"cross_attention_dim": 768},
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    ],
    ids=["sd1", "sd2"],
)
def test_original_names_go_where_diffusers_puts_them(changes: dict[str, Any]) -> None:
    """Full size, by its own conversion: every name of the original code, to the same place."""
    import torch
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    config = {
        "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        **changes,
    }
    names = ldm_controlnet(ControlNetConfig.from_dict(config)).names
    assert names is not None
    numbered = {f"control_model.{n}": torch.tensor(float(i)) for i, n in enumerate(names)}
    converted = convert_controlnet_checkpoint(numbered, config)
    ours = {piece.target: float(i) for i, (piece,) in enumerate(names.values())}
    assert ours == {name: float(number) for name, number in converted.items()}
