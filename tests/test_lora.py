"""LoRA and its kin: pictures against diffusers, weights against the formulas, names, errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from golden_data import assert_latents_close, cases, checkpoint
from golden_runs import Opened, assert_drawn_again
from lora_files import KOHYA_PARTS, PEFT_PARTS, kohya, kohya_sgm, lora, modules, read_weights
from safetensors.numpy import load_file, save_file

import mlxdiff
from mlxdiff.adapters import lora_names
from mlxdiff.adapters.lora import changed, match, open_lora
from mlxdiff.backends import numpy as reference_backend
from mlxdiff.convert import open_source
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.run.kind import Network
from mlxdiff.weights.quantization import Quantization
from mlxdiff.weights.tensors import AdaptedTensor, LazyTensor, quantize_tensor

CASES = cases("lora")
SMALL = {"width": 32, "height": 32, "steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def files(opened: Opened) -> Path:
    return opened.folder


@pytest.mark.parametrize("case", CASES, ids=[c["case"] for c in CASES])
def test_pictures_equal_diffusers(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend)


def test_what_is_removed_is_gone(backend: str, opened: Opened, files: Path) -> None:
    path = lora_files.write("sd15-kohya", files)
    pipe = opened("sd15", backend)
    pipe.set_loras([])
    plain = pipe.generate("a", **SMALL).latents
    pipe.set_loras([path])
    under = pipe.generate("a", **SMALL).latents
    assert np.abs(under - plain).max() > 0.1
    pipe.set_loras([(path, 0.0)])
    np.testing.assert_array_equal(pipe.generate("a", **SMALL).latents, plain)
    pipe.set_loras([])
    np.testing.assert_array_equal(pipe.generate("a", **SMALL).latents, plain)
    pipe.set_loras([path])
    np.testing.assert_array_equal(pipe.generate("a", **SMALL).latents, under)
    fresh = mlxdiff.load(checkpoint("sd15"), backend=backend, dtype="float32", loras=[path])
    np.testing.assert_array_equal(fresh.generate("a", **SMALL).latents, under)
    again = pipe.loras
    pipe.set_loras([])
    pipe.set_loras(again)
    np.testing.assert_array_equal(pipe.generate("a", **SMALL).latents, under)
    pipe.set_loras([])


# ------------------------------------------------------------------------- formulas, on the weights

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV3 = "mid_block.resnets.0.conv1"
CONV1 = "mid_block.attentions.0.proj_in"
STRIDED = "down_blocks.0.downsamplers.0.conv"
KINDS = [LINEAR, CONV3, CONV1, STRIDED]


def configs(model: str) -> dict[str, Any]:
    source = open_source(checkpoint(model))
    return {name: source.config(name) for name in source.components if name != "vae"}


def matched(tensors: dict[str, np.ndarray], folder: Path, scale: float = 1.0, **save: Any) -> Any:
    path = folder / "x.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, **save)
    return match(open_lora(path), scale, configs("sd15"), "sd1")


def weight_of(loras: list[Any], module: str, component: str = "unet") -> np.ndarray:
    """The changed weight in PyTorch's layout."""
    tensors = open_source(checkpoint("sd15")).tensors(component)
    values = changed(loras, component, tensors)[f"{module}.weight"].read()
    return values.transpose(0, 3, 1, 2) if values.ndim == 4 else values


def base(module: str) -> np.ndarray:
    return read_weights("sd15", "unet")[module]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def flat(module: str) -> tuple[int, int, tuple[int, ...]]:
    """(out, in * kH * kW) and the shape."""
    shape = base(module).shape
    return shape[0], int(np.prod(shape[1:])), shape


@pytest.mark.parametrize("module", KINDS)
@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_lora(module: str, scale: float, alpha: float | None, tmp_path: Path) -> None:
    out, size, shape = flat(module)
    down = random(3, *shape[1:])
    up = random(out, 3, *(1,) * (len(shape) - 2))
    name = kohya("unet", module)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    if alpha is not None:
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    product = (up.reshape(out, 3) @ down.reshape(3, size)).reshape(shape)
    strength = 1.0 if alpha is None else alpha / 3
    close(
        weight_of([matched(tensors, tmp_path, scale)], module),
        base(module) + scale * strength * product,
    )


def test_a_pointwise_convolution_and_a_linear_layer_are_one(tmp_path: Path) -> None:
    out, size, shape = flat(CONV1)
    down, up = random(2, size), random(out, 2)
    name = kohya("unet", CONV1)
    close(
        weight_of(
            [matched({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path)],
            CONV1,
        ),
        base(CONV1) + (up @ down).reshape(shape),
    )


@pytest.mark.parametrize("module", [CONV3, STRIDED])
def test_locon_with_a_core(module: str, tmp_path: Path) -> None:
    """up(mid(down(x))), three convolutions one after the other, is the difference's convolution."""
    from mlxdiff.backends.numpy_layers import Conv2d

    out, _, shape = flat(module)
    down, mid, up = random(3, shape[1], 1, 1), random(2, 3, 3, 3), random(out, 2, 1, 1)
    name = kohya("unet", module)
    parts = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    tensors = {f"{name}.{part}.weight": values for part, values in parts.items()}
    tensors[f"{name}.alpha"] = np.array(1.5, np.float32)
    difference = weight_of([matched(tensors, tmp_path, 0.5)], module) - base(module)

    def conv(x: np.ndarray, weight: np.ndarray, padding: int) -> np.ndarray:
        layer = Conv2d(
            weight.shape[1], weight.shape[0], weight.shape[2], padding=padding, bias=False
        )
        layer.weight = np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
        return layer(x)

    x = random(1, 6, 5, shape[1])
    expected = 0.5 * 1.5 / 3 * conv(conv(conv(x, down, 0), mid, 1), up, 0)
    np.testing.assert_allclose(
        conv(x, difference, 1), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("module", KINDS)
def test_loha(module: str, tmp_path: Path) -> None:
    out, size, shape = flat(module)
    parts = {"w1_a": random(out, 2), "w1_b": random(2, size, seed=1)}
    parts |= {"w2_a": random(out, 2, seed=2), "w2_b": random(2, size, seed=3)}
    name = kohya("unet", module)
    tensors = {f"{name}.hada_{part}": values for part, values in parts.items()}
    tensors[f"{name}.alpha"] = np.array(1.0, np.float32)
    expected = np.zeros((out, size))
    for i, j in itertools.product(range(2), range(2)):  # sums of outer products, multiplied out
        left = parts["w1_a"][:, i] * parts["w2_a"][:, j].astype(np.float64)
        expected += np.outer(left, parts["w1_b"][i] * parts["w2_b"][j])
    close(
        weight_of([matched(tensors, tmp_path, 0.8)], module),
        base(module) + 0.8 * 0.5 * expected.reshape(shape),
    )


def test_loha_with_cores(tmp_path: Path) -> None:
    out, _, shape = flat(CONV3)
    name = kohya("unet", CONV3)
    parts: dict[str, np.ndarray] = {}
    expected = np.ones(shape)
    for i in (1, 2):
        a, b, core = random(3, out, seed=i), random(3, shape[1], seed=i), random(3, 3, 3, 3, seed=i)
        parts |= {f"w{i}_a": a, f"w{i}_b": b, f"t{i}": core}
        factor = np.zeros(shape)
        for r, s in itertools.product(range(3), range(3)):
            factor += a[r][:, None, None, None] * b[s][None, :, None, None] * core[r, s]
        expected *= factor
    tensors = {f"{name}.hada_{part}": values for part, values in parts.items()}
    close(weight_of([matched(tensors, tmp_path)], CONV3), base(CONV3) + expected)


@pytest.mark.parametrize("module", KINDS)
@pytest.mark.parametrize("first", ["whole", "product"])
@pytest.mark.parametrize("second", ["whole", "product", "core"])
def test_lokr(module: str, first: str, second: str, tmp_path: Path) -> None:
    out, _, shape = flat(module)
    kernel = shape[2:]
    if second == "core" and kernel in ((), (1, 1)):
        pytest.skip("cores are for kernels")
    name = kohya("unet", module)
    rows, columns = out // 4, shape[1] // 2
    parts, rank = {}, None
    if first == "whole":
        w1 = parts["w1"] = random(4, 2)
    else:
        parts |= {"w1_a": random(4, 3), "w1_b": random(3, 2)}
        w1, rank = parts["w1_a"] @ parts["w1_b"], 3
    if second == "whole":
        w2 = parts["w2"] = random(rows, columns, *kernel)
    elif second == "product":
        size = columns * int(np.prod(kernel))
        parts |= {"w2_a": random(rows, 3), "w2_b": random(3, size, seed=1)}
        w2, rank = (parts["w2_a"] @ parts["w2_b"]).reshape(rows, columns, *kernel), 3
    else:
        a, b, core = random(3, rows), random(3, columns, seed=1), random(3, 3, *kernel)
        parts |= {"w2_a": a, "w2_b": b, "t2": core}
        w2, rank = np.einsum("rskl,ro,si->oikl", core, a, b), 3
    tensors = {f"{name}.lokr_{part}": values for part, values in parts.items()}
    tensors[f"{name}.alpha"] = np.array(1.5, np.float32)
    expected = np.empty(shape)
    for o, i in itertools.product(range(out), range(shape[1])):
        expected[o, i] = w1[o // rows, i // columns] * w2[o % rows, i % columns]
    strength = 1.0 if rank is None else 1.5 / rank  # two whole factors have no rank
    close(weight_of([matched(tensors, tmp_path)], module), base(module) + strength * expected)


@pytest.mark.parametrize("module", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("axis", ["output", "input", "peft"])
def test_dora(module: str, scale: float, axis: str, tmp_path: Path) -> None:
    out, size, shape = flat(module)
    tail = (1,) * (len(shape) - 2)
    down, up = random(2, *shape[1:]), random(out, 2, *tail)
    spell, parts = (lora_files.peft, PEFT_PARTS) if axis == "peft" else (kohya, KOHYA_PARTS)
    name = spell("unet", module)
    tensors = {name + parts["down"]: down, name + parts["up"]: up}
    product = (up.reshape(out, 2) @ down.reshape(2, size)).reshape(shape).astype(np.float64)
    if axis == "input":
        norms = 1 + random(shape[1]) ** 2
        tensors[f"{name}.dora_scale"] = norms.reshape(1, -1, *tail)
        axes: tuple[int, ...] = (0, 2, 3)[: len(shape) - 1]
        wide = norms.reshape(1, -1, *tail)
    else:
        norms = 1 + random(out) ** 2
        axes = (1, 2, 3)[: len(shape) - 1]
        wide = norms.reshape(-1, 1, *tail)
        if axis == "peft":
            tensors[f"{name}.lora_magnitude_vector"] = norms
        else:
            tensors[f"{name}.dora_scale"] = wide
    if axis == "peft":
        whole = base(module) + scale * product
        expected = whole * (wide / np.sqrt((whole**2).sum(axis=axes, keepdims=True)))
    else:
        whole = base(module) + product
        decomposed = whole * (wide / np.sqrt((whole**2).sum(axis=axes, keepdims=True)))
        expected = base(module) + scale * (decomposed - base(module))
    close(weight_of([matched(tensors, tmp_path, scale)], module), expected)


def test_full_difference(tmp_path: Path) -> None:
    difference = random(*base(CONV3).shape)
    tensors = {f"{kohya('unet', CONV3)}.diff": difference}
    close(weight_of([matched(tensors, tmp_path, -0.3)], CONV3), base(CONV3) - 0.3 * difference)


def test_openclip_names_with_fused_queries_keys_and_values(tmp_path: Path) -> None:
    width = 32
    down, up = random(2, width), random(3 * width, 2)
    place = "lora_te_transformer_resblocks_1_attn_in_proj"
    found = matched({f"{place}.lora_down.weight": down, f"{place}.lora_up.weight": up}, tmp_path)
    assert len(found.deltas["text_encoder"]) == 3
    weights = read_weights("sd15", "text_encoder")
    for i, part in enumerate("qkv"):
        module = f"text_model.encoder.layers.1.self_attn.{part}_proj"
        expected = weights[module] + (up @ down)[i * width : (i + 1) * width]
        close(weight_of([found], module, "text_encoder"), expected)


def test_several_add_up(tmp_path: Path) -> None:
    out, size, _ = flat(LINEAR)
    name, loras, expected = kohya("unet", LINEAR), [], base(LINEAR)
    for i, scale in enumerate((0.5, -1.0, 2.0)):
        down, up = random(i + 1, size), random(out, i + 1)
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        (tmp_path / str(i)).mkdir()
        loras.append(matched(tensors, tmp_path / str(i), scale))
        expected = expected + scale * (up @ down)
    close(weight_of(loras, LINEAR), expected)


@pytest.mark.parametrize("module", [LINEAR, CONV3, CONV1])
def test_beside_a_packed_weight(module: str, tmp_path: Path) -> None:
    """What a layer adds beside its weight is what would be added to the weight."""
    out, _, shape = flat(module)
    tail = (1,) * (len(shape) - 2)
    name, files = kohya("unet", module), []
    for i in range(2):
        files.append(
            {
                f"{name}.lora_down.weight": random(2 + i, *shape[1:]),
                f"{name}.lora_up.weight": random(out, 2 + i, *tail),
                f"{name}.alpha": np.array(1.0, np.float32),
            }
        )
    files.append(files[0] | {f"{name}.dora_scale": 1 + random(out, 1, *tail) ** 2})
    files.append(
        {
            f"{lora_files.peft('unet', module)}.lora_A.weight": random(2, *shape[1:]),
            f"{lora_files.peft('unet', module)}.lora_B.weight": random(out, 2, *tail),
            f"{lora_files.peft('unet', module)}.lora_magnitude_vector": 1 + random(out) ** 2,
        }
    )
    dense = {f"{name}.diff": random(*shape)}
    loras = []
    for i, tensors in enumerate([*files, dense]):
        (tmp_path / str(i)).mkdir()
        loras.append(matched(tensors, tmp_path / str(i), 0.3 * (i + 1)))
    parameter = f"{module}.weight"
    tensors = open_source(checkpoint("sd15")).tensors("unet")
    packed = quantize_tensor("x", tensors[parameter], Quantization(4, 32), "float16")
    if packed.shape[-1] % 32:
        packed = quantize_tensor("x", tensors[parameter], Quantization(4, 16, "nvfp4"), "float16")
    x = random(2, 5, 4, packed.shape[-1])
    for chosen in (loras[:2], loras[:4], loras):
        adapted = changed(chosen, "unet", tensors | {parameter: packed})[parameter]
        assert isinstance(adapted, AdaptedTensor)
        parts = adapted.read_beside()
        assert (parts.up is None) == (len(chosen) == 5)
        assert (parts.gain is None) == (len(chosen) != 4)
        # What is stored is what it was, and what is computed with is that and the difference.
        np.testing.assert_array_equal(adapted.read_packed().weight, packed.read_packed().weight)
        plain = LazyTensor(packed.shape, "F32", packed.read)
        expected = changed(chosen, "unet", {**tensors, parameter: plain})[parameter].read()
        close(adapted.read(), expected)
        kept = reference_backend._weight(adapted, np.float32, keep_stored=True)
        close(kept.expand(), expected)
        mlx = pytest.importorskip("mlx.core")
        from mlxdiff.backends import mlx as models_backend
        from mlxdiff.backends import mlx_layers as layers

        kept = models_backend._weight(adapted, mlx.float32, keep_stored=True)
        close(np.array(kept.expand()), expected)
        if module != CONV3:  # the way of a GPU
            product = layers._quantized_product(mlx.array(x), kept, kept.quantization)
            product = np.array(layers._add_beside(mlx.array(x), kept, product))
            right = x @ expected.reshape(len(expected), -1).T
            np.testing.assert_allclose(product, right, atol=2e-5 * np.abs(right).max())


@pytest.mark.parametrize("keep_stored", [True, False])
def test_a_quantized_model(backend: str, keep_stored: bool, files: Path) -> None:
    """A picture of a quantized model under a LoRA: of its packed weights and the difference."""
    path = lora_files.write("sd15-kohya", files)
    pipe = mlxdiff.load(checkpoint("sd15"), backend=backend, dtype="float32", quantize=4)

    def put(name: str, tensors: Any, **how: Any) -> None:
        loaded = pipe.backend.load(pipe.source.config(name), tensors, **how)
        pipe.model.cache.keep(Network(name), loaded, pipe.model.additions)

    plain = pipe.generate("a", **SMALL).latents
    pipe.set_loras([(path, 0.7)])
    expected = {
        name: {k: LazyTensor(t.shape, "F32", t.read) for k, t in tensors.items()}
        for name in ("unet", "text_encoder")
        for tensors in [changed(pipe.loras, name, pipe.source.tensors(name))]
    }
    for name in ("unet", "text_encoder"):
        tensors = changed(pipe.loras, name, pipe.source.tensors(name))
        assert any(isinstance(t, AdaptedTensor) for t in tensors.values())
        put(name, tensors, keep_stored=keep_stored)
    under = pipe.generate("a", **SMALL).latents
    for name, tensors in expected.items():
        put(name, tensors)
    assert_latents_close(under, pipe.generate("a", **SMALL).latents)
    assert np.abs(under - plain).max() > 0.1
    pipe.set_loras([])
    np.testing.assert_array_equal(pipe.generate("a", **SMALL).latents, plain)


# ----------------------------------------------------------------------------------- PEFT's folders


def test_loha_and_lokr_as_peft_computes_them(tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    shapes = modules("sd15")["unet"]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(shapes[LINEAR][1], shapes[LINEAR][0], bias=False)
            self.b = torch.nn.Conv2d(shapes[CONV3][1], shapes[CONV3][0], 3, bias=False)

    given = {
        "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=["a", "b"], init_weights=False),
        "loha-core": peft.LoHaConfig(
            r=3, alpha=2, target_modules=["a", "b"], init_weights=False, use_effective_conv2d=True
        ),
        "lokr": peft.LoKrConfig(
            r=3, alpha=6, target_modules=["a", "b"], init_weights=False, decompose_both=True
        ),
        "lokr-whole": peft.LoKrConfig(r=64, alpha=32, target_modules=["a"], init_weights=False),
        "lokr-core": peft.LoKrConfig(
            r=2, alpha=5, target_modules=["a", "b"], init_weights=False, use_effective_conv2d=True
        ),
        "lora": peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["a", "b"], init_lora_weights=False, use_rslora=True,
            alpha_pattern={"b": 3}, rank_pattern={"a": 2},
        ),
        "dora": peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["a", "b"], init_lora_weights=False, use_dora=True
        ),
    }  # fmt: skip
    names = {"a": LINEAR, "b": CONV3}
    for name, config in given.items():
        torch.manual_seed(0)
        net = Net()
        with torch.no_grad():
            for own, module in names.items():
                getattr(net, own).weight.copy_(torch.from_numpy(base(module).copy()))
        model = peft.get_peft_model(net, config)
        model.save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        for own, module in names.items():
            tensors = {
                k.replace(f"base_model.model.{own}.", f"base_model.model.{module}."): v
                for k, v in tensors.items()
            }
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        for key in ("alpha_pattern", "rank_pattern"):
            pattern = settings.get(key) or {}
            settings[key] = {names[own]: value for own, value in pattern.items()}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        found = match(open_lora(tmp_path / name), 1.0, configs("sd15"), "sd1")
        assert found.name == name
        merged = model.merge_and_unload()
        for own, module in names.items():
            if own in config.target_modules:
                expected = getattr(merged, own).weight.detach().numpy()
                np.testing.assert_allclose(weight_of([found], module), expected, atol=2e-6)


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_name_as_diffusers_reads_it(family: str) -> None:
    """Every kohya name of the real models, in both block namings, by diffusers' conversion."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    from diffusers.utils import convert_unet_state_dict_to_peft

    from mlxdiff.networks.config import UNet2DConditionConfig

    table = lora_names.spellings({"unet": UNet2DConditionConfig.from_dict(_unet_config(family))})
    targets = {
        t.parameter.removesuffix(".weight")
        for found in table.values()
        for t in found
        if len(t.shape) > 1  # the tools have no names for norms
    }
    level = type("Config", (), {"layers_per_block": 2})
    for spell in [kohya, kohya_sgm] if family == "sdxl" else [kohya]:
        for module in targets:
            name = spell("unet", module)
            assert [t.parameter for t in table[name]] == [f"{module}.weight"]
            if spell is kohya and module.startswith("add_embedding"):
                continue  # diffusers makes add.embedding.linear of both
            pair = {f"{name}.lora_{part}.weight": torch.zeros(1, 1) for part in ("down", "up")}
            if spell is kohya_sgm:
                pair = utils._maybe_map_sgm_blocks_to_diffusers(pair, level)
            converted, _ = utils._convert_non_diffusers_lora_to_diffusers(pair)
            theirs = sorted(convert_unet_state_dict_to_peft(converted))
            assert theirs == [f"unet.{module}.lora_{part}.weight" for part in "AB"]


def _unet_config(family: str) -> dict[str, Any]:
    common = {"_class_name": "UNet2DConditionModel", "layers_per_block": 2}
    down, cross_down = "DownBlock2D", "CrossAttnDownBlock2D"
    up, cross_up = "UpBlock2D", "CrossAttnUpBlock2D"
    if family == "sd15":
        return common | {
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": [cross_down] * 3 + [down],
            "up_block_types": [up] + [cross_up] * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        }
    return common | {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [down, cross_down, cross_down],
        "up_block_types": [cross_up, cross_up, up],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


SPELLINGS = {
    "peft": (lora_files.peft, PEFT_PARTS),
    "peft with the adapter's name": (
        lora_files.peft,
        {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"},
    ),
    "peft alone": (
        lambda component, module: f"base_model.model.{module}",
        PEFT_PARTS,
    ),
    "diffusers before peft": (
        lora_files.peft,
        {"down": ".lora.down.weight", "up": ".lora.up.weight"},
    ),
    "processor": (lora_files.processor, lora_files.OLD_PARTS),
    "processor without prefix": (
        lambda component, module: lora_files.processor(component, module).removeprefix("unet."),
        lora_files.OLD_PARTS,
    ),
    "kohya": (kohya, KOHYA_PARTS),
    "lycoris": (
        lambda component, module: "lycoris_" + module.replace(".", "_"),
        KOHYA_PARTS,
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_mean_the_same(spelling: str, tmp_path: Path) -> None:
    spell, parts = SPELLINGS[spelling]
    only = r".+attn[12]\.to_(?:q|k|v|out\.0)"
    tensors = lora("sd15", spell, parts, 1, only=only, components=["unet"])
    found = matched(tensors, tmp_path)
    expected = [m for m in modules("sd15")["unet"] if "attn" in m and ".to_" in m]
    assert sorted(found.deltas["unet"]) == sorted(f"{m}.weight" for m in expected)
    standard = lora("sd15", lora_files.peft, PEFT_PARTS, 1, only=only, components=["unet"])
    (tmp_path / "standard").mkdir()
    close(weight_of([found], LINEAR), weight_of([matched(standard, tmp_path / "standard")], LINEAR))


@pytest.mark.parametrize(
    "model", ["sd15", "sd21v", "sdxl", "sdxl-refiner", "ssd-1b", "bk-sdm-tiny"]
)
def test_no_spelling_means_two_weights(model: str) -> None:
    for spelled, targets in lora_names.spellings(configs(model)).items():
        fused = all(target.third is not None for target in targets)
        assert len(targets) == (3 if fused else 1), spelled


def test_a_pickle_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = lora("sd15", kohya, KOHYA_PARTS, 1, only=r"mid.+attn.+", components=["unet"])
    expected = weight_of([matched(tensors, tmp_path)], LINEAR)
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, tmp_path / "x.pt")
    found = match(open_lora(tmp_path / "x.pt"), 1.0, configs("sd15"), "sd1")
    np.testing.assert_array_equal(weight_of([found], LINEAR), expected)


# ------------------------------------------------------------------------------------------- errors


def refused(tensors: dict[str, np.ndarray], folder: Path, **save: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        matched(tensors, folder, **save)
    return str(error.value)


def one(module: str, rank: int = 2, spell: Any = kohya, parts: Any = KOHYA_PARTS) -> dict[str, Any]:
    shape = base(module).shape
    name = spell("unet", module)
    pair = lora_files.low_rank(shape, rank, np.random.default_rng(0))
    return {name + parts[part]: values for part, values in pair.items()}


def test_no_match_is_an_error(tmp_path: Path) -> None:
    message = refused({"a.lora_A.weight": random(2, 3), "a.lora_B.weight": random(3, 2)}, tmp_path)
    assert "none of its 2 tensors belongs to a weight of this model" in message
    assert "a.lora_A.weight" in message and "Stable Diffusion 1.x" in message


def test_a_partial_match_is_an_error(tmp_path: Path) -> None:
    odd = {"lora_unet_mid_block_nothing.lora_down.weight": random(2, 3)}
    message = refused(one(LINEAR) | odd, tmp_path)
    assert "only in part" in message and "lora_unet_mid_block_nothing.lora_down.weight" in message


def test_a_lora_of_another_family_names_both(files: Path) -> None:
    path = lora_files.write("sdxl-kohya", files)
    with pytest.raises(CheckpointError, match=r"was made for .+text 96 wide.+this model is Stable"):
        match(open_lora(path), 1.0, configs("sd15"), "sd1")
    path = lora_files.write("sd15-kohya", files)
    with pytest.raises(CheckpointError, match=r"text 32 wide\); this model is SDXL"):
        match(open_lora(path), 1.0, configs("sdxl"), "sdxl")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("transformer.transformer_blocks.0.attn.to_q", "a diffusion transformer"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "SDXL"),
        ("unet.down_blocks.0.motion_modules.0.to_q", "AnimateDiff"),
    ],
)
def test_other_models_are_named(name: str, words: str, tmp_path: Path) -> None:
    tensors = {f"{name}.lora_A.weight": random(2, 8), f"{name}.lora_B.weight": random(8, 2)}
    assert f"was made for {words}" in refused(tensors, tmp_path)


def test_widths_of_the_real_families_are_named(tmp_path: Path) -> None:
    name = kohya("unet", LINEAR)
    tensors = {f"{name}.lora_down.weight": random(2, 2048), f"{name}.lora_up.weight": random(32, 2)}
    assert "was made for SDXL (text 2048 wide); this model is Stable Diffusion 1.x" in refused(
        tensors, tmp_path
    )


def test_damaged_files(tmp_path: Path) -> None:
    name = kohya("unet", LINEAR)
    whole = one(LINEAR)
    down = f"{name}.lora_down.weight"
    assert "down" in refused({down: whole[down]}, tmp_path)
    wrong = {
        key: values[..., :1] if "down" in key else values for key, values in one(CONV3).items()
    }
    assert "do not fit" in refused(whole | wrong, tmp_path)
    assert "do not match" in refused(whole | {down: random(3, 32)}, tmp_path)
    assert "alpha has 2 values" in refused(whole | {f"{name}.alpha": random(2)}, tmp_path)
    assert "dora_scale is (5, 1)" in refused(whole | {f"{name}.dora_scale": random(5, 1)}, tmp_path)
    assert "is I32" in refused(whole | {down: np.zeros((2, 32), np.int32)}, tmp_path)
    both = whole | one(LINEAR, spell=lora_files.peft, parts=PEFT_PARTS)
    assert "changes the same weight twice" in refused(both, tmp_path)
    loha = {f"{name}.hada_w1_a": random(32, 2)}
    assert "not a complete LoRA" in refused(loha, tmp_path)
    nan = matched(whole | {down: np.full_like(whole[down], np.nan)}, tmp_path)
    with pytest.raises(CheckpointError, match="NaN"):
        weight_of([nan], LINEAR)
    assert "malformed" in refused(whole, tmp_path, metadata={"lora_adapter_metadata": "[1]"})


def test_what_is_known_to_be_harmless_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"bundle_emb.word.string_to_param.*": random(1, 32)}
    found = matched(one(LINEAR) | extra, tmp_path)
    assert [name for name, _ in found.ignored] == list(extra)
    assert "textual inversion" in caplog.text
    alone = {"lora_unet_mid_block_resnets_0_conv1.alpha": np.array(1.0, np.float32)}
    assert not matched(one(LINEAR) | alone, tmp_path).ignored


def test_wrong_arguments(opened: Opened, files: Path, tmp_path: Path) -> None:
    pipe = opened("sd15")
    path = lora_files.write("sd15-kohya", files)
    before = pipe.loras
    for bad, words in (
        ("text", "expected a list"),
        ([tmp_path / "nothing.safetensors"], "no such LoRA"),
        ([tmp_path], "contains no LoRA"),
        ([(path, "much")], "its scale is 'much'; expected a number"),
        ([(path, float("nan"))], "expected a number"),
        ([(path, True)], "expected a number"),
        ([3], "expected a list of paths"),
    ):
        with pytest.raises(UsageError, match=words):
            pipe.set_loras(bad)
    assert pipe.loras == before
    with pytest.raises(UsageError, match="no part for a LoRA"):
        mlxdiff.load(checkpoint("ddpm"), backend="numpy", loras=[path])


def test_report_and_metadata(opened: Opened, files: Path) -> None:
    pipe = opened("sd15")
    path = lora_files.write("sd15-kohya", files)
    pipe.set_loras([(path, -0.5)])
    report = pipe.loras[0].report()
    assert report.startswith("sd15-kohya.safetensors at -0.5: LoRA of rank 2 to 4; ")
    assert "of unet" in report and "of text_encoder" in report
    metadata = pipe.generate("a", **SMALL).metadata[0]
    (entry,) = metadata.extra["loras"]
    assert entry["name"] == "sd15-kohya.safetensors" and entry["scale"] == -0.5
    assert len(entry["sha256"]) == 64 and len(entry["short_hash"]) == 12
    assert f'Lora hashes: "sd15-kohya: {entry["short_hash"]}"' in metadata.to_parameters()
    pipe.set_loras([])
    assert "loras" not in pipe.generate("a", **SMALL).metadata[0].extra


# --------------------------------------------------------------------------------------- in prompts


def test_loras_in_a_prompt(backend: str, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``<lora:name:0.5>`` is what the same LoRA at that scale is, for that prompt alone."""
    for name in ("sd15-kohya", "sd15-peft"):
        lora_files.write(name, files)
    pipe = mlxdiff.load(checkpoint("sd15"), backend=backend, dtype="float32", lora_folder=files)
    syntax = {"prompt_syntax": "a1111"}
    plain = pipe.generate("a cat", **SMALL, **syntax).latents
    asked = pipe.generate("a cat <lora:sd15-kohya:0.5>", **SMALL, **syntax)
    assert pipe.loras == ()
    entry = asked.metadata[0].extra["loras"][0]
    assert (entry["name"], entry["scale"], entry["in_prompt"]) == (
        "sd15-kohya.safetensors",
        0.5,
        True,
    )
    both = pipe.generate(
        "a cat <lora:sd15-kohya:te=0:unet=0.5><lora:sd15-peft:-0.2>", **SMALL, **syntax
    ).latents
    np.testing.assert_array_equal(pipe.generate("a cat", **SMALL, **syntax).latents, plain)
    pipe.set_loras([(files / "sd15-kohya.safetensors", 0.5)])
    np.testing.assert_array_equal(pipe.generate("a cat ", **SMALL, **syntax).latents, asked.latents)
    pipe.set_loras(
        [
            (files / "sd15-kohya.safetensors", (0.5, 0.0)),
            (files / "sd15-peft.safetensors", -0.2),
        ]
    )
    np.testing.assert_array_equal(pipe.generate("a cat ", **SMALL, **syntax).latents, both)
    assert "at 0.5 (text 0): " in pipe.loras[0].report()
    kept = pipe.loras
    pipe.generate("a cat <lora:sd15-kohya:0.5>", **SMALL, **syntax)
    assert pipe.loras == kept
    for prompt, words in (
        ("a <lora:nothing:1>", r"asks for the LoRA 'nothing', and .+; it has .*sd15-kohya"),
        ("a <lora:../x:1>", "expected a file name"),
    ):
        with pytest.raises(UsageError, match=words):
            pipe.settings(prompt, **syntax)
    with pytest.raises(UsageError, match="put it into the prompt"):
        pipe.settings("a", negative_prompt="<lora:sd15-kohya:1>", **syntax)
