"""Classifier-free guidance: its formula, on arrays of both backends."""

from __future__ import annotations

import numpy as np
import pytest

from mlxdiff.samplers.guidance import guidance_scale_embedding, guide, is_guided


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    uncond, cond = generator.standard_normal((2, 2, 8, 8, 4)).astype(np.float32)
    return uncond, 3.0 * cond


def test_scale(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    uncond, cond = predictions
    np.testing.assert_allclose(guide(uncond, cond, 1.0), cond, atol=1e-6)
    np.testing.assert_allclose(guide(uncond, cond, 0.0), uncond)
    np.testing.assert_allclose(guide(uncond, cond, 7.5), 7.5 * cond - 6.5 * uncond, rtol=1e-5)


def test_rescale_brings_back_the_deviation_of_each_picture(
    predictions: tuple[np.ndarray, np.ndarray],
) -> None:
    uncond, cond = predictions
    axes = (1, 2, 3)
    full = guide(uncond, cond, 7.5, rescale=1.0)
    np.testing.assert_allclose(full.std(axis=axes), cond.std(axis=axes), rtol=1e-5)
    none, half = guide(uncond, cond, 7.5), guide(uncond, cond, 7.5, rescale=0.5)
    np.testing.assert_allclose(half, (full + none) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.mlx
def test_both_backends(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    mx = pytest.importorskip("mlx.core")
    for rescale in (0.0, 0.7):
        expected = guide(*predictions, 7.5, rescale)
        found = guide(*map(mx.array, predictions), 7.5, rescale)
        assert isinstance(found, mx.array) and found.dtype == mx.float32
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-5)
        assert expected.dtype == np.float32


def test_only_above_one() -> None:
    assert [is_guided(scale) for scale in (0.0, 1.0, 1.01, 7.5)] == [False, False, True, True]


@pytest.mark.parity
@pytest.mark.parametrize("dim", [256, 7])
def test_the_embedding_of_the_scale(dim: int) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    method = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    expected = method(None, torch.tensor([8.5 - 1]), embedding_dim=dim).numpy()
    found = guidance_scale_embedding(8.5, dim)
    assert found.shape == (1, dim)
    # At an angle of 7500 the last bit of float32 is 5e-4.
    np.testing.assert_allclose(found, expected, atol=1e-3)
