"""What is the same in all evaluations of a run is computed once, and to the same values."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models as tiny

from mlxdiff.backends.numpy import NumPyBackend
from mlxdiff.networks.condition import Condition
from mlxdiff.run.denoiser import TimeEmbeddings


def backend(name: str):
    if name == "numpy":
        return NumPyBackend()
    pytest.importorskip("mlx.core")
    from mlxdiff.backends.mlx import MLXBackend

    return MLXBackend()


def test_a_layer_works_once_for_all_rows() -> None:
    calls = []

    def double(values: np.ndarray) -> tuple[np.ndarray]:
        calls.append(len(values))
        return (2 * values,)

    whole, layer, other = Condition(np.arange(6.0)), object(), object()
    part = whole.rows(2, 4)
    np.testing.assert_array_equal(part.made_by(layer, double)[0], [4, 6])
    np.testing.assert_array_equal(whole.made_by(layer, double)[0], 2 * np.arange(6.0))
    np.testing.assert_array_equal(whole.rows(5, 6).made_by(layer, double)[0], [10])
    assert calls == [6]
    part.made_by(other, double)
    assert calls == [6, 6]


@pytest.mark.parametrize("side", ["numpy", pytest.param("mlx", marks=pytest.mark.mlx)])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "guidance-distilled", "unusual"])
def test_many_timesteps_at_once(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation of a run equals the network called on its own."""
    monkeypatch.setattr(TimeEmbeddings, "AT_ONCE", 2)
    config, chosen = tiny.config("unet", name), backend(side)
    unet = chosen.load(config, tiny.lazy(tiny.random_arrays(config)))
    given = {key: chosen.asarray(value) for key, value in tiny.unet_inputs(config).items()}
    sample, states = given.pop("sample"), given.pop("encoder_hidden_states")
    del given["timesteps"]

    def embed(timesteps: np.ndarray):
        rows = {key: chosen.concatenate([value] * len(timesteps)) for key, value in given.items()}
        return unet.embed(chosen.asarray(timesteps.repeat(2)), **rows)

    bound, timesteps = tiny.order_of_sums(config), [981.0, 500.5, 20.0]
    times, text = TimeEmbeddings(timesteps, embed, batch=2), unet.read(states)
    for i, t in enumerate(timesteps):
        got = chosen.to_numpy(unet.predict(sample, times.at(i), text))
        wanted = chosen.to_numpy(unet(sample, t, states, **given))
        np.testing.assert_allclose(got, wanted, atol=bound * wanted.std())
    # A part of the batch, as where guidance is left out.
    got = unet.predict(sample[1:], times.at(2).rows(1, 2), text.rows(1, 2))
    np.testing.assert_allclose(chosen.to_numpy(got), wanted[1:], atol=bound * wanted.std())
