"""The networks on both backends: what does not need another implementation to compare with.

The goldens are in test_goldens_components.py, diffusers itself in test_networks_parity.py.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
from sides import Side

from mlxdiff.backends import numpy_layers as layers
from mlxdiff.errors import UsageError
from mlxdiff.machine import threads
from mlxdiff.networks import registry
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    CLIPTextConfig,
    ComponentConfig,
    UNet2DConditionConfig,
)
from mlxdiff.networks.cost import multiply_adds
from mlxdiff.networks.layers import Array, Layers, Module, Sizes
from mlxdiff.networks.params import expected_parameters
from mlxdiff.networks.registry import build
from mlxdiff.networks.unet import UNet2DConditionModel

ALL = [
    (kind, name)
    for kind, table in (("clip", tiny.CLIPS), ("unet", tiny.UNETS), ("vae", tiny.VAES))
    for name in table
]
# Rounding differs between two float32 implementations; a wrong layer shows at 1e-2 and more.
TOLERANCE = 1e-5


@functools.cache
def load(config: ComponentConfig, backend: str) -> Any:
    return Side(backend).backend.load(config, tiny.lazy(tiny.random_arrays(config)))


def on_side(backend: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: Side(backend).array(value) for name, value in inputs.items()}


def results(kind: str, name: str, backend: str = "numpy") -> list[np.ndarray]:
    """Everything that a tiny network says about its inputs."""
    config, side = tiny.config(kind, name), Side(backend)
    model = load(config, backend)
    if isinstance(config, CLIPTextConfig):
        output = model(side.array(tiny.INPUT_IDS))
        assert len(output.hidden_states) == config.num_hidden_layers + 1
        assert (output.text_embeds is None) == (name != "projection")
        arrays = [*output.hidden_states, output.last_hidden_state, output.pooled]
        arrays = arrays if output.text_embeds is None else [*arrays, output.text_embeds]
    elif isinstance(config, UNet2DConditionConfig):
        arrays = []
        for size in ((8, 8), (9, 7)):
            arrays.append(model(**on_side(backend, tiny.unet_inputs(config, *size))))
            assert arrays[-1].shape == (2, *size, config.out_channels)
    else:
        x = np.random.RandomState(3).uniform(-1, 1, (2, 10, 14, 3)).astype(np.float32)
        mean, logvar = model.encode(side.array(x))
        assert mean.shape == logvar.shape == (2, 5, 7, config.latent_channels)
        # The same latents for both backends: they differ in rounding alone.
        z = np.random.RandomState(4).standard_normal(mean.shape).astype(np.float32)
        arrays = [mean, logvar, model.decode(mean), model.decode(side.array(z))]
        assert arrays[-1].shape == x.shape
    assert all("float32" in str(array.dtype) for array in arrays)
    return [side.numpy(array) for array in arrays]


@pytest.mark.mlx
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_both_backends_agree(kind: str, name: str) -> None:
    for a, b in zip(results(kind, name, "mlx"), results(kind, name, "numpy"), strict=True):
        assert tiny.difference(a, b) < TOLERANCE


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_parameters_are_those_expected(kind: str, name: str) -> None:
    config = tiny.config(kind, name)
    parameters = load(config, "numpy").parameters()
    assert {n: value.shape for n, value in parameters.items()} == expected_parameters(config)
    assert {value.dtype for value in parameters.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_small_workspaces_and_threads_change_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    expected, bound = results(kind, name), tiny.order_of_sums(tiny.config(kind, name))
    for constant in ("_BLOCK", "_SCORES", "_COLUMNS", "_LEAST_MACS"):
        monkeypatch.setattr(layers, constant, 500)
    monkeypatch.setattr(layers, "_LEAST_BLOCKS", 1)
    monkeypatch.setattr(threads, "count", lambda: 2)
    for got, wanted in zip(results(kind, name), expected, strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - wanted).max() < bound * wanted.std()


def test_the_end_of_the_text(backend: str) -> None:
    side = Side(backend)
    for name, ends in (("legacy end", [3, 3]), ("end by id", [3, 5])):
        output = load(tiny.config("clip", name), backend)(side.array(tiny.INPUT_IDS))
        states = side.numpy(output.last_hidden_state)
        np.testing.assert_array_equal(side.numpy(output.pooled), states[[0, 1], ends])
    # No end at all: the first position, as the reference implementation.
    for start in (96, 98):
        ids = side.array(np.array([[start, 5, 6]], np.int32))
        output = load(tiny.config("clip", "end by id"), backend)(ids)
        states = side.numpy(output.last_hidden_state)
        np.testing.assert_array_equal(side.numpy(output.pooled), states[:, 0])


def test_text_is_not_influenced_by_what_follows(backend: str) -> None:
    side, model = Side(backend), load(tiny.config("clip", "projection"), backend)
    changed = tiny.INPUT_IDS.copy()
    changed[:, 5:] = 1
    a, b = (
        side.numpy(model(side.array(ids)).last_hidden_state) for ids in (tiny.INPUT_IDS, changed)
    )
    np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-6)
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 0.1


def test_one_timestep_for_all(backend: str) -> None:
    config, side = tiny.config("unet", "sd1"), Side(backend)
    unet, inputs = load(config, backend), on_side(backend, tiny.unet_inputs(config))
    inputs["timesteps"] = side.array(np.array([501.0, 501.0], np.float32))
    expected = side.numpy(unet(**inputs))
    for timestep in (501, 501.0, np.array(501), np.float64(501), side.array(np.array(501))):
        got = unet(**(inputs | {"timesteps": timestep}))
        assert "float32" in str(got.dtype)
        np.testing.assert_array_equal(side.numpy(got), expected)


def test_pictures_of_a_batch_do_not_mix(backend: str) -> None:
    config, side = tiny.config("unet", "sdxl"), Side(backend)
    unet, inputs = load(config, backend), on_side(backend, tiny.unet_inputs(config))
    alone = unet(**{name: value[1:] for name, value in inputs.items()})
    both = side.numpy(unet(**inputs))
    np.testing.assert_allclose(both[1:], side.numpy(alone), atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_inputs_are_left_alone(kind: str, name: str, backend: str) -> None:
    """Sums are taken in place, but only in arrays that a network has made."""
    config, side = tiny.config(kind, name), Side(backend)
    model = load(config, backend)
    if kind == "unet":
        plain = tiny.unet_inputs(config)
        given, call = on_side(backend, plain), lambda: model(**given)
    elif kind == "clip":
        plain = {"ids": tiny.INPUT_IDS}
        given, call = on_side(backend, plain), lambda: model(given["ids"])
    else:
        plain = {
            "x": np.random.RandomState(3).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32),
            "z": np.random.RandomState(3).normal(size=(1, 4, 4, config.latent_channels)),
        }
        plain["z"] = plain["z"].astype(np.float32)
        given = on_side(backend, {key: value.copy() for key, value in plain.items()})
        call = lambda: (model.encode(given["x"]), model.decode(given["z"]))  # noqa: E731
    call()
    for key, value in plain.items():
        np.testing.assert_array_equal(side.numpy(given[key]), value.astype(np.float32))


@pytest.mark.parametrize("missing", ["text_embeds", "time_ids"])
def test_sdxl_without_its_conditions(missing: str, backend: str) -> None:
    config = tiny.config("unet", "sdxl")
    inputs = on_side(backend, tiny.unet_inputs(config))
    del inputs[missing]
    with pytest.raises(UsageError, match="text_embeds and time_ids"):
        load(config, backend)(**inputs)


def test_a_copy_of_a_network(backend: str) -> None:
    """It computes the same, and new weights of the one are not those of the other."""
    config, side = tiny.config("unet", "sd1"), Side(backend)
    unet, inputs = build(side.nn, config), on_side(backend, tiny.unet_inputs(config))
    unet.load_weights(list(on_side(backend, tiny.random_arrays(config)).items()))
    other = copy.deepcopy(unet)
    assert isinstance(other, UNet2DConditionModel) and isinstance(other, side.nn.Module)
    expected = side.numpy(unet(**inputs))
    np.testing.assert_array_equal(side.numpy(other(**inputs)), expected)
    other.put("conv_out.bias", side.array(np.full(4, 9, np.float32)))
    np.testing.assert_array_equal(side.numpy(unet(**inputs)), expected)
    assert np.abs(side.numpy(other(**inputs)) - expected).max() > 5


FULL_SIZE: dict[str, ComponentConfig] = {
    "sd15 text encoder": CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12
    ),
    "sdxl text encoder 2": CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        with_projection=True,
    ),
    "sd15 unet": UNet2DConditionConfig.from_dict({"cross_attention_dim": 768}),
    "sd21 unet": UNet2DConditionConfig.from_dict(
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        }
    ),
    "sdxl unet": UNet2DConditionConfig.from_dict(
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    ),
    "vae": AutoencoderKLConfig.from_dict(
        {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
        }
    ),
}
# Millions of parameters, as published with the models.
MILLIONS = {"sd15 unet": 859.5, "sd21 unet": 865.9, "sdxl unet": 2567.5, "vae": 83.7}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes_without_memory(name: str, backend: str) -> None:
    config, side = FULL_SIZE[name], Side(backend)
    if backend == "mlx":
        import mlx.core as mx
        from mlx.utils import tree_flatten

        before = mx.get_active_memory()
        parameters = dict(tree_flatten(build(side.nn, config).parameters()))
        assert mx.get_active_memory() - before < 1 << 20
    else:
        parameters = build(side.nn, config).parameters()
        assert all(not any(value.strides) for value in parameters.values())
    shapes = {key: tuple(value.shape) for key, value in parameters.items()}
    assert shapes == expected_parameters(config)
    if name in MILLIONS:
        count = sum(math.prod(shape) for shape in shapes.values())
        assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.05)


@dataclass(frozen=True)
class MLPConfig:
    """The config of a network that is only here."""

    width: int = 6


class MLP(Module):
    """Two linear maps with silu between them: (B, W) -> (B, W)."""

    def __init__(self, nn: Layers, config: MLPConfig) -> None:
        super().__init__(nn)
        self.width = config.width
        self.layers = [nn.Linear(config.width, 8), nn.Linear(8, config.width, bias=False)]

    def __call__(self, x: Array) -> Array:
        first, last = self.layers
        return last(self.nn.silu(first(x)))

    def run_once(self, sizes: Sizes) -> Array:
        return self(sizes.array(sizes.batch, self.width))


def test_a_new_network_is_a_class_a_config_and_a_row(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded on both backends, and its parameters and its cost are known."""
    monkeypatch.setitem(registry.NETWORKS, MLPConfig, MLP)
    side, config = Side(backend), MLPConfig()
    shapes = {"layers.0.weight": (8, 6), "layers.0.bias": (8,), "layers.1.weight": (6, 8)}
    assert expected_parameters(config) == shapes
    assert multiply_adds(config, batch=3) == 3 * 2 * 6 * 8
    arrays = tiny.random_arrays(config)
    mlp = side.backend.load(config, tiny.lazy(arrays))
    x = np.random.RandomState(0).standard_normal((3, 6)).astype(np.float32)
    hidden = x @ arrays["layers.0.weight"].T + arrays["layers.0.bias"]
    expected = hidden / (1 + np.exp(-hidden)) @ arrays["layers.1.weight"].T
    np.testing.assert_allclose(side.run(mlp, x), expected, atol=1e-5)
