"""The VAE's decoder in bands of rows gives what it gives as a whole, in less memory."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models as tiny

from mlxdiff.backends.numpy import NumPyBackend
from mlxdiff.networks import tiling
from mlxdiff.networks.config import AutoencoderKLConfig

SIDES = ["numpy", pytest.param("mlx", marks=pytest.mark.mlx)]


def backend(name: str):
    if name == "numpy":
        return NumPyBackend()
    pytest.importorskip("mlx.core")
    from mlxdiff.backends.mlx import MLXBackend

    return MLXBackend()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", tiny.VAES)
def test_bands_give_what_the_whole_gives(
    name: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, on = tiny.config("vae", name), backend(side)
    vae = on.load(config, tiny.lazy(tiny.random_arrays(config)))
    shape = (1, 19, 7, config.latent_channels)
    z = on.asarray(np.random.RandomState(0).standard_normal(shape).astype(np.float32))
    whole = on.to_numpy(vae.decode(z))
    for size in (1, 3000, 1 << 30):  # at least four rows each; several more; all
        monkeypatch.setattr(tiling, "BAND_BYTES", size)
        got = on.to_numpy(tiling.decode(vae, z))
        assert got.dtype == np.float32
        assert got.shape == whole.shape
        assert np.abs(got - whole).max() < 2e-5 * np.abs(whole).max()


@pytest.mark.mlx
def test_bands_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlxdiff.backends import mlx_layers as layers

    monkeypatch.setattr(layers, "_WORK_BYTES", 1 << 18)
    config = AutoencoderKLConfig.from_dict(tiny.VAES["no attention"] | {"latent_channels": 4})
    on = backend("mlx")
    vae = on.load(config, tiny.lazy(tiny.random_arrays(config)))
    z = mx.array(np.random.RandomState(0).standard_normal((1, 200, 100, 4)).astype(np.float32))
    monkeypatch.setattr(tiling, "BAND_BYTES", 1 << 18)
    peaks = []
    for decode in (vae.decode, lambda z: tiling.decode(vae, z)):
        mx.eval(z)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(decode(z))
        peaks.append(mx.get_peak_memory() - before)
    # The widest features: 400 x 200 pixels of 32 channels, 10 MB; after them 16 channels.
    assert peaks[1] < 2 * 10.3e6
    assert peaks[1] < 0.6 * peaks[0]
