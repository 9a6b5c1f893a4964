"""What is particular to networks on MLX: half precision, training, the graph of a GPU."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
import test_cost
import tiny_models as tiny

mx = pytest.importorskip("mlx.core")

import mlx.nn as mlx_nn  # noqa: E402
from mlx.optimizers import SGD  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlxdiff.backends import mlx_layers  # noqa: E402
from mlxdiff.backends.mlx import MLXBackend  # noqa: E402
from mlxdiff.backends.numpy import NumPyBackend as Reference  # noqa: E402
from mlxdiff.networks.condition import Condition  # noqa: E402
from mlxdiff.networks.config import ComponentConfig  # noqa: E402
from mlxdiff.networks.layers import Sizes  # noqa: E402
from mlxdiff.networks.params import expected_parameters  # noqa: E402

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
    norms = sum(isinstance(layer, mlx_layers.GroupNorm) for layer in unet.modules())
    # q, k, v, the result; a norm's groups as rows, and back.
    assert kinds.count("Transpose") == 4 * 2 * len(unet.cross_attentions()) + 2 * norms


NETWORKS = [
    *(("unet", name) for name in ("sd1", "sdxl", "guidance-distilled", "upscaler")),
    *(("vae", name) for name in tiny.VAES),
    *(("clip", name) for name in tiny.CLIPS),
]


@pytest.mark.parametrize(("kind", "name"), NETWORKS)
def test_networks_can_be_trained(kind: str, name: str) -> None:
    """A network is an mlx.nn.Module, and every parameter has a gradient that is not zero."""
    config = tiny.config(kind, name)
    network = MLXBackend().load(config, tiny.lazy(tiny.random_arrays(config)))
    assert isinstance(network, mlx_nn.Module)

    def loss() -> mx.array:
        if kind == "unet":
            return mx.square(network(**to_mlx(tiny.unet_inputs(config)))).mean()
        if kind == "vae":
            x = np.random.RandomState(3).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
            mean, logvar = network.encode(mx.array(x))
            return mx.square(network.decode(mean)).mean() + mx.square(logvar).mean()
        output = network(mx.array(tiny.INPUT_IDS))
        said = output.pooled if output.text_embeds is None else output.text_embeds
        return mx.square(said).mean()

    _, gradients = mlx_nn.value_and_grad(network, loss)()
    gradients = dict(tree_flatten(gradients))
    assert {key: value.shape for key, value in gradients.items()} == expected_parameters(config)
    for key, value in gradients.items():
        assert np.isfinite(value).all() and np.abs(value).max() > 0, key


OTHERS = {
    name: config
    for name, config in test_cost.ALL_CONFIGS.items()
    if not name.startswith(("clip", "unet ", "vae"))
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_can_be_trained(name: str) -> None:
    config, random = OTHERS[name], np.random.RandomState(1)
    network = MLXBackend().load(config, tiny.lazy(tiny.random_arrays(config)))
    parts = (False, True) if name in ("taesd", "video vae") else (False,)

    def array(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape).astype(np.float32))

    def loss() -> mx.array:
        total = mx.array(0.0)
        for encode in parts:
            out = network.run_once(Sizes(array, 8, 8, 2, 5, encode))
            for _, part in tree_flatten(out):
                total = total if part is None else total + mx.square(part).mean()
        return total

    _, gradients = mlx_nn.value_and_grad(network, loss)()
    gradients = dict(tree_flatten(gradients))
    assert {key: value.shape for key, value in gradients.items()} == expected_parameters(config)
    for key, value in gradients.items():
        assert np.isfinite(value).all() and np.abs(value).max() > 0, key


def test_a_trained_network_computes_with_its_new_weights() -> None:
    """No view of an old weight is left beside it."""
    config = tiny.config("unet", "sd1")
    network = MLXBackend().load(config, tiny.lazy(tiny.random_arrays(config)))
    inputs = to_mlx(tiny.unet_inputs(config))

    def loss() -> mx.array:
        return mx.square(network(**inputs)).mean()

    before, gradients = mlx_nn.value_and_grad(network, loss)()
    SGD(learning_rate=0.01).update(network, gradients)
    after = loss()
    assert float(after) < float(before)
    trained = {key: np.array(value) for key, value in tree_flatten(network.parameters())}
    fresh = MLXBackend().load(config, tiny.lazy(trained))
    np.testing.assert_array_equal(network(**inputs), fresh(**inputs))
