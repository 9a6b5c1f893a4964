"""Weights in few bits: the arithmetic against MLX's, the folder, and both backends."""

from __future__ import annotations

import importlib.util
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import diffusers_folder

import mlxdiff
from mlxdiff import convert as conversion
from mlxdiff.convert import convert, describe
from mlxdiff.errors import CheckpointError, ConfigError, UsageError
from mlxdiff.loading import BUILTIN, make_backend
from mlxdiff.networks.config import UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.store.folder import open_folder
from mlxdiff.store.recipes import find_recipe, quantized_model
from mlxdiff.weights import quantization
from mlxdiff.weights.quantization import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    FLOAT_MODES,
    Quantization,
    dequantize,
    quantize,
)
from mlxdiff.weights.tensors import QuantizedTensor, quantize_tensor

WAYS = [Quantization(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS]
WAYS += [Quantization(bits, group, mode) for mode, (bits, group) in FLOAT_MODES.items()]


def weights_to_round(dtype: Any) -> list[np.ndarray]:
    """Make ordinary values, heavy tails, a kernel, many scales, and degenerate cases."""
    random = np.random.default_rng(0)
    arrays = [
        random.normal(0, 0.02, (24, 3, 3, 128)),
        random.standard_t(3, (32, 256)),
        random.normal(0, 1, (16, 128)) * 10.0 ** random.integers(-6, 3, (16, 1)),
        np.zeros((4, 128)),
        np.full((4, 128), 0.3),
        np.full((4, 128), -7.0),
        np.abs(random.normal(0, 1, (16, 128))),
        np.linspace(-6, 6, 128)[None],
    ]
    return [array.astype(dtype) for array in arrays]


# -------------------------------------------------------------------------------------- arithmetic


@pytest.mark.mlx
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_the_same_bits_and_values_as_mlx(how: Quantization, dtype: str) -> None:
    import mlx.core as mx

    if how.mode.startswith("mxfp") and mx.__version__ < "0.32.4":
        pytest.skip("older versions chose the scales of these modes otherwise")
    for array in weights_to_round(dtype):
        ours = quantize(array, how)
        theirs = mx.quantize(mx.array(array), how.group_size, how.bits, mode=how.mode)
        for mine, their in zip(ours, theirs, strict=False):
            np.testing.assert_array_equal(mine, np.array(their))
        assert ours.shape == array.shape
        values = _mlx_values(theirs, how, getattr(mx, dtype))
        np.testing.assert_array_equal(dequantize(ours, dtype), values)


def _mlx_values(stored: Any, how: Quantization, dtype: Any) -> np.ndarray:
    import mlx.core as mx

    biases = stored[2] if len(stored) > 2 else None
    return np.array(
        mx.dequantize(stored[0], stored[1], biases, how.group_size, how.bits, how.mode, dtype=dtype)
    )


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_error_is_within_the_bound_of_the_bits(how: Quantization) -> None:
    array = np.random.default_rng(1).normal(0, 0.02, (64, 256)).astype(np.float16)
    packed = quantize(array, how)
    groups = array.reshape(-1, how.group_size).astype(np.float64)
    error = np.abs(dequantize(packed).reshape(groups.shape) - groups)
    if how.mode == "affine":
        # Half a step; the zero that is made exact costs up to another half at one end.
        step = (groups.max(1) - groups.min(1)) / (2**how.bits - 1)
        assert (error.max(1) <= 1.05 * step).all()
    else:
        # Half the widest gap of the numbers (4 to 6; 416 to 448), scaled.
        assert error.max() <= np.abs(groups).max() * (0.35 if how.bits == 4 else 0.08)
    bits = 8 * packed.nbytes / array.size
    assert bits == how.bits_per_weight


@pytest.mark.parametrize("how", WAYS[:-3], ids=str)
def test_fitted_scales_err_less_in_every_group(how: Quantization) -> None:
    array = np.random.default_rng(1).normal(0, 0.02, (64, 256)).astype(np.float16)
    for extreme in (array, np.full_like(array, 0.3), np.zeros_like(array)):
        errors = [
            np.square(dequantize(quantize(extreme, how, fitted)) - extreme.astype(np.float32))
            for fitted in (False, True)
        ]
        plain, fitted = (e.reshape(-1, how.group_size).sum(1) for e in errors)
        assert (fitted <= plain * (1 + 1e-5)).all()
        if extreme is array:
            assert fitted.sum() < 0.94 * plain.sum()


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_words_are_streams_of_bits(bits: int) -> None:
    codes = np.random.default_rng(2).integers(0, 2**bits, (5, 96)).astype(np.uint8)
    words = quantization._pack(codes, bits)
    assert words.shape == (5, 96 * bits // 32)
    for row, numbers in zip(words, codes, strict=True):
        stream = sum(int(word) << 32 * i for i, word in enumerate(row))
        assert [stream >> bits * i & 2**bits - 1 for i in range(96)] == numbers.tolist()
    np.testing.assert_array_equal(quantization._unpack(words, bits), codes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7,), "quantization to 7 bits does not exist; choose 2, 3, 4, 5, 6, 8"),
        ((4, 48), "group size 48 does not exist; choose 32, 64, 128"),
        ((4, 32, "int4"), "mode 'int4' does not exist; choose affine, mxfp4, nvfp4, mxfp8"),
        ((8, 32, "mxfp4"), "mxfp4 exists only with 4 bits in groups of 32"),
    ],
)
def test_unknown_quantizations(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Quantization(*arguments)


def test_names() -> None:
    for how in WAYS:
        assert Quantization.parse(str(how)) == how
    for text in ("affine-4", "affine-7-64", "x", "affine-4-64-1"):
        with pytest.raises(ConfigError, match=text):
            Quantization.parse(text)
    with pytest.raises(UsageError, match="groups of 64"):
        quantize(np.zeros((4, 96), np.float16), Quantization(4))


# ----------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7,), "7 bits does not exist"),
        (("many",), "quantization 'many' does not exist; choose one of 2, 3, 4, 5, 6, 8, mxfp4"),
        ((4, None, "best"), "recipe 'best' does not exist; choose mixed, uniform, linear"),
        (("mxfp4", 64), "mxfp4 has groups of 32"),
        (("uniform-4-64", 64), "is a complete recipe"),
        (("mixed-7",), "mixed recipes exist for"),
    ],
)
def test_unknown_recipes(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_recipe(*arguments)


def test_a_recipe_is_found_by_its_name() -> None:
    for arguments in ((4, None, "uniform"), (3, 32, "uniform"), ("nvfp4",), (8, 128, "linear")):
        found = find_recipe(*arguments)
        assert find_recipe(found.name) == found


def test_rows_that_no_group_divides_stay_floating_point() -> None:
    plan = find_recipe(4, 128, "uniform").plan
    shapes = {"a.weight": (8, 96), "b.weight": (8, 3, 3, 4), "c.bias": (128,), "d.weight": (128,)}
    assert plan("unet", shapes) == {"a.weight": Quantization(4, 32)}
    assert plan("vae", shapes) == {}


def test_linear_leaves_the_convolutions() -> None:
    kernels = (
        "conv_in",
        "conv_out",
        "down_blocks.0.resnets.0.conv1",
        "up_blocks.0.upsamplers.0.conv",
    )
    matrices = ("down_blocks.0.resnets.0.conv_shortcut", "time_embedding.linear_1")
    shapes = {f"{name}.weight": (64, 3, 3, 64) for name in kernels}
    shapes |= {f"{name}.weight": (64, 64) for name in matrices}
    plan = find_recipe(4, None, "linear").plan("unet", shapes)
    assert plan == {f"{name}.weight": Quantization(4) for name in matrices}


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    benchmark = Path(__file__).parent.parent / "benchmarks" / "numpy_unet_step.py"
    spec = importlib.util.spec_from_file_location("numpy_unet_step", benchmark)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return expected_parameters(UNet2DConditionConfig.from_dict(module.MODELS[model], model))


@pytest.mark.parametrize("model, most", [("sd15", 490), ("sdxl", 1460)])
def test_a_mixed_recipe_takes_no_more_room(model: str, most: int) -> None:
    shapes = shapes_of(model)
    for bits in (3, 4, 5, 6):
        sizes = []
        for kind in ("mixed", "uniform"):
            plan = find_recipe(bits, None, kind).plan("unet", shapes)
            sizes.append(
                sum(
                    math.prod(shape) * (plan[name].bits_per_weight if name in plan else 16) / 8
                    for name, shape in shapes.items()
                )
            )
        assert sizes[0] <= 1.001 * sizes[1]
        if bits == 4:
            assert sizes[0] < most * 1e6


def test_a_mixed_recipe_gives_bits_where_they_count() -> None:
    plan = find_recipe(4).plan("unet", shapes_of("sd15"))
    assert "conv_in.weight" not in plan and "conv_out.weight" not in plan
    last = plan["up_blocks.3.attentions.2.proj_out.weight"].bits
    deep = plan["mid_block.resnets.0.conv1.weight"].bits
    assert (last, deep) == (8, 3)
    assert {how.bits for how in plan.values()} <= {3, 4, 5, 6, 8}
    plan = find_recipe(4).plan("text_encoder", {"a.weight": (64, 64)})
    assert plan == {"a.weight": Quantization(6)}


# ---------------------------------------------------------------------------------------- a folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    diffusers_folder(path)
    return path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 6, "mxfp4"])
def test_folder_holds_the_rounded_values(
    source: Path, tmp_path: Path, bits: int | str, dtype: str
) -> None:
    report = convert(source, tmp_path / "q", dtype=dtype, quantize=bits, recipe="uniform")
    folder = open_folder(tmp_path / "q")
    folder.verify()
    assert folder.recipe == report.recipe == find_recipe(bits, None, "uniform").name
    assert folder.manifest["format_version"] == 2
    original = conversion.open_source(source)
    found = 0
    for component in folder.components:
        floats = original.tensors(component)
        stored = sum(f.stat().st_size for f in (tmp_path / "q" / component).glob("*.safetensors"))
        tensors = folder.tensors(component)
        assert 0 < stored - sum(t.nbytes for t in tensors.values()) < 60_000  # the header
        for name, tensor in tensors.items():
            if isinstance(tensor, QuantizedTensor):
                found += 1
                again = quantize_tensor(name, floats[name], tensor.quantization, dtype)
                np.testing.assert_array_equal(tensor.read(), again.read())
    assert found > 30
    assert describe(tmp_path / "q")["quantization"] == folder.recipe


def test_shards(source: Path, tmp_path: Path) -> None:
    from mlxdiff.store.folder import write_folder

    model = quantized_model(conversion.open_source(source), find_recipe(8))
    write_folder(model, tmp_path / "q", recipe="uniform-8-64", shard_bytes=50_000)
    assert (tmp_path / "q/unet/model.safetensors.index.json").is_file()
    tensors = open_folder(tmp_path / "q").tensors("unet")
    for name, tensor in model.tensors("unet").items():
        expected = tensor.read()
        if not isinstance(tensor, QuantizedTensor):
            expected = expected.astype(np.float16)
        np.testing.assert_array_equal(tensors[name].read(), expected)


def test_not_twice(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "q", quantize=8)
    with pytest.raises(UsageError, match="already quantized; convert the original"):
        convert(tmp_path / "q", tmp_path / "again")
    with pytest.raises(UsageError, match="already quantized, and rounding twice"):
        mlxdiff.load(tmp_path / "q", quantize=4)
    assert not (tmp_path / "again").exists()
    mlxdiff.load(tmp_path / "q", quantize=8)  # it is that already


def test_group_size_without_bits(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a number of bits"):
        convert(source, tmp_path / "q", group_size=32)


def edited(folder: Path, change: Any) -> Path:
    """Change the manifest of the folder."""
    manifest = json.loads((folder / "mlxdiff.json").read_text())
    change(manifest)
    (folder / "mlxdiff.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["quantization"]["tensors"]["unet"].clear(), "missing|mistyped|unknown"),
        (
            lambda m: m["quantization"]["tensors"]["unet"].update({"affine-8-64": ["nowhere"]}),
            "1 unknown tensor: nowhere",
        ),
        (
            lambda m: m["quantization"]["tensors"]["unet"].update(
                {"affine-8-64": m["quantization"]["tensors"]["unet"].pop("affine-4-64")}
            ),
            r"misshapen .*weight is U32",
        ),
        (
            lambda m: m["quantization"]["tensors"]["unet"].update(
                {"affine-7-64": m["quantization"]["tensors"]["unet"].pop("affine-4-64")}
            ),
            "quantization 'affine-7-64' is unknown",
        ),
        (lambda m: m.pop("quantization"), "version 2 does not match"),
        (lambda m: m.update(quantization=[]), "quantization is malformed"),
        (lambda m: m.update(format_version=1), "version 1 does not match"),
        (lambda m: m.update(format_version=4), "format version 4 is unknown .* reads 1, 2, 3"),
    ],
)
def test_a_damaged_manifest(source: Path, tmp_path: Path, change: Any, message: str) -> None:
    convert(source, tmp_path / "q", quantize=4, recipe="uniform")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_folder(edited(tmp_path / "q", change))


# ---------------------------------------------------------------------------------------- networks


def outputs(backend: str, model: Any, component: str, **options: Any) -> np.ndarray:
    """Run a component of the built-in model on fixed input."""
    chosen = make_backend(backend)
    network = chosen.load(model.config(component), model.tensors(component), **options)
    if component == "text_encoder":
        ids = np.arange(77, dtype=np.int32)[None] % 60
        return chosen.to_numpy(network(chosen.asarray(ids)).last_hidden_state)
    random = np.random.default_rng(3)
    x = chosen.asarray(random.standard_normal((1, 16, 16, 4), np.float32))
    text = chosen.asarray(random.standard_normal((1, 77, 128), np.float32))
    return chosen.to_numpy(network(x, 500.0, text))


@cache
def of_numpy(component: str, bits: int | str | None) -> np.ndarray:
    model = conversion.open_source(BUILTIN)
    if bits is not None:
        model = quantized_model(model, find_recipe(bits, None, "uniform"))
    return outputs("numpy", model, component)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("bits", [4, "nvfp4"])
def test_kept_packed_or_expanded_at_once_is_the_same(
    backend: str, component: str, bits: int | str
) -> None:
    model = quantized_model(conversion.open_source(BUILTIN), find_recipe(bits, None, "uniform"))
    at_once = outputs(backend, model, component, keep_stored=False)
    kept = outputs(backend, model, component, keep_stored=True)
    np.testing.assert_allclose(kept, at_once, rtol=0, atol=2e-6 * np.abs(at_once).max())
    other, plain = of_numpy(component, bits), of_numpy(component, None)
    np.testing.assert_allclose(at_once, other, rtol=0, atol=1e-4 * np.abs(other).max())
    assert np.abs(plain - other).max() > 1e-3 * np.abs(plain).max()  # it was rounded


def test_kept_in_half_precision_is_the_same(backend: str) -> None:
    model = conversion.open_source(BUILTIN)
    for component in ("unet", "text_encoder"):
        at_once = outputs(backend, model, component)
        kept = outputs(backend, model, component, keep_stored=True)
        np.testing.assert_allclose(kept, at_once, rtol=0, atol=2e-6 * np.abs(at_once).max())


def test_a_picture_says_how_its_model_was_quantized() -> None:
    pipe = mlxdiff.load(quantize=8, backend="numpy")
    metadata = pipe.generate("a red circle", seed=0, steps=2).metadata[0]
    recipe = metadata.extra["quantize"]
    assert find_recipe(recipe) == find_recipe(8)
    plain = mlxdiff.load(backend="numpy").generate("a red circle", seed=0, steps=2)
    assert "quantize" not in plain.metadata[0].extra
