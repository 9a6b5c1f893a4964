"""The order of training: which pictures make which batch. It depends on the seed alone.

Each bucket is an endless row: all its pictures in random order, then all of them in another one,
and so on. Batches are cut from these rows, so every batch is full, and no picture is used twice
before all others of its bucket were used once. An epoch has from each bucket as many batches as its
share of the pictures allows; what is left over comes first in the next epoch.

Nothing is drawn from a running generator: batch n follows from (seed, n). So a run that stops can
go on at any step, and processes that share the work need not speak to each other about it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError, argument

_PASS, _EPOCH, _ITEM = 1, 2, 3  # what a generator is for


@dataclass(frozen=True)
class Place:
    """Where a run stands in its data.

    Attributes:
        seed: decides the order.
        epoch: number of the epoch, from 0.
        position: number of the next batch in the epoch, from 0.
    """

    seed: int
    epoch: int = 0
    position: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the place as JSON holds it."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    @classmethod
    def from_dict(cls, data: Any) -> Place:
        """Read what ``to_dict`` wrote. Raises: UsageError."""
        names = ("seed", "epoch", "position")
        if not isinstance(data, dict) or not all(
            type(data.get(name)) is int and data[name] >= 0 for name in names
        ):
            raise UsageError(
                f"the saved place in the data is damaged; start again without {argument('resume')}"
            )
        return cls(*(data[name] for name in names))


@dataclass(frozen=True)
class Draw:
    """A picture of a batch, and the random numbers that go with it.

    Attributes:
        index: of the picture.
        flip, place: uniform in [0, 1), for the mirror and for the crop.
        drop: uniform in [0, 1), for dropping the caption.
    """

    index: int
    flip: float
    place: float
    drop: float


class Order:
    """All batches of a training, by epoch and position.

    Args:
        groups: the bucket of each picture; pictures of one bucket can share a batch.
        repeats: how often each picture is used in an epoch.
        batch: pictures in a batch, over all processes.
        seed: decides the order.
    """

    def __init__(
        self, groups: Sequence[Hashable], repeats: Sequence[int], batch: int, seed: int
    ) -> None:
        self.batch, self.seed = batch, seed
        rows: dict[Hashable, list[int]] = {}
        for index, (group, count) in enumerate(zip(groups, repeats, strict=True)):
            rows.setdefault(group, []).extend([index] * count)
        self._rows = [np.array(row) for row in rows.values()]
        self._pass = lru_cache(maxsize=2 * len(self._rows) + 2)(self._make_pass)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def count(self) -> int:
        """Pictures of an epoch, repeats included."""
        return sum(len(row) for row in self._rows)

    def length(self, epoch: int) -> int:
        """Return how many batches an epoch has; 0 where all pictures together fill no batch yet."""
        return len(self._epoch(epoch))

    def place(self, index: int) -> Place:
        """Return the place of a batch by its number over all epochs, from 0 on."""
        epoch = index * self.batch // self.count
        while self._before(epoch) > index:
            epoch -= 1
        while self._before(epoch + 1) <= index:
            epoch += 1
        return Place(self.seed, epoch, index - self._before(epoch))

    def _before(self, epoch: int) -> int:
        """Return how many batches all epochs before this one have."""
        return sum(epoch * len(row) // self.batch for row in self._rows)

    def start(self) -> Place:
        """Return the place before the first batch."""
        return self._settled(Place(self.seed))

    def next(self, place: Place) -> Place:
        """Return the place after the batch at ``place``."""
        return self._settled(Place(place.seed, place.epoch, place.position + 1))

    def at(self, place: Place) -> list[Draw]:
        """Return the batch at a place.

        Raises: UsageError if the place is of another seed, or beyond its epoch.
        """
        if place.seed != self.seed or place.position >= self.length(place.epoch):
            raise UsageError(
                "the saved place in the data does not fit these pictures or this seed; start again "
                f"without {argument('resume')}"
            )
        group, number = self._epoch(place.epoch)[place.position]
        row = self._rows[group]
        draws = []
        for i in range(number * self.batch, (number + 1) * self.batch):
            index = int(self._pass(group, i // len(row))[i % len(row)])
            flip, at, drop = np.random.default_rng((self.seed, _ITEM, group, i)).random(3)
            draws.append(Draw(index, float(flip), float(at), float(drop)))
        return draws

    def walk(self, place: Place | None = None) -> Iterator[tuple[Place, list[Draw]]]:
        """Yield all batches from a place on, without end."""
        place = self.start() if place is None else place
        while True:
            yield place, self.at(place)
            place = self.next(place)

    def _settled(self, place: Place) -> Place:
        """Go on to the next epoch where this one is over."""
        while place.position >= self.length(place.epoch):
            place = Place(place.seed, place.epoch + 1, 0)
        return place

    def _make_pass(self, group: int, number: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, _PASS, group, number))
        return self._rows[group][rng.permutation(len(self._rows[group]))]

    def _make_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """Return (bucket, number of its batch) for each batch of an epoch."""
        batches = [
            (group, number)
            for group, row in enumerate(self._rows)
            for number in range(
                epoch * len(row) // self.batch, (epoch + 1) * len(row) // self.batch
            )
        ]
        rng = np.random.default_rng((self.seed, _EPOCH, epoch))
        return [batches[i] for i in rng.permutation(len(batches))]
