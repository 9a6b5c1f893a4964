"""Half precision, as a GPU runs it by default: no overflow, no widening, the same pictures.

Nothing runs on a GPU here; MLX's CPU computes in the same types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import golden_data
import numpy as np
import pytest
from golden_runs import Opened

import mlxdiff
from mlxdiff.errors import MlxdiffError
from mlxdiff.run.kind import Network

mx = pytest.importorskip("mlx.core")

from mlxdiff.backends import mlx_layers as layers  # noqa: E402
from mlxdiff.backends.mlx import MLXBackend  # noqa: E402

pytestmark = pytest.mark.mlx

FAMILIES = (
    "sd15", "sd21v", "sdxl", "ssd-1b", "segmind-vega", "bk-sdm-small", "bk-sdm-tiny", "lcm",
    "sd-turbo", "sdxl-turbo",
)  # fmt: skip


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a GPU would be given, for the CPU; nothing is compiled, that takes seconds here."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("name", FAMILIES)
def test_float16_draws_what_float32_draws(name: str) -> None:
    """Rounded by 2^-11 in some hundred layers, in each of four steps: within four levels."""
    run = {"seed": 1, "steps": 4, "width": 64, "height": 64}
    drawn = []
    for dtype in ("float32", "float16"):
        pipe = mlxdiff.load(golden_data.checkpoint(name), backend="mlx", dtype=dtype)
        result = pipe.generate("a red circle", **run)
        assert np.isfinite(result.latents).all()
        drawn.append(np.asarray(result.images[0], np.int16))
    assert np.abs(drawn[0] - drawn[1]).max() <= 4


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_bits_do_not_widen(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net in 4 bits computes in its type throughout, whatever its scales are stored in."""
    kind, seen = getattr(mx, dtype), Counter[Any]()
    product, convolve = layers._quantized_product, mx.conv2d

    def quantized_product(x: Any, weight: Any, how: Any) -> Any:
        out = product(x, weight, how)
        seen[("product", x.dtype, weight.scales.dtype, out.dtype)] += 1
        return out

    def conv2d(x: Any, weight: Any, *more: Any) -> Any:
        seen[("conv2d", x.dtype, weight.dtype)] += 1
        return convolve(x, weight, *more)

    pipe = mlxdiff.load(backend="mlx", dtype=dtype, quantize=4)
    unet = pipe.model.component("unet")
    monkeypatch.setattr(layers, "_quantized_product", quantized_product)
    monkeypatch.setattr(mx, "conv2d", conv2d)
    text = mx.zeros((1, 77, unet.config.cross_attention_dim[0]))
    mx.eval(unet(mx.zeros((1, 8, 8, 4)), 500.0, text))
    assert set(seen) == {("product", kind, kind, kind), ("conv2d", kind, kind)}


def test_a_pooled_mean_does_not_overflow(opened: Opened) -> None:
    """ControlNets with global_pool_conditions; the sum of 64 x 64 values of 17 is infinite."""
    (item,) = opened("sd15", "mlx", controlnets=["pooled"]).model.controlnets
    net = MLXBackend("float16").load(item.component.config, item.component.tensors())
    (mean,) = net._scaled([mx.full((1, 64, 64, 2), 17.0, mx.float16)], 1.0, False)
    assert mean.dtype == mx.float16 and mean.shape == (1, 1, 1, 2)
    assert (np.array(mean) == 17.0).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_run_that_overflows_ends_at_that_step(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = mlxdiff.load(backend="mlx", dtype=dtype)
    network, calls = type(pipe.model.component("unet")), []
    predict = network.predict

    def overflow(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        return predict(self, *arguments) * (float("inf") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(network, "predict", overflow)
    with pytest.raises(MlxdiffError, match="step 2 of 4 gives latents that are not finite") as e:
        pipe.generate("a circle", seed=0, steps=4, guidance=1.0, sampler="euler")
    assert ("dtype='float32'" in str(e.value)) == (dtype == "float16")
    assert len(calls) == 2


# --------------------------------------------------------------------------------------- the VAE


def vae_dtype(pipe: Any) -> Any:
    return pipe.model.component("vae").dtype


def test_a_vae_whose_file_says_nothing_is_tried_in_half_precision(opened: Opened) -> None:
    """SD 1.x; where the file asks for float32 it gets that, and bfloat16 is too coarse."""
    latents = np.random.RandomState(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    half, wide, brain = (
        mlxdiff.load(golden_data.checkpoint("sd15"), backend="mlx", dtype=dtype)
        for dtype in ("float16", "float32", "bfloat16")
    )
    assert (vae_dtype(half), vae_dtype(brain)) == (mx.float16, mx.float32)
    asks = mlxdiff.load(golden_data.checkpoint("lcm"), backend="mlx", dtype="float16")
    assert vae_dtype(asks) == mx.float32
    one, other = (np.asarray(p.decode(latents)[0], np.int16) for p in (half, wide))
    assert np.abs(one - other).max() <= 4
    upscaler = mlxdiff.load(golden_data.checkpoint("x4-upscaler"), backend="mlx", dtype="float16")
    assert vae_dtype(upscaler) == mx.float32


@pytest.mark.parametrize("encode", [False, True])
def test_a_vae_that_overflows_is_computed_in_float32(encode: bool) -> None:
    """Once it has overflowed it stays so; another VAE would be tried again."""
    checkpoint = golden_data.checkpoint("sd15")
    half, wide = (
        mlxdiff.load(checkpoint, backend="mlx", dtype=dtype) for dtype in ("float16", "float32")
    )
    # Weights whose products leave float16's range, and come back.
    latents = np.random.RandomState(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    image = np.random.RandomState(1).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    for pipe in (half, wide):
        load = pipe.backend.load

        def enlarged(config: Any, tensors: Any, *more: Any, load: Any = load) -> Any:
            network = load(config, tensors, *more)
            for part in (network.encoder, network.decoder):
                part.conv_in.put("bias", part.conv_in.bias + 60000.0)
                part.conv_in.put("bias", part.conv_in.bias * 1.5)
            return network

        pipe.backend.load = enlarged
    run = (
        (lambda p: p.encode_image(image))
        if encode
        else (lambda p: np.asarray(p.decode(latents)[0]))
    )
    expected, got = run(wide), run(half)
    assert vae_dtype(half) == mx.float32
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), atol=1e-3)
    assert half.model.cache.widen(Network("vae"), half.model.additions) is False


# ------------------------------------------------------------------------------ threads of a stream


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", ["plain", "prompt editing", "controlnet", "both"])
def test_each_step_may_come_from_another_thread(case: str, dtype: str, opened: Opened) -> None:
    """As servers do that pull a generator from a pool. MLX's lazy arrays belong to one thread."""
    prompt = "a red circle"
    run: dict[str, Any] = {"seed": 0, "steps": 4, "width": 64, "height": 64}
    pipe = mlxdiff.load(golden_data.checkpoint("sd15"), backend="mlx", dtype=dtype)
    if case != "plain" and case != "controlnet":
        prompt, run["prompt_syntax"] = "a [red:blue:0.5] circle", "a1111"
    if case in ("controlnet", "both"):
        pipe.set_controlnets([opened.controlnet("sd15", "first")])
        run |= {"control_image": golden_data.photo(64, 64), "control_start": 0.5}
    expected = [step.latents for step in pipe.stream(prompt, **run)]
    steps = pipe.stream(prompt, **run)
    found = []
    for _ in range(4):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(next, steps).result().latents)
    assert next(steps, None) is None
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
