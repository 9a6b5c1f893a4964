"""Seeded noise, equal to the numbers that other programs draw, and the forward process.

Every picture starts from noise. Two programs give the same picture for a seed only if they draw the
same numbers. There are three kinds, all in NumPy:

- `Generator`, "cpu": torch's on the CPU. The Mersenne Twister MT19937 (Matsumoto and Nishimura
  1998) and the Box-Muller transform (1958), with draws in torch's order. Source of the order: torch
  aten/src/ATen/native/cpu/DistributionTemplates.h (normal_fill) and
  aten/src/ATen/core/DistributionsHelper.h (normal_distribution).
- `PhiloxGenerator`, "gpu": torch's on CUDA. Philox 4x32-10 (Salmon et al. 2011) and Box-Muller.
- `NumpyGenerator`, "numpy": NumPy's RandomState.

tests/test_noise.py compares the numbers with those that these programs publish or draw.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mlxdiff.errors import UsageError, argument

Array = Any  # a float32 array of either backend: np.ndarray or mx.array

SEEDS = range(-(2**63), 2**64)
"""The seeds that torch takes."""

_BLOCK = 16  # torch fills blocks of 16 numbers: eight radii, eight angles
_U24 = np.float32(2.0**-24)
_TWO_PI = np.float32(2.0 * math.pi)


class NoiseSource(Protocol):
    """A stream of standard normal numbers; but for that of a GPU, of orders as well."""

    def randn(self, shape: int | Sequence[int]) -> np.ndarray:
        """Draw the next numbers: float32, in C order of `shape`."""

    def permutation(self, count: int) -> list[int]:
        """Draw an order of ``count`` things."""


class Generator:
    """A stream of standard normal numbers: ``torch.Generator("cpu").manual_seed(seed)``.

    The generator has a state, as torch's has: each `randn` continues the stream. Values agree with
    torch's to 5e-7, because builds of torch also differ in the last bits of log and cos. Draws of
    fewer than 16 values are equal.

    Args:
        seed: an integer from -2**63 to 2**64 - 1. Only the low 32 bits count, as in torch.
    Raises: UsageError if torch would refuse the seed.
    """

    def __init__(self, seed: int) -> None:
        seed = _torch_seed(seed)
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        # The second number of a scalar pair, for the next small draw. Large draws do not use it.
        self._spare: float | None = None

    def randn(self, shape: int | Sequence[int]) -> np.ndarray:
        """Draw the next numbers, as torch.randn(shape) does: float32, in C order of `shape`."""
        shape = _as_tuple(shape)
        count = math.prod(shape)
        if count < _BLOCK:
            values = np.array([self._scalar() for _ in range(count)], np.float32)
        else:
            values = self._blocks(self._raw(count))
            if count % _BLOCK:  # torch redraws the last 16 numbers
                values[-_BLOCK:] = self._blocks(self._raw(_BLOCK))
        return values.reshape(shape)

    def permutation(self, count: int) -> list[int]:
        """Draw an order of ``count`` things, as torch.randperm(count) does.

        Source: torch aten/src/ATen/native/TensorFactories.cpp (randperm_cpu).
        """
        order = list(range(count))
        for i in range(count - 1):
            other = i + int(self._raw(1)[0]) % (count - i)
            order[i], order[other] = order[other], order[i]
        return order

    def _raw(self, count: int) -> np.ndarray:
        """Draw the next `count` 32-bit words of the twister. A full-range draw rejects none."""
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    @staticmethod
    def _blocks(words: np.ndarray) -> np.ndarray:
        """Apply Box-Muller in float32 to whole blocks. The remainder stays uniform."""
        uniform: np.ndarray = (words & np.uint32(0xFFFFFF)).astype(np.float32) * _U24
        whole = uniform[: len(uniform) // _BLOCK * _BLOCK].reshape(-1, 2, _BLOCK // 2)
        radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - whole[:, 0]))
        angle = _TWO_PI * whole[:, 1]
        whole[:, 0], whole[:, 1] = radius * np.cos(angle), radius * np.sin(angle)
        return uniform

    def _scalar(self) -> float:
        """Draw one number on the double-precision path. Its partner is kept for the next call."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        u1, u2 = self._uniform53(), self._uniform53()
        radius, angle = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform53(self) -> float:
        words: list[int] = self._raw(2).tolist()
        high, low = words
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


_PHILOX_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_STEPS = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_UNIT = 2.0**-32
_TURN = float(np.float32(2.0**-32 * 6.2831855))  # as cuRAND has it: 2 pi in float32


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Apply Philox 4x32-10 to counters. The four words of a counter give four random words.

    Args:
        counter: (4, n) uint64 that hold 32-bit words, the lowest word first.
        key: two 32-bit words, the lower one first.
    Returns: (4, n) uint64 that hold 32-bit words.
    Source: Salmon et al. 2011, *Parallel Random Numbers: As Easy as 1, 2, 3*, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        first, second = c0 * _PHILOX_FACTORS[0], c2 * _PHILOX_FACTORS[1]
        c0, c1 = (second >> _HALF) ^ c1 ^ np.uint64(k0), second & _LOW
        c2, c3 = (first >> _HALF) ^ c3 ^ np.uint64(k1), first & _LOW
        k0, k1 = (k0 + _PHILOX_STEPS[0]) & 0xFFFFFFFF, (k1 + _PHILOX_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


class PhiloxGenerator:
    """A stream of standard normal numbers: ``torch.Generator("cuda").manual_seed(seed)``.

    CUDA draws each number of an array in a thread of its own. The number of the thread and the
    number of draws so far are the counter, the seed is the key, and the first of Box-Muller's two
    values is taken. This is exact as long as the GPU has a thread for each number (a GTX 1080 has
    40,960, an RTX 4090 196,608); a GPU with fewer gives other numbers beyond, to torch as well.
    CUDA's own sine is good to 4e-7 of the radius, so pictures agree as between two GPUs.

    Args:
        seed: an integer from -2**63 to 2**64 - 1. All 64 bits count.
    Raises: UsageError if torch would refuse the seed.
    Source: torch aten/src/ATen/native/cuda/DistributionTemplates.h (the counter); cuRAND's
        documentation of curand_normal4 (the transform).
    """

    def __init__(self, seed: int) -> None:
        seed = _torch_seed(seed) % 2**64
        self._key = seed & 0xFFFFFFFF, seed >> 32
        self._draws = 0

    def randn(self, shape: int | Sequence[int]) -> np.ndarray:
        """Draw the next numbers, as torch.randn(shape) does: float32, in C order of `shape`."""
        shape = _as_tuple(shape)
        counter = np.zeros((4, math.prod(shape)), np.uint64)
        counter[0], counter[2] = self._draws, np.arange(counter.shape[1])
        self._draws += 1
        radius, angle = philox(counter, self._key)[:2].astype(np.float64)
        values = np.sqrt(-2.0 * np.log(radius * _UNIT + _UNIT / 2)) * np.sin(
            angle * _TURN + _TURN / 2
        )
        return np.asarray(values, np.float32).reshape(shape)

    def permutation(self, count: int) -> list[int]:
        """Not known: CUDA sorts random keys. Raises: UsageError."""
        raise UsageError(f"{argument('rng', 'gpu')} draws no orders; take cpu or numpy")


class NumpyGenerator:
    """A stream of standard normal numbers: ``np.random.RandomState(seed).randn``.

    Args:
        seed: an integer from 0 to 2**32 - 1.
    Raises: UsageError if RandomState would refuse the seed.
    """

    def __init__(self, seed: int) -> None:
        seed = _integer(seed)
        if not 0 <= seed < 2**32:
            raise UsageError(
                f"seed {seed} is out of range: NumPy's generator takes 0 to 2**32 - 1; take "
                f"another seed, or another generator ({argument('rng')})"
            )
        self._state = np.random.RandomState(seed)

    def randn(self, shape: int | Sequence[int]) -> np.ndarray:
        """Draw the next numbers: float32, in C order of `shape`."""
        values = self._state.standard_normal(_as_tuple(shape))
        return np.asarray(values, np.float32)

    def permutation(self, count: int) -> list[int]:
        """Draw an order of ``count`` things, as RandomState.permutation(count) does."""
        return [int(i) for i in self._state.permutation(count)]


SOURCES: Mapping[str, Callable[[int], NoiseSource]] = {
    "cpu": Generator,
    "gpu": PhiloxGenerator,
    "numpy": NumpyGenerator,
}
"""Kinds of generators, by name; each is made from a seed."""


def _integer(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise UsageError(f"seed must be an integer, not {seed!r}") from None


def _torch_seed(seed: Any) -> int:
    whole = _integer(seed)
    if whole not in SEEDS:
        raise UsageError(f"seed {whole} is out of range: torch takes -2**63 to 2**64 - 1")
    return whole


def _as_tuple(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)


def interpolated(noise: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """Go from one noise towards another on a sphere, so that the result is noise as well.

    Args:
        noise, other: (1, h, w, C) float32.
        share: 0 gives `noise`, 1 gives `other`.
    Returns: (1, h, w, C) float32.
    Source: Shoemake 1985 (slerp). A1111's variation seed interpolates each column of each channel
        for itself, by the angle between the two columns; so does this, to give the same pictures.
    """
    low, high = noise.astype(np.float64), other.astype(np.float64)
    norms = [np.sqrt((one * one).sum(axis=1, keepdims=True)) for one in (low, high)]
    cosine = (low / norms[0] * (high / norms[1])).sum(axis=1, keepdims=True)
    if cosine.mean() > 0.9995:  # the same seed twice: there is no angle to divide by
        return noise
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    # A column of one number has an angle of 0 or pi, where the formula divides 0 by 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [np.sin((1.0 - share) * angle), np.sin(share * angle)] / np.sin(angle)
    straight = np.sin(angle) < 1e-6
    shares = np.where(straight, np.reshape([1.0 - share, share], (2, 1, 1, 1, 1)), shares)
    return np.asarray(shares[0] * low + shares[1] * high, np.float32)


def framed(noise: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Put a noise of another size into the middle of a noise; what does not fit is cut off.

    Args:
        noise: (1, h, w, C) float32.
        small: (1, h', w', C) float32.
    Returns: (1, h, w, C) float32.
    Source: A1111's "Resize seed from".
    """
    result = np.array(noise)
    inside: list[slice] = []
    taken: list[slice] = []
    for size, other in zip(noise.shape[1:3], small.shape[1:3], strict=True):
        shift = (size - other) // 2
        length = other if shift >= 0 else other + 2 * shift
        inside.append(slice(max(shift, 0), max(shift, 0) + length))
        taken.append(slice(max(-shift, 0), max(-shift, 0) + length))
    result[:, inside[0], inside[1]] = small[:, taken[0], taken[1]]
    return result


def add_noise(x0: Array, noise: Array, alphas_cumprod: float) -> Array:
    """Sample q(x_t | x_0) = N(sqrt(a) x_0, (1 - a) I). a is the product of (1 - beta) up to t.

    Args:
        x0, noise: arrays of the same shape, of either backend.
        alphas_cumprod: a, a Python float in [0, 1].
    Source: Ho et al. 2020, equation 4.
    """
    return math.sqrt(alphas_cumprod) * x0 + math.sqrt(1.0 - alphas_cumprod) * noise


def velocity(x0: Array, noise: Array, alphas_cumprod: float) -> Array:
    """Return the training target of a v-prediction model: v = sqrt(a) noise - sqrt(1 - a) x_0.

    Source: Salimans and Ho 2022, appendix D.
    """
    return math.sqrt(alphas_cumprod) * noise - math.sqrt(1.0 - alphas_cumprod) * x0
