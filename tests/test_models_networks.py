"""The MLX networks: against the NumPy reference, in half precision, and at full size by name."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
import tiny_models as tiny

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten  # noqa: E402

from mlxdiff.backends.mlx import MLXBackend, nn  # noqa: E402
from mlxdiff.backends.numpy import NumPyBackend as Reference  # noqa: E402
from mlxdiff.errors import UsageError  # noqa: E402
from mlxdiff.networks.clip import CLIPTextModel  # noqa: E402
from mlxdiff.networks.condition import Condition  # noqa: E402
from mlxdiff.networks.config import (  # noqa: E402
    AutoencoderKLConfig,
    CLIPTextConfig,
    ComponentConfig,
    UNet2DConditionConfig,
)
from mlxdiff.networks.params import expected_parameters  # noqa: E402
from mlxdiff.networks.unet import UNet2DConditionModel  # noqa: E402
from mlxdiff.networks.vae import AutoencoderKL  # noqa: E402

pytestmark = pytest.mark.mlx
# Rounding differs between two float32 implementations; a wrong layer shows at 1e-2 and more.
TOLERANCE = 1e-5


@functools.cache
def load(config: ComponentConfig, dtype: str = "float32"):
    return MLXBackend(dtype).load(config, tiny.lazy(tiny.random_arrays(config)))


@functools.cache
def load_reference(config: ComponentConfig):
    return Reference().load(config, tiny.lazy(tiny.random_arrays(config)))


def to_mlx(inputs: dict[str, np.ndarray]) -> dict[str, object]:
    return {name: mx.array(value) for name, value in inputs.items()}


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("name", tiny.UNETS)
def test_unet_equals_the_reference(name: str, size: tuple[int, int]) -> None:
    config = tiny.config("unet", name)
    inputs = tiny.unet_inputs(config, *size)
    got = load(config)(**to_mlx(inputs))
    assert got.dtype == mx.float32
    assert got.shape == (2, *size, config.out_channels)
    assert tiny.difference(got, load_reference(config)(**inputs)) < TOLERANCE


@pytest.mark.parametrize("name", tiny.VAES)
def test_vae_equals_the_reference(name: str) -> None:
    config = tiny.config("vae", name)
    vae, reference = load(config), load_reference(config)
    x = np.random.RandomState(3).uniform(-1, 1, (2, 10, 14, 3)).astype(np.float32)
    expected = reference.encode(x)
    for got, wanted in zip(vae.encode(mx.array(x)), expected, strict=True):
        assert got.shape == (2, 5, 7, config.latent_channels)
        assert tiny.difference(got, wanted) < TOLERANCE
    got = vae.decode(mx.array(expected[0]))
    assert got.shape == x.shape
    assert tiny.difference(got, reference.decode(expected[0])) < TOLERANCE


@pytest.mark.parametrize("name", tiny.CLIPS)
def test_clip_equals_the_reference(name: str) -> None:
    config = tiny.config("clip", name)
    got = load(config)(mx.array(tiny.INPUT_IDS))
    wanted = load_reference(config)(tiny.INPUT_IDS)
    assert len(got.hidden_states) == len(wanted.hidden_states) == config.num_hidden_layers + 1
    assert (got.text_embeds is None) == (wanted.text_embeds is None) == (name != "projection")
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert tiny.difference(a, b) < TOLERANCE
    for field in ("last_hidden_state", "pooled", "text_embeds"):
        if getattr(got, field) is not None:
            assert tiny.difference(getattr(got, field), getattr(wanted, field)) < TOLERANCE


def test_the_end_of_the_text() -> None:
    for name, ends in (("legacy end", [3, 3]), ("end by id", [3, 5])):
        output = load(tiny.config("clip", name))(mx.array(tiny.INPUT_IDS))
        np.testing.assert_array_equal(output.pooled, output.last_hidden_state[mx.arange(2), ends])
    # No end at all: the first position, as the reference implementation.
    output = load(tiny.config("clip", "end by id"))(mx.array([[96, 5, 6]]))
    np.testing.assert_array_equal(output.pooled, output.last_hidden_state[:, 0])


def test_text_is_not_influenced_by_what_follows() -> None:
    model = load(tiny.config("clip", "projection"))
    changed = tiny.INPUT_IDS.copy()
    changed[:, 5:] = 1
    a, b = (model(mx.array(ids)).last_hidden_state for ids in (tiny.INPUT_IDS, changed))
    np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-6)
    assert np.abs(np.array(a[:, 5:] - b[:, 5:])).max() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("clip", "projection"), ("unet", "sd1"), ("unet", "sdxl"), ("vae", "kl")],
)
def test_half_precision(kind: str, name: str, dtype: str) -> None:
    """Each layer rounds weights and output by a relative u; N layers add up like sqrt(N)."""
    config = tiny.config(kind, name)

    def run(model) -> list:
        if kind == "clip":
            return [model(mx.array(tiny.INPUT_IDS)).text_embeds]
        if kind == "unet":
            return [model(**to_mlx(tiny.unet_inputs(config)))]
        x = mx.array(np.random.RandomState(3).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32))
        mean, logvar = model.encode(x)
        return [mean, logvar, model.decode(mean)]

    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    tolerance = unit * math.sqrt(len(expected_parameters(config)))
    for got, wanted in zip(run(load(config, dtype)), run(load(config)), strict=True):
        got, wanted = np.array(got.astype(mx.float32)), np.array(wanted)
        assert np.isfinite(got).all()
        assert np.linalg.norm(got - wanted) < tolerance * np.linalg.norm(wanted)


def test_one_timestep_for_all() -> None:
    config = tiny.config("unet", "sd1")
    unet, inputs = load(config), to_mlx(tiny.unet_inputs(config))
    inputs["timesteps"] = mx.array([501.0, 501.0])
    expected = unet(**inputs)
    for timestep in (501, 501.0, mx.array(501)):
        inputs["timesteps"] = timestep
        np.testing.assert_array_equal(unet(**inputs), expected)


def test_pictures_of_a_batch_do_not_mix() -> None:
    config = tiny.config("unet", "sdxl")
    unet, inputs = load(config), to_mlx(tiny.unet_inputs(config))
    both = unet(**inputs)
    alone = unet(**{name: value[1:] for name, value in inputs.items()})
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)


@pytest.mark.parametrize("missing", ["text_embeds", "time_ids"])
def test_sdxl_without_its_conditions(missing: str) -> None:
    config = tiny.config("unet", "sdxl")
    inputs = to_mlx(tiny.unet_inputs(config))
    del inputs[missing]
    with pytest.raises(UsageError, match="text_embeds and time_ids"):
        load(config)(**inputs)


FULL_SIZE = {
    "sd15 text encoder": (
        CLIPTextModel,
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    ),
    "sdxl text encoder 2": (
        CLIPTextModel,
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            projection_dim=1280,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            with_projection=True,
        ),
    ),
    "sd15 unet": (
        UNet2DConditionModel,
        UNet2DConditionConfig.from_dict({"cross_attention_dim": 768}),
    ),
    "sd21 unet": (
        UNet2DConditionModel,
        UNet2DConditionConfig.from_dict(
            {
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
            }
        ),
    ),
    "sdxl unet": (
        UNet2DConditionModel,
        UNet2DConditionConfig.from_dict(
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
    ),
    "vae": (
        AutoencoderKL,
        AutoencoderKLConfig.from_dict(
            {
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
            }
        ),
    ),
}
# Millions of parameters, as published with the models.
MILLIONS = {"sd15 unet": 859.5, "sd21 unet": 865.9, "sdxl unet": 2567.5, "vae": 83.7}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes_without_memory(name: str) -> None:
    model, config = FULL_SIZE[name]
    before = mx.get_active_memory()
    built = {key: value.shape for key, value in tree_flatten(model(nn, config).parameters())}
    assert built == expected_parameters(config)
    assert mx.get_active_memory() - before < 1 << 20
    if name in MILLIONS:
        count = sum(math.prod(shape) for shape in built.values())
        assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.05)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a GPU would be given, for the CPU; nothing is compiled, that takes seconds here."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", ["sd1", "sdxl", "unusual"])
def test_unet_as_on_a_gpu_equals_the_reference(name: str) -> None:
    config = tiny.config("unet", name)
    inputs = tiny.unet_inputs(config)
    got = load(config)(**to_mlx(inputs))
    assert tiny.difference(got, load_reference(config)(**inputs)) < TOLERANCE


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_makes_no_views_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do products reshape what they are given: a step's graph on a GPU is as small as that."""
    unet = load(tiny.config("unet", "sd1"))
    inputs = to_mlx(tiny.unet_inputs(unet.config))
    temb = Condition(unet.embed(inputs["timesteps"]))
    text = unet.read(inputs["encoder_hidden_states"])
    mx.eval(unet.predict(inputs["sample"], temb, text))
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda q, k, v, **_: mx.depends([q], [k, v])[0]
    )
    graph = io.StringIO()
    mx.export_to_dot(graph, unet.predict(inputs["sample"], temb, text))
    kinds = re.findall(r'label ?="([A-Za-z]\w*)', graph.getvalue())
    assert {"AddMM", "Convolution", "Matmul", "Sum"} < set(kinds)
    assert not {"Flatten", "Unflatten"} & set(kinds)
    assert kinds.count("Transpose") == 4 * 2 * len(unet.cross_attentions())  # q, k, v, the result
