"""One Brownian motion over the noise levels of a run, as k-diffusion's SDE samplers draw it.

Independent noise in each step makes a picture depend on how a run is divided into steps. The
increments of one Brownian motion between the levels do not: steps that are halved use the same
path. k-diffusion takes torchsde's BrownianInterval for it, a tree of halved intervals: the
increment over a half follows from that over the whole and fresh numbers, whose seed is hashed from
the picture's seed and the place of the interval in the tree.

Source: torchsde 0.2.6, brownian_interval.py (halfway_tree, tol 1e-6, pool_size 24), in the way
that k-diffusion's BrownianTreeNoiseSampler uses it; Levy's construction. tests/test_noise.py
compares the numbers with torchsde's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property

import numpy as np

_DIGITS = 6  # noise levels are rounded to this many, and the tree ends there
_POOL = 24
_KEPT = 64  # nodes of the tree, of the size of a picture's latents each


class _Node:
    """An interval of the tree. It is number `key` of the 2**depth intervals at its depth."""

    def __init__(self, start: float, end: float, key: int, above: _Node | None) -> None:
        self.start, self.end, self.key, self.above = start, end, key, above
        self.depth: int = 0 if above is None else above.depth + 1
        self.middle = round(0.5 * (end + start), _DIGITS)

    @cached_property
    def halves(self) -> tuple[_Node, _Node]:
        """The intervals before and after the middle."""
        return (
            _Node(self.start, self.middle, 2 * self.key, self),
            _Node(self.middle, self.end, 2 * self.key + 1, self),
        )

    def parts(self, low: float, high: float) -> list[_Node]:
        """Return the nodes at and below this one that make up an interval within it, in order."""
        if (self.start, self.end) == (low, high):
            return [self]
        left, right = self.halves
        if high <= self.middle:
            return left.parts(low, high)
        if low >= self.middle:
            return right.parts(low, high)
        return [*left.parts(low, self.middle), *right.parts(self.middle, high)]


class BrownianMotion:
    """A Brownian motion over an interval of noise levels.

    Args:
        interval: the lowest and the highest sigma of the run.
        seed: of the picture.
        normal: draws the standard normal noise of a seed, float32.
    """

    def __init__(
        self, interval: tuple[float, float], seed: int, normal: Callable[[int], np.ndarray]
    ) -> None:
        low, high = interval
        self._seed, self._normal = seed, normal
        self._top = _Node(round(low, _DIGITS), round(high, _DIGITS), 0, None)
        self._whole = normal(self._hash()) * np.float32(math.sqrt(high - low))
        self._known: OrderedDict[_Node, np.ndarray] = OrderedDict()

    def __call__(self, here: float, there: float) -> np.ndarray:
        """Return the increment from one sigma to another, scaled to variance 1: float32.

        Args:
            here, there: two different sigmas within the interval.
        """
        low, high = sorted((here, there))
        first, *others = self._top.parts(self._within(low), self._within(high))
        total = self._increment(first)
        for node in others:
            total = total + self._increment(node)
        scale = np.float32(math.sqrt(high - low) * (1.0 if here < there else -1.0))
        return total / scale

    def _within(self, sigma: float) -> float:
        return min(max(round(sigma, _DIGITS), self._top.start), self._top.end)

    def _increment(self, node: _Node) -> np.ndarray:
        """Return the increment over an interval of the tree."""
        above = node.above
        if above is None:
            return self._whole
        if node not in self._known:
            whole, halves = self._increment(above), above.halves
            before, after = (half.end - half.start for half in halves)
            length = 1.0 / (above.end - above.start)
            fresh = self._normal(self._hash(above.key, above.depth))
            mean = np.float32(before) * whole * np.float32(length)
            left = mean + np.float32(math.sqrt(before * after * length)) * fresh
            for half, increment in zip(halves, (left, whole - left), strict=True):
                self._known[half] = increment
        self._known.move_to_end(node)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return self._known[node]

    def _hash(self, *place: int) -> int:
        """Return the seed of the fresh numbers at a place of the tree: 32 bits."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=place, pool_size=_POOL)
        return int(sequence.generate_state(1)[0])
