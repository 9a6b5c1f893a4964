"""Seeded noise, number for number what torch draws on the CPU, and the forward process.

Every picture starts from noise, so a seed means the same picture in two programs only if both draw
the same numbers. The field's pictures were made with torch's CPU generator; `Generator` repeats it
in NumPy: the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998) and the Box-Muller transform
(1958), with torch's order of draws.

Source of the order: torch aten/src/ATen/native/cpu/DistributionTemplates.h (normal_fill) and
aten/src/ATen/core/DistributionsHelper.h (normal_distribution); checked against torch by
tests/test_noise.py.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError

Array = Any  # a float32 array of either backend: np.ndarray or mx.array

_BLOCK = 16  # torch fills in blocks of 16 numbers: eight radii, eight angles
_U24 = np.float32(2.0**-24)
_TWO_PI = np.float32(2.0 * math.pi)


class Generator:
    """A stream of standard normal numbers: ``torch.Generator("cpu").manual_seed(seed)``.

    Like torch's it is stateful: each `randn` continues where the last one stopped. Values agree
    with torch's to 5e-7 (the last bits of log and cos differ between builds of torch too); below 16
    values they are equal.

    Args:
        seed: an integer from -2**63 to 2**64 - 1; as in torch only its low 32 bits count.
    Raises: UsageError where torch would refuse the seed.
    """

    def __init__(self, seed: int) -> None:
        try:
            seed = operator.index(seed)
        except TypeError:
            raise UsageError(f"seed must be an integer, not {seed!r}") from None
        if not -(2**63) <= seed < 2**64:
            raise UsageError(f"seed {seed} is out of range: torch takes -2**63 to 2**64 - 1")
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        # The second number of a scalar pair, for the next small draw; large ones leave it alone.
        self._spare: float | None = None

    def randn(self, shape: int | Sequence[int]) -> np.ndarray:
        """The next numbers of the stream: float32, in C order of `shape`, as torch.randn(shape)."""
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        count = math.prod(shape)
        if count < _BLOCK:
            values = np.array([self._scalar() for _ in range(count)], np.float32)
        else:
            values = self._blocks(self._raw(count))
            if count % _BLOCK:  # the last 16 are drawn anew, over what was there
                values[-_BLOCK:] = self._blocks(self._raw(_BLOCK))
        return values.reshape(shape)

    def _raw(self, count: int) -> np.ndarray:
        """The next `count` 32-bit words of the twister (a full-range draw rejects nothing)."""
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    @staticmethod
    def _blocks(words: np.ndarray) -> np.ndarray:
        """Box-Muller in float32 on whole blocks; what is left over stays uniform."""
        uniform = (words & np.uint32(0xFFFFFF)).astype(np.float32) * _U24
        whole = uniform[: len(uniform) // _BLOCK * _BLOCK].reshape(-1, 2, _BLOCK // 2)
        radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - whole[:, 0]))
        angle = _TWO_PI * whole[:, 1]
        whole[:, 0], whole[:, 1] = radius * np.cos(angle), radius * np.sin(angle)
        return uniform

    def _scalar(self) -> float:
        """One number by the double-precision path; its partner waits for the next call."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        u1, u2 = self._uniform53(), self._uniform53()
        radius, angle = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform53(self) -> float:
        high, low = self._raw(2).tolist()
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def add_noise(x0: Array, noise: Array, alphas_cumprod: float) -> Array:
    """A sample of q(x_t | x_0) = N(sqrt(a) x_0, (1 - a) I), a the product of (1 - beta) up to t.

    Args:
        x0, noise: arrays of one shape, of either backend.
        alphas_cumprod: a, a Python float in [0, 1].
    Source: Ho et al. 2020, equation 4.
    """
    return math.sqrt(alphas_cumprod) * x0 + math.sqrt(1.0 - alphas_cumprod) * noise


def velocity(x0: Array, noise: Array, alphas_cumprod: float) -> Array:
    """What a v-prediction model learns to say: v = sqrt(a) noise - sqrt(1 - a) x_0.

    Source: Salimans and Ho 2022, appendix D.
    """
    return math.sqrt(alphas_cumprod) * noise - math.sqrt(1.0 - alphas_cumprod) * x0
