"""Files as people have them, in forms that no other test writes: each opens, or is named.

The cases are likely neighbours of reported ones. Each test writes its own input.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from folders import write_json
from golden_data import checkpoint
from lora_files import kohya, kohya_xl, low_rank, modules
from pickle_files import saved
from quantized_files import raw, scaled_fp8, write_gguf, write_safetensors
from safetensors.numpy import load_file, save_file
from single_files import Tensors, ldm_tensors, single_file

from mlxdiff.adapters.lora import changed, match, open_lora
from mlxdiff.convert import convert, describe, open_controlnet, open_source, open_vae
from mlxdiff.errors import CheckpointError, ConfigError, MlxdiffError, UsageError
from mlxdiff.machine.disk import read_json
from mlxdiff.report import info

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def sd15() -> Tensors:
    return ldm_tensors(checkpoint("sd15"))


@pytest.fixture(scope="module")
def sdxl() -> Tensors:
    return ldm_tensors(checkpoint("sdxl"))


def close(found: Any, expected: Any, bound: float = 0.0) -> None:
    """Compare the weights of two models, relative to the largest value."""
    for component in expected.components:
        tensors = found.tensors(component)
        for name, tensor in expected.tensors(component).items():
            values, other = tensor.read(), tensors[name].read()
            most = bound * float(np.abs(values).max())
            np.testing.assert_allclose(other, values, rtol=0, atol=most, err_msg=name)


# ------------------------------------------------------------------------------------- checkpoints


def test_scaled_fp8_with_its_biases_in_half(sd15: Tensors, tmp_path: Path) -> None:
    layers: dict[str, Any] = {}
    for name, array in sd15.items():
        if name.startswith(UNET) and name.endswith(".weight") and array.ndim == 2:
            codes, scale = scaled_fp8(array.astype(np.float32))
            layers |= {
                name: raw(codes, "F8_E4M3"),
                name.removesuffix("weight") + "scale_weight": raw(scale),
            }
        else:
            kind = np.float16 if name.endswith("bias") else np.float32
            layers[name] = raw(array.astype(kind))
    path = tmp_path / "mixed.safetensors"
    write_safetensors(path, layers)
    found = open_source(path, config=checkpoint("sd15"))
    close(found, open_source(checkpoint("sd15")), 2**-4)
    precision = info.describe(str(path), config=str(checkpoint("sd15")))
    assert precision["kind"] == "single file"


def test_a_gguf_with_convolutions_in_half_and_matrices_in_eight_bits(
    sd15: Tensors, tmp_path: Path
) -> None:
    def form(name: str, array: np.ndarray) -> str:
        fits = array.ndim == 2 and array.shape[1] % 32 == 0 and name.startswith(UNET)
        return "q8_0" if fits else "F16"

    path = write_gguf(tmp_path / "x.gguf", sd15, form)
    close(open_source(path, config=checkpoint("sd15")), open_source(checkpoint("sd15")), 2**-6)


def test_parts_in_different_precisions(sdxl: Tensors, tmp_path: Path) -> None:
    """U-Net in bfloat16's bits, text encoders in float32, VAE in half."""
    layers: dict[str, Any] = {}
    for name, array in sdxl.items():
        if name.startswith(UNET):
            bits = (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            layers[name] = raw(bits, "BF16")
        else:
            vae = name.startswith("first_stage_model.")
            layers[name] = raw(array.astype(np.float16 if vae else np.float32))
    path = tmp_path / "mixed.safetensors"
    write_safetensors(path, layers)
    close(open_source(path, config=checkpoint("sdxl")), open_source(checkpoint("sdxl")), 2**-7)


def test_a_checkpoint_with_nothing_but_moving_averages(sd15: Tensors, tmp_path: Path) -> None:
    averaged = {
        "model_ema.diffusion_model" + n.removeprefix(UNET).replace(".", "")
        if n.startswith(UNET)
        else n: a
        for n, a in sd15.items()
    }
    save_file(averaged, tmp_path / "x.safetensors")
    found = open_source(tmp_path / "x.safetensors", config=checkpoint("sd15"))
    close(found, open_source(checkpoint("sd15")))
    said = info.describe(str(tmp_path / "x.safetensors"))
    assert said["kind"].startswith("a whole model") and "model" in said["use"]


def test_a_suffix_in_capitals(tmp_path: Path) -> None:
    path = single_file(checkpoint("sd15"), tmp_path / "MODEL.SAFETENSORS")
    close(open_source(path, config=checkpoint("sd15")), open_source(checkpoint("sd15")))


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("wrap", ["", "state_dict"])
def test_a_vae_in_torchs_format(prefix: str, wrap: str, sd15: Tensors, tmp_path: Path) -> None:
    part = "first_stage_model."
    tensors = {prefix + n.removeprefix(part): a for n, a in sd15.items() if n.startswith(part)}
    path = tmp_path / "vae.pt"
    path.write_bytes(saved(tensors, wrap=wrap))
    assert info.describe(str(path))["kind"] == "a VAE, alone"
    found = open_vae(path)
    for name, tensor in open_source(checkpoint("sd15")).tensors("vae").items():
        np.testing.assert_array_equal(found.tensors()[name].read(), tensor.read())


# ----------------------------------------------------------------------------------------- folders


def with_scheduler(folder: Path, **config: Any) -> Path:
    shutil.copytree(checkpoint("sdxl"), folder)
    path = folder / "scheduler/scheduler_config.json"
    write_json(path, read_json(path) | config)
    return folder


FLOWS: dict[str, dict[str, Any]] = {
    "another class": {"_class_name": "FlowMatchHeunDiscreteScheduler"},
    "for LCM": {"_class_name": "FlowMatchLCMScheduler", "shift": 3.0},
    "a class of one's own": {"_class_name": "MyFlowMatchScheduler", "shift": 3.0},
    "UniPC": {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3},
    "Euler": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"},
    "in the words of others": {"prediction_type": "flow"},
    "stochastic": {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True},
}


@pytest.mark.parametrize("case", FLOWS)
def test_flow_matching_under_any_name_is_refused(case: str, tmp_path: Path) -> None:
    folder = with_scheduler(tmp_path / "x", **FLOWS[case])
    with pytest.raises(ConfigError, match=r"flow|prediction_type") as refused:
        describe(folder)
    assert str(folder) in str(refused.value) or "scheduler_config.json" in str(refused.value)


def test_a_folder_with_nothing_but_bin(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(checkpoint("sd15"), folder)
    for path in folder.rglob("*.safetensors"):
        path.with_name(path.name.replace("model.safetensors", "pytorch_model.bin")
                       if path.name == "model.safetensors"
                       else path.stem + ".bin").write_bytes(saved(load_file(path)))  # fmt: skip
        path.unlink()
    found = open_source(folder)
    close(found, open_source(checkpoint("sd15")))
    assert any("pickle" in note for note in found.notes)


def sharded(folder: Path, form: str) -> Path:
    """The U-Net of a folder in two shards; returns its folder."""
    shutil.copytree(checkpoint("sd15"), folder)
    unet = folder / "unet"
    (whole,) = unet.glob("*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    suffix = "safetensors" if form == "safetensors" else "bin"
    table = {}
    for i, part in enumerate((names[::2], names[1::2])):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.{suffix}"
        some = {n: tensors[n] for n in part}
        if suffix == "bin":
            (unet / name).write_bytes(saved(some))
        else:
            save_file(some, unet / name)
        table |= dict.fromkeys(part, name)
    write_json(
        unet / f"diffusion_pytorch_model.{suffix}.index.json",
        {"metadata": {}, "weight_map": table},
    )
    return unet


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards(form: str, tmp_path: Path) -> None:
    sharded(tmp_path / "x", form)
    close(open_source(tmp_path / "x"), open_source(checkpoint("sd15")))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_shard_is_missing(form: str, tmp_path: Path) -> None:
    unet = sharded(tmp_path / "x", form)
    (lost,) = unet.glob("*00002-of-*")
    lost.unlink()
    with pytest.raises(CheckpointError, match=re.escape(lost.name)) as refused:
        open_source(tmp_path / "x")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        lambda table: {n: f"../{f}" for n, f in table.items()},
        lambda table: table | {"more.weight": next(iter(table.values()))},
        lambda table: [],
    ],
    ids=["outside", "a name too many", "no table"],
)
def test_a_damaged_index(change: Callable[[Any], Any], tmp_path: Path) -> None:
    unet = sharded(tmp_path / "x", "safetensors")
    (index,) = unet.glob("*.index.json")
    data = read_json(index)
    write_json(index, data | {"weight_map": change(data["weight_map"])})
    with pytest.raises(MlxdiffError) as refused:
        open_source(tmp_path / "x")
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------- LoRAs


def configs(model: str) -> dict[str, Any]:
    source = open_source(checkpoint(model))
    return {name: source.config(name) for name in source.components if name != "vae"}


def opened(path: Path, model: str, family: str, scale: float = 1.0) -> Any:
    return match(open_lora(path), scale, configs(model), family)


def test_the_second_text_encoder_alone(tmp_path: Path) -> None:
    tensors: Tensors = {}
    random = np.random.default_rng(0)
    for module, shape in modules("sdxl")["text_encoder_2"].items():
        pair, name = low_rank(shape, 4, random), kohya_xl("text_encoder_2", module)
        tensors |= {f"{name}.lora_{part}.weight": values for part, values in pair.items()}
        tensors[f"{name}.alpha"] = np.array(2.0, np.float32)
    path = tmp_path / "te2.safetensors"
    save_file(tensors, path)
    found = opened(path, "sdxl", "sdxl")
    assert not found.deltas["unet"] and not found.deltas["text_encoder"]
    assert len(found.deltas["text_encoder_2"]) == len(tensors) // 3
    with pytest.raises(CheckpointError) as refused:
        opened(path, "sd15", "sd1")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert "text encoder" in json.dumps(info.describe(str(path))) or "text_encoder_2" in json.dumps(
        info.describe(str(path))
    )


def formula(model: str, module: str) -> np.ndarray:
    """A weight in PyTorch's layout, float64."""
    return lora_files.read_weights(model, "unet")[module].astype(np.float64)


def after(path: Path, module: str, scale: float = 1.0, model: str = "sd15") -> np.ndarray:
    tensors = open_source(checkpoint(model)).tensors("unet")
    values = changed([opened(path, model, "sd1", scale)], "unet", tensors)[
        f"{module}.weight"
    ].read()
    return values.transpose(0, 3, 1, 2) if values.ndim == 4 else values


CONV = "down_blocks.1.resnets.0.conv1"
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def test_kohyas_dora(tmp_path: Path) -> None:
    """dora_scale holds a norm for each output; scale 1 gives the decomposed weight."""
    weight = formula("sd15", LINEAR)
    out, inputs = weight.shape
    up, down = drawn(out, 4), drawn(4, inputs, seed=1)
    norms = 1 + drawn(out, 1, seed=2)
    name = kohya("unet", LINEAR)
    parts = {
        "lora_up.weight": up,
        "lora_down.weight": down,
        "alpha": np.array(2.0, np.float32),
        "dora_scale": norms,
    }
    save_file(
        {f"{name}.{part}": values for part, values in parts.items()}, tmp_path / "x.safetensors"
    )
    sum_ = weight + 0.5 * up.astype(np.float64) @ down
    expected = norms * sum_ / np.linalg.norm(sum_, axis=1, keepdims=True)
    np.testing.assert_allclose(after(tmp_path / "x.safetensors", LINEAR), expected, atol=1e-5)


def test_lokr_and_loha_of_a_convolution_with_tucker(tmp_path: Path) -> None:
    weight = formula("sd15", CONV)
    out, inputs, kernel, _ = weight.shape
    name = kohya("unet", CONV)
    first, a, b = drawn(4, 4), drawn(3, out // 4), drawn(3, inputs // 4, seed=1)
    core = drawn(3, 3, kernel, kernel, seed=2)
    lokr = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
    save_file(
        {f"{name}.{k}": v for k, v in lokr.items()} | {f"{name}.alpha": np.array(6, np.float32)},
        tmp_path / "lokr.safetensors",
    )
    second = np.einsum("ijkl,ip,jr->prkl", core, a, b, dtype=np.float64)
    product = np.einsum("ab,cdkl->acbdkl", first, second).reshape(weight.shape)
    found = after(tmp_path / "lokr.safetensors", CONV)
    np.testing.assert_allclose(found, weight + 6 / 3 * product, atol=1e-5)
    pairs, total = {}, np.ones_like(weight)
    for i in (1, 2):
        core = drawn(3, 3, kernel, kernel, seed=i)
        a, b = drawn(3, out, seed=i), drawn(3, inputs, seed=i + 5)
        pairs |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b, f"hada_t{i}": core}
        total = total * np.einsum("ijkl,ip,jr->prkl", core, a, b, dtype=np.float64)
    save_file({f"{name}.{k}": v for k, v in pairs.items()}, tmp_path / "loha.safetensors")
    found = after(tmp_path / "loha.safetensors", CONV, 0.5)
    np.testing.assert_allclose(found, weight + 0.5 * total, atol=1e-5)


# What the training script of LCM-LoRA and Hyper-SD changes in a U-Net.
FEW_STEP = (
    r".+\.(?:to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2"
    r"|conv_shortcut|(?:down|up)samplers\.0\.conv|time_emb_proj)"
)
FEW_STEP_NAMES: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (lambda m: kohya("unet", m), ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (lambda m: f"unet.{m}", ".lora_A.weight", ".lora_B.weight"),
    "peft": (lambda m: f"base_model.model.{m}", ".lora_A.weight", ".lora_B.weight"),
    "bare": (lambda m: m, ".lora_A.weight", ".lora_B.weight"),
    "old diffusers": (lambda m: f"unet.{m}", ".lora.down.weight", ".lora.up.weight"),
}


@pytest.mark.parametrize("names", FEW_STEP_NAMES)
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_few_step_loras_change_every_layer_that_they_were_trained_on(
    names: str, model: str, tmp_path: Path
) -> None:
    spell, down, up = FEW_STEP_NAMES[names]
    tensors: Tensors = {}
    random = np.random.default_rng(0)
    every = modules(model)["unet"]
    trained = [m for m in every if re.fullmatch(FEW_STEP, m)]
    assert {m.rpartition(".")[2] for m in trained} >= {"conv1", "time_emb_proj", "proj_in", "conv"}
    for module in trained:
        pair = low_rank(every[module], 2, random)
        tensors |= {spell(module) + down: pair["down"], spell(module) + up: pair["up"]}
        if names == "kohya":
            tensors[f"{spell(module)}.alpha"] = np.array(8.0, np.float32)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    found = opened(path, model, "sdxl" if model == "sdxl" else "sd1")
    assert set(found.deltas["unet"]) == {f"{module}.weight" for module in trained}


def test_a_lora_in_torchs_format_within_a_table(tmp_path: Path) -> None:
    source = lora_files.write("sd15-kohya", tmp_path)
    for suffix in ("ckpt", "pt", "bin"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(saved(load_file(source), wrap="state_dict"))
        found, expected = opened(path, "sd15", "sd1"), opened(source, "sd15", "sd1")
        assert found.deltas["unet"].keys() == expected.deltas["unet"].keys()


def test_a_lora_of_which_nothing_is_understood_is_told_shortly(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for module in modules("sd15")["unet"]:
        name = kohya("unet", module)
        tensors |= {
            f"{name}.lora_down.weight": np.ones((4, 8), np.float16),
            f"{name}.lora_up.weight": np.ones((8, 4), np.float16),
            f"{name}.alpha": np.array(np.nan, np.float16),
        }
    save_file(tensors, tmp_path / "x.safetensors")
    said = info.describe(str(tmp_path / "x.safetensors"))
    assert len(said["not_understood"]) <= 11 and "more" in said["not_understood"][-1]


# ----------------------------------------------------------------------------- LoRAs and quantized


def test_a_lora_is_baked_into_a_quantized_file(sd15: Tensors, tmp_path: Path) -> None:
    """`convert --lora` on a packed file: the values that the file stands for, and the change."""
    from mlxdiff.run.baking import Baking

    def form(name: str, array: np.ndarray) -> str:
        fits = array.ndim == 2 and array.shape[1] % 32 == 0 and name.startswith(UNET)
        return "q8_0" if fits else "F32"

    path = write_gguf(tmp_path / "x.gguf", sd15, form)
    lora = lora_files.write("sd15-kohya", tmp_path)
    convert(
        path,
        tmp_path / "out",
        dtype="float32",
        config=checkpoint("sd15"),
        change=Baking([(lora, 0.5)]),
    )
    found, source = open_source(tmp_path / "out"), open_source(path, config=checkpoint("sd15"))
    one = opened(lora, "sd15", "sd1", 0.5)
    for component in source.components:
        expected = changed([one], component, source.tensors(component))
        for name, tensor in found.tensors(component).items():
            np.testing.assert_allclose(
                tensor.read(), expected[name].read(), rtol=0, atol=1e-6, err_msg=name
            )


# -------------------------------------------------------------------------------------- ControlNet


def test_a_controlnet_in_eight_bits(tmp_path: Path) -> None:
    from control_files import controlnet_config, controlnet_tensors
    from quantized_files import e4m3

    config = controlnet_config("sdxl")
    layers = {
        name: raw(e4m3(array), "F8_E4M3") if array.ndim > 1 else raw(array.astype(np.float16))
        for name, array in controlnet_tensors(config, 1).items()
    }
    write_safetensors(tmp_path / "x.safetensors", layers)
    found = open_controlnet(
        tmp_path / "x.safetensors", open_source(checkpoint("sdxl")).config("unet")
    )
    assert found.tensors()["conv_in.weight"].read().dtype == np.float32


def test_other_things_in_place_of_a_model(tmp_path: Path) -> None:
    """PEFT's forms, a folder of PEFT's parts, and an unfinished download."""
    folder = tmp_path / "oft" / "unet"
    folder.mkdir(parents=True)
    names = [f"base_model.model.{LINEAR}.oft_R.weight"]
    save_file(
        {name: np.ones((2, 28), np.float32) for name in names}, folder / "adapter_model.safetensors"
    )
    write_json(folder / "adapter_config.json", {"peft_type": "OFT", "r": 8})
    for path in (tmp_path / "oft", folder, folder / "adapter_model.safetensors"):
        with pytest.raises(
            (CheckpointError, UsageError), match=r"PEFT's form OFT; not supported; merge"
        ):
            opened(path, "sd15", "sd1")
        said = info.describe(str(path))
        assert said["kind"] == "an adapter of PEFT's form OFT" and "merge" in said["use"]
    write_json(folder / "adapter_config.json", {"peft_type": "NEWEST", "r": 8})
    with pytest.raises(CheckpointError, match=r"is an adapter of PEFT's form 'NEWEST'|form NEWEST"):
        opened(folder, "sd15", "sd1")
    part = {f"base_model.model.{LINEAR}.lora_E": np.ones((4, 1), np.float32)}
    save_file(part, tmp_path / "ada.safetensors")
    with pytest.raises(CheckpointError, match="form AdaLoRA"):
        opened(tmp_path / "ada.safetensors", "sd15", "sd1")
