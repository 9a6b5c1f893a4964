"""Out again: a diffusers folder and a single file of a model, the same to the bit; baked LoRAs; the
model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file
from single_files import ldm_tensors

import mlxdiff
from mlxdiff.adapters.lora import changed, match, open_lora
from mlxdiff.cli import main
from mlxdiff.convert import convert, open_source
from mlxdiff.convert.export import write_diffusers
from mlxdiff.errors import UsageError
from mlxdiff.run.baking import Baking
from mlxdiff.store.folder import MANIFEST

MODELS = ["sd15", "sd21v", "sdxl", "sdxl-refiner", "sd15-inpainting"]


def values(model: Any) -> dict[str, np.ndarray]:
    return {
        f"{component}/{name}": tensor.read()
        for component in model.components
        for name, tensor in model.tensors(component).items()
    }


def assert_same(one: Any, other: Any) -> None:
    left, right = values(one), values(other)
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


@pytest.mark.parametrize("model", [*MODELS, "ddpm", "bk-sdm-tiny"])
def test_a_diffusers_folder_comes_back(model: str, tmp_path: Path) -> None:
    source = open_source(checkpoint(model))
    convert(checkpoint(model), tmp_path / "converted", dtype="float32")
    convert(tmp_path / "converted", tmp_path / "out", dtype="float32", to="diffusers")
    found = open_source(tmp_path / "out")
    assert found.family == source.family
    assert found.scheduler_config == source.scheduler_config
    assert_same(found, source)
    assert not (tmp_path / "out" / MANIFEST).exists()
    for file in (tmp_path / "out").rglob("*.safetensors"):
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_half_precision_comes_back(tmp_path: Path) -> None:
    convert(checkpoint("sd15"), tmp_path / "half")
    for to, dest in (("diffusers", "folder"), ("single", "file.safetensors")):
        convert(tmp_path / "half", tmp_path / dest, to=to)
        config = {"config": checkpoint("sd15")} if to == "single" else {}
        assert_same(open_source(tmp_path / dest, **config), open_source(tmp_path / "half"))


def test_shards(tmp_path: Path) -> None:
    source = open_source(checkpoint("sd15"))
    write_diffusers(source, tmp_path / "out", "float32", shard_bytes=300_000)
    shards = sorted((tmp_path / "out" / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and shards[0].name.startswith("diffusion_pytorch_model-00001-of-")
    text = (tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text()
    names = set().union(*(load_file(shard) for shard in shards))
    assert set(json.loads(text)["weight_map"]) == names
    assert_same(open_source(tmp_path / "out"), source)


@pytest.mark.parametrize("model", MODELS)
def test_a_single_file_has_ldms_names_and_layout(model: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    report = convert(checkpoint(model), path, dtype="float32", to="single")
    written, expected = load_file(path), ldm_tensors(checkpoint(model))
    marks = written.keys() - expected.keys()
    assert marks == ({"v_pred"} if model == "sd21v" else set())
    assert not expected.keys() - written.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
        assert written[name].shape == array.shape
    with safe_open(path, "np") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-")
    assert report.bytes_out and str(path) in str(report)
    assert_same(open_source(path, config=checkpoint(model)), open_source(checkpoint(model)))


def test_marks_of_v_prediction_and_zero_snr(tmp_path: Path) -> None:
    convert(checkpoint("sdxl"), tmp_path / "x", dtype="float32", to="diffusers")
    where = tmp_path / "x/scheduler/scheduler_config.json"
    config = json.loads(where.read_text())
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    where.write_text(json.dumps(config))
    convert(tmp_path / "x", tmp_path / "v.safetensors", to="single")
    with safe_open(tmp_path / "v.safetensors", "np") as opened:
        assert {"v_pred", "ztsnr"} <= set(opened.keys())
        assert opened.metadata()["modelspec.prediction_type"] == "v"


def test_a_quantized_model_is_written_as_its_values(tmp_path: Path) -> None:
    convert(checkpoint("sd15"), tmp_path / "q", dtype="float32", quantize=8)
    convert(tmp_path / "q", tmp_path / "out", dtype="float32", to="diffusers")
    assert_same(open_source(tmp_path / "out"), open_source(tmp_path / "q"))


@pytest.mark.parametrize("to", ["mlxdiff", "diffusers", "single"])
def test_loras_in_the_weights(to: str, tmp_path: Path) -> None:
    lora = lora_files.write("sd15-kohya", tmp_path)
    dest = tmp_path / ("x.safetensors" if to == "single" else "x")
    change = Baking([(lora, 0.5)])
    convert(checkpoint("sd15"), dest, dtype="float32", to=to, change=change)
    found = open_source(dest, **({"config": checkpoint("sd15")} if to == "single" else {}))
    source = open_source(checkpoint("sd15"))
    configs = {name: source.config(name) for name in ("unet", "text_encoder")}
    one = match(open_lora(lora), 0.5, configs, "sd1")
    for component in source.components:
        expected = changed([one], component, source.tensors(component))
        for name, tensor in found.tensors(component).items():
            np.testing.assert_array_equal(tensor.read(), expected[name].read().astype(np.float32))
    if to != "single":
        assert f"with the LoRA {lora.name} at 0.5" in (dest / "README.md").read_text()
    if to == "mlxdiff":
        small = {"width": 32, "height": 32, "steps": 2, "seed": 0}
        kept = mlxdiff.load(dest, backend="numpy").generate("a", **small).latents
        loaded = mlxdiff.load(checkpoint("sd15"), backend="numpy", loras=[(lora, 0.5)])
        np.testing.assert_array_equal(kept, loaded.generate("a", **small).latents)


def test_the_model_card(tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(checkpoint("sd15"), tmp_path / name, quantize=8)
    card = (tmp_path / "a" / "README.md").read_text()
    assert card == (tmp_path / "b" / "README.md").read_text()
    assert "library_name: mlxdiff" in card and "uniform-8-64 and float16" in card
    assert str(checkpoint("sd15").parent) not in card
    digest = json.loads((tmp_path / "a" / MANIFEST).read_text())["source"]["sha256"]
    assert all(one in card for one in digest.values())
    (tmp_path / "a" / "README.md").write_text("mine")  # may be edited
    assert open_source(tmp_path / "a").family == "sd1"


def run(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_on_the_command_line(tmp_path: Path) -> None:
    lora = lora_files.write("sd15-kohya", tmp_path)
    dest = tmp_path / "x.safetensors"
    words = ("convert", checkpoint("sd15"), dest, "--to", "single", "--lora", f"{lora}:0.5")
    assert run(*words).exit_code == 0
    assert run(*words).exit_code != 0 and dest.is_file()
    assert run(*words, "--force").exit_code == 0
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--to", "single"], "ends in .safetensors"),
        (["x", "--to", "onnx"], "'onnx' is unknown; choose one of mlxdiff, diffusers, single"),
        (["x", "--to", "diffusers", "-q", "4"], "no quantized form"),
        (["x", "--lora", "none.safetensors"], "no such LoRA"),
        (["x", "--lora", "LORA:much"], "not a number"),
    ],
)
def test_wrong_words(words: list[str], message: str, tmp_path: Path) -> None:
    lora = lora_files.write("sd15-kohya", tmp_path)
    words = [word.replace("LORA", str(lora)) for word in words]
    result = run("convert", checkpoint("sd15"), tmp_path / words[0], *words[1:])
    assert result.exit_code != 0 and message in result.stderr, result.stderr
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one file is for sd1, sd2"):
        convert(checkpoint("ddpm"), tmp_path / "x.safetensors", to="single")
    convert(checkpoint("sd15"), tmp_path / "q", quantize=4)
    change = Baking([lora_files.write("sd15-kohya", tmp_path)])
    with pytest.raises(UsageError, match=r"is quantized, .+ rounded away"):
        convert(tmp_path / "q", tmp_path / "out", to="diffusers", change=change)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("variation", r"it reads no text, and LoRAs are trained with text"),
        ("ddpm", "draws pixels|no part"),
    ],
)
def test_a_lora_is_not_baked_into_a_model_that_takes_none(
    model: str, says: str, tmp_path: Path
) -> None:
    """By the rule that refuses one when a picture is drawn."""
    change = Baking([lora_files.write("sd15-kohya", tmp_path)])
    with pytest.raises(UsageError, match=says):
        convert(checkpoint(model), tmp_path / "out", change=change)
    with pytest.raises(UsageError, match=says):
        mlxdiff.load(checkpoint(model), backend="numpy").set_loras(change.given)


# --------------------------------------------------------------------- the reference opens it


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_diffusers_opens_it(model: str, tmp_path: Path) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    convert(checkpoint(model), tmp_path / "out", dtype="float32", to="diffusers")
    convert(checkpoint(model), tmp_path / "x.safetensors", dtype="float32", to="single")
    expected = diffusers.DiffusionPipeline.from_pretrained(
        checkpoint(model), torch_dtype=torch.float32
    )
    folder = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "out", torch_dtype=torch.float32
    )
    single = type(expected).from_single_file(
        str(tmp_path / "x.safetensors"), config=str(checkpoint(model)), torch_dtype=torch.float32
    )
    for part in open_source(checkpoint(model)).components:
        right = getattr(expected, part).state_dict()
        for found in (folder, single):
            left = getattr(found, part).state_dict()
            assert left.keys() == right.keys()
            for name, tensor in right.items():
                assert torch.equal(left[name].to(torch.float32), tensor.to(torch.float32)), name
