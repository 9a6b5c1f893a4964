"""T2I-Adapters against diffusers; how they are opened, told and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pickle_files
import pytest
from click.testing import CliRunner, Result
from folders import write_json
from golden_data import cases, checkpoint, photo
from golden_runs import Opened, assert_drawn_again
from PIL import Image
from safetensors.numpy import save_file
from t2i_files import original_names, t2i_config, t2i_tensors, write_t2i_adapter

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.convert import open_controlnet, open_t2i_adapter
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import T2IAdapterConfig, UNet2DConditionConfig
from mlxdiff.networks.cost import operations
from mlxdiff.networks.params import expected_parameters
from mlxdiff.report.info import describe
from mlxdiff.run.additions.t2i_adapter import T2IAdapter
from mlxdiff.run.kind import Network
from mlxdiff.run.memory import Device, UNetRun

CASES = cases("t2i-adapter")
SMALL: dict[str, Any] = {"seed": 0, "width": 32, "height": 32, "steps": 2}


@pytest.mark.parametrize("case", CASES, ids=[c["case"] for c in CASES])
def test_pictures_equal_diffusers(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend)


def unet_of(model: str) -> UNet2DConditionConfig:
    return UNet2DConditionConfig.from_dict(read_json(checkpoint(model) / "unet/config.json"))


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("name", "model"), [("full", "sd15"), ("grey", "sd15"), ("light", "sd15"), ("xl", "sdxl")]
)
@pytest.mark.parametrize("form", ["original", "original .pth", "diffusers", "diffusers bare"])
def test_one_file_is_what_the_folder_is(tmp_path: Path, name: str, model: str, form: str) -> None:
    expected = open_t2i_adapter(write_t2i_adapter(tmp_path / "net", name, model), unet_of(model))
    path = tmp_path / f"t2iadapter.{'pth' if 'pth' in form else 'safetensors'}"
    if form.startswith("original"):
        tensors = {k: v.astype(np.float16) for k, v in original_names(name, model).items()}
    else:
        bare = "" if form.endswith("bare") else "adapter."
        tensors = {
            bare + k.removeprefix("adapter."): v.astype(np.float16)
            for k, v in t2i_tensors(name, model).items()
        }
    if path.suffix == ".pth":
        path.write_bytes(pickle_files.saved(tensors, wrap="adapter"))
    else:
        save_file(tensors, path)
    found = open_t2i_adapter(path, unet_of(model))
    assert found.config == expected.config
    ours, theirs = found.tensors(), expected.tensors()
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[key].read())
    said = describe(str(path))
    assert said["kind"] == "a T2I-Adapter" and "t2i_adapters" in said["use"]
    assert describe(str(tmp_path / "net"))["kind"] == "a T2I-Adapter"


def test_the_published_adapters_fit_the_published_models() -> None:
    """Names and shapes of t2iadapter_canny_sd15v2 and t2i-adapter-canny-sdxl-1.0."""
    shapes = expected_parameters(T2IAdapterConfig.from_dict({"_class_name": "T2IAdapter"}))
    assert shapes["adapter.conv_in.weight"] == (320, 3, 3, 192)
    assert shapes["adapter.body.2.in_conv.weight"] == (1280, 1, 1, 640)
    assert shapes["adapter.body.3.resnets.1.block2.weight"] == (1280, 1, 1, 1280)
    xl = {"adapter_type": "full_adapter_xl", "downscale_factor": 16}
    assert expected_parameters(T2IAdapterConfig.from_dict(xl))["adapter.conv_in.weight"][3] == 768
    light = {"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4}
    shapes = expected_parameters(T2IAdapterConfig.from_dict(light))
    assert shapes["adapter.body.0.in_conv.weight"] == (80, 1, 1, 192)
    assert shapes["adapter.body.3.out_conv.weight"] == (1280, 1, 1, 320)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["control_model.input_hint_block.0.weight"], "a ControlNet; give it with controlnets"),
        (["style_embedding", "transformer_layes.0.ln_1.weight"], "a style T2I-Adapter; .+ip_ada"),
        (["lora_unet_down.lora_up.weight"], "a LoRA"),
        (["body.0.skep.weight", "body.0.block1.weight"], "first structure"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, names: list[str], says: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: np.ones((2, 2), np.float16) for name in names}, path)
    with pytest.raises(CheckpointError, match=says):
        open_t2i_adapter(path, unet_of("sd15"))


def test_given_as_a_controlnet(tmp_path: Path) -> None:
    path = tmp_path / "t2i.safetensors"
    save_file(original_names("full", "sd15"), path)
    with pytest.raises(CheckpointError, match="a T2I-Adapter; give it with t2i_adapters"):
        open_controlnet(path, unet_of("sd15"))
    folder = write_t2i_adapter(tmp_path / "net", "full", "sd15")
    with pytest.raises(CheckpointError, match="is a T2IAdapter, not a ControlNet"):
        open_controlnet(folder, unet_of("sd15"))


@pytest.mark.parametrize("shape", [None, (), (2, 2), (0, 8, 3, 3), (7, 9, 3, 3)])
@pytest.mark.parametrize("name", ["full", "light"])
def test_files_that_are_damaged(tmp_path: Path, name: str, shape: tuple[int, ...] | None) -> None:
    """Whatever tensor has another shape, or is not there, it is named or the structure refused."""
    tensors, path, unet = original_names(name, "sd15"), tmp_path / "x.safetensors", unet_of("sd15")
    for key in list(tensors)[::5]:
        other = {} if shape is None else {key: np.zeros(shape, np.float16)}
        save_file({k: v for k, v in tensors.items() if k != key} | other, path)
        with pytest.raises((CheckpointError, ConfigError)):
            open_t2i_adapter(path, unet)


@pytest.mark.parametrize(
    ("made_for", "used_with"),
    [("full", "sdxl"), ("xl", "sd15"), ("full", "sd21v"), ("light", "sdxl")],
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_another_family_is_refused(
    tmp_path: Path, made_for: str, used_with: str, form: str
) -> None:
    model = "sdxl" if made_for == "xl" else "sd15"
    path = tmp_path / "net"
    if form == "folder":
        write_t2i_adapter(path, made_for, model)
    else:
        path = path.with_suffix(".safetensors")
        save_file(original_names(made_for, model), path)
    with pytest.raises(CheckpointError, match=r"kind of model|do not divide"):
        mlxdiff.load(checkpoint(used_with), backend="numpy", t2i_adapters=path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_class_name": "MultiAdapter"}, "is a MultiAdapter"),
        ({"adapter_type": "huge"}, "'full_adapter' or 'full_adapter_xl' or 'light_adapter'"),
        ({"in_channels": 4}, "in_channels"),
        ({"new_key": 1}, "unknown key"),
        ({"channels": [16, 32, 48, 32]}, "another kind of model"),
        ({"downscale_factor": 16}, "another kind of model"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = write_t2i_adapter(tmp_path / "net", "full", "sd15")
    write_json(path / "config.json", t2i_config("full", "sd15", **changes))
    with pytest.raises((ConfigError, CheckpointError), match=says):
        open_t2i_adapter(path, unet_of("sd15"))


# ----------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize(
    ("nets", "adapters", "arguments", "says"),
    [
        (0, 1, {}, "1 T2I-Adapter and no control image"),
        (1, 1, {"control_image": photo(8, 8)}, "1 ControlNet and 1 T2I-Adapter and 1 control ima"),
        (1, 1, {"control_image": photo(8, 8)}, "those of ControlNets first"),
        (0, 2, {"control_scale": [1.0] * 3}, "3 values of control_scale for 2 T2I-Adapters"),
        (0, 1, {"control_mode": "depth"}, "this T2I-Adapter knows one type of picture"),
        (0, 1, {"guess_mode": True}, "there is no ControlNet"),
        (0, 1, {"width": 36}, "multiple of 8"),
    ],
)
def test_arguments_that_are_refused(
    nets: int, adapters: int, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    pipe = opened("sd15", controlnets=["first"] * nets, t2i_adapters=["full"] * adapters)
    if "control ima" not in says and "first" not in says:
        arguments = {"control_image": [photo(8, 8)] * (nets + adapters)} | arguments
    with pytest.raises(UsageError, match=says):
        pipe.settings("a", **arguments)


def test_a_size_that_the_adapter_does_not_take(opened: Opened) -> None:
    pipe = opened("sdxl", t2i_adapters=["xl"])
    with pytest.raises(UsageError, match=r"width 40 is not a multiple of 16, .+ 32 or 48"):
        pipe.settings("a", control_image=photo(8, 8), width=40, height=32)


def test_a_model_without_such_a_part() -> None:
    for model, says in (("pix2pix", "cannot be combined with a T2I-Adapter"), ("ddpm", "no part")):
        with pytest.raises(UsageError, match=says):
            mlxdiff.load(checkpoint(model), backend="numpy", t2i_adapters="nothing")


def test_a_scale_of_zero_changes_nothing(opened: Opened) -> None:
    without = opened("sd15").generate("a", **SMALL)
    pipe = opened("sd15", t2i_adapters=["full"])
    off = pipe.generate("a", control_image=photo(32, 32), control_scale=0, **SMALL)
    assert np.array_equal(off.latents, without.latents)
    on = pipe.generate("a", control_image=photo(32, 32), **SMALL)
    assert not np.array_equal(on.latents, without.latents)
    assert Network("t2i_adapter", 0) in pipe.model.cache.loaded
    pipe.set_t2i_adapters([])
    assert np.array_equal(pipe.generate("a", **SMALL).latents, without.latents)


@pytest.mark.parametrize("quantize", [None, 8])
def test_low_memory_and_quantized_give_the_same(
    opened: Opened, quantize: int | None, backend: str
) -> None:
    pipe = opened("sd15", backend, quantize=quantize, t2i_adapters=["full", "light"])
    run = SMALL | {"control_image": [photo(32, 32)] * 2, "count": 2, "steps": 3}
    whole = pipe.generate("a", **run).latents
    pipe.save_memory()
    try:
        assert pipe.model.low_memory
        low = pipe.generate("a", **run).latents
    finally:
        pipe.save_memory(False)
    np.testing.assert_allclose(low, whole, atol=2e-4 * np.abs(whole).max())


def test_with_reused_features_and_hires(opened: Opened) -> None:
    """A shallow evaluation gets nothing; an adapter that stops makes the features anew."""
    pipe = opened("sd15", t2i_adapters=["full"])
    run = SMALL | {"steps": 6, "sampler": "euler", "control_image": photo(32, 32)}
    plain = pipe.generate("a", **run).latents
    reused = pipe.generate("a", feature_reuse=2, control_end=0.5, **run).latents
    assert np.isfinite(reused).all() and not np.array_equal(plain, reused)
    larger = pipe.generate("a", hires=2, hires_strength=0.5, **run)
    assert larger.images[0].size == (64, 64)


def test_memory_is_estimated(opened: Opened) -> None:
    pipe = opened("sd15", t2i_adapters=["full"])
    settings = pipe.settings("a", control_image=photo(64, 64), width=64, height=64)
    with_it = pipe.memory(settings)
    (adapter,) = pipe.model.additions.of(T2IAdapter)
    run = UNetRun(Device("numpy", False, "float32"), pipe.model.unet_config, (8, 8), (64, 64), 2)
    assert adapter.work(run).beside == 4 * (64 * 16 + 16 * 32 + 4 * 32 + 32)
    assert adapter.work(run).before > 0
    assert any(str(held) == "t2i_adapter_0" for held in with_it.weights)
    assert operations(adapter.component.config, 64, 64)


def test_the_command_line_and_back_from_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_t2i_adapter(Path("canny"), "full", "sd15")
    Image.fromarray(photo(40, 40)).save("shown.png")

    def run(*arguments: str) -> Result:
        always = ["-m", str(checkpoint("sd15")), "--backend", "numpy"]
        return CliRunner().invoke(main, ["generate", *always, *arguments])

    given = "--t2i-adapter canny --control-image shown.png --control-scale 0.5 --control-end 0.8 "
    given += "--control-preprocess edges -s 3 --steps 2 -W 32 -H 32 -o a.png"
    result = run("a", *given.split())
    assert result.exit_code == 0, result.output
    again = run("--from-image", "a.png", "-o", "b.png")
    assert again.exit_code == 2 and "shown.png: give it with --control-image" in again.stderr
    again = run("--from-image", "a.png", "-o", "b.png", "--control-image", "shown.png")
    assert again.exit_code == 0, again.output
    first, second = (np.asarray(Image.open(name)) for name in ("a.png", "b.png"))
    assert np.array_equal(first, second)
    assert describe("a.png")["t2i_adapter"] == ["canny"]
