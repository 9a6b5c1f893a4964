"""Seeded noise against torch's, stored and live, and the forward process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxdiff import noise
from mlxdiff.errors import UsageError
from mlxdiff.noise import (
    Generator,
    NumpyGenerator,
    PhiloxGenerator,
    framed,
    interpolated,
    philox,
)

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


# Philox words of Random123's known answers (kat_vectors, philox4x32 10): counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_its_known_answers(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    found = philox(np.array(counter, np.uint64).reshape(4, 1), (key[0], key[1]))
    assert found[:, 0].tolist() == words


def test_gpu_numbers_are_those_of_cuda() -> None:
    """Published: torch.manual_seed(0); torch.randn(3, 4, device="cuda").

    CUDA works in float32, where the angle (up to 2 pi) is rounded by 2.4e-7 and the sine and the
    logarithm are approximate; times a radius of 2.7 this is below 1e-6.
    """
    published = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    found = PhiloxGenerator(0).randn((3, 4))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, published, rtol=0, atol=1e-6)
    values = PhiloxGenerator(3).randn(200_001)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01


def test_gpu_draws_count_on_and_take_the_whole_seed() -> None:
    generator = PhiloxGenerator(5)
    first, second = generator.randn((2, 8)), generator.randn(16)
    assert not np.array_equal(first.ravel(), second)
    # Each number depends on its place and the number of the draw alone, not on the shape.
    np.testing.assert_array_equal(first.ravel()[:3], PhiloxGenerator(5).randn(3))
    assert not np.array_equal(first, PhiloxGenerator(5 + 2**32).randn((2, 8)))
    np.testing.assert_array_equal(PhiloxGenerator(-1).randn(4), PhiloxGenerator(2**64 - 1).randn(4))


def test_numpy_numbers_are_those_of_random_state() -> None:
    generator, state = NumpyGenerator(93), np.random.RandomState(93)
    for shape in ((1, 4, 3, 3), (2,)):
        expected = state.randn(*shape).astype(np.float32)
        np.testing.assert_array_equal(generator.randn(shape), expected)
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match=r"generator \(rng\)"):
            NumpyGenerator(seed)


def _slerp(share: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A1111's, for one picture (C, h, w): the angle is that of columns."""
    result = np.empty_like(low)
    for c in range(low.shape[0]):
        for x in range(low.shape[2]):
            a, b = low[c, :, x].astype(float), high[c, :, x].astype(float)
            omega = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            shares = np.sin((1 - share) * omega), np.sin(share * omega)
            result[c, :, x] = (shares[0] * a + shares[1] * b) / np.sin(omega)
    return result


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_interpolation_is_that_of_a1111(share: float) -> None:
    low, high = (PhiloxGenerator(seed).randn((4, 8, 6)) for seed in (1, 2))
    found = interpolated(low.transpose(1, 2, 0)[None], high.transpose(1, 2, 0)[None], share)
    expected = _slerp(share, low, high).transpose(1, 2, 0)[None]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_interpolation_stays_noise_and_finite() -> None:
    low, high = (Generator(seed).randn((1, 64, 64, 4)) for seed in (1, 2))
    assert abs(interpolated(low, high, 0.5).std() - 1) < 0.02
    np.testing.assert_array_equal(interpolated(low, low, 0.5), low)
    assert np.isfinite(interpolated(low[:, :1], high[:, :1], 0.5)).all()


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 8), (8, 2), (3, 5), (6, 6), (9, 9)])
def test_noise_of_another_size_lies_in_the_middle(rows: int, columns: int) -> None:
    large, small = Generator(1).randn((1, 6, 6, 2)), Generator(2).randn((1, rows, columns, 2))
    found = framed(large, small)
    top, left = (6 - rows) // 2, (6 - columns) // 2
    for y in range(6):
        for x in range(6):
            v, u = y - top, x - left
            # A1111 counts what it cuts off twice: odd overhangs lose one row more.
            inside = 0 <= v < rows + min(top, 0) and 0 <= u < columns + min(left, 0)
            assert np.array_equal(found[0, y, x], (small[0, v, u] if inside else large[0, y, x]))


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
