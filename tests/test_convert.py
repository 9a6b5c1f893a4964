"""Conversion of diffusers folders: all spellings, all faults, and no half-written folder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import (
    UNET,
    VAE,
    diffusers_folder,
    random_tensors,
    save_bfloat16,
    write_json,
    write_tokenizer,
)
from golden_data import checkpoint
from safetensors.numpy import load_file, save_file

from mlxdiff.convert import DiffusersFolder, convert, describe, detect, open_source
from mlxdiff.errors import CheckpointError, ConfigError, HubError, MlxdiffError, UsageError
from mlxdiff.networks.config import UNet2DConditionConfig
from mlxdiff.store import hub
from mlxdiff.store.folder import open_folder
from mlxdiff.store.reference import Reference
from mlxdiff.store.selection import Listing
from mlxdiff.weights.tensors import DTYPES, cast

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("sd1", "sd2", "sdxl")
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
Tensors = dict[str, np.ndarray]


def ohwi(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def listing(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensors]]]:
    root = tmp_path_factory.mktemp("models")
    return {name: (root / name, diffusers_folder(root / name, name)) for name in FAMILIES}


@pytest.fixture
def model(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> Path:
    """Copy the SD 1 folder, so that a test can change it."""
    return Path(shutil.copytree(models["sd1"][0], tmp_path / "in" / "model"))


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def change(model: Path, component: str, function: Callable[[Tensors], Any]) -> None:
    """Rewrite the weights of a component."""
    path = model / component / WEIGHTS[component]
    arrays = load_file(path)
    function(arrays)
    save_file(arrays, path)


def rename(arrays: Tensors, *pairs: tuple[str, str]) -> None:
    for name in list(arrays):
        new = name
        for old, replacement in pairs:
            new = new.replace(old, replacement)
        arrays[new] = arrays.pop(name)


def same_as_before(model: Path, before: dict[str, Tensors]) -> DiffusersFolder:
    """Open a folder and compare all its tensors with those that the model was made from."""
    opened = open_source(model)
    assert isinstance(opened, DiffusersFolder)
    for component, arrays in before.items():
        tensors = opened.tensors(component)
        assert set(tensors) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(tensors[name].read(), ohwi(array), name)
    return opened


# ------------------------------------------------------------------------------------- the good way


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_arrays_equal_the_source_up_to_layout(
    models: Any, tmp_path: Path, family: str, dtype: str
) -> None:
    path, before = models[family]
    report = convert(path, tmp_path / "out", dtype=dtype)
    result = open_folder(tmp_path / "out")
    result.verify()
    assert (result.family, result.dtype, report.family) == (family, dtype, family)
    assert set(result.components) == set(before)
    for component, arrays in before.items():
        tensors = result.tensors(component)
        assert set(tensors) == set(arrays)
        for name, array in arrays.items():
            want = ohwi(array)
            if dtype == "bfloat16":
                want = (cast(want, dtype, name).astype(np.uint32) << 16).view(np.float32)
            assert tensors[name].dtype == DTYPES[dtype]
            np.testing.assert_array_equal(tensors[name].read(), want)
    assert result.tokenizer("tokenizer").pad_token_id == (0 if family == "sd2" else 7)
    if family == "sdxl":
        assert result.tokenizer("tokenizer_2").pad_token_id == 0


def test_report(models: Any, tmp_path: Path) -> None:
    path, before = models["sd1"]
    report = convert(path, tmp_path / "out")
    data = json.loads(json.dumps(report.to_dict()))
    assert [c["name"] for c in data["components"]] == ["text_encoder", "unet", "vae"]
    for component in data["components"]:
        arrays = before[component["name"]]
        assert component["converted"] == len(arrays) == sum(component["transforms"].values())
        assert component["parameters"] == sum(a.size for a in arrays.values())
        assert component["bytes_in"] == component["bytes_out"] == 2 * component["parameters"]
    text = str(report)
    assert "unet: 208 tensors, 793 k parameters, 1.59 MB (F16) -> 1.59 MB" in text
    assert "note: safety_checker omitted" in text and "note: feature_extractor omitted" in text
    assert "image_encoder" not in text  # [null, null]: there is none


def test_provenance_names_every_file(models: Any, tmp_path: Path) -> None:
    path, _ = models["sdxl"]
    convert(path, tmp_path / "out")
    origin = open_folder(tmp_path / "out").provenance
    assert origin["source"] == "sdxl" and "revision" not in origin
    assert set(origin["sha256"]) == {
        *("model_index.json", "scheduler/scheduler_config.json"),
        *(f"{name}/config.json" for name in WEIGHTS),
        *(f"{name}/{file}" for name, file in WEIGHTS.items()),
        *(f"tokenizer{n}/{file}" for n in ("", "_2") for file in ("vocab.json", "merges.txt")),
    }


def test_progress_covers_reading_and_writing(models: Any, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert(models["sd1"][0], tmp_path / "out", progress=lambda *call: calls.append(call))
    assert len({total for _, total, _ in calls}) == 1
    done = [done for done, _, _ in calls]
    assert done == sorted(done) and done[-1] == calls[0][1]
    assert calls[0][2].startswith("reading ") and calls[-1][2].startswith("vae/")


def test_a_converted_folder_can_be_converted_again(models: Any, tmp_path: Path) -> None:
    path, _ = models["sd1"]
    convert(path, tmp_path / "half")
    convert(tmp_path / "half", tmp_path / "full", dtype="float32")
    half, full = open_folder(tmp_path / "half"), open_folder(tmp_path / "full")
    assert full.dtype == "float32" and full.provenance == half.provenance
    for name, tensor in half.tensors("unet").items():
        np.testing.assert_array_equal(full.tensors("unet")[name].read(), tensor.read())
    with pytest.raises(UsageError, match="has no variant"):
        convert(tmp_path / "half", tmp_path / "x", variant="fp16")


def test_describe(models: Any, tmp_path: Path) -> None:
    path, _ = models["sd2"]
    convert(path, tmp_path / "out", dtype="bfloat16")
    before, after = describe(path), describe(tmp_path / "out")
    json.dumps([before, after])
    assert (before["kind"], after["kind"]) == ("diffusers", "converted")
    for key in ("family", "pipeline", "resolution", "prediction_type", "scheduler", "parameters"):
        assert before[key] == after[key]
    assert before["family"] == "sd2" and before["resolution"] == [16, 16]
    assert (before["prediction_type"], before["scheduler"]) == ("epsilon", "PNDMScheduler")
    assert before["components"]["vae"]["dtypes"] == {"F16": 124}
    assert after["components"]["vae"]["dtypes"] == {"BF16": 124}
    assert after["source"]["source"] == "sd2"


# ---------------------------------------------------------------------------------------- spellings

OLD_VAE = (
    (".to_q.", ".query."),
    (".to_k.", ".key."),
    (".to_v.", ".value."),
    (".to_out.0.", ".proj_attn."),
)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_old_vae_attention(models: Any, model: Path, conv: bool) -> None:
    def older(arrays: Tensors) -> None:
        rename(arrays, *OLD_VAE)
        for name in arrays:
            if conv and ".attentions." in name and arrays[name].ndim == 2:
                arrays[name] = arrays[name][:, :, None, None]

    change(model, "vae", older)
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(
        model / "vae" / WEIGHTS["vae"]
    )
    opened = same_as_before(model, models["sd1"][1])
    used = {use.transform.name for use in opened.files["vae"].mapped.uses.values()}
    assert ("conv1x1_to_linear" in used) == conv


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoder_without_prefix(models: Any, tmp_path: Path, family: str) -> None:
    path, before = models[family]
    model = Path(shutil.copytree(path, tmp_path / "model"))
    for component in (c for c in before if c.startswith("text")):
        change(model, component, lambda arrays: rename(arrays, ("text_model.", "")))
    same_as_before(model, before)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_other_tensors_of_text_encoders(models: Any, model: Path, prefix: str) -> None:
    def add(arrays: Tensors) -> None:
        rename(arrays, ("text_model.", prefix))
        arrays[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]
        arrays["text_projection.weight"] = np.ones((24, 32), np.float16)
        arrays["vision_model.embeddings.class_embedding"] = np.ones(3, np.float16)

    change(model, "text_encoder", add)
    opened = same_as_before(model, models["sd1"][1])
    ignored = dict(opened.files["text_encoder"].mapped.ignored)
    assert set(ignored) == {
        f"{prefix}embeddings.position_ids",
        "text_projection.weight",
        "vision_model.embeddings.class_embedding",
    }
    assert "not a weight" in ignored[f"{prefix}embeddings.position_ids"]


def test_projections_as_linear_layers_or_convolutions(models: Any, model: Path) -> None:
    """A checkpoint can store proj_in and proj_out in another form than its config gives."""

    def flatten(arrays: Tensors) -> None:
        for name in arrays:
            if name.endswith(("proj_in.weight", "proj_out.weight")):
                arrays[name] = arrays[name][:, :, 0, 0]

    change(model, "unet", flatten)
    same_as_before(model, models["sd1"][1])


def split(folder: Path, file: str, index: str, shards: list[str]) -> None:
    """Turn a weights file into shards with an index."""
    arrays = load_file(folder / file)
    (folder / file).unlink()
    names = sorted(arrays)
    parts = [names[i :: len(shards)] for i in range(len(shards))]
    for shard, part in zip(shards, parts, strict=True):
        save_file({n: arrays[n] for n in part}, folder / shard)
    places = {n: shard for shard, part in zip(shards, parts, strict=True) for n in part}
    write_json(folder / index, {"metadata": {"total_size": 1}, "weight_map": places})


SHARD_NAMES = {
    "plain": (
        None,
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-0000{}-of-00003.safetensors",
    ),
    "variant, old": (
        "fp16",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model-0000{}-of-00003.fp16.safetensors",
    ),
    "variant, new": (
        "fp16",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "diffusion_pytorch_model.fp16-0000{}-of-00003.safetensors",
    ),
    "variant, newest": (
        "fp16",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16-0000{}-of-00003.safetensors",
    ),
}


@pytest.mark.parametrize("variant, index, shard", SHARD_NAMES.values(), ids=SHARD_NAMES)
def test_shards(
    models: Any, model: Path, tmp_path: Path, variant: str | None, index: str, shard: str
) -> None:
    split(model / "unet", WEIGHTS["unet"], index, [shard.format(i) for i in (1, 2, 3)])
    same_as_before(model, models["sd1"][1])
    report = convert(model, tmp_path / "out", variant=variant)
    assert report.components[1].file == f"unet/{index}"
    hashes = open_folder(tmp_path / "out").provenance["sha256"]
    assert sum("-0000" in name for name in hashes) == 3
    (model / "unet" / shard.format(2)).unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.format(2)} is missing"):
        convert(model, tmp_path / "again")


def test_bfloat16_source(models: Any, model: Path, tmp_path: Path) -> None:
    path = model / "unet" / WEIGHTS["unet"]
    arrays = {n: cast(a, "bfloat16", n) for n, a in load_file(path).items()}
    save_bfloat16(arrays, path)
    convert(model, tmp_path / "out", dtype="float16")
    tensors = open_folder(tmp_path / "out").tensors("unet")
    for name, bits in arrays.items():
        want = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16)
        np.testing.assert_array_equal(tensors[name].read(), ohwi(want))


def test_variants(models: Any, model: Path) -> None:
    before = models["sd1"][1]
    plain = model / "unet" / "diffusion_pytorch_model.safetensors"
    half = model / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(plain, half)
    change(model, "unet", lambda arrays: arrays.update({"conv_in.bias": np.zeros(32, "f2")}))

    def bias(variant: str | None) -> np.ndarray:
        opened = open_source(model, variant=variant)
        assert isinstance(opened, DiffusersFolder)
        notes = [n for n in opened.notes if "omitted" not in n]
        assert all("has no fp16 variant; its plain file is used" in n for n in notes)
        assert len(notes) == (2 if variant else 0)
        return opened.tensors("unet")["conv_in.bias"].read()

    np.testing.assert_array_equal(bias(None), 0)
    np.testing.assert_array_equal(bias("fp16"), before["unet"]["conv_in.bias"])
    with pytest.raises(CheckpointError, match=r"no weights of variant 'bf16'.*its variants: fp16"):
        open_source(model, variant="bf16")
    plain.rename(plain.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    opened = same_as_before(model, before)  # fp16 before non_ema
    assert "unet: has no plain file; its fp16 variant is used" in opened.notes


def test_short_configs_and_null_parts(models: Any, model: Path) -> None:
    """An absent key gets diffusers' default. A null part is absent."""
    path = model / "unet/config.json"
    data = json.loads(path.read_text())
    write_json(path, {k: v for k, v in data.items() if k not in ("sample_size", "_class_name")})
    edit(model / "model_index.json", safety_checker=[None, None])
    opened = same_as_before(model, models["sd1"][1])
    assert not any("safety_checker" in note for note in opened.notes)
    assert describe(model)["resolution"] is None


def test_tokenizer_files_are_carried_over_and_win(model: Path, tmp_path: Path) -> None:
    write_json(model / "tokenizer/special_tokens_map.json", {"pad_token": "!"})
    write_json(model / "tokenizer/tokenizer_config.json", {"pad_token": "!"})
    assert open_source(model).tokenizer().pad_token_id == 0
    convert(model, tmp_path / "out")
    assert open_folder(tmp_path / "out").tokenizer().pad_token_id == 0


PIPELINE_CLASSES = ("StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline")


@pytest.mark.parametrize("name", PIPELINE_CLASSES)
def test_other_pipelines_of_the_same_parts(models: Any, model: Path, name: str) -> None:
    edit(model / "model_index.json", _class_name=name)
    same_as_before(model, models["sd1"][1])


def test_inpainting_models_have_nine_input_channels(model: Path, tmp_path: Path) -> None:
    config = UNET | {"in_channels": 9}
    edit(model / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    write_json(model / "unet/config.json", config)
    arrays = random_tensors(UNet2DConditionConfig.from_dict(config))
    save_file(arrays, model / "unet" / WEIGHTS["unet"])
    convert(model, tmp_path / "out")
    assert open_folder(tmp_path / "out").tensors("unet")["conv_in.weight"].shape == (32, 3, 3, 9)


def test_the_refiner_has_only_the_second_text_encoder(models: Any, tmp_path: Path) -> None:
    path, before = models["sdxl"]
    model = Path(shutil.copytree(path, tmp_path / "model"))
    edit(model / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    shutil.rmtree(model / "text_encoder")
    shutil.rmtree(model / "tokenizer")
    opened = same_as_before(model, {k: v for k, v in before.items() if k != "text_encoder"})
    assert opened.family == "sdxl-refiner"
    assert opened.components == ("text_encoder_2", "unet", "vae")


GOLDENS = sorted(p.parent for p in GOLDEN.glob("*/checkpoint/model_index.json"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.parent.name)
def test_checkpoints_written_by_diffusers(path: Path, tmp_path: Path) -> None:
    report = convert(checkpoint(path.parent.name), tmp_path / "out")
    result = open_folder(tmp_path / "out")
    for component in report.components:
        read = component.parameters, component.converted
        tensors = result.tensors(component.name).values()
        assert read == (sum(t.size for t in tensors), len(tensors))
        if component.name.startswith("text_encoder"):
            result.tokenizer(component.name.replace("text_encoder", "tokenizer"))


# ------------------------------------------------------------------------------------------- faults

BIAS = "conv_in.bias"


def set_value(name: str, value: Any) -> Callable[[Tensors], Any]:
    return lambda arrays: arrays.update({name: value})


def poison(value: float) -> Callable[[Tensors], None]:
    def set_one(arrays: Tensors) -> None:
        arrays[BIAS] = arrays[BIAS].copy()
        arrays[BIAS][3] = value

    return set_one


def truncate(model: Path) -> None:
    path = model / "unet" / WEIGHTS["unet"]
    path.write_bytes(path.read_bytes()[:-100])


def another_name(model: Path) -> None:
    path = model / "unet" / WEIGHTS["unet"]
    path.rename(path.with_name("weights.bin"))


def part(name: str, entry: Any) -> Callable[[Path], None]:
    return lambda model: edit(model / "model_index.json", **{name: entry})


def unet(function: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    return lambda model: change(model, "unet", function)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (unet(lambda a: a.pop(BIAS)), r"1 missing tensor: conv_in.bias"),
    "extra tensor": (unet(set_value("x.y", np.ones(1, "f2"))), "1 unknown tensor: x.y"),
    "misshapen tensor": (
        unet(set_value("conv_in.weight", np.ones((32, 5, 3, 3), "f2"))),
        r"1 misshapen tensor: conv_in.weight is \(32, 5, 3, 3\), expected \(32, 4, 3, 3\)",
    ),
    "tensor in two spellings": (
        lambda m: change(
            m,
            "text_encoder",
            lambda a: a.update({"final_layer_norm.bias": a["text_model.final_layer_norm.bias"]}),
        ),
        "1 duplicated tensor: text_model.final_layer_norm.bias and final_layer_norm.bias",
    ),
    "integer weights": (
        unet(set_value(BIAS, np.ones(32, np.int8))),
        r"1 unsupported tensor: conv_in.bias is I8",
    ),
    "NaN": (unet(poison(np.nan)), "conv_in.bias holds 1 values that are NaN or infinite"),
    "infinity": (unet(poison(np.inf)), "conv_in.bias holds 1 values that are NaN or infinite"),
    "beyond float16": (
        unet(set_value(BIAS, np.full(32, 1e5, "f4"))),
        "unet/conv_in.bias: values up to 100000 do not fit float16",
    ),
    "truncated file": (truncate, "diffusion_pytorch_model.safetensors: truncated"),
    "another name": (another_name, "unet: has weights.bin, but no weights under"),
    "no weights": (lambda m: (m / "vae" / WEIGHTS["vae"]).unlink(), "vae: has no weights"),
    "shards without index": (
        lambda m: (m / "vae" / WEIGHTS["vae"]).rename(m / "vae/model-00001-of-00002.safetensors"),
        "no index of the shards",
    ),
    "unknown config value": (
        lambda m: edit(m / "unet/config.json", act_fn="strange"),
        "unet/config.json: act_fn = 'strange'",
    ),
    "unknown config key": (
        lambda m: edit(m / "vae/config.json", strange=1),
        "vae/config.json: 1 unknown key.*strange = 1",
    ),
    "no config": (lambda m: (m / "vae/config.json").unlink(), "vae/config.json: no such file"),
    "broken config": (lambda m: (m / "vae/config.json").write_text("{"), "vae/config.json: not"),
    "broken model_index": (lambda m: (m / "model_index.json").write_text("[]"), "model_index.json"),
    "no scheduler": (lambda m: shutil.rmtree(m / "scheduler"), "folder scheduler is missing"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "folder tokenizer is missing"),
    "no unet": (part("unet", [None, None]), "model_index.json has no unet"),
    "no text encoder": (part("text_encoder", [None, None]), "has no text_encoder"),
    "unknown part": (part("prior", ["diffusers", "PriorTransformer"]), "unsupported part: prior"),
    "malformed part": (part("unet", ["diffusers"]), r"unet = \['diffusers'\]"),
    "other class": (
        part("vae", ["diffusers", "AsymmetricAutoencoderKL"]),
        "vae is a AsymmetricAutoencoderKL.*supported: AutoencoderKL",
    ),
    "other pipeline": (
        part("_class_name", "FluxPipeline"),
        "is a FluxPipeline; supported: StableDiffusionPipeline, .*LatentConsistency",
    ),
    "no pipeline": (part("_class_name", None), "names no pipeline class"),
}


@pytest.mark.parametrize("damage, says", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str
) -> None:
    damage(model)
    (tmp_path / "out").mkdir()
    with pytest.raises((CheckpointError, ConfigError), match=says) as caught:
        convert(model, tmp_path / "out" / "new")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path / "out") == []


def test_at_most_ten_names_are_listed(model: Path, tmp_path: Path) -> None:
    change(model, "unet", lambda a: rename(a, ("resnets", "resnet")))
    with pytest.raises(CheckpointError) as caught:
        convert(model, tmp_path / "new")
    message = str(caught.value)
    assert message.count("resnet") == 20 and "90 missing" in message and "90 unknown" in message


def file(name: str, *tensors: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        save_file({tensor: np.ones(1, "f4") for tensor in tensors}, root / name)
        return root / name

    return make


def touch(name: str, content: bytes = b"x") -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
        return root / name

    return make


def folder(*makers: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / "given").mkdir()
        for maker in makers:
            maker(root / "given")
        return root / "given"

    return make


def json_file(name: str, data: Any) -> Callable[[Path], Any]:
    return lambda root: write_json(root / name, data)


LORA = (
    "unet.down_blocks.0.attn1.to_q.lora_A.weight",
    "unet.down_blocks.0.attn1.to_q.lora_B.weight",
)
NOT_MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda root: root / "nothing", "no such file or folder"),
    "empty folder": (folder(), "is an empty folder"),
    "LoRA": (file("x.safetensors", *LORA), "looks like a LoRA"),
    "LoRA, kohya": (
        file("x.safetensors", "lora_unet_mid_block.lora_up.weight", "lora_unet_mid_block.alpha"),
        "looks like a LoRA",
    ),
    "LoRA folder": (folder(file("pytorch_lora_weights.safetensors", *LORA)), "like a LoRA"),
    "LoRA, PEFT": (folder(json_file("adapter_config.json", {})), "like a LoRA"),
    "ControlNet": (
        file("x.safetensors", "controlnet_cond_embedding.conv_in.bias", "down_blocks.0.bias"),
        "a ControlNet",
    ),
    "ControlNet folder": (
        folder(json_file("config.json", {"_class_name": "ControlNetModel"})),
        r"one component alone \(ControlNetModel\)",
    ),
    "VAE": (file("x.safetensors", "decoder.conv_in.weight", "encoder.conv_in.weight"), "a VAE"),
    "VAE folder": (folder(json_file("config.json", VAE)), r"alone \(AutoencoderKL\)"),
    "text encoder folder": (
        folder(json_file("config.json", {"architectures": ["CLIPTextModel"]})),
        r"alone \(CLIPTextModel\)",
    ),
    "tokenizer": (folder(write_tokenizer), "a tokenizer alone"),
    "U-Net": (file("x.safetensors", "down_blocks.0.resnets.0.conv1.bias"), "a U-Net in diffusers"),
    "single file": (
        file("x.safetensors", "model.diffusion_model.out.2.bias", "first_stage_model.x"),
        "a U-Net of an unknown structure",
    ),
    "embedding": (file("x.safetensors", "emb_params"), "a textual-inversion"),
    "Flux": (file("x.safetensors", "double_blocks.0.img_attn.qkv.weight"), "a Flux transformer"),
    "other weights": (file("x.safetensors", "a", "b"), r"of an unknown kind \(2 tensors\)"),
    "ckpt": (touch("x.ckpt"), "was not written by torch.save"),
    "GGUF": (touch("x.gguf"), "GGUF"),
    "picture": (touch("x.png"), "a picture, not a model"),
    "its index": (touch("model_index.json", b"{}"), "give the folder"),
    "parent": (folder(json_file("inner/model_index.json", {})), "but its folder inner has one"),
    "ckpt folder": (folder(touch("x.ckpt")), "it holds x.ckpt"),
    "some folder": (folder(touch("letter.txt")), "not a diffusers folder"),
    "broken file": (touch("x.safetensors"), "truncated"),
}


@pytest.mark.parametrize("make, says", NOT_MODELS.values(), ids=NOT_MODELS)
def test_errors_describe_paths_that_are_not_models(
    tmp_path: Path, make: Callable[[Path], Path], says: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=says) as caught:
        convert(path, tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_usage(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype 'int8' is unknown"):
        convert(model, tmp_path / "out", dtype="int8")
    with pytest.raises(UsageError, match="has no revision 'main'"):
        convert(model, tmp_path / "out", revision="main")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        convert("org/name", tmp_path / "out")  # before anything is fetched
    with pytest.raises(HubError, match="revision 'a', but revision 'b' is given too"):
        convert("org/name@a", tmp_path / "new", revision="b")


def test_hub_ids_are_resolved(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(models["sd1"][0], snapshot)
    asked = []

    def find(reference: Reference, variant: str | None) -> Listing:
        asked.append((str(reference), variant))
        return Listing(reference, "0123abc", {})

    monkeypatch.setattr(hub, "find", find)
    monkeypatch.setattr(hub, "fetch", lambda listing, progress: snapshot)
    unet = snapshot / "unet"
    shutil.copy(unet / WEIGHTS["unet"], unet / "diffusion_pytorch_model.fp16.safetensors")
    report = convert("org/some-name@main", tmp_path / "out")
    assert report.components[1].file == "unet/diffusion_pytorch_model.fp16.safetensors"
    assert len(report.notes) == 2  # the plain files of the others are as good
    assert asked == [("org/some-name", None)]
    origin = open_folder(tmp_path / "out").provenance
    assert (origin["source"], origin["revision"]) == ("org/some-name", "0123abc")


# ------------------------------------------------------------------------------------- interruption

SLOW = """
import sys, time
from mlxdiff.convert import convert
def progress(done, total, name):
    if name.startswith("unet/"):
        print("writing", flush=True)
        time.sleep(30)
convert(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_ctrl_c_leaves_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(model), str(out / "new")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    assert any(name.endswith(".partial") for name in listing(out))
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert time.monotonic() - begin < 15 and "KeyboardInterrupt" in errors
    assert child.returncode != 0
    assert listing(out) == []


# --------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("family", FAMILIES)
def test_family(models: Any, family: str) -> None:
    assert open_source(models[family][0]).family == family


def test_every_supported_class_is_real() -> None:
    assert len(set(detect.PIPELINES)) == len(detect.PIPELINES)
    assert all(issubclass(error, MlxdiffError) for error in (CheckpointError, ConfigError))
