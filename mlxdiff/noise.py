"""Seeded noise, equal to the numbers that torch draws on the CPU, and the forward process.

Every picture starts from noise. Two programs give the same picture for a seed only if they draw the
same numbers. Most published pictures were made with torch's CPU generator. `Generator` repeats it
in NumPy: the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998) and the Box-Muller transform
(1958), with draws in torch's order.

Source of the order: torch aten/src/ATen/native/cpu/DistributionTemplates.h (normal_fill) and
aten/src/ATen/core/DistributionsHelper.h (normal_distribution). tests/test_noise.py compares the
numbers with torch's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError

Array = Any  # a float32 array of either backend: np.ndarray or mx.array

SEEDS = range(-(2**63), 2**64)
"""The seeds that torch takes."""

_BLOCK = 16  # torch fills blocks of 16 numbers: eight radii, eight angles
_U24 = np.float32(2.0**-24)
_TWO_PI = np.float32(2.0 * math.pi)


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
        try:
            seed = operator.index(seed)
        except TypeError:
            raise UsageError(f"seed must be an integer, not {seed!r}") from None
        if seed not in SEEDS:
            raise UsageError(f"seed {seed} is out of range: torch takes -2**63 to 2**64 - 1")
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        # The second number of a scalar pair, for the next small draw. Large draws do not use it.
        self._spare: float | None = None

    def randn(self, shape: int | Sequence[int]) -> np.ndarray:
        """Draw the next numbers, as torch.randn(shape) does: float32, in C order of `shape`."""
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        count = math.prod(shape)
        if count < _BLOCK:
            values = np.array([self._scalar() for _ in range(count)], np.float32)
        else:
            values = self._blocks(self._raw(count))
            if count % _BLOCK:  # torch redraws the last 16 numbers
                values[-_BLOCK:] = self._blocks(self._raw(_BLOCK))
        return values.reshape(shape)

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
