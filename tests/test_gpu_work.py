"""How much work a GPU is given: kernels, waits, bytes and libraries of full-size models.

Nothing runs on a GPU; see gpu_trace.py. The figures stand in docs/metal.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from gpu_trace import Counts, Trace, fresh_bytes  # noqa: E402

from benchmarks.random_model import config  # noqa: E402
from mlxdiff.backends import mlx as backend  # noqa: E402
from mlxdiff.networks import tiling  # noqa: E402
from mlxdiff.networks.condition import Condition  # noqa: E402

pytestmark = pytest.mark.mlx

BANDS = 128 << 20
"""Bytes of a band in these counts; a GPU's memory decides otherwise (run.memory.band_bytes)."""


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    return Trace(monkeypatch)


def step(trace: Trace, model: str, latent: int, dtype: str = "float16", beside: int = 0) -> Counts:
    """A step under guidance, with what a run makes once (keys, values, shifts) made before.

    Args:
        beside: tokens of an IP-Adapter's picture.
    """
    unet = trace.network(config(model, "unet"), dtype)
    more: dict[str, Any] = {}
    if model == "sdxl":
        more = {"text_embeds": mx.zeros((2, 1280)), "time_ids": mx.zeros((2, 6))}
    sample = mx.zeros((2, latent, latent, unet.config.in_channels))
    text = unet.read(mx.zeros((2, 77, unet.config.cross_attention_dim[0])))
    temb = Condition(unet.embed(mx.array([501.0, 501.0]), **more))
    unet.predict(sample, temb, text)
    for layer in unet.cross_attentions() if beside else ():
        shape = 2, beside, layer.to_q.weight.shape[0]
        layer.keep_beside(text, mx.zeros(shape, unet.dtype), mx.zeros(shape, unet.dtype), 1.0)
    for found in text._beside.values():
        found[:] = [
            (mx.zeros(k.shape, k.dtype), mx.zeros(v.shape, v.dtype), s) for k, v, s in found
        ]
        mx.async_eval(found[0][:2])
    for condition in (text, temb):
        for key, (layer, made) in condition._made.items():
            zeros = tuple(mx.zeros(one.shape, one.dtype) for one in made)
            mx.async_eval(zeros)
            condition._made[key] = layer, zeros
    mx.synchronize()
    return trace.run(unet, lambda sample: unet.predict(sample, temb, text), sample)


def decode(
    trace: Trace, model: str, latent: int, dtype: str = "float32", bands: int | None = BANDS
) -> Counts:
    vae = trace.network(config(model, "vae"), dtype)
    z = mx.zeros((1, latent, latent, 4))
    return trace.run(vae, lambda z: tiling.decode(vae, z, bands) if bands else vae.decode(z), z)


def test_a_step_of_sd15(trace: Trace) -> None:
    counts = step(trace, "sd15", 64)
    assert counts.kernels.total() <= 703
    assert counts.waits == 0
    assert counts.gigabytes < 7.9
    # The text's keys and values come padded: of the heads of 40, queries are, and in self-attention
    # keys and values.
    assert counts.kernels["Pad"] == 5 * (3 + 1)


def test_an_ip_adapter_pads_no_keys_in_a_step(trace: Trace) -> None:
    """The padded queries serve both attentions."""
    assert step(trace, "sd15", 64, beside=4).kernels["Pad"] == 5 * (3 + 1)


def test_a_step_of_sdxl(trace: Trace) -> None:
    counts = step(trace, "sdxl", 128)
    assert counts.kernels.total() <= 1463
    assert counts.waits == 0
    assert counts.gigabytes < 41.7
    assert counts.kernels["Pad"] == 0


@pytest.mark.parametrize(
    ("model", "latent", "bands", "kernels", "waits", "gigabytes"),
    [
        ("sdxl", 128, BANDS, 798, 123, 110.4),
        ("sdxl", 128, None, 181, 16, 89.4),
        ("sd15", 64, BANDS, 271, 35, 25.7),
        ("sd15", 64, None, 165, 0, 22.3),
    ],
)
def test_a_decoder(
    trace: Trace,
    model: str,
    latent: int,
    bands: int | None,
    kernels: int,
    waits: int,
    gigabytes: float,
) -> None:
    counts = decode(trace, model, latent, bands=bands)
    assert counts.kernels.total() <= kernels
    assert counts.waits <= waits
    assert counts.gigabytes < gigabytes


def test_half_precision_halves_the_bytes_of_a_decoder(trace: Trace) -> None:
    assert decode(trace, "sd15", 64, "float16", None).gigabytes < 11.2


def test_libraries(trace: Trace) -> None:
    """What Metal compiles from source does not depend on the size, and is little."""
    every: set[Any] = set()
    for model, dtype in (("sd15", "float16"), ("sd15", "float32"), ("sdxl", "float16")):
        made = [step(trace, model, size, dtype).libraries for size in (32, 24)]
        assert len(made[0]) <= 5
        assert made[1] <= made[0]
        if dtype == "float16":
            every |= made[0]
    for dtype in ("float16", "float32"):
        made = [decode(trace, "sd15", size, dtype, 1 << 20).libraries for size in (32, 24)]
        assert made[1] <= made[0]
        every |= made[0] | decode(trace, "sd15", 32, dtype, None).libraries
    assert len(every) <= 10


@pytest.mark.parametrize(("late", "most"), [(10, 2.1e9), (100, 3.2e9)])
def test_low_memory_keeps_enough_buffers(trace: Trace, late: int, most: float) -> None:
    """A step of SDXL maps little memory anew, though buffers are freed some operations late."""
    nodes = step(trace, "sdxl", 128).nodes
    assert fresh_bytes(nodes, backend._LITTLE_CACHE_ON_GPU, late) <= most
    assert fresh_bytes(nodes, 32 << 20, late) > 2 * most


def test_what_is_made_for_a_gpu_has_a_gradient() -> None:
    """No operation without a gradient enters a network: training needs them."""
    source = Path(backend.mlx_layers.__file__).read_text(encoding="utf-8")
    assert "metal_kernel" not in source and "cuda_kernel" not in source


def test_counting_itself(trace: Trace) -> None:
    """One convolution of 4 to 320 channels with a bias: two kernels, and their bytes."""
    from mlxdiff.backends import mlx_layers as layers

    class Net(layers.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layers.Conv2d(4, 320, 3, padding=1)

    counts = trace.run(net := Net(), lambda x: net.conv(x), mx.zeros((2, 8, 8, 4)))
    assert dict(counts.kernels) == {"Convolution": 1, "Add": 1}
    out = 2 * 8 * 8 * 320
    values = (2 * 8 * 8 * 4 + 320 * 9 * 4 + out) + (out + out + out)  # the bias is broadcast
    assert sum(counts.bytes.values()) == 4 * values
    assert np.isclose(counts.gigabytes, 4e-9 * values)
