"""Quantized checkpoints of other tools: equal to what their tools read, packed where MLX can."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import wide
from golden_data import GOLDEN, checkpoint
from quantized_files import (
    Raw,
    e4m3,
    int8_rows,
    raw,
    scaled_fp8,
    text,
    write_gguf,
    write_safetensors,
)
from safetensors.numpy import save_file
from single_files import Tensors, ldm_tensors, real_names, sparse_file

import mlxdiff
from mlxdiff.convert import convert, describe, open_source
from mlxdiff.errors import CheckpointError, MlxdiffError, UsageError
from mlxdiff.store.folder import open_folder
from mlxdiff.weights.files import open_file
from mlxdiff.weights.gguf import BLOCKS, GGUFFile
from mlxdiff.weights.tensors import QuantizedTensor

QUANTIZED = GOLDEN / "quantized"
COMFY = np.load(QUANTIZED / "comfy.npz")
CASES = json.loads(COMFY["headers"].tobytes())
PACKED = {"float8_e4m3fn", "int8_tensor", "mxfp8", "nvfp4"}
# Rotations sum 64 or 256 products in another order than the tool, and nvfp4 rounds twice there.
ROUNDED = {"int8_convrot", "convrot_w4a4", "w4a8", "w4a8_plain", "w4a8_asymmetric", "w6a8"}
NVFP4 = {"nvfp4", "nvfp4_padded"}


def layer(case: str, mark: Any = None) -> dict[str, Raw]:
    """The tensors of a layer ``l`` as comfy-kitchen stores it, with its mark."""
    tensors = {
        f"l.{name}": (dtype, tuple(shape), COMFY[f"{case}/{name}"].tobytes())
        for name, (dtype, shape) in CASES[case]["tensors"].items()
    }
    return tensors | {"l.comfy_quant": text(CASES[case]["config"] if mark is None else mark)}


# ----------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("form", BLOCKS.values(), ids=lambda form: form.name)
def test_gguf_blocks_equal_the_gguf_package_to_the_bit(form: Any) -> None:
    with np.load(QUANTIZED / "gguf.npz") as file:
        blocks, values = (file[f"{form.name.lower()}/{what}"] for what in ("bytes", "values"))
    found = form.decode(blocks.reshape(-1, form.bytes))
    np.testing.assert_array_equal(found.reshape(values.shape), values)


@pytest.mark.parametrize("case", CASES)
def test_forms_equal_their_tool(case: str, tmp_path: Path) -> None:
    file = open_file(write_safetensors(tmp_path / "x.safetensors", layer(case)))
    assert list(file.tensors) == ["l.weight"]
    tensor, want = file.tensors["l.weight"], COMFY[f"{case}/values"]
    assert isinstance(tensor, QuantizedTensor) == (case in PACKED)
    found = tensor.read()
    assert found.dtype == np.float32 and found.shape == tensor.shape == want.shape
    if case in ROUNDED:
        # Both sum n = 256 products of float32 in some order: each is within n * 2^-24 of the sum of
        # the sizes, which is at most 16 times the largest value here.
        assert np.abs(found - want).max() <= 256 * 2**-24 * 16 * np.abs(want).max()
        assert np.abs(found - want).max() <= 2e-6 * np.abs(want).max()  # in practice
    elif case in NVFP4:
        # The tool rounds the product of the scales, and then each value: 1 unit in the last place.
        np.testing.assert_allclose(found, want, rtol=2**-23, atol=0)
    else:
        np.testing.assert_array_equal(found, want)


def test_nvfp4_is_the_float64_value_rounded_once(tmp_path: Path) -> None:
    file = open_file(write_safetensors(tmp_path / "x.safetensors", layer("nvfp4")))
    tensor = file.tensors["l.weight"]
    assert isinstance(tensor, QuantizedTensor)
    packed = tensor.read_packed()
    plain = packed._replace(global_scale=None)
    from mlxdiff.weights.quantization import dequantize

    exact = dequantize(plain).astype(np.float64) * np.float64(packed.global_scale)
    np.testing.assert_array_equal(tensor.read(), exact.astype(np.float32))


def test_blocked_scales_of_more_than_one_tile() -> None:
    from mlxdiff.weights.scaled import _unblocked

    rows, columns = 300, 10
    whole = np.zeros((384, 12), np.int64)
    whole[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    # cuBLAS: offset of (row, column) in a tile of 128 x 4; tiles lie in rows.
    stored = np.empty(384 * 12, np.int64)
    for row in range(384):
        for column in range(12):
            tile = row // 128 * 3 + column // 4
            inside = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            stored[tile * 512 + inside] = whole[row, column]
    found = _unblocked(stored.reshape(384, 12), rows, columns)
    np.testing.assert_array_equal(found, whole[:rows, :columns])


def test_a_file_of_the_gguf_package() -> None:
    file = GGUFFile(QUANTIZED / "container.gguf")
    assert file.metadata["general.architecture"] == "sdxl"
    assert file.metadata["a.list"] is None and file.metadata["some.texts"] is None
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    assert shapes["conv.weight"] == (8, 4, 3, 8) and shapes["linear.weight"] == (5, 64)
    linear = file.tensors["linear.weight"]
    assert isinstance(linear, QuantizedTensor) and str(linear.quantization) == "affine-8-32"
    assert not isinstance(file.tensors["conv.weight"], QuantizedTensor)
    np.testing.assert_allclose(
        linear.read()[:, 0], file.tensors["linear.bias"].read(), atol=0.02, rtol=0
    )
    assert [file.tensors[n].dtype for n in ("half", "brain")] == ["F16", "BF16"]


@pytest.mark.parametrize("form", [f for f in BLOCKS.values() if f.group], ids=lambda f: f.name)
def test_packed_gguf_has_the_same_bits(form: Any, tmp_path: Path) -> None:
    """Affine groups of 32 with float16 scales, in float32 arithmetic, as MLX stores them."""
    mx = pytest.importorskip("mlx.core")
    from mlxdiff.weights.gguf import _packed
    from mlxdiff.weights.quantization import Quantization

    with np.load(QUANTIZED / "gguf.npz") as file:
        blocks, values = (file[f"{form.name.lower()}/{what}"] for what in ("bytes", "values"))
    how = Quantization(form.bits, 32)
    packed = _packed(blocks.reshape(-1, form.bytes), values.shape, form, how)
    parts = (mx.array(packed.weight), mx.array(packed.scales), mx.array(packed.biases))
    scales, biases = (part.astype(mx.float32) for part in parts[1:])
    found = mx.dequantize(parts[0], scales, biases, 32, form.bits)
    np.testing.assert_array_equal(np.array(found), values)


@pytest.mark.parametrize(("dtype", "least", "most"), [("float16", 0.0, 0.125), ("bfloat16", 1, 2)])
def test_cost_of_half_precision_scales(dtype: str, least: float, most: float) -> None:
    """q8_0 computed in half precision, in steps of the form: why bfloat16 does not keep it packed.

    scale * 255 + bias: the product has 19 bits and is rounded to 11 (float16: half a unit of 2^-2
    steps is 0.125) or 8 (bfloat16: 1 step, and the scale loses 3 of its bits).
    """
    mx = pytest.importorskip("mlx.core")
    from mlxdiff.weights.gguf import _packed
    from mlxdiff.weights.quantization import Quantization

    blocks = np.random.default_rng(0).integers(0, 256, (4096, 34), dtype=np.uint8)
    scales = np.random.default_rng(1).uniform(1e-3, 2e-3, 4096).astype("<f2")
    blocks[:, :2] = scales[:, None].view(np.uint8)
    form, how = BLOCKS[8], Quantization(8, 32)
    packed = _packed(blocks, (4096, 32), form, how)
    kind = getattr(mx, dtype)
    parts = (mx.array(part).astype(kind) for part in (packed.scales, packed.biases))
    found = np.array(mx.dequantize(mx.array(packed.weight), *parts, 32, 8).astype(mx.float32))
    error = np.abs(found - form.decode(blocks)) / np.abs(scales.astype(np.float32))[:, None]
    assert least <= error.max() <= most * 1.01, error.max()


# ---------------------------------------------------------------------------------------- marks


def opened(path: Path, tensors: Mapping[str, Raw], metadata: Any = None) -> np.ndarray:
    said = None if metadata is None else {"_quantization_metadata": json.dumps(metadata)}
    file = open_file(write_safetensors(path / "x.safetensors", tensors, said))
    (name,) = file.tensors
    return file.tensors[name].read()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("short", "inside"), [(False, True), (True, True), (False, False)])
def test_marks_in_the_metadata(bare: bool, short: bool, inside: bool, tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    tensors = {
        prefix * inside + name: value
        for name, value in layer("nvfp4").items()
        if "comfy" not in name
    }
    mark = "nvfp4" if bare else {"format": "nvfp4"}
    name = "l" if short else f"{prefix}l"
    found = opened(tmp_path, tensors, {"format_version": "1.0", "layers": {name: mark}})
    np.testing.assert_allclose(found, COMFY["nvfp4/values"], rtol=2**-23)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1)])
def test_scaled_floats_without_a_mark(scale: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """ComfyUI's older files, and conv weights, which stay in float32."""
    rng = np.random.default_rng(0)
    codes = e4m3(rng.normal(0, 100, (6, 32)))
    factor = rng.random(shape or ()).astype(np.float32)
    tensors = {
        "l.weight": raw(codes, "F8_E4M3"),
        f"l.{scale}": raw(np.asarray(factor)),
        "l.scale_input": raw(np.float32(1)),
        "scaled_fp8": raw(np.zeros(2, np.uint8), "F8_E4M3"),
    }
    from mlxdiff.weights.quantization import E4M3

    np.testing.assert_array_equal(opened(tmp_path, tensors), E4M3[codes] * factor)


def test_half_precision_that_kept_its_scale(tmp_path: Path) -> None:
    """A file that was cast without its scales: the scale counts all the same."""
    values = np.arange(12, dtype=np.float16).reshape(3, 4)
    tensors = {"l.weight": raw(values), "l.scale_weight": raw(np.float32(0.5))}
    np.testing.assert_array_equal(opened(tmp_path, tensors), values.astype(np.float32) / 2)


def test_bits_of_floats_in_integers(tmp_path: Path) -> None:
    tensors = layer("float8_e4m3fn")
    tensors["l.weight"] = ("U8", *tensors["l.weight"][1:])
    np.testing.assert_array_equal(opened(tmp_path, tensors), COMFY["float8_e4m3fn/values"])


def test_attention_marks_are_ignored(tmp_path: Path) -> None:
    tensors = layer("mxfp8") | {"l.attn.comfy_attention.config": text({"attention": "x"})}
    file = open_file(write_safetensors(tmp_path / "x.safetensors", tensors))
    assert list(file.tensors) == ["l.weight"]
    reasons = dict(file.ignored)
    assert "attention in 8 bits" in reasons["l.attn.comfy_attention.config"]
    assert "it was read" in reasons["l.comfy_quant"]
    assert file.notes == ("quantized tensors in the file: 1 x mxfp8",)


def _changed(case: str, **tensors: Raw | None) -> dict[str, Raw]:
    given = layer(case) | {f"l.{n}": t for n, t in tensors.items() if t is not None}
    return {n: t for n, t in given.items() if tensors.get(n.removeprefix("l."), 0) is not None}


F32 = raw(np.float32(1))
BAD: dict[str, tuple[Mapping[str, Raw], str]] = {
    "unknown": (layer("mxfp8", {"format": "q7"}), "has the form 'q7', which is not supported"),
    "no format": (layer("int8_row", {"convrot": True}), "its mark names no format"),
    "not json": (_changed("mxfp8", comfy_quant=raw(np.zeros(9, np.uint8))), "is not JSON"),
    "deep": (
        _changed("mxfp8", comfy_quant=("U8", (9000,), b"[" * 9000)),
        "is not JSON",
    ),
    "svdquant": (layer("mxfp8", {"format": "svdquant_w4a4"}), "SVDQuant's form"),
    "no scale": (_changed("mxfp8", weight_scale=None), "has no weight_scale"),
    "no second scale": (_changed("nvfp4", weight_scale_2=None), "has no weight_scale_2"),
    "no weight": (_changed("nvfp4", weight=None), "has no weight; the file is incomplete"),
    "scale shape": (_changed("int8_row", weight_scale=raw(np.ones(5, np.float32))), "of shape"),
    "block shape": (
        _changed("nvfp4", weight_scale=raw(np.ones((128, 15), np.uint8))),
        r"weight_scale of shape \(128, 15\); expected \(128, 16\)",
    ),
    "type": (_changed("int8_row", weight=F32), "its weight is F32; expected I8"),
    "rotation": (
        layer("int8_row", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48}),
        "rotated in groups of 48",
    ),
    "group": (layer("awq_w4a16", {"format": "awq_w4a16", "group_size": -1}), "group_size = -1"),
    "padding": (
        layer("mxfp8", {"format": "mxfp8", "orig_shape": [7, 7]}),
        r"orig_shape \[7, 7\], which does not fit",
    ),
    "smoothing": (_changed("nvfp4", pre_quant_scale=F32), "pre_quant_scale"),
    "unmarked int8": (
        {"l.weight": raw(np.ones((4, 4), np.int8)), "l.weight_scale": F32},
        "but no mark of its form",
    ),
    "two scales": (
        {
            "l.weight": raw(np.ones((4, 4), np.float16)),
            "l.weight_scale": F32,
            "l.scale_weight": F32,
        },
        "contradicts itself",
    ),
    "nunchaku": (
        {"a.qweight": raw(np.ones((4, 4), np.int8)), "a.wscales": F32},
        "SVDQuant's form .* use the original model",
    ),
    "bitsandbytes": (
        {"a.weight": F32, "a.weight.quant_state.bitsandbytes__nf4": F32},
        "quantized by bitsandbytes",
    ),
    "sdnq, plain": (
        {"a.weight": raw(np.ones((4, 4), np.int8)), "a.scale": F32},
        "quantized by SDNQ",
    ),
    "torchao": ({"a.weight_qdata": F32}, "quantized by torchao"),
    "sdnq": ({"a.weight": F32, "a.svd_up": F32, "a.svd_down": F32}, "quantized by SDNQ"),
    "quanto": ({"a.weight._data": F32, "a.weight._scale": F32}, "quantized by quanto"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_layers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    tensors, message = BAD[case]
    path = write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        open_file(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_contradicting_marks_are_refused(tmp_path: Path) -> None:
    said = {"_quantization_metadata": json.dumps({"layers": {"l": "nvfp4"}})}
    path = write_safetensors(tmp_path / "x.safetensors", layer("mxfp8"), said)
    with pytest.raises(CheckpointError, match="nvfp4 in the metadata, but mxfp8"):
        open_file(path)


# ---------------------------------------------------------------------------------------- models


def quantized_file(path: Path, tensors: Tensors, form: str) -> Path:
    """Write a model with the matrices (and, for int8, the convolutions) of its U-Net quantized."""
    result: dict[str, Raw] = {}
    for name, array in tensors.items():
        stem = name.removesuffix(".weight")
        inside = name.startswith("model.diffusion_model.") and name != stem
        values = array.astype(np.float32)
        if inside and form == "int8" and array.ndim in (2, 4) and array.shape[0] > 4:
            codes, scale = int8_rows(values)
            result |= {name: raw(codes), f"{stem}.weight_scale": raw(scale)}
            result[f"{stem}.comfy_quant"] = text({"format": "int8_tensorwise"})
        elif inside and form == "fp8" and array.ndim == 2:
            codes, factor = scaled_fp8(values)
            result |= {name: raw(codes, "F8_E4M3"), f"{stem}.scale_weight": raw(factor)}
        else:
            result[name] = raw(array.astype(np.float16))
    return write_safetensors(path, result)


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_quantized_model_converts(form: str, dtype: str, tmp_path: Path) -> None:
    folder = wide(tmp_path / "folder")
    path = quantized_file(tmp_path / "x.safetensors", ldm_tensors(folder), form)
    report = convert(path, tmp_path / "out", config=folder, dtype=dtype)
    source, result = open_source(path, config=folder), open_folder(tmp_path / "out")
    packed = 0
    for component in source.components:
        found, wanted = result.tensors(component), source.tensors(component)
        for name, tensor in wanted.items():
            if isinstance(found[name], QuantizedTensor) or dtype == "float32":
                np.testing.assert_array_equal(found[name].read(), tensor.read(), name)
            else:
                want = tensor.read().astype(np.float16)
                np.testing.assert_array_equal(found[name].read(), want, name)
            packed += isinstance(found[name], QuantizedTensor)
    assert (packed > 0) == (form == "fp8")
    assert result.manifest["format_version"] == (3 if packed else 1)
    assert report.recipe == ("as-stored" if packed else None)
    assert any("quantized tensors in the file" in note for note in report.notes)
    result.verify()
    facts = describe(tmp_path / "out")
    assert facts.get("quantization") is None


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_a_packed_model_draws_as_the_dequantized_one(backend: str, tmp_path: Path) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    folder = checkpoint("sd15")
    path = quantized_file(tmp_path / "x.safetensors", ldm_tensors(folder), "fp8")
    plain = {
        name: tensor.read().astype(np.float32) for name, tensor in open_file(path).tensors.items()
    }
    other = tmp_path / "plain.safetensors"
    save_file({n: np.ascontiguousarray(a) for n, a in plain.items()}, other)
    draw: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "steps": 2}
    convert(path, tmp_path / "out", config=folder, dtype="float32")
    pictures = [
        mlxdiff.load(model, backend=backend, dtype="float32", low_memory=low, **options)
        .generate(**draw)
        .latents
        for model, options, low in (
            (other, {"config": folder}, False),
            (path, {"config": folder}, False),
            (tmp_path / "out", {}, True),
        )
    ]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    # Kept packed and expanded at each use: products in another order.
    np.testing.assert_allclose(pictures[0], pictures[2], atol=2e-4 * pictures[0].std(), rtol=0)


@pytest.mark.parametrize("case", sorted(PACKED))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_products_with_packed_weights(case: str, dtype: str, tmp_path: Path) -> None:
    """The kernels that a GPU uses, on the CPU: a global scale is not lost in half precision."""
    mx = pytest.importorskip("mlx.core")
    from mlxdiff.backends.mlx_layers import StoredWeight, _quantized_product

    file = open_file(write_safetensors(tmp_path / "x.safetensors", layer(case)))
    tensor = file.tensors["l.weight"]
    assert isinstance(tensor, QuantizedTensor)
    kind = getattr(mx, dtype)
    weight = StoredWeight(tensor.read_packed(), kind)
    assert weight.expand().dtype == kind
    want = tensor.read().astype(np.float64)
    exact = np.array(weight.expand().astype(mx.float32))
    np.testing.assert_allclose(exact, want, rtol=2**-11, atol=2**-24)
    # Large activations: their product with a weight without its scale leaves float16's range.
    # Small ones: times the scale they would leave it, too. mxfp8 has no such scale. MLX's kernel
    # for a CPU multiplies by the groups' scales last; mxfp8 can overflow there, but it is not used.
    for width in (100, 1, 0.1) if tensor.has_global_scale else (1, 0.1):
        x = np.random.default_rng(0).normal(0, width, (4, want.shape[1])).astype(dtype)
        out = _quantized_product(mx.array(x), weight, tensor.quantization)
        assert out.dtype == kind
        found, product = np.array(out.astype(mx.float32)), x.astype(np.float64) @ want.T
        # n = 256 partial sums, each rounded by eps of its size, which is at most about twice the
        # root of the sum of squares: sqrt(n) * 2 * eps of it if the errors are independent.
        eps = 2**-11 if dtype == "float16" else 2**-24
        size = np.sqrt((x.astype(np.float64) ** 2) @ (want.T**2))
        assert np.abs(found - product).max() <= 32 * eps * size.max(), width


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_rows_of_packed_weights(backend: str, tmp_path: Path) -> None:
    file = open_file(write_safetensors(tmp_path / "x.safetensors", layer("nvfp4")))
    tensor = file.tensors["l.weight"]
    assert isinstance(tensor, QuantizedTensor)
    ids, want = np.array([3, 0, 7]), tensor.read()
    if backend == "numpy":
        from mlxdiff.backends.numpy_layers import StoredWeight as Stored

        found = Stored(tensor.read_packed()).take(ids)
    else:
        mx = pytest.importorskip("mlx.core")
        from mlxdiff.backends.mlx_layers import StoredWeight

        found = np.array(StoredWeight(tensor.read_packed(), mx.float32).take(mx.array(ids)))
    np.testing.assert_array_equal(found, want[ids])


def test_a_quantized_file_can_be_quantized_again(tmp_path: Path) -> None:
    folder = wide(tmp_path / "folder")
    path = quantized_file(tmp_path / "x.safetensors", ldm_tensors(folder), "fp8")
    report = convert(path, tmp_path / "out", config=folder, quantize=8)
    assert report.recipe == "uniform-8-64"
    assert "rounds its values a second time" in report.notes[-1]
    with pytest.raises(UsageError, match="already quantized"):
        convert(tmp_path / "out", tmp_path / "again")


# ------------------------------------------------------------------------------------------- GGUF


def gguf_form(name: str, array: np.ndarray) -> str:
    return "q8_0" if array.ndim > 1 and array.shape[-1] % 32 == 0 else "F16"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_gguf_unet(prefix: str, tmp_path: Path) -> None:
    """ComfyUI-GGUF: the U-Net alone; convolutions are flattened to rows of 256."""
    folder = wide(tmp_path / "folder")
    inside = "model.diffusion_model."
    unet = {
        prefix + name.removeprefix(inside): array
        for name, array in ldm_tensors(folder).items()
        if name.startswith(inside)
    }

    def flat(name: str, array: np.ndarray) -> str:
        return "q8_0" if array.ndim > 1 and array.size % 256 == 0 else "F16"

    said = {"general.architecture": "sd1"}
    path = write_gguf(tmp_path / "x.gguf", unet, flat, said, flatten=True)
    source = open_source(path, config=folder)
    wanted = open_source(folder).tensors("unet")
    packed = 0
    for name, tensor in source.tensors("unet").items():
        values, want = tensor.read(), wanted[name].read()
        assert values.shape == want.shape
        step = np.abs(want).max() / 127
        np.testing.assert_allclose(values, want, atol=0.6 * step + 1e-3, err_msg=name, rtol=0)
        packed += isinstance(tensor, QuantizedTensor)
    assert packed > 10
    convert(path, tmp_path / "out", config=folder)
    result = open_folder(tmp_path / "out")
    assert result.manifest["format_version"] == 2
    for name, tensor in source.tensors("unet").items():
        if isinstance(tensor, QuantizedTensor):
            np.testing.assert_array_equal(result.tensors("unet")[name].read(), tensor.read())


def test_bfloat16_does_not_keep_float16_scales(tmp_path: Path) -> None:
    folder = wide(tmp_path / "folder")
    path = write_gguf(tmp_path / "x.gguf", ldm_tensors(folder), gguf_form)
    convert(path, tmp_path / "out", config=folder, dtype="bfloat16")
    assert open_folder(tmp_path / "out").manifest["format_version"] == 1


def sd_cpp_names(tensors: Tensors) -> Tensors:
    """Name the text encoders as stable-diffusion.cpp does."""
    pairs = [
        ("conditioner.embedders.0.transformer.", "cond_stage_model.transformer."),
        ("conditioner.embedders.1.model.", "cond_stage_model.1.transformer."),
        ("cond_stage_model.model.", "cond_stage_model.transformer."),
    ]
    inner = [
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("ln_final.", "text_model.final_layer_norm."),
        ("text_projection", "text_model.text_projection"),
        ("transformer.resblocks.", "text_model.encoder.layers."),
        ("attn.in_proj_", "self_attn.in_proj."),
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ]
    result = {}
    for name, array in tensors.items():
        for old, new in pairs:
            if name.startswith(old):
                rest = name.removeprefix(old)
                for theirs, ours in inner if old.endswith(".model.") else ():
                    rest = rest.replace(theirs, ours)
                name = new + rest
                break
        result[name] = array
    return result


@pytest.mark.parametrize("name", ["sd15", "sd21v", "sdxl"])
def test_a_whole_gguf_model_without_metadata(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name)
    tensors = sd_cpp_names(ldm_tensors(folder))
    path = write_gguf(tmp_path / "x.gguf", {n: a.astype(np.float32) for n, a in tensors.items()})
    source, wanted = open_source(path, config=folder), open_source(folder)
    assert source.components == wanted.components and not source.notes
    for component in wanted.components:
        for key, tensor in wanted.tensors(component).items():
            found = source.tensors(component)[key].read()
            np.testing.assert_array_equal(found, tensor.read().astype(np.float32), key)


@pytest.mark.parametrize(("name", "family"), [("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl")])
def test_stable_diffusion_cpps_names_need_no_config(name: str, family: str, tmp_path: Path) -> None:
    """Real names and shapes; stable-diffusion.cpp leaves out the schedule and the positions."""
    named: Any = real_names(name)
    shapes = {
        key: shape
        for key, shape in sd_cpp_names(named).items()
        if not key.endswith(("position_ids", "logit_scale")) and "." in key
    }
    facts = describe(sparse_file(tmp_path / "x.safetensors", shapes))
    assert facts["family"] == family and "vae" in facts["components"]


def test_rows_of_joined_matrices_stay_packed(tmp_path: Path) -> None:
    folder = checkpoint("sdxl")
    path = write_gguf(tmp_path / "x.gguf", ldm_tensors(folder), gguf_form)
    source = open_source(path, config=folder)
    part = source.tensors("text_encoder_2")
    name = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    tensor = part[name]
    assert isinstance(tensor, QuantizedTensor)
    want = open_source(folder).tensors("text_encoder_2")[name].read()
    step = np.abs(want).max() / 127
    np.testing.assert_allclose(tensor.read(), want, atol=0.6 * step, rtol=0)


BAD_GGUF: dict[str, tuple[Any, str]] = {
    "cut header": (lambda b: b[:100], "truncated: its header is incomplete"),
    "cut data": (lambda b: b[:-64], "truncated: .* bytes expected"),
    "version 1": (lambda b: b[:4] + b"\1" + b[5:], "has version 1, which is not supported"),
    "big-endian": (lambda b: b[:4] + b"\0\0\0\3" + b[8:], "big-endian"),
    "many tensors": (lambda b: b[:8] + b"\xff" * 8 + b[16:], "announces .* entries"),
    "many entries": (lambda b: b[:16] + b"\xff" * 8 + b[24:], "announces .* entries"),
    "long key": (lambda b: b[:24] + b"\xff" * 7 + b"\0" + b[32:], "a name in its header has"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    spoil, message = BAD_GGUF[case]
    good = write_gguf(
        tmp_path / "good",
        {"a.weight": np.ones((4, 64), np.float32), "b": np.ones(50, np.float32)},
        gguf_form,
        {"general.architecture": "sd1", "some.list": [1, 2]},
    )
    (tmp_path / "x.gguf").write_bytes(spoil(good.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        open_file(tmp_path / "x.gguf")
    assert "x.gguf" in str(error.value) and "\n" not in str(error.value)


def test_unsupported_block_forms_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {"a": np.ones((4, 256), np.float32)})
    data = bytearray(path.read_bytes())
    place = data.index(b"\1\0\0\0\0\0\0\0a") + 9 + 4 + 16
    data[place] = 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="stored as iq2_xxs, which is not supported; use"):
        open_file(path)


# ---------------------------------------------------------------------------------------- fuzzing


def _spoilt(data: bytes, limit: int, chance: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        place, kind = chance.randrange(min(limit, len(spoilt))), chance.randrange(4)
        if kind == 0:
            spoilt[place] = chance.randrange(256)
        elif kind == 1:
            spoilt[place : place + 8] = chance.choice([b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x7f"])
        elif kind == 2:
            del spoilt[place : place + chance.randint(1, 20)]
        else:
            spoilt[place:place] = chance.choice([b"{", b"9" * 30, b"null", b"\1\0\0\0", b"[["])
    return bytes(spoilt)


def _fuzz(tmp_path: Path, count: int, seed: int) -> dict[str, int]:
    """Open damaged GGUF and quantized files. Return the number of each outcome."""
    import resource

    chance, outcomes = random.Random(seed), {"read": 0, "refused": 0}
    tensors: dict[str, Raw] = {}
    for number, case in enumerate(CASES):
        for name, value in layer(case).items():
            tensors[name.replace("l.", f"l{number}.", 1)] = value
    safe = write_safetensors(
        tmp_path / "a", tensors, {"_quantization_metadata": json.dumps({"layers": {}})}
    ).read_bytes()
    gguf = (QUANTIZED / "container.gguf").read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        good, limit = (safe, len(safe)) if chance.random() < 0.3 else (gguf, 1300)
        if good is safe and chance.random() < 0.8:
            limit = 8 + int.from_bytes(good[:8], "little")
        (tmp_path / "bad").write_bytes(_spoilt(good, limit, chance))
        start = time.process_time()
        try:
            for tensor in open_file(tmp_path / "bad").tensors.values():
                assert tensor.read().shape == tensor.shape
            outcomes["read"] += 1
        except MlxdiffError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error)
        assert time.process_time() - start < 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 512 << 20, grown
    return outcomes


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damaged_headers_are_read_or_refused(tmp_path: Path) -> None:
    assert _fuzz(tmp_path, 300, 1)["refused"] > 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_20000_damaged_headers(tmp_path: Path) -> None:
    outcomes = _fuzz(tmp_path, 20_000, 2)
    print(outcomes)
    assert outcomes["refused"] > 5_000
