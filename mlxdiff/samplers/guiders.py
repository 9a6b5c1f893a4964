"""Ways to combine the predictions of an evaluation, beside classifier-free guidance itself.

A guider is named, with its numbers, in one word: `apg`, `pag:scale=3,layers=mid`. Some change how
the predictions with and without the prompt are combined. Others ask for one more prediction, for
the prompt, by a network that is weakened on purpose (networks/perturbation.py), and step away from
it:

    output = uncond + g (cond - uncond) + scale (cond - weakened)

Sources: Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales"
(arXiv 2410.02416; apg); Fan et al. 2025, "CFG-Zero*" (arXiv 2503.18886); sd-dynamic-thresholding
(MIT licence; mimic, after Saharia et al. 2022); Ahn et al. 2024, "Perturbed-Attention Guidance"
(arXiv 2403.17377; pag); Hong 2024, "Smoothed Energy Guidance" (arXiv 2408.00760; seg); Hyung et al.
2024, "Spatiotemporal Skip Guidance" (arXiv 2411.18664; slg). Equal to diffusers' guiders and PAG
pipelines (docs/guidance.md says in what they differ).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mlxdiff.errors import UsageError

Array = Any  # np.ndarray or mx.array, float32
_ALL = (1, 2, 3)  # all axes of a picture
_TINY = 1e-12  # keeps 0 / 0 away where both predictions are the same


@dataclass(frozen=True, kw_only=True)
class Guider:
    """Classifier-free guidance: the base of the others.

    Attributes:
        name: its name.
        weakens: how the network of its extra prediction is weakened; None: there is none.
    """

    name: ClassVar[str] = "cfg"
    weakens: ClassVar[str | None] = None

    @property
    def text(self) -> str:
        """Its name, and the numbers that are not the usual ones; `parse` reads it."""
        said = [
            f"{field.name}={getattr(self, field.name):g}"
            if isinstance(getattr(self, field.name), float)
            else f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(said) if said else "")

    def combine(self, uncond: Array, cond: Array, scale: float, memory: Memory) -> Array:
        """Combine the predictions without and with the prompt.

        Args:
            uncond, cond: (1, h, w, C), float32.
            scale: the guidance scale.
            memory: what it keeps of earlier evaluations of the picture.
        Returns: the guided prediction, of that shape.
        """
        return uncond + scale * (cond - uncond)


@dataclass
class Memory:
    """What a guider keeps from one evaluation of a picture to the next.

    Attributes:
        average: the running average of the differences that apg has seen.
        index: the number of the evaluation, from 0.
    """

    average: Array | None = None
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class AdaptiveProjected(Guider):
    """Shrink the part of the difference that is parallel to the prediction, and its size.

    Attributes:
        eta: factor of the parallel part; 1 leaves it.
        norm: the largest size of the difference, as a Euclidean norm; 0: no limit.
        momentum: share of the earlier differences; negative: what they agreed on counts less.
        original: 1: start from the prediction with the prompt, as the paper does; 0: from that
            without it, as diffusers does.
    """

    name: ClassVar[str] = "apg"
    eta: float = 0.0
    norm: float = 15.0
    momentum: float = -0.5
    original: int = 0

    def combine(self, uncond: Array, cond: Array, scale: float, memory: Memory) -> Array:
        """See ``Guider.combine``; the scale keeps its meaning."""
        difference = cond - uncond
        if memory.average is not None and self.momentum:
            difference = difference + self.momentum * memory.average
        memory.average = difference if self.momentum else None
        if self.norm > 0.0:
            size = _sum(difference * difference) ** 0.5
            difference = difference * _at_most_one(self.norm / (size + _TINY))
        parallel = _sum(difference * cond) / (_sum(cond * cond) + _TINY) * cond
        update = difference - parallel + self.eta * parallel
        return cond + (scale - 1.0) * update if self.original else uncond + scale * update


@dataclass(frozen=True, kw_only=True)
class ZeroStar(Guider):
    """Scale the prediction without the prompt so that it fits the one with it best.

    Attributes:
        zero_steps: the output of the first evaluations is zero. The paper's 1 is for flow models.
    """

    name: ClassVar[str] = "cfg-zero"
    zero_steps: int = 0

    def combine(self, uncond: Array, cond: Array, scale: float, memory: Memory) -> Array:
        """See ``Guider.combine``."""
        if memory.index < self.zero_steps:
            return 0.0 * cond
        fitted = uncond * (_sum(cond * uncond) / (_sum(uncond * uncond) + 1e-8))
        return fitted + scale * (cond - fitted)


@dataclass(frozen=True, kw_only=True)
class Mimic(Guider):
    """Guide at the full scale, and bring each channel's range back to that of a lower scale.

    Attributes:
        scale: the lower scale.
        percentile: share of the values, by size, that the range must hold; the others are clipped.
    """

    name: ClassVar[str] = "mimic"
    scale: float = 7.0
    percentile: float = 1.0

    def combine(self, uncond: Array, cond: Array, scale: float, memory: Memory) -> Array:
        """See ``Guider.combine``."""
        full = uncond + scale * (cond - uncond)
        mimicked = uncond + self.scale * (cond - uncond)
        mean = full.mean(axis=(1, 2), keepdims=True)
        centred = full - mean
        low = _largest(mimicked - mimicked.mean(axis=(1, 2), keepdims=True), 1.0)
        high = _larger(low, _largest(centred, self.percentile))
        return _clipped(centred, high) / (high + _TINY) * low + mean


@dataclass(frozen=True, kw_only=True)
class Weakened(Guider):
    """Step away from the prediction of a weakened network.

    Attributes:
        scale: how far.
        layers: the transformer blocks that are weakened: names, or their beginnings, joined by
            `+`: mid, down.2, up.1.attentions.0.
        start, end: the shares of the run between which it acts.
    """

    scale: float = 3.0
    layers: str = "mid"
    start: float = 0.0
    end: float = 1.0

    def acts(self, index: int, total: int) -> bool:
        """Return True if it acts in an evaluation of a run."""
        return int(self.start * total) <= index < int(self.end * total)


@dataclass(frozen=True, kw_only=True)
class PerturbedAttention(Weakened):
    """Weaken by self-attention that looks at nothing but the pixel itself."""

    name: ClassVar[str] = "pag"
    weakens: ClassVar[str | None] = "identity"


@dataclass(frozen=True, kw_only=True)
class SmoothedEnergy(Weakened):
    """Weaken by blurred queries of self-attention.

    Attributes:
        blur: standard deviation of the blur, in pixels of the layer; inf: one query for all.
    """

    name: ClassVar[str] = "seg"
    weakens: ClassVar[str | None] = "blur"
    blur: float = math.inf


@dataclass(frozen=True, kw_only=True)
class SkippedLayers(Weakened):
    """Weaken by leaving the blocks out."""

    name: ClassVar[str] = "slg"
    weakens: ClassVar[str | None] = "skip"
    scale: float = 2.8
    start: float = 0.01
    end: float = 0.2


CFG = Guider()
GUIDERS: dict[str, type[Guider]] = {
    kind.name: kind
    for kind in (
        AdaptiveProjected,
        ZeroStar,
        Mimic,
        PerturbedAttention,
        SmoothedEnergy,
        SkippedLayers,
    )
}
"""Name -> guider."""


def parse(text: str) -> Guider:
    """Return the guider that a word describes: NAME, or NAME:KEY=VALUE,...

    Raises: UsageError for an unknown name or key, or a value that is none.
    """
    name, _, rest = text.partition(":")
    if name not in GUIDERS:
        raise UsageError(f"unknown guider {name!r}; there are {', '.join(GUIDERS)}")
    fields = {field.name: field for field in dataclasses.fields(GUIDERS[name])}
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, sign, word = part.partition("=")
        if not sign or key not in fields:
            raise UsageError(f"guider {name}: {part!r} is none of {'=, '.join(fields)}=")
        values[key] = _value(name, key, word, fields[key].default)
    return GUIDERS[name](**values)


def _value(name: str, key: str, word: str, default: Any) -> Any:
    if isinstance(default, str):
        return word
    try:
        value = type(default)(word)
    except ValueError:
        value = math.nan
    low, high = (0.0, 1.0) if key in ("start", "end", "percentile") else (-1e6, math.inf)
    if not low <= value <= high or (key != "blur" and not math.isfinite(value)):
        raise UsageError(f"guider {name}: {key} is {word!r}; expected a number")
    if key in ("norm", "blur", "zero_steps") and value < 0:
        raise UsageError(f"guider {name}: {key} is {word!r}; expected at least 0")
    if key == "original" and value not in (0, 1):
        raise UsageError(f"guider {name}: {key} is {word!r}; expected 0 or 1")
    return value


def _sum(x: Array) -> Array:
    return x.sum(axis=_ALL, keepdims=True)


def _at_most_one(x: Array) -> Array:
    return _smaller(x, 0.0 * x + 1.0)


def _smaller(x: Array, y: Array) -> Array:
    # Arrays of both backends have operators, and no common function for it.
    return (x <= y) * x + (x > y) * y


def _larger(x: Array, y: Array) -> Array:
    return (x >= y) * x + (x < y) * y


def _clipped(x: Array, bound: Array) -> Array:
    return _larger(_smaller(x, bound), -bound)


def _largest(x: Array, percentile: float) -> Array:
    """Return the quantile of |x| in each channel: (1, 1, 1, C)."""
    if percentile >= 1.0:
        return _larger(x.max(axis=(1, 2), keepdims=True), -x.min(axis=(1, 2), keepdims=True))
    # NumPy does it: quantiles have no operator.
    values = np.abs(np.asarray(x))
    found = np.quantile(values, percentile, axis=(1, 2), keepdims=True).astype(np.float32)
    return found if isinstance(x, np.ndarray) else type(x)(found)
