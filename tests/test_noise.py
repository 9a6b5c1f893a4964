"""Seeded noise against torch's, stored and live, and the forward process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxdiff import noise
from mlxdiff.errors import UsageError
from mlxdiff.noise import Generator

GOLDEN = Path(__file__).parent / "golden" / "samplers" / "noise.npz"
BUILDS = 5e-7  # by how much torch's float32 log and cos may differ in their last bits


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32 + 5, -3])
def test_mixed_draws_are_torchs(seed: int) -> None:
    """Draw large, odd-sized and small arrays from one generator, so that all paths alternate."""
    with np.load(GOLDEN) as stored:
        sizes, expected = stored["sizes"].tolist(), stored[f"seed {seed}"]
    generator = Generator(seed)
    for size in sizes:
        found = generator.randn(size)
        wanted, expected = expected[:size], expected[size:]
        assert found.dtype == np.float32 and found.shape == (size,)
        if size < 16:
            np.testing.assert_array_equal(found, wanted)
        else:
            np.testing.assert_allclose(found, wanted, rtol=0, atol=BUILDS)
    assert len(expected) == 0


def test_latents_are_torchs() -> None:
    with np.load(GOLDEN) as stored:
        expected = stored["latents"]
    found = Generator(1234).randn((1, 4, 64, 64))[:, :, ::9, ::7]
    np.testing.assert_allclose(found, expected, rtol=0, atol=BUILDS)


def test_only_the_low_32_bits_count() -> None:
    np.testing.assert_array_equal(Generator(5).randn(40), Generator(2**32 + 5).randn(40))
    np.testing.assert_array_equal(Generator(-1).randn(3), Generator(2**32 - 1).randn(3))
    assert not np.array_equal(Generator(5).randn(40), Generator(6).randn(40))


def test_shapes() -> None:
    assert Generator(0).randn(()).shape == ()
    assert Generator(0).randn((0, 4)).shape == (0, 4)
    assert Generator(np.int64(7)).randn([2, 3]).shape == (2, 3)
    generator = Generator(0)
    generator.randn(0)
    np.testing.assert_array_equal(generator.randn(16), Generator(0).randn(16))


def test_numbers_are_standard_normal() -> None:
    values = Generator(11).randn(200_001)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "7", None])
def test_a_bad_seed_is_named(seed: object) -> None:
    with pytest.raises(UsageError, match="seed"):
        Generator(seed)  # type: ignore[arg-type]


def test_forward_process() -> None:
    """Compare the closed form with its definition and with the chain of single steps."""
    generator = Generator(3)
    x0, fresh = generator.randn(1000), generator.randn(1000)
    for a in (0.0, 0.3, 0.9, 1.0):
        x = noise.add_noise(x0, fresh, a)
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, np.sqrt(a) * x0 + np.sqrt(1 - a) * fresh, atol=1e-6)
        v = noise.velocity(x0, fresh, a)
        # (x_t, v) is (x_0, noise) turned by an angle, so turning back recovers both.
        np.testing.assert_allclose(np.sqrt(a) * x - np.sqrt(1 - a) * v, x0, atol=2e-6)
        np.testing.assert_allclose(np.sqrt(1 - a) * x + np.sqrt(a) * v, fresh, atol=2e-6)
    x, a = np.full(200_000, 2.0, np.float32), 1.0
    for beta in (0.1, 0.2, 0.3):
        x = np.sqrt(1 - beta) * x + np.sqrt(beta) * generator.randn(len(x))
        a *= 1 - beta
    assert abs(x.mean() - 2 * np.sqrt(a)) < 0.01 and abs(x.var() - (1 - a)) < 0.01


@pytest.mark.mlx
def test_forward_process_keeps_mlx_arrays() -> None:
    mx = pytest.importorskip("mlx.core")
    x0, fresh = Generator(3).randn(20), Generator(4).randn(20)
    for function in (noise.add_noise, noise.velocity):
        found = function(mx.array(x0), mx.array(fresh), 0.3)
        assert isinstance(found, mx.array) and found.dtype == mx.float32
        np.testing.assert_allclose(np.array(found), function(x0, fresh, 0.3), atol=1e-6)


@pytest.mark.parity
def test_live_torch() -> None:
    """Compare many seeds and shapes with an installed torch and diffusers' generators."""
    torch = pytest.importorskip("torch")
    from diffusers.utils.torch_utils import randn_tensor

    for seed in range(12):
        theirs, ours = torch.Generator("cpu").manual_seed(seed), Generator(seed)
        for shape in ((1, 4, 24, 40), (3,), (1, 4, 5, 5), (2,), (15,), (1, 4, 7, 9), (1,)):
            found, wanted = ours.randn(shape), torch.randn(shape, generator=theirs).numpy()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=BUILDS)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]
    batch = randn_tensor((2, 4, 8, 8), generator=generators).numpy()
    ours = np.concatenate([Generator(seed).randn((1, 4, 8, 8)) for seed in (5, 6)])
    np.testing.assert_allclose(ours, batch, rtol=0, atol=BUILDS)
