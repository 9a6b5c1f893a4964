"""What a network is told in many evaluations alike, and what its layers make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Condition:
    """Something that a network is told all through a run: the text, or the timesteps.

    What a layer makes of it depends on nothing else, so it is computed at its first use and kept.
    A Condition must not outlive the weights it was used with.

    Args:
        values: (N, ...) array of either backend: a row for each sample of a batch or, for the
            timesteps, for the batch of each evaluation one after the other.
    """

    def __init__(self, values: Any) -> None:
        self.values = values
        self._rows = slice(None)
        self._made: dict[int, tuple[object, Any]] = {}
        self._beside: dict[int, list[tuple[Any, Any, float]]] = {}

    def rows(self, start: int, stop: int) -> Condition:
        """Some of these samples; what layers make is shared with the whole."""
        part = Condition(self.values)
        first = self._rows.start or 0
        part._rows = slice(first + start, first + stop)
        part._made = self._made
        part._beside = self._beside
        return part

    def made_by(self, layer: object, make: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What a layer makes of the values, for these rows.

        Args:
            layer: whose it is to keep.
            make: computes arrays (N, ...) from all values.
        """
        # The layer is kept beside it: an id is only its own while it lives.
        _, made = self._made.get(id(layer)) or (layer, make(self.values))
        self._made[id(layer)] = layer, made
        return made if self._rows == slice(None) else tuple(one[self._rows] for one in made)

    def put_beside(self, layer: object, keys: Any, values: Any, scale: float) -> None:
        """Let a layer of attention see something beside these values, on its own.

        Args:
            layer: which one.
            keys, values: (N, ...), as it would make them itself.
            scale: times what it sees there.
        """
        self._beside.setdefault(id(layer), []).append((keys, values, scale))

    def beside(self, layer: object) -> list[tuple[Any, Any, float]]:
        """What a layer sees beside these values, for these rows."""
        found = self._beside.get(id(layer), [])
        return [(keys[self._rows], values[self._rows], scale) for keys, values, scale in found]
