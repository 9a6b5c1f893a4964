"""Single files in LDM naming: the family, the place of each tensor, the report of the rest."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import wide
from golden_data import GOLDEN, checkpoint
from pickle_files import saved
from safetensors.numpy import save_file
from single_files import LDM_NAMES, Tensors, ldm_tensors, real_names, single_file, sparse_file

import mlxdiff
from mlxdiff.convert import SingleFile, convert, describe, open_source
from mlxdiff.convert.keymap import ema_names, ldm_unet
from mlxdiff.errors import CheckpointError, MlxdiffError, UsageError
from mlxdiff.networks.config import read_unet
from mlxdiff.networks.params import expected_parameters
from mlxdiff.store.folder import ModelSource, open_folder

MODELS = ("sd15", "sd21v", "sdxl", "sdxl-refiner", "ssd-1b", "x4-upscaler")
FAMILY = {
    "sd15": ("sd1", "StableDiffusionPipeline"),
    "sd15-inpainting": ("sd1", "StableDiffusionInpaintPipeline"),
    "instruct-pix2pix": ("sd1", "StableDiffusionInstructPix2PixPipeline"),
    "sd21": ("sd2", "StableDiffusionPipeline"),
    "sd2-inpainting": ("sd2", "StableDiffusionInpaintPipeline"),
    "x4-upscaler": ("sd2", "StableDiffusionUpscalePipeline"),
    "sdxl": ("sdxl", "StableDiffusionXLPipeline"),
    "sdxl-inpainting": ("sdxl", "StableDiffusionXLInpaintPipeline"),
    "sdxl-refiner": ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline"),
    "ssd-1b": ("sdxl", "StableDiffusionXLPipeline"),
    "segmind-vega": ("sdxl", "StableDiffusionXLPipeline"),
    "sd21-unclip-h": ("sd2", "StableUnCLIPImg2ImgPipeline"),
    "image-variation": ("sd1", "StableDiffusionImageVariationPipeline"),
    "zero123": ("sd1", "Zero1to3StableDiffusionPipeline"),
    "svd": ("svd", "StableVideoDiffusionPipeline"),
}
SAME_UNET = {"image-variation": "sd15", "zero123": "instruct-pix2pix"}


def same(found: ModelSource, expected: ModelSource) -> None:
    """Check that two models have equal tensors."""
    assert found.components == expected.components
    for component in expected.components:
        tensors, wanted = found.tensors(component), expected.tensors(component)
        assert list(tensors) == list(wanted)
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(tensors[name].read(), tensor.read(), name)


def opened(path: Path, **options: Any) -> SingleFile:
    model = open_source(path, **options)
    assert isinstance(model, SingleFile)
    return model


# ----------------------------------------------------------------------------- names of real models


def golden_unet(name: str) -> Any:
    data = gzip.decompress((GOLDEN / "names" / f"unet.{name}.json.gz").read_bytes())
    return read_unet(json.loads(data)["config"])


@pytest.mark.parametrize("name", [path.name.removesuffix(".json.gz") for path in LDM_NAMES])
def test_every_name_of_the_real_models_maps(name: str, tmp_path: Path) -> None:
    names = real_names(name)
    model = opened(sparse_file(tmp_path / "model.safetensors", names))
    assert (model.family, model.model_index["_class_name"]) == FAMILY[name]
    unet = model.config("unet")
    # The blocks are worked out as the published config has them (sizes: 512 for SD 2 base).
    want = golden_unet(SAME_UNET.get(name, name))
    for part in ("down_blocks", "mid_block", "up_blocks", "in_channels", "num_attention_heads"):
        assert getattr(unet, part) == getattr(want, part), part
    sizes = [(32, 32)] if name == "zero123" else [want.sample_size, (64, 64)]
    assert unet.sample_size in sizes
    for component in model.components:
        shapes = {n: t.shape for n, t in model.tensors(component).items()}
        assert shapes == expected_parameters(model.config(component))
    # Used, or ignored for a reason; no name is both or neither.
    used = {
        section.prefix + use.source
        for component, section in model._sections.items()
        for use in model.files[component].mapped.uses.values()
    }
    ignored = {entry[0] for entry in model.ignored}
    for component, section in model._sections.items():
        ignored |= {section.prefix + n for n, _ in model.files[component].mapped.ignored}
    assert used.isdisjoint(ignored)
    assert used | ignored == set(names)


def test_moving_averages_of_the_real_names_map(tmp_path: Path) -> None:
    """v1-5-pruned.ckpt has the U-Net twice, and the counters of training."""
    names = real_names("sd15")
    inner = [n.removeprefix("model.diffusion_model.") for n in names if "diffusion_model" in n]
    flat = {
        f"model_ema.{short}": names[f"model.diffusion_model.{name}"]
        for short, name in ema_names(inner).items()
    }
    assert "model_ema.diffusion_modelinput_blocks00weight" in flat
    whole = names | flat | {"model_ema.decay": (), "model_ema.num_updates": ()}
    model = opened(sparse_file(tmp_path / "x.safetensors", whole))
    assert sum("moving averages" in reason for _, reason in model.ignored) == len(flat)
    model = opened(tmp_path / "x.safetensors", ema=True)
    assert sum("averages are used" in reason for _, reason in model.ignored) == len(flat)


# ------------------------------------------------------------------------------ values and pictures


@pytest.mark.parametrize("name", MODELS)
def test_same_tensors_as_the_folder(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name)
    model = opened(single_file(folder, tmp_path / "x.safetensors"), config=folder)
    same(model, open_source(folder))
    assert not model.ignored


@pytest.mark.parametrize("name", ["sd15", "sd21v", "sdxl"])
def test_same_pictures_as_the_folder(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name)
    path = single_file(folder, tmp_path / "x.safetensors")
    draw: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "steps": 2}
    one = mlxdiff.load(path, config=folder, backend="numpy").generate(**draw)
    other = mlxdiff.load(folder, backend="numpy").generate(**draw)
    np.testing.assert_array_equal(one.latents, other.latents)
    np.testing.assert_array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_conversion_without_configs_is_complete(family: str, tmp_path: Path) -> None:
    """Widths of 64 and 128 fit the published rule for heads. The shapes give the rest."""
    folder = wide(tmp_path / "folder", family)
    path = single_file(folder, tmp_path / "x.safetensors")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    report = convert(path, tmp_path / "out")
    result = open_folder(tmp_path / "out")
    same(result, open_source(folder))
    assert (result.family, report.family) == (family, family)
    assert result.tokenizer().encode("a b", pad=False) == [3, 4]
    assert result.tokenizer().pad_token_id == 7
    if family == "sdxl":
        assert result.tokenizer("tokenizer_2").pad_token_id == 0
        assert result.model_index["force_zeros_for_empty_prompt"] is True
    assert set(result.provenance["sha256"]) == {"x.safetensors"}
    assert "every tensor is accounted for" in str(report)


# -------------------------------------------------------------------------------------------- forms


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("sd15")


@pytest.fixture(scope="module")
def tensors(tiny: Path) -> Tensors:
    return ldm_tensors(tiny)


def test_values_outside_the_components_are_ignored_with_a_reason(
    tiny: Path, tensors: Tensors, tmp_path: Path
) -> None:
    more = {
        "betas": np.zeros(4, np.float32),
        "sqrt_recipm1_alphas_cumprod": np.zeros(4, np.float32),
        "model_ema.decay": np.zeros((), np.float32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.zeros((1, 77)),
        "first_stage_model.loss.logvar": np.zeros(1, np.float32),
        "cond_stage_model.logit_scale": np.zeros((), np.float32),
    }
    save_file(tensors | more, tmp_path / "x.safetensors")
    report = convert(tmp_path / "x.safetensors", tmp_path / "out", config=tiny)
    ignored = dict(report.ignored)
    for component in report.components:
        ignored |= dict(component.ignored)
    assert len(ignored) == len(more)
    assert "noise schedule" in ignored["betas"]
    assert "noise schedule" in str(report)


def test_an_unknown_tensor_is_an_error(tiny: Path, tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors | {"surprise": np.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="1 unknown tensor: surprise"):
        open_source(tmp_path / "x.safetensors", config=tiny)
    save_file(tensors | {"model.diffusion_model.surprise": np.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"\(model\.diffusion_model\.\*\): 1 unknown.*surp"):
        open_source(tmp_path / "x.safetensors", config=tiny)


def test_a_missing_tensor_is_an_error(tiny: Path, tensors: Tensors, tmp_path: Path) -> None:
    lacking = {k: v for k, v in tensors.items() if not k.endswith("time_embed.0.bias")}
    save_file(lacking, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing tensor: time_embedding\.linear_1\.bias"):
        open_source(tmp_path / "x.safetensors", config=tiny)


@pytest.mark.parametrize("lacks", ["vae", "text_encoder", "both", "all but the U-Net"])
def test_parts_that_the_file_lacks_come_from_the_folder(
    lacks: str, tiny: Path, tensors: Tensors, tmp_path: Path
) -> None:
    gone = {
        "vae": ("first_stage_model.",),
        "text_encoder": ("cond_stage_model.",),
    }.get(lacks, ("first_stage_model.", "cond_stage_model."))
    less = {k: v for k, v in tensors.items() if not k.startswith(gone)}
    if lacks == "all but the U-Net":
        less = {k.removeprefix("model.diffusion_model."): v for k, v in less.items()}
    save_file(less, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"has no .*with config"):
        open_source(tmp_path / "x.safetensors")
    model = opened(tmp_path / "x.safetensors", config=tiny)
    same(model, open_source(tiny))
    assert any("from" in note for note in model.notes)


def test_a_unet_in_diffusers_naming_on_a_base(tiny: Path, tmp_path: Path) -> None:
    """SDXL-Lightning and Hyper-SD are such files. The base can also be a converted folder."""
    shutil.copy(
        tiny / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "unet.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"is a U-Net alone; give its model with config"):
        open_source(tmp_path / "unet.safetensors")
    convert(tiny, tmp_path / "base", dtype="float16")
    for base in (tiny, tmp_path / "base"):
        model = opened(tmp_path / "unet.safetensors", config=base)
        same(model, open_source(tiny))
        convert(tmp_path / "unet.safetensors", tmp_path / f"{base.name}-out", config=base)
        same(open_folder(tmp_path / f"{base.name}-out"), open_source(tiny))


def test_a_folder_of_configs_without_weights_is_enough(
    tiny: Path, tensors: Tensors, tmp_path: Path
) -> None:
    ignore = shutil.ignore_patterns("*.safetensors")
    configs = shutil.copytree(tiny, tmp_path / "configs", ignore=ignore)
    save_file(tensors, tmp_path / "x.safetensors")
    same(opened(tmp_path / "x.safetensors", config=configs), open_source(tiny))
    less = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}
    save_file(less, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="configs/vae: has no weights"):
        open_source(tmp_path / "y.safetensors", config=configs)


def test_a_folder_of_another_kind_is_an_error(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"is Stable Diffusion 1, .* is SDXL"):
        open_source(tmp_path / "x.safetensors", config=checkpoint("sdxl"))
    with pytest.raises(UsageError, match="no such folder"):
        open_source(tmp_path / "x.safetensors", config=tmp_path / "nowhere")


def test_the_options_are_for_single_files(tiny: Path) -> None:
    options: list[dict[str, Any]] = [{"config": tiny}, {"prediction_type": "epsilon"}]
    for option in [*options, {"ema": True}]:
        with pytest.raises(UsageError, match="is for single files only"):
            open_source(tiny, **option)


def test_the_vae_of_later_converters(tiny: Path, tensors: Tensors, tmp_path: Path) -> None:
    """Some converters write current attention names, as linear layers, into LDM's naming."""
    renamed = {}
    for name, array in tensors.items():
        for old, new in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            if f".mid.attn_1.{old}." in name:
                name = name.replace(f".attn_1.{old}.", f".attn_1.{new}.")
                array = array.reshape(array.shape[:2])
        renamed[name] = array
    assert set(renamed) != set(tensors)
    save_file(renamed, tmp_path / "x.safetensors")
    same(opened(tmp_path / "x.safetensors", config=tiny), open_source(tiny))


@pytest.mark.parametrize("stream", [False, True])
def test_ckpt_files(stream: bool, tiny: Path, tensors: Tensors, tmp_path: Path) -> None:
    """PyTorch's format, from 1.6 on and before. The weights are under state_dict."""
    (tmp_path / "x.ckpt").write_bytes(saved(tensors, wrap="state_dict", stream=stream))
    model = opened(tmp_path / "x.ckpt", config=tiny)
    same(model, open_source(tiny))
    assert any("datetime" in name for name, _ in model.ignored)
    report = convert(tmp_path / "x.ckpt", tmp_path / "out", config=tiny)
    same(open_folder(tmp_path / "out"), open_source(tiny))
    assert "datetime" not in str(report.components)


def test_text_encoders_as_other_programs_write_them(
    tiny: Path, tensors: Tensors, tmp_path: Path
) -> None:
    place = "cond_stage_model.transformer."
    bare = {k.replace(f"{place}text_model.", place): v for k, v in tensors.items()}
    save_file(bare, tmp_path / "x.safetensors")
    same(opened(tmp_path / "x.safetensors", config=tiny), open_source(tiny))
    folder = checkpoint("sdxl")
    changed = {}
    for name, array in ldm_tensors(folder).items():
        if name.endswith(".text_projection"):
            name, array = f"{name}.weight", np.ascontiguousarray(array.T)
        changed[name] = array
    assert "conditioner.embedders.1.model.text_projection.weight" in changed
    save_file(changed, tmp_path / "xl.safetensors")
    same(opened(tmp_path / "xl.safetensors", config=folder), open_source(folder))


def test_the_last_layer_of_sd2s_text_encoder_is_left_out(tmp_path: Path) -> None:
    folder = checkpoint("sd21v")
    arrays = ldm_tensors(folder)
    place = "cond_stage_model.model.transformer.resblocks."
    last = {k.replace(f"{place}2.", f"{place}3."): v for k, v in arrays.items() if f"{place}2" in k}
    more = {"cond_stage_model.model.text_projection": np.zeros((64, 64), np.float16)}
    save_file(arrays | last | more, tmp_path / "x.safetensors")
    model = opened(tmp_path / "x.safetensors", config=folder)
    same(model, open_source(folder))
    reasons = dict(model.files["text_encoder"].mapped.ignored)
    assert len(reasons) == 13
    assert "the last layer" in reasons["transformer.resblocks.3.ln_1.weight"]


def test_moving_averages(tiny: Path, tensors: Tensors, tmp_path: Path) -> None:
    place = "model.diffusion_model."
    inner = [k.removeprefix(place) for k in tensors if k.startswith(place)]
    averages = {
        f"model_ema.{flat}": tensors[place + name] * np.float16(2)
        for flat, name in ema_names(inner).items()
    }
    save_file(tensors | averages, tmp_path / "both.safetensors")
    same(opened(tmp_path / "both.safetensors", config=tiny), open_source(tiny))
    alone = {k: v for k, v in tensors.items() if not k.startswith(place)} | averages
    save_file(alone, tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"only moving averages|has no U-Net"):
        open_source(tmp_path / "alone.safetensors")
    wanted = open_source(tiny).tensors("unet")["conv_in.weight"].read() * np.float16(2)
    for path, ema in (("both", True), ("alone", False)):
        model = opened(tmp_path / f"{path}.safetensors", config=tiny, ema=ema)
        np.testing.assert_array_equal(model.tensors("unet")["conv_in.weight"].read(), wanted)
    save_file(tensors, tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="no moving averages"):
        open_source(tmp_path / "none.safetensors", config=tiny, ema=True)


def test_the_flat_names_of_moving_averages_are_distinct() -> None:
    for name in ("sd15", "sdxl", "ssd-1b"):
        names = ldm_unet(golden_unet(name)).names
        assert names is not None and len(ema_names(names)) == len(names)


# -------------------------------------------------------------------------------------- predictions

V = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(
    "name, more, metadata, asked, prediction, zero_snr",
    [
        ("sd15", {}, {}, None, "epsilon", False),
        ("sd15", {"v_pred": ()}, {}, None, "v_prediction", False),
        ("sdxl", {"v_pred": (), "ztsnr": ()}, {}, None, "v_prediction", True),
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, None, "v_prediction", False),
        ("sdxl", {}, {"modelspec.predict_key": "epsilon"}, None, "epsilon", False),
        ("sdxl", {"v_pred": ()}, {}, "epsilon", "epsilon", False),
        ("sd21", {}, {}, None, "epsilon", False),
        ("sd21", {}, {}, "v_prediction", "v_prediction", False),
        ("sd2-inpainting", {}, {}, None, "epsilon", False),
    ],
)
def test_prediction_type(
    name: str,
    more: dict[str, Any],
    metadata: dict[str, str],
    asked: str | None,
    prediction: str,
    zero_snr: bool,
    tmp_path: Path,
) -> None:
    path = sparse_file(tmp_path / "x.safetensors", real_names(name) | more, **metadata)
    model = opened(path, prediction_type=asked)
    scheduler = model.scheduler_config
    assert scheduler["prediction_type"] == prediction
    assert bool(scheduler.get("rescale_betas_zero_snr")) is zero_snr
    assert (scheduler.get("timestep_spacing") == "trailing") is zero_snr
    guessed = name == "sd21" and asked is None
    assert any("guessed" in note for note in model.notes) is guessed
    side = 96 if (name, prediction) == ("sd21", "v_prediction") else {"sdxl": 128}.get(name, 64)
    assert model.config("unet").sample_size == (side, side)


def test_one_bias_gives_the_prediction_type_of_sd2(tmp_path: Path) -> None:
    names = real_names("sd21")
    path = sparse_file(tmp_path / "x.safetensors", names)
    with path.open("rb") as file:
        raw = file.read(1_000_000)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    place = 8 + int.from_bytes(raw[:8], "little") + header[V]["data_offsets"][0]
    for spread, prediction in ((0.2, "v_prediction"), (0.05, "epsilon")):
        with path.open("r+b") as file:
            file.seek(place)
            values = np.random.default_rng(0).standard_normal(names[V][0]) * spread
            file.write(values.astype("<f2").tobytes())
        assert opened(path).scheduler_config["prediction_type"] == prediction


def test_a_schedule_that_ends_at_zero_is_detected(
    tiny: Path, tensors: Tensors, tmp_path: Path
) -> None:
    folder = wide(tmp_path / "folder", "sd1")
    for end, zero_snr in ((0.0047, False), (0.0, True)):
        more = {"alphas_cumprod": np.linspace(0.999, end, 1000).astype(np.float32)}
        model = opened(single_file(folder, tmp_path / "x.safetensors", more))
        assert bool(model.scheduler_config.get("rescale_betas_zero_snr")) is zero_snr
        wanted = "DDIMScheduler" if zero_snr else "PNDMScheduler"
        assert model.scheduler_config["_class_name"] == wanted


def test_an_unknown_prediction_type(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="prediction_type 'x' is unknown; expected epsilon"):
        open_source(tmp_path / "x.safetensors", prediction_type="x")


# ----------------------------------------------------------------------------------- what it is not

WEIGHT = np.zeros((4, 4), np.float16)
KINDS: dict[str, tuple[list[str], str]] = {
    "lora kohya": (["lora_unet_down_blocks_0_x.lora_down.weight"], "a LoRA"),
    "lora diffusers": (["unet.down_blocks.0.to_q.lora_A.weight"], "a LoRA"),
    "lycoris": (["lora_unet_x.hada_w1_a"], "LyCORIS|LoRA"),
    "controlnet ldm": (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
    "controlnet": (["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"], "a ControlNet"),
    "vae": (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE, alone"),
    "vae in ldm": (["first_stage_model.encoder.conv_in.weight"], "has no U-Net"),
    "taesd": (["decoder.layers.3.conv.0.weight"], "a tiny VAE"),
    "text encoder": (["text_model.embeddings.token_embedding.weight"], "a text encoder"),
    "textual inversion": (["emb_params"], "a textual-inversion embedding"),
    "flux": (["double_blocks.0.img_attn.proj.weight"], "a Flux transformer"),
    "flux whole": (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a Flux"),
    "flux diffusers": (
        ["single_transformer_blocks.0.norm.weight", "transformer_blocks.0.attn.add_q_proj.weight"],
        "a Flux",
    ),
    "sd3": (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], "Diffusion 3"),
    "sd3 diffusers": (["transformer_blocks.0.attn.add_q_proj.weight"], "Diffusion 3"),
    "pixart": (["adaln_single.linear.weight"], "PixArt"),
    "dit": (["blocks.0.adaLN_modulation.1.weight"], "DiT"),
    "auraflow": (["model.double_layers.0.attn.w2q.weight"], "AuraFlow"),
    "cascade": (["down_blocks.1.0.channelwise.0.weight"], "Stable Cascade"),
    "cascade c": (["clip_txt_mapper.weight"], "Stable Cascade"),
    "svd": (
        ["decoder.up.0.block.0.time_stack.in_layers.0.weight"],
        "the VAE of a video model",
    ),
    "sv4d": (["model.diffusion_model.input_blocks.1.1.time_mix_blocks.0.norm1.weight"], "SV4D"),
    "wan": (["model.diffusion_model.head.modulation"], "video"),
    "ltx": (["model.diffusion_model.patchify_proj.weight"], "video"),
    "animatediff": (["down_blocks.0.motion_modules.0.proj_in.weight"], "AnimateDiff"),
    "unclip": (["noise_augmentor.data_mean"], "unCLIP|has no U-Net"),
    "variations": (["cond_stage_model.model.visual.proj"], "has no U-Net"),
    "paint by example": (["cond_stage_model.mapper.final_ln.weight"], "Paint by Example"),
    "playground": (["edm_mean"], "Playground 2.5"),
    "cosxl": (["edm_vpred.sigma_max"], "CosXL"),
    "bert": (["cond_stage_model.transformer.attn_layers.x"], "BERT"),
    "kandinsky": (["encoder_hid_proj.weight"], "Kandinsky"),
    "ip-adapter": (["image_proj.proj.weight"], "an IP-Adapter"),
    "upscaler": (["body.0.rdb1.conv1.weight"], "ESRGAN"),
    "unknown": (["x"], "of an unknown kind"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_recognised_by_name(kind: str, tmp_path: Path) -> None:
    names, words = KINDS[kind]
    save_file(dict.fromkeys(names, WEIGHT), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_the_depth_model_is_recognised_by_its_channels(tmp_path: Path) -> None:
    """512-depth-ema.ckpt: five channels, and a depth estimator that is not used."""
    names = real_names("sd21")
    names["model.diffusion_model.input_blocks.0.0.weight"] = (320, 5, 3, 3)
    names["depth_model.model.scratch.output_conv.4.bias"] = (1,)
    model = opened(sparse_file(tmp_path / "x.safetensors", names))
    assert (model.family, model.config("unet").in_channels) == ("sd2", 5)
    assert model.model_index["_class_name"] == "StableDiffusionDepth2ImgPipeline"
    assert model.scheduler_config["prediction_type"] == "epsilon"
    (ignored,) = (reason for name, reason in model.ignored if name.startswith("depth_model"))
    assert "a map is given" in ignored


def test_no_kind_is_seen_in_the_real_models(tmp_path: Path) -> None:
    for path in LDM_NAMES:
        name = path.name.removesuffix(".json.gz")
        opened(sparse_file(tmp_path / "x.safetensors", real_names(name)))


DAMAGE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no middle": (
        lambda t: {k: v for k, v in t.items() if "input_blocks.2.0.in" not in k},
        "unknown structure .*with config",
    ),
    "no blocks": (
        lambda t: {k: v for k, v in t.items() if "output_blocks" not in k},
        "output_blocks is empty",
    ),
    "narrow heads": (lambda t: t, "U-Net|norm_num_groups"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_structure_is_an_error(damage: str, tmp_path: Path) -> None:
    change, words = DAMAGE[damage]
    save_file(change(ldm_tensors(checkpoint("sdxl"))), tmp_path / "x.safetensors")
    with pytest.raises(MlxdiffError, match=words):
        open_source(tmp_path / "x.safetensors")


def test_nan_weights_are_refused(tiny: Path, tensors: Tensors, tmp_path: Path) -> None:
    bad = tensors["model.diffusion_model.out.0.bias"].copy()
    bad[1] = np.nan
    save_file(tensors | {"model.diffusion_model.out.0.bias": bad}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"out\.0\.bias holds 1 values that are NaN"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", config=tiny)
    assert not (tmp_path / "out").exists()


def test_a_truncated_file(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"truncated: .* download it again"):
        open_source(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------ the tokenizer


def test_without_a_vocabulary_the_error_names_files_and_place(tmp_path: Path) -> None:
    folder = wide(tmp_path / "folder", "sd1")
    (tmp_path / "models").mkdir()
    path = single_file(folder, tmp_path / "models" / "x.safetensors")
    model = opened(path)  # what needs no words needs no vocabulary
    with pytest.raises(CheckpointError) as caught:
        model.tokenizer()
    message = str(caught.value)
    assert "put vocab.json and merges.txt of https://huggingface.co/openai/clip-vit" in message
    assert f"into {tmp_path / 'models' / 'tokenizer'}, or" in message
    assert "with config" in message
    with pytest.raises(CheckpointError, match=r"put vocab\.json and merges\.txt"):
        convert(path, tmp_path / "out")
    shutil.copytree(folder / "tokenizer", tmp_path / "models" / "tokenizer")
    assert opened(path).tokenizer().pad_token_id == 7
    convert(path, tmp_path / "out")


def test_the_vocabulary_of_the_hub_is_taken_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = wide(tmp_path / "folder", "sd1")
    repo = tmp_path / "home" / "hub" / "models--openai--clip-vit-large-patch14"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder / "tokenizer", repo / "snapshots" / ("a" * 40))
    model = opened(single_file(folder, tmp_path / "x.safetensors"))
    assert model.tokenizer().pad_token_id == 7


# -------------------------------------------------------------------------------------- description


def test_description(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "my_model.safetensors", real_names("sdxl"))
    facts = describe(path)
    assert facts["kind"] == "single file"
    assert (facts["family"], facts["resolution"]) == ("sdxl", [1024, 1024])
    assert facts["components"]["text_encoder_2"]["class"] == "CLIPTextModelWithProjection"
    assert facts["prediction_type"] == "epsilon"
    assert facts["source"] == {"source": "my_model.safetensors"}


# ------------------------------------------------------------------------ diffusers' own conversion


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_the_conversion_of_diffusers_gives_the_same(name: str, tmp_path: Path) -> None:
    """diffusers.loaders.single_file_utils gives the same names and values for the same file."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    folder = checkpoint(name)
    path = single_file(folder, tmp_path / "x.safetensors")
    model = opened(path, config=folder)
    arrays = ldm_tensors(folder)
    file = {n: torch.from_numpy(a.astype(np.float32)) for n, a in arrays.items()}
    for component in model.components:
        config, prefix = model.config(component), model._sections[component].prefix
        if component == "unet":
            data = json.loads((folder / "unet" / "config.json").read_text())
            theirs = utils.convert_ldm_unet_checkpoint(dict(file), data)
        elif component == "vae":
            blocks = [0] * len(config.block_out_channels)
            types = {"down_block_types": blocks, "up_block_types": blocks}
            theirs = utils.convert_ldm_vae_checkpoint(dict(file), types)
        elif prefix.endswith("transformer."):
            theirs = utils.convert_ldm_clip_checkpoint(dict(file))
        else:

            class Width:
                hidden_size = config.hidden_size

            class Encoder:
                config = Width

            theirs = utils.convert_open_clip_checkpoint(Encoder, dict(file), prefix)
        ours = model.tensors(component)
        assert set(theirs) == set(ours)
        for key, value in theirs.items():
            want, found = value.numpy(), ours[key].read()
            want = want.transpose(0, 2, 3, 1) if want.ndim == 4 else want
            np.testing.assert_array_equal(found.reshape(want.shape), want, key)
