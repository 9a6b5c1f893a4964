"""Several prompts in one picture: each in a region of its own, or all everywhere (A1111's AND).

Every prompt has a prediction of its own in each evaluation. Regions share the picture out: with
m_i a region's mask and w_i its weight, and m_0 what no mask covers,

    prompt's prediction = (m_0 cond_0 + sum of w_i m_i cond_i) / (m_0 + sum of w_i m_i)

AND adds up what the prompts change: uncond + sum of w_i (cond_i - uncond), as in Liu et al. 2022,
"Compositional Visual Generation with Composable Diffusion Models" (arXiv 2206.01714), equation 11.
Guidance then takes the result for the prediction with the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.pictures.canvas import load_mask
from mlxdiff.pictures.image import resize


@dataclass(frozen=True)
class Region:
    """A part of the picture with a prompt of its own.

    Attributes:
        area: left, top, right and bottom edge, as shares of the picture; or the path of a mask,
            which is white where the region is.
        prompt: what to draw there.
        weight: how much it counts where regions overlap.
    """

    area: tuple[float, float, float, float] | str
    prompt: str
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The region as `parse` reads it."""
        area = self.area if isinstance(self.area, str) else ",".join(f"{v:g}" for v in self.area)
        weight = "" if self.weight == 1.0 else f"*{self.weight:g}"
        return f"{area}{weight}:{self.prompt}"

    @property
    def named(self) -> Region:
        """The region with the name of its mask alone, for metadata."""
        area = Path(self.area).name if isinstance(self.area, str) else self.area
        return Region(area, self.prompt, self.weight)

    def mask(self, height: int, width: int) -> np.ndarray:
        """Return the share of each latent that it covers: (1, height, width, 1) float32."""
        if isinstance(self.area, str):
            grey = load_mask(self.area)
            picture = np.repeat(grey[..., None], 3, -1) if grey.ndim == 2 else grey
            found = resize(picture, width, height)[..., :1].astype(np.float32) / 255
            return found[None]
        left, top, right, bottom = self.area
        rows, columns = _covered(top, bottom, height), _covered(left, right, width)
        return (rows[:, None] * columns[None])[None, ..., None].astype(np.float32)


def _covered(start: float, end: float, count: int) -> np.ndarray:
    """Return the share of each of `count` equal parts of 0 to 1 that lies between two shares."""
    edges = np.arange(count + 1) / count
    inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return np.clip(inside * count, 0.0, 1.0)


def parse(text: str) -> Region:
    """Return the region that AREA[*WEIGHT]:PROMPT describes.

    Args:
        text: AREA is LEFT,TOP,RIGHT,BOTTOM, each 0 to 1, or the path of a mask.
    Raises: UsageError.
    """
    head, sign, prompt = text.partition(":")
    area, _, word = head.partition("*")
    try:
        weight = float(word) if word else 1.0
    except ValueError:
        weight = math.nan
    if not sign or not area or not 0.0 < weight < math.inf:
        raise UsageError(
            f"region {text!r}: expected LEFT,TOP,RIGHT,BOTTOM:PROMPT with shares of the picture, "
            "such as 0,0,0.5,1:a red house, or MASK.png:PROMPT"
        )
    parts = area.split(",")
    try:
        box = tuple(float(part) for part in parts)
    except ValueError:
        return Region(area, prompt, weight)
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise UsageError(
            f"region {text!r}: its edges must be LEFT,TOP,RIGHT,BOTTOM, each from 0 to 1"
        )
    left, top, right, bottom = box
    return Region((left, top, right, bottom), prompt, weight)


Merge = Callable[[Any, Any, Sequence[Any]], Any]
"""(prediction without the prompt or None, with the first prompt, with the others) -> all in one."""


def by_regions(regions: Sequence[Region], height: int, width: int, backend: Any) -> Merge:
    """Return what joins the predictions of regions.

    Args:
        height, width: of the latents.
    """
    masks = [region.weight * region.mask(height, width) for region in regions]
    covered = np.minimum(sum(mask / r.weight for mask, r in zip(masks, regions, strict=True)), 1.0)
    rest = 1.0 - covered
    total = np.maximum(rest + sum(masks), 1e-6)
    shares = [backend.asarray((part / total).astype(np.float32)) for part in (rest, *masks)]

    def merge(uncond: Any, cond: Any, others: Sequence[Any]) -> Any:
        found = shares[0] * cond
        for share, other in zip(shares[1:], others, strict=True):
            found = found + share * other
        return found

    return merge


def by_weights(weights: Sequence[float]) -> Merge:
    """Return what adds up predictions with these weights, the first prompt's first."""

    def merge(uncond: Any, cond: Any, others: Sequence[Any]) -> Any:
        if uncond is None:  # without guidance there is nothing to differ from: their mean
            parts = [weight * one for weight, one in zip(weights, (cond, *others), strict=True)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total * (1.0 / sum(weights))
        found = uncond
        for weight, one in zip(weights, (cond, *others), strict=True):
            found = found + weight * (one - uncond)
        return found

    return merge
