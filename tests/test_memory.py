"""The estimate of a run's memory against measured peaks, and what is refused because of it."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
from golden_data import checkpoint

import mlxdiff
from mlxdiff.convert import Component
from mlxdiff.errors import UsageError
from mlxdiff.loading import make_backend
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    ComponentConfig,
    UNet2DConditionConfig,
)
from mlxdiff.networks.params import expected_parameters
from mlxdiff.networks.recorder import Operation
from mlxdiff.networks.tiling import BAND_BYTES
from mlxdiff.run import memory
from mlxdiff.run.additions import Additions
from mlxdiff.run.additions.controlnet import ControlNet
from mlxdiff.run.kind import Network
from mlxdiff.run.memory import (
    Device,
    Estimate,
    Held,
    activation_bytes,
    band_bytes,
    require,
    weight_bytes,
)
from mlxdiff.weights.quantization import Quantization
from mlxdiff.weights.tensors import LazyTensor, quantize_tensor

# As deep as Stable Diffusion's, a fifth to a quarter as wide.
UNET: dict[str, Any] = tiny_models.UNETS["sd1"] | {
    "block_out_channels": [64, 128, 256],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 64,
}
VAE: dict[str, Any] = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
}


def tensors_of(config: ComponentConfig) -> dict[str, LazyTensor]:
    return {
        name: LazyTensor(shape, "F32", lambda shape=shape: np.full(shape, 0.01, np.float32))
        for name, shape in expected_parameters(config).items()
    }


def measured_peak(backend: str, config: ComponentConfig, side: int) -> int:
    """The most bytes that one evaluation holds, weights included, as the backend counts them."""
    chosen = make_backend(backend)
    random = np.random.RandomState(0)

    def run() -> None:
        network = chosen.load(config, tensors_of(config))
        if isinstance(config, UNet2DConditionConfig):
            sample = chosen.asarray(random.randn(2, side, side, 4).astype(np.float32))
            text = chosen.asarray(random.randn(2, 77, 64).astype(np.float32))
            out = network(sample, 500.0, text)
        else:
            out = network.decode(chosen.asarray(random.randn(1, side, side, 4).astype(np.float32)))
        chosen.evaluate(out)

    if backend == "mlx":
        import mlx.core as mx

        gc.collect()
        before = mx.get_active_memory()
        chosen.reset_peak_memory()
        run()
        return chosen.peak_memory() - before
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("config", "side"),
    [
        (UNet2DConditionConfig.from_dict(UNET), 16),
        (AutoencoderKLConfig.from_dict(VAE), 16),
    ],
    ids=["unet", "vae"],
)
def test_the_estimate_is_within_a_quarter(backend: str, config: ComponentConfig, side: int) -> None:
    device = Device(backend, False, "float32")
    batch = 2 if isinstance(config, UNet2DConditionConfig) else 1
    expected = weight_bytes(tensors_of(config), device)
    expected += activation_bytes(config, device, side, side, batch=batch)
    assert expected == pytest.approx(measured_peak(backend, config, side), rel=0.25)


def test_weights_are_counted_as_they_are_kept() -> None:
    tensors = {
        "a.weight": LazyTensor((64, 64), "F16", lambda: np.zeros((64, 64), np.float16)),
        "a.bias": LazyTensor((64,), "F16", lambda: np.zeros(64, np.float16)),
    }
    half, full = Device("mlx", True, "float16"), Device("numpy", False, "float32")
    assert weight_bytes(tensors, half) == 2 * (64 * 64 + 64)
    assert weight_bytes(tensors, full) == 4 * (64 * 64 + 64)
    # Kept as stored, only matrices stay small.
    assert weight_bytes(tensors, full, keep_stored=True) == 2 * 64 * 64 + 4 * 64
    # Quantized ones stay so on a GPU, and where they are told to: 4 bits and 32 for 64 values.
    tensors["a.weight"] = quantize_tensor("a", tensors["a.weight"], Quantization(4, 64), "float16")
    packed = 64 * 64 // 2 + 64 * 4
    assert weight_bytes(tensors, half) == packed + 2 * 64
    assert weight_bytes(tensors, full) == 4 * (64 * 64 + 64)
    assert weight_bytes(tensors, full, keep_stored=True) == packed + 4 * 64


def test_stages_add_up_or_follow_each_other() -> None:
    sizes = {"text_encoder": 10, "text_encoder_2": 20, "unet": 100, "vae": 5}
    weights = {Held(Network(name)): size for name, size in sizes.items()}
    work = {"text_encoder": 1, "image": 50, "unet": 7, "vae": 60}
    together = Estimate(weights, work)
    assert together.stages == {"text_encoder": 31, "image": 85, "unet": 142, "vae": 195}
    assert (together.peak, together.stage) == (195, "vae")
    one_by_one = Estimate(weights, work, low_memory=True)
    assert one_by_one.stages == {"text_encoder": 21, "image": 55, "unet": 107, "vae": 65}


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    weights = {Held(Network("unet")): 3 * 10**9}
    needed, smaller = (Estimate(weights, {"unet": work}) for work in (2 * 10**9, 10**8))
    require(needed, None)  # a machine that does not tell
    require(needed, 6 * 10**9)
    require(needed, 4 * 10**9, limit=6)  # the user knows better
    with pytest.raises(
        UsageError, match=r"5.10 GB .* U-Net.*this machine has 4.00 GB; these fit: x"
    ):
        require(needed, 4 * 10**9, None, {"x": lambda: smaller, "y": lambda: needed})
    with pytest.raises(UsageError, match=r"memory_limit allows 3.00 GB; a smaller model"):
        require(needed, 64 * 10**9, 3)


def test_a_pipeline_refuses_before_it_loads_anything(backend: str) -> None:
    pipe = mlxdiff.load(checkpoint("sd15"), backend=backend, memory_limit=0.2)
    pipe.settings("a", width=64, height=64)
    with pytest.raises(UsageError, match="memory_limit"):
        pipe.generate("a", width=2048, height=2048)
    assert pipe.model.load_seconds == 0
    for wrong in (0, -1, "4", True, float("nan")):
        with pytest.raises(UsageError, match="gigabytes"):
            mlxdiff.load(checkpoint("sd15"), backend=backend, memory_limit=wrong)


def test_the_machine_itself_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    monkeypatch.setattr(pipe.backend, "memory_size", lambda: 150_000_000)
    with pytest.raises(UsageError, match=r"this machine has 0.15 GB; these fit: (low|half)"):
        pipe.settings("a", width=256, height=256)


def test_networks_that_were_added_count() -> None:
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    settings = pipe.settings("a", width=64, height=64)
    alone, tensors = pipe.memory(settings), pipe.source.tensors("unet")
    net = ControlNet(Component(None, lambda: tensors, {}))
    pipe.model = pipe.model.with_additions(Additions((net,)))
    more = pipe.memory(settings)
    size = more.weights[Held(Network("controlnet", 0))]
    assert more.to_dict()["weights"]["controlnet_0"] == size
    assert size == 4 * sum(t.size for t in tensors.values())
    assert more.stages["unet"] - alone.stages["unet"] > size
    assert more.stages["text_encoder"] == alone.stages["text_encoder"]
    # In low memory, too, a ControlNet is there together with the U-Net.
    alone, more = (
        replace(estimate, low_memory=True, weights=weights)
        for estimate, weights in (
            (more, {h: s for h, s in more.weights.items() if h.network.name != "controlnet"}),
            (more, more.weights),
        )
    )
    assert more.stages["unet"] - alone.stages["unet"] == size


GPU = Device("mlx", True, "float16")


def full_size(model: str, component: str) -> Any:
    from benchmarks.random_model import config

    return config(model, component)


@pytest.mark.parametrize(
    ("model", "latent", "gigabytes", "expected"),
    [
        ("sd15", 64, 5.7, None),  # 8 GB; its VAE is float16
        ("sd15", 96, 5.7, 89062500),
        ("sd15", 96, 11.4, None),  # 16 GB
        ("sdxl", 128, 5.7, 89062500),
        ("sdxl", 128, 17.0, 265625000),  # 24 GB
        ("sdxl", 128, 38.0, None),  # 48 GB
        ("sdxl", 128, None, 256 << 20),
    ],
)
def test_bands_on_a_gpu_are_chosen_by_what_fits(
    model: str, latent: int, gigabytes: float | None, expected: int | None
) -> None:
    vae, size = full_size(model, "vae"), None if gigabytes is None else int(gigabytes * 1e9)

    def chosen(**how: Any) -> int | None:
        how = {"low_memory": False, "memory": size} | how
        return band_bytes(vae, GPU, latent, latent, **how)

    assert chosen() == expected
    assert chosen(tiling=False) is None
    assert chosen(tiling=True) == min(256 << 20, 1 << 40 if size is None else size // 64)
    assert chosen(low_memory=True) == 64 << 20


def test_bands_on_a_cpu_are_as_large_as_its_cache() -> None:
    vae = full_size("sd15", "vae")
    for backend in ("numpy", "mlx"):
        cpu = Device(backend, False, "float32")
        for latent, low, tiling, expected in (
            (32, False, None, None),
            (33, False, None, BAND_BYTES),
            (33, False, False, None),
            (8, True, None, BAND_BYTES),
            (8, False, True, BAND_BYTES),
        ):
            how = {"memory": 1 << 40, "low_memory": low, "tiling": tiling}
            assert band_bytes(vae, cpu, latent, latent, **how) == expected


def test_what_a_gpu_holds_beside_the_values_of_layers() -> None:
    """Winograd's filters for large maps; expanded weights; ten portions of commands in flight."""
    wide = Operation("convolution", 4096 * 9 * 512**2, 9 * 512**2, 0, 1, 1, scratch=1)
    assert activation(wide) == pytest.approx(4 * 64 * 512**2, rel=1e-3)  # 64 MiB
    small = replace(wide, macs=4095 * 9 * 512**2)  # too few pixels for Winograd's method
    assert activation(small) < 100
    assert activation(small, expands=True) == pytest.approx(4 * 9 * 512**2, rel=1e-3)
    # A network of many layers of 10 MB in and out: what fits into 500 MiB of inputs is held.
    layer = Operation("linear", 0, 0, 0, 2_500_000, 2_500_000)
    assert activation(*[layer] * 1000) == pytest.approx(10e6 + (500 << 20), rel=0.03)
    # Layers of 2 GB in and out wait for each other.
    large = Operation("linear", 0, 0, 0, 500_000_000, 500_000_000)
    assert activation(*[large] * 10) == 4_000_000_000


def activation(*work: Operation, expands: bool = False) -> int:
    return memory._gpu_bytes(work, 4, expands)
