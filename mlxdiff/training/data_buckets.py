"""Aspect-ratio buckets: training pictures of about the same area, cut as little as possible.

All pictures of a batch have one size. Each picture goes to the bucket whose aspect ratio is nearest
to its own; it is scaled to cover the bucket, and what stands over is cut off.
Source: "Aspect Ratio Bucketing" (NovelAI 2022); kohya's sd-scripts do the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import resize

CROPS = ("center", "random")
"""Which part of a picture is kept: the middle, or one of PLACES by the seed, anew in each epoch."""

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where a random crop begins, as shares of what stands over. So few that latents can be kept."""

_MOST_ASPECT = 4.0  # of a bucket: 4:1


@dataclass(frozen=True)
class Bucket:
    """A size of training pictures, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Cut:
    """How a picture becomes a training picture.

    Attributes:
        scaled: (width, height) that it is scaled to.
        left, top: where the crop begins, in scaled pixels.
        bucket: size of the crop.
        flip: mirror it, left to right, after the crop.
    """

    scaled: tuple[int, int]
    left: int
    top: int
    bucket: Bucket
    flip: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Cut uint8 (H, W, 3) to (bucket height, bucket width, 3)."""
        scaled = resize(pixels, *self.scaled)
        rows = slice(self.top, self.top + self.bucket.height)
        columns = slice(self.left, self.left + self.bucket.width)
        cut = scaled[rows, columns]
        return np.ascontiguousarray(cut[:, ::-1] if self.flip else cut)


def make_buckets(width: int, height: int, multiple: int, *, one_size: bool = False) -> list[Bucket]:
    """List the buckets for a training size.

    Args:
        width, height: the size, in pixels. No bucket has a larger area.
        multiple: sides are multiples of this: 8 times the VAE's factor, as all public tools have
            it (64 for Stable Diffusion), or a number that divides both sides.
        one_size: the size itself and nothing else.
    Returns: buckets from narrow to wide; the size itself is one of them.
    Raises: UsageError if the size is no multiple.
    """
    for name, side in (("width", width), ("height", height)):
        if side < multiple or side % multiple:
            low = max(multiple, side // multiple * multiple)
            raise UsageError(
                f"a training {name} of {side} is no multiple of {multiple}; give {low} or "
                f"{low + multiple}"
            )
    found = {(width, height)}
    if not one_size:
        area = width * height
        longest = int(math.sqrt(area * _MOST_ASPECT))
        for side in range(multiple, longest + 1, multiple):
            other = area // side // multiple * multiple
            if other and max(side, other) / min(side, other) <= _MOST_ASPECT:
                found |= {(side, other), (other, side)}
    ordered = sorted(found, key=lambda size: (size[0] / size[1], size[0]))
    return [Bucket(*size) for size in ordered]


def choose(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket whose aspect ratio is nearest to a picture's; of two, the larger."""
    aspect = math.log(width / height)
    return min(
        buckets,
        key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.width * b.height),
    )


def cut(
    width: int,
    height: int,
    bucket: Bucket,
    *,
    place: float = 0.5,
    flip: bool = False,
) -> Cut:
    """Scale a picture to cover a bucket, and place the crop.

    Args:
        width, height: of the picture.
        place: where the crop begins, as a share of what stands over: 0 at the left or top, 0.5 in
            the middle.
    """
    scale = max(bucket.width / width, bucket.height / height)
    scaled = (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale)))
    left = round((scaled[0] - bucket.width) * place)
    top = round((scaled[1] - bucket.height) * place)
    return Cut(scaled, left, top, bucket, flip)
