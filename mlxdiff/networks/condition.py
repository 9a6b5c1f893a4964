"""Inputs that stay the same over many evaluations, and the arrays that layers make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Change = Callable[[Any], Any]
"""Changes the input of a layer: (B * L, C) -> the same."""


@dataclass(frozen=True)
class Frames:
    """The frames of a video: samples that stand in a batch one after the other.

    Attributes:
        count: frames of each video; 1 for pictures.
        context: motion modules see so many frames at a time; None: all of them.
        stride: frames from the start of a window to that of the next.
        at_once: to save memory, layers that see one frame alone run on so many at a time, and
            motion modules on as small a share of the places; None: on all.
    """

    count: int = 1
    context: int | None = None
    stride: int = 4
    at_once: int | None = None

    @property
    def in_parts(self) -> bool:
        """Return True if layers run on a part of the frames at a time."""
        return self.at_once is not None and self.at_once < self.count

    @property
    def windows(self) -> list[tuple[int, list[float]]]:
        """Windows of frames: the first frame of each, and the weights of its frames.

        The weights of a frame add up to 1 over all windows. They rise and fall within a window.
        Source: Qiu et al. 2023 (FreeNoise), equation 9.
        """
        length = self.context
        if length is None or length >= self.count:
            return [(0, [1.0] * self.count)]
        half = [float(i + 1) for i in range((length + 1) // 2)]
        shape = half + half[: length // 2][::-1]
        starts = list(range(0, self.count - length + 1, self.stride))
        windows = [(start, list(shape)) for start in starts]
        if (missing := self.count - starts[-1] - length) > 0:
            # The last window counts only where no other one is.
            windows.append((self.count - length, [0.0] * (length - missing) + shape[-missing:]))
        totals = [0.0] * self.count
        for start, weights in windows:
            for i, weight in enumerate(weights):
                totals[start + i] += weight
        return [
            (start, [weight / totals[start + i] for i, weight in enumerate(weights)])
            for start, weights in windows
        ]


class Condition:
    """An input of a network that a whole run shares: the text, or the timesteps.

    A layer makes arrays of it alone (keys and values, a shift). They are computed at their first
    use and kept. Drop a Condition together with the weights that it was used with.

    Args:
        values: (N, ...) array of either backend: a row for each sample of a batch or, for the
            timesteps, for the batch of each evaluation one after the other.
    Attributes:
        frames: the frames of a video, which share a row.
    """

    def __init__(self, values: Any) -> None:
        self.values = values
        self.frames = Frames()
        self._rows = slice(None)
        self._made: dict[int, tuple[object, Any]] = {}
        self._beside: dict[int, list[tuple[Any, Any, float]]] = {}
        self._inputs: dict[tuple[int, str], list[Change]] = {}
        self._changes: dict[int, tuple[object, Any]] = {}

    def rows(self, start: int, stop: int) -> Condition:
        """Take some of these samples. They share with the whole what layers make."""
        part = Condition(self.values)
        first = self._rows.start or 0
        part._rows = slice(first + start, first + stop)
        part._made = self._made
        part._beside = self._beside
        part._inputs, part._changes = self._inputs, self._changes
        part.frames = self.frames
        return part

    def of_video(self, frames: Frames) -> Condition:
        """Take the same, with rows that stand for all frames of a video."""
        same = self._copy()
        same.frames = frames
        return same

    def changing(self, changes: Iterable[tuple[object, str, Change]]) -> Condition:
        """Take the same, with changes of the inputs of some layers, for one evaluation.

        Args:
            changes: module, name of its layer, change.
        """
        same = self._copy()
        same._inputs = {key: [*found] for key, found in self._inputs.items()}
        for module, name, change in changes:
            same._inputs.setdefault((id(module), name), []).append(change)
        return same

    def changed_input(self, module: object, name: str, x: Any) -> Any:
        """Return the input of a layer of a module as it is after all changes."""
        for change in self._inputs.get((id(module), name), ()):
            x = change(x)
        return x

    def changed(self, changes: Iterable[tuple[object, Any]]) -> Condition:
        """Return the same input, with changes to layers that are evaluated with it.

        Args:
            changes: pairs of a layer and its change (``networks.perturbation``).
        """
        part = self._copy()
        part._changes = {**self._changes, **{id(layer): (layer, new) for layer, new in changes}}
        return part

    def _copy(self) -> Condition:
        same = Condition(self.values)
        same._rows, same._made, same._beside = self._rows, self._made, self._beside
        same._inputs, same._changes = self._inputs, self._changes
        same.frames = self.frames
        return same

    def change(self, layer: object) -> Any:
        """Return the change of a layer, or None."""
        return self._changes[id(layer)][1] if id(layer) in self._changes else None

    def made_by(self, layer: object, make: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Return the arrays that a layer makes of the values, for these rows.

        Args:
            layer: owns the arrays.
            make: computes arrays (N, ...) from all values.
        """
        # The layer is kept beside it: an id is only its own while it lives.
        _, made = self._made.get(id(layer)) or (layer, make(self.values))
        self._made[id(layer)] = layer, made
        return made if self._rows == slice(None) else tuple(one[self._rows] for one in made)

    def put_beside(self, layer: object, keys: Any, values: Any, scale: float) -> None:
        """Give a layer of attention other keys and values beside these.

        Args:
            layer: the layer.
            keys, values: (N, ...), as the layer would make them.
            scale: factor of their attention.
        """
        self._beside.setdefault(id(layer), []).append((keys, values, scale))

    def beside(self, layer: object) -> list[tuple[Any, Any, float]]:
        """Return the other keys and values of a layer, with their scale, for these rows."""
        found = self._beside.get(id(layer), [])
        return [(keys[self._rows], values[self._rows], scale) for keys, values, scale in found]
