"""The NumPy networks and their backend: what does not need another implementation to compare with.

The goldens are in test_goldens_components.py, diffusers itself in test_reference_parity.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.machine import threads
from mlxdiff.networks.config import CLIPTextConfig, ComponentConfig, UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.reference import layers
from mlxdiff.reference.backend import Backend
from mlxdiff.reference.unet import UNet2DConditionModel
from mlxdiff.weights.tensors import LazyTensor

ALL = [
    (kind, name)
    for kind, table in (("clip", tiny.CLIPS), ("unet", tiny.UNETS), ("vae", tiny.VAES))
    for name in table
]


def load(config: ComponentConfig) -> Any:
    return Backend().load(config, tiny.lazy(tiny.random_arrays(config)))


def results(kind: str, name: str) -> list[np.ndarray]:
    """Everything that a tiny network says about its inputs."""
    config = tiny.config(kind, name)
    model = load(config)
    if isinstance(config, CLIPTextConfig):
        output = model(tiny.INPUT_IDS)
        arrays = [*output.hidden_states, output.last_hidden_state, output.pooled]
        return arrays if output.text_embeds is None else [*arrays, output.text_embeds]
    if isinstance(config, UNet2DConditionConfig):
        return [model(**tiny.unet_inputs(config, 9, 7))]
    x = np.random.RandomState(3).uniform(-1, 1, (2, 10, 14, 3)).astype(np.float32)
    mean, logvar = model.encode(x)
    return [mean, logvar, model.decode(mean)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_parameters_are_those_expected(kind: str, name: str) -> None:
    config = tiny.config(kind, name)
    parameters = load(config).parameters()
    assert {n: value.shape for n, value in parameters.items()} == expected_parameters(config)
    assert {value.dtype for value in parameters.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_small_workspaces_and_threads_change_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    expected, bound = results(kind, name), tiny.order_of_sums(tiny.config(kind, name))
    for constant in ("_BLOCK", "_SCORES", "_COLUMNS"):
        monkeypatch.setattr(layers, constant, 500)
    monkeypatch.setattr(threads, "count", lambda: 2)
    for got, wanted in zip(results(kind, name), expected, strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - wanted).max() < bound * wanted.std()


def test_the_end_of_the_text() -> None:
    for name, ends in (("legacy end", [3, 3]), ("end by id", [3, 5])):
        output = load(tiny.config("clip", name))(tiny.INPUT_IDS)
        np.testing.assert_array_equal(output.pooled, output.last_hidden_state[[0, 1], ends])
    # No end at all: the first position, as the reference implementation.
    output = load(tiny.config("clip", "end by id"))(np.array([[98, 5, 6]]))
    np.testing.assert_array_equal(output.pooled, output.last_hidden_state[:, 0])


def test_text_is_not_influenced_by_what_follows() -> None:
    model = load(tiny.config("clip", "projection"))
    changed = tiny.INPUT_IDS.copy()
    changed[:, 5:] = 1
    a, b = (model(ids).last_hidden_state for ids in (tiny.INPUT_IDS, changed))
    np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-6)
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 0.1


def test_one_timestep_for_all() -> None:
    config = tiny.config("unet", "sd1")
    unet, inputs = load(config), tiny.unet_inputs(config)
    inputs["timesteps"] = np.array([501.0, 501.0], np.float32)
    expected = unet(**inputs)
    for timestep in (501, 501.0, np.array(501), np.float64(501)):
        got = unet(**(inputs | {"timesteps": timestep}))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)


def test_pictures_of_a_batch_do_not_mix() -> None:
    config = tiny.config("unet", "sdxl")
    unet, inputs = load(config), tiny.unet_inputs(config)
    alone = unet(**{name: value[1:] for name, value in inputs.items()})
    np.testing.assert_allclose(unet(**inputs)[1:], alone, atol=1e-5)


def test_inputs_are_left_alone() -> None:
    config = tiny.config("unet", "sdxl")
    inputs = tiny.unet_inputs(config)
    load(config)(**inputs)
    for name, value in tiny.unet_inputs(config).items():
        np.testing.assert_array_equal(inputs[name], value)


@pytest.mark.parametrize("missing", ["text_embeds", "time_ids"])
def test_sdxl_without_its_conditions(missing: str) -> None:
    config = tiny.config("unet", "sdxl")
    inputs = tiny.unet_inputs(config)
    del inputs[missing]
    with pytest.raises(UsageError, match="text_embeds and time_ids"):
        load(config)(**inputs)


def test_a_full_size_network_takes_no_memory_before_its_weights() -> None:
    config = UNet2DConditionConfig.from_dict({"cross_attention_dim": 768})
    parameters = UNet2DConditionModel(config).parameters()
    assert {n: value.shape for n, value in parameters.items()} == expected_parameters(config)
    assert all(not any(value.strides) for value in parameters.values())


# ------------------------------------------------------------------------------------------ backend

VAE = tiny.config("vae", "kl")


def test_weights_are_copied_one_by_one_to_float32() -> None:
    arrays = tiny.random_arrays(VAE)
    halves = {name: value.astype(np.float16) for name, value in arrays.items()}
    tensors = {
        name: LazyTensor(value.shape, "F16", lambda value=value: value)
        for name, value in halves.items()
    }
    parameters = Backend().load(VAE, tensors).parameters()
    for name, value in parameters.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, halves[name])
    parameters = Backend().load(VAE, tiny.lazy(arrays)).parameters()
    assert not any(np.shares_memory(value, arrays[name]) for name, value in parameters.items())


def test_faults_are_named_before_anything_is_read() -> None:
    def refuse() -> np.ndarray:
        raise AssertionError("read")

    tensors = {
        name: LazyTensor(shape, "F32", refuse) for name, shape in expected_parameters(VAE).items()
    }
    del tensors["decoder.conv_in.bias"]
    tensors["decoder.scale"] = LazyTensor((1,), "F32", refuse)
    tensors["quant_conv.bias"] = LazyTensor((4,), "F32", refuse)
    with pytest.raises(CheckpointError, match=r"AutoencoderKL") as caught:
        Backend().load(VAE, tensors)
    message = str(caught.value)
    for part in ("decoder.conv_in.bias", "decoder.scale", "quant_conv.bias is (4,), expected (8,)"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "float33"])
def test_only_float32(dtype: str) -> None:
    with pytest.raises(UsageError, match=f"float32 only, not in {dtype}"):
        Backend(dtype)
    with pytest.raises(UsageError, match="float32 only"):
        Backend().load(VAE, tiny.lazy(tiny.random_arrays(VAE)), dtype)


def test_arrays_in_and_out() -> None:
    backend = Backend()
    x = np.arange(6.0).reshape(2, 3)
    assert (backend.name, backend.dtype, backend.default_dtype()) == ("numpy", "float32", "float32")
    assert not backend.has_gpu()
    assert backend.asarray(x).dtype == np.float64
    assert backend.asarray(x, "float32").dtype == np.float32
    assert backend.asarray(x, "int32").dtype == np.int32
    assert backend.to_numpy(x).dtype == np.float32
    np.testing.assert_array_equal(backend.concatenate([x, x], 1), np.concatenate([x, x], 1))
    backend.evaluate(x, (x, x))
    backend.clear_cache()
    assert backend.peak_memory() >= 0
