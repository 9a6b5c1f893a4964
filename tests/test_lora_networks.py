"""LyCORIS' and other tools' networks: each form against its tool's formula in float64; names of
ComfyUI, OneTrainer, PEFT and cloneofsimo; biases and norms; what does not fit."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from golden_data import checkpoint
from lora_files import kohya, low_rank, modules
from safetensors.numpy import save_file

from mlxdiff.adapters.lora import changed, describe, match, open_lora
from mlxdiff.convert import open_source
from mlxdiff.convert.keymap import ldm_unet
from mlxdiff.errors import CheckpointError
from mlxdiff.weights.quantization import Quantization
from mlxdiff.weights.tensors import quantize_tensor

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
SQUARE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "mid_block.resnets.0.conv1"
NORM = "mid_block.resnets.0.norm1"
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.norm1"
MODULES = [LINEAR, SQUARE, WIDE, CONV]

Tensors = dict[str, np.ndarray]


def configs(model: str) -> dict[str, Any]:
    source = open_source(checkpoint(model))
    return {name: source.config(name) for name in source.components if name != "vae"}


def matched(
    tensors: Tensors, folder: Path, scale: float = 1.0, model: str = "sd15", **save: Any
) -> Any:
    folder.mkdir(exist_ok=True)
    path = folder / "x.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, **save)
    return match(open_lora(path), scale, configs(model), {"sdxl": "sdxl"}.get(model, "sd1"))


@cache
def stored(model: str, component: str) -> Any:
    return open_source(checkpoint(model)).tensors(component)


def original(name: str, component: str = "unet", model: str = "sd15") -> np.ndarray:
    """A parameter in PyTorch's layout, float64."""
    values = stored(model, component)[name].read().astype(np.float64)
    return values.transpose(0, 3, 1, 2) if values.ndim == 4 else values


def result(loras: list[Any], name: str, component: str = "unet", model: str = "sd15") -> np.ndarray:
    values = changed(loras, component, stored(model, component))[name].read()
    return values.transpose(0, 3, 1, 2) if values.ndim == 4 else values


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal to float32's accuracy: a few roundings of the largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


def refused(tensors: Tensors, folder: Path, **save: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        matched(tensors, folder, **save)
    return str(error.value)


# --------------------------------------------------------------------------------------------- OFT


def cayley(blocks: np.ndarray, limit: float = 0) -> np.ndarray:
    """(I + Q) (I - Q)^-1 of each block, with Q = P - P^T scaled down to a norm of ``limit``."""
    q = blocks.astype(np.float64)
    q = q - np.swapaxes(q, -1, -2)
    norm = np.sqrt((q**2).sum())
    if 0 < limit < norm:
        q = q * (limit / norm)
    eye = np.eye(q.shape[-1])
    return (eye + q) @ np.linalg.inv(eye - q)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("alpha", [None, 0.0, 0.01, 1000.0])
@pytest.mark.parametrize("rescaled", [False, True])
def test_oft(module: str, alpha: float | None, rescaled: bool, tmp_path: Path) -> None:
    weight = original(f"{module}.weight")
    out = len(weight)
    blocks = random(out // 8, 8, 8) * 0.2
    name = kohya("unet", module)
    tensors = {f"{name}.oft_blocks": blocks}
    if alpha is not None:
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    factors = np.ones(out)
    if rescaled:
        factors = 1 + random(out, seed=1).astype(np.float64) ** 2
        tensors[f"{name}.rescale"] = factors.astype(np.float32).reshape(
            -1, *(1,) * (weight.ndim - 1)
        )
        factors = tensors[f"{name}.rescale"].astype(np.float64).reshape(-1)
    turn = np.zeros((out, out))  # the whole block-diagonal matrix
    for i, block in enumerate(cayley(blocks, (alpha or 0) * out)):
        turn[8 * i : 8 * i + 8, 8 * i : 8 * i + 8] = block
    turned = np.einsum("nm,n...->m...", turn, weight)
    turned *= factors.reshape(-1, *(1,) * (weight.ndim - 1))
    for scale in (1.0, -0.6):
        expected = weight + scale * (turned - weight)
        close(result([matched(tensors, tmp_path, scale)], f"{module}.weight"), expected)
    if alpha is None and not rescaled:  # a rotation keeps all norms
        np.testing.assert_allclose((turned**2).sum(0), (weight**2).sum(0))


def test_old_oft_holds_the_rotations(tmp_path: Path) -> None:
    weight = original(f"{SQUARE}.weight")
    rotations = cayley(random(len(weight) // 8, 8, 8) * 0.2).astype(np.float32)
    name = kohya("unet", SQUARE)
    tensors = {f"{name}.oft_diag": rotations, f"{name}.alpha": np.array(1.0, np.float32)}
    expected = np.einsum("knm,kni->kmi", rotations, weight.reshape(len(rotations), 8, -1))
    close(result([matched(tensors, tmp_path)], f"{SQUARE}.weight"), expected.reshape(weight.shape))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft(module: str, factors: int, tmp_path: Path) -> None:
    """Each factor as a whole matrix: a permutation, blocks on the diagonal, and back."""
    weight = original(f"{module}.weight")
    out, size = len(weight), 4
    blocks = random(factors, out // size, size, size) * 0.2
    name = kohya("unet", module)
    expected = weight.reshape(out, -1)
    for i, turns in enumerate(cayley(blocks)):
        step = 2**i * size // 2
        order = np.arange(out).reshape(-1, 2, step).swapaxes(1, 2).reshape(-1)
        permutation = np.eye(out)[order]
        diagonal = np.zeros((out, out))
        for j, turn in enumerate(turns):
            diagonal[size * j : size * (j + 1), size * j : size * (j + 1)] = turn
        expected = permutation.T @ diagonal @ permutation @ expected
    found = matched({f"{name}.oft_blocks": blocks, f"{name}.alpha": np.array(0)}, tmp_path)
    close(result([found], f"{module}.weight"), expected.reshape(weight.shape))
    assert "BOFT" in found.report()


# ------------------------------------------------------------------------------------ (IA)^3, GLoRA


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("tool", ["lycoris", "lycoris, old", "peft"])
def test_ia3(module: str, on_input: bool, tool: str, tmp_path: Path) -> None:
    weight = original(f"{module}.weight")
    count = weight.shape[1 if on_input else 0]
    axis = [1] * weight.ndim
    axis[1 if on_input else 0] = count
    factors = random(count) * 0.3
    name = kohya("unet", module)
    if tool == "peft":
        shape = axis
        tensors = {f"base_model.model.{module}.ia3_l": (1 + factors).reshape(shape)}
        factors = tensors[f"base_model.model.{module}.ia3_l"].astype(np.float64).reshape(-1) - 1
    else:
        shape = [count] if tool == "lycoris" and weight.ndim == 2 else axis
        kind = np.int64 if tool == "lycoris" else bool
        tensors = {
            f"{name}.weight": factors.reshape(shape),
            f"{name}.on_input": np.array(on_input, kind),
        }
    expected = weight * (1 + 0.5 * factors.astype(np.float64).reshape(axis))
    close(result([matched(tensors, tmp_path, 0.5)], f"{module}.weight"), expected)


@pytest.mark.parametrize("module", MODULES)
def test_glora(module: str, tmp_path: Path) -> None:
    weight = original(f"{module}.weight")
    out, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    a1, a2 = random(inputs, 4, *ones) * 0.1, random(4, inputs, *ones) * 0.1
    b1, b2 = random(out, 4, *ones) * 0.1, random(4, inputs, *kernel, seed=1) * 0.1
    name = kohya("unet", module)
    tensors = {
        f"{name}.{part}.weight": v
        for part, v in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
    }
    tensors[f"{name}.alpha"] = np.array(2)  # an integer
    a = (a1.reshape(inputs, 4) @ a2.reshape(4, inputs)).astype(np.float64)
    b = np.einsum("or,ri...->oi...", b1.reshape(out, 4), b2.astype(np.float64))
    change = np.einsum("oi...,ij->oj...", weight, a) + b
    expected = weight + 0.7 * 2 / 4 * change
    close(result([matched(tensors, tmp_path, 0.7)], f"{module}.weight"), expected)


@pytest.mark.parametrize("module", [LINEAR, SQUARE, WIDE])
def test_glora_of_the_first_lycoris(module: str, tmp_path: Path) -> None:
    weight = original(f"{module}.weight")
    out, inputs = weight.shape
    parts = {"a1": (4, inputs), "a2": (inputs, 4), "b1": (4, inputs), "b2": (out, 4)}
    values = {part: random(*shape) * 0.1 for part, shape in parts.items()}
    name = kohya("unet", module)
    tensors = {f"{name}.{part}.weight": v for part, v in values.items()}
    a1, a2, b1, b2 = (v.astype(np.float64) for v in values.values())
    expected = weight + weight @ a2 @ a1 + b2 @ b1
    close(result([matched(tensors, tmp_path)], f"{module}.weight"), expected)


def test_beside_a_packed_weight(tmp_path: Path) -> None:
    """A change that depends on the weight is that of the packed weight's values."""
    parameter = f"{SQUARE}.weight"
    tensors = open_source(checkpoint("sd15")).tensors("unet")
    packed = quantize_tensor("x", tensors[parameter], Quantization(4, 32), "float16")
    blocks = random(packed.shape[0] // 8, 8, 8) * 0.2
    found = matched({f"{kohya('unet', SQUARE)}.oft_blocks": blocks}, tmp_path)
    adapted: Any = changed([found], "unet", tensors | {parameter: packed})[parameter]
    weight = packed.read().astype(np.float64)
    turned = np.einsum("knm,kni->kmi", cayley(blocks), weight.reshape(len(blocks), 8, -1))
    close(adapted.read(), turned.reshape(weight.shape))
    close(adapted.read_beside().down, turned.reshape(weight.shape) - weight)


# ------------------------------------------------------------------------------- norms and biases


@pytest.mark.parametrize("spelling", [("diff", "diff_b"), ("w_norm", "b_norm")])
def test_norms(spelling: tuple[str, str], tmp_path: Path) -> None:
    names = [kohya("unet", ATTENTION), kohya("unet", NORM)]
    size = len(original(f"{ATTENTION}.weight"))
    tensors = {
        f"{n}.{part}": random(size, seed=i) for i, part in enumerate(spelling) for n in names
    }
    found = matched(tensors, tmp_path, 0.5)
    for module in (ATTENTION, NORM):
        for i, kind in enumerate(("weight", "bias")):
            expected = original(f"{module}.{kind}") + 0.5 * random(size, seed=i)
            close(result([found], f"{module}.{kind}"), expected)


def test_a_bias_beside_a_lora(tmp_path: Path) -> None:
    out, inputs = original(f"{WIDE}.weight").shape
    pair = low_rank((out, inputs), 4, np.random.default_rng(0))
    product = (pair["up"] @ pair["down"]).astype(np.float64)
    bias = random(out)
    name = kohya("unet", WIDE)
    tensors = {f"{name}.lora_down.weight": pair["down"], f"{name}.lora_up.weight": pair["up"]}
    tensors |= {f"{name}.diff_b": bias, f"{name}.alpha": np.array(2, np.int32)}
    found = matched(tensors, tmp_path, 0.5)
    close(result([found], f"{WIDE}.weight"), original(f"{WIDE}.weight") + 0.25 * product)
    close(result([found], f"{WIDE}.bias"), original(f"{WIDE}.bias") + 0.5 * bias)
    # PEFT's bias of lora_B is multiplied by alpha / r, too
    name = f"unet.{WIDE}"
    tensors = {f"{name}.lora_A.weight": pair["down"], f"{name}.lora_B.weight": pair["up"]}
    tensors |= {f"{name}.lora_B.bias": bias}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    found = matched(tensors, tmp_path, 1.0, metadata=metadata)
    close(result([found], f"{WIDE}.weight"), original(f"{WIDE}.weight") + 0.5 * product)
    close(result([found], f"{WIDE}.bias"), original(f"{WIDE}.bias") + 0.5 * bias)
    message = refused({f"{kohya('unet', LINEAR)}.diff_b": random(4)}, tmp_path)
    assert "1 change the bias of a layer that has none, which is not supported" in message
    assert "attn2_to_k" in message and "trained on" not in message


def test_a_changed_embedding(tmp_path: Path) -> None:
    """ComfyUI's extraction makes factors of the token embedding, too."""
    module = "text_model.embeddings.token_embedding"
    shape = original(f"{module}.weight", "text_encoder").shape
    pair = low_rank(shape, 4, np.random.default_rng(0))
    name = f"text_encoders.clip_l.transformer.{module}"
    tensors = {f"{name}.lora_down.weight": pair["down"], f"{name}.lora_up.weight": pair["up"]}
    expected = original(f"{module}.weight", "text_encoder") + pair["up"] @ pair["down"]
    close(result([matched(tensors, tmp_path)], f"{module}.weight", "text_encoder"), expected)


# ------------------------------------------------------------------------------------------- names


def ldm_places(model: str) -> dict[str, str]:
    table = ldm_unet(open_source(checkpoint(model)).config("unet")).names or {}
    return {
        p[0].target.removesuffix(".weight"): n.removesuffix(".weight") for n, p in table.items()
    }


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["comfy", "original"])
def test_onetrainers_names(model: str, kind: str, tmp_path: Path) -> None:
    places = ldm_places(model)
    prefixes = {
        "comfy": {
            "unet": "diffusion_model.",
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
        },
        "original": {"unet": "", "text_encoder": "cond_stage_model.transformer."},
    }[kind]
    if kind == "original" and model == "sdxl":
        prefixes["text_encoder"] = "conditioner.embedders.0.transformer."
    spelled, standard = {}, {}
    random_numbers = np.random.default_rng(0)
    for component, prefix in prefixes.items():
        for module, shape in modules(model).get(component, {}).items():
            pair = low_rank(shape, 4, random_numbers)
            name = prefix + (places[module] if component == "unet" else module)
            spelled |= {f"{name}.lora_A.weight": pair["down"], f"{name}.lora_B.weight": pair["up"]}
            spelled[f"{name}.alpha"] = np.array(2, np.float32)
            half = pair["up"] * np.float32(0.5)
            name = f"{component}.{module}"
            standard |= {f"{name}.lora_A.weight": pair["down"], f"{name}.lora_B.weight": half}
    one = matched(spelled, tmp_path / "spelled", model=model)
    other = matched(standard, tmp_path / "standard", model=model)
    for component in prefixes:
        assert one.deltas.get(component, {}).keys() == other.deltas.get(component, {}).keys()
    for name in list(one.deltas["unet"])[::20]:
        close(result([one], name, model=model), result([other], name, model=model))


def test_peft_folders(tmp_path: Path) -> None:
    """One folder for the U-Net and one for the text encoder: each alone, and the folder of both."""
    both: Tensors = {}
    random_numbers = np.random.default_rng(0)
    for component, ends in (("unet", ("to_q", "to_v")), ("text_encoder", ("q_proj", "v_proj"))):
        tensors: Tensors = {}
        for module, shape in modules("sd15")[component].items():
            if module.endswith(ends):
                pair = low_rank(shape, 4, random_numbers)
                name = f"base_model.model.{module}"
                tensors |= {
                    f"{name}.lora_A.weight": pair["down"],
                    f"{name}.lora_B.weight": pair["up"],
                }
                name = kohya(component, module)
                both |= {
                    f"{name}.lora_down.weight": pair["down"],
                    f"{name}.lora_up.weight": pair["up"],
                }
                both[f"{name}.alpha"] = np.array(8, np.float32)
        folder = tmp_path / "out" / component
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(ends)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    whole = matched(both, tmp_path / "kohya")

    def opened(path: Path) -> Any:
        return match(open_lora(path), 1.0, configs("sd15"), "sd1")

    joined = opened(tmp_path / "out")
    apart = [opened(tmp_path / "out" / part) for part in ("unet", "text_encoder")]
    assert joined.name == "out" and len(joined.file.sha256) == 64
    for component, found in whole.deltas.items():
        assert joined.deltas[component].keys() == found.keys()
        for name in list(found)[::7]:
            expected = result([whole], name, component)
            np.testing.assert_array_equal(result([joined], name, component), expected)
            np.testing.assert_array_equal(result(apart, name, component), expected)


def numbered_modules(order: tuple[str, ...]) -> dict[str, list[str]]:
    """Modules as cloneofsimo's loader meets them: down, up, middle; CLIP's k, v, q, out."""
    names = list(modules("sd15")["unet"])
    places = []
    for side in ("down_blocks.", "up_blocks.", "mid_block."):
        for name in names:
            if name.startswith(side) and name.endswith("attn1.to_q"):
                places.append(name.removesuffix("attn1.to_q"))
    unet = []
    for place in places:
        for part in order:
            if part == "ff":
                unet.append(f"{place}ff.net.0.proj")
            else:
                unet += [f"{place}{part}.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
    layers = sum(name.endswith("k_proj") for name in modules("sd15")["text_encoder"])
    text = [
        f"text_model.encoder.layers.{i}.self_attn.{part}_proj"
        for i in range(layers)
        for part in ("k", "v", "q", "out")
    ]
    return {"unet": unet, "text_encoder": text}


@pytest.mark.parametrize("order", [("attn1", "ff", "attn2"), ("attn1", "attn2", "ff")])
def test_cloneofsimos_numbers(
    order: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors: Tensors = {"<s1>": random(32), "<s2>": random(32, seed=1)}
    metadata = {"<s1>": "<embed>", "<s2>": "<embed>"}
    standard: Tensors = {}
    classes = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
    random_numbers = np.random.default_rng(0)
    for component, names in numbered_modules(order).items():
        metadata[component] = json.dumps(classes[component])
        for i, module in enumerate(names):
            pair = low_rank(modules("sd15")[component][module], 4, random_numbers)
            tensors |= {f"{component}:{i}:{part}": values for part, values in pair.items()}
            metadata[f"{component}:{i}:rank"] = "4"
            name = f"{component}.{module}"
            standard |= {f"{name}.lora_A.weight": pair["down"], f"{name}.lora_B.weight": pair["up"]}
    found = matched(tensors, tmp_path / "numbered", metadata=metadata)
    other = matched(standard, tmp_path / "standard")
    assert "textual inversion" in caplog.text
    for component, deltas in other.deltas.items():
        assert found.deltas[component].keys() == deltas.keys()
        held = stored("sd15", component)
        numbered, named = (changed([one], component, held) for one in (found, other))
        for name in list(deltas)[::5]:
            np.testing.assert_array_equal(numbered[name].read(), named[name].read())
    metadata["unet"] = json.dumps(["Odd"])
    assert "it changes layers of Odd" in refused(tensors, tmp_path, metadata=metadata)
    metadata["unet"] = "{"
    assert "list of changed classes is malformed" in refused(tensors, tmp_path, metadata=metadata)


def test_several_networks_in_a_file(tmp_path: Path) -> None:
    out, inputs = original(f"{LINEAR}.weight").shape
    tensors, expected = {}, original(f"{LINEAR}.weight")
    for i, network in enumerate(("style", "person")):
        down, up = random(2, inputs, seed=i), random(out, 2, seed=i)
        tensors[f"unet.{LINEAR}.lora_A.{network}.weight"] = down
        tensors[f"unet.{LINEAR}.lora_B.{network}.weight"] = up
        expected = expected + 0.5 * (up @ down)
    close(result([matched(tensors, tmp_path, 0.5)], f"{LINEAR}.weight"), expected)


# ------------------------------------------------------------------------------ what does not fit


def test_advice_is_given_only_where_it_is_true(tmp_path: Path) -> None:
    pair = low_rank(original(f"{LINEAR}.weight").shape, 2, np.random.default_rng(0))
    name = f"unet.{LINEAR}"
    good = {f"{name}.lora_A.weight": pair["down"], f"{name}.lora_B.weight": pair["up"]}
    strange = refused(good | {"something.else": random(3)}, tmp_path)
    assert "1 tensors have names that mlxdiff does not know: something.else" in strange
    assert "trained on" not in strange
    absent = refused(good | {"unet.mid_block.x.lora_A.weight": random(2, 3)}, tmp_path)
    assert "belong to no weight" in absent and "use the kind of model" in absent


def test_broken_forms(tmp_path: Path) -> None:
    name = kohya("unet", SQUARE)
    size = len(original(f"{SQUARE}.weight"))
    for tensors, words in (
        ({f"{name}.oft_blocks": random(3, 8, 8)}, "do not fit"),
        ({f"{name}.oft_blocks": random(size // 8, 8, 4)}, "the blocks"),
        ({f"{name}.oft_blocks": random(9, size // 8, 8, 8)}, "oft_blocks"),
        ({f"{name}.rescale": random(size)}, "not a complete"),
        ({f"{name}.weight": random(size)}, "not a complete"),
        ({f"{name}.weight": random(3), f"{name}.on_input": np.array(1)}, "do not fit"),
        ({f"{name}.weight": random(size), f"{name}.on_input": np.ones(2, bool)}, "single number"),
        ({f"{name}.a1.weight": random(4, size)}, "not a complete"),
        ({f"{name}.{p}.weight": random(4, 3) for p in ("a1", "a2", "b1", "b2")}, "a1, a2"),
        ({f"{name}.diff": random(size)}, "do not fit"),
    ):
        assert words in refused(tensors, tmp_path), words
    fused = "lora_te_transformer_resblocks_0_attn_in_proj.oft_blocks"
    assert "OFT of a fused weight" in refused({fused: random(12, 8, 8)}, tmp_path)


def test_describe(tmp_path: Path) -> None:
    name = kohya("unet", SQUARE)
    size = len(original(f"{SQUARE}.weight"))
    tensors = {f"{name}.oft_blocks": random(size // 8, 8, 8), f"{name}.diff_b": random(size)}
    save_file(tensors, tmp_path / "x.safetensors")
    facts = describe(tmp_path / "x.safetensors")
    assert facts["forms"] == {"OFT": 1, "bias difference": 1} and facts["not_understood"] == []
    assert lora_files.peft("unet", SQUARE) == f"unet.{SQUARE}"
