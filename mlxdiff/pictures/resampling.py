"""Resize arrays of floats as torch's ``interpolate`` does.

Pillow's filters, which the rest of the package resizes pictures with, round to 8 bits, have another
cubic curve, and always widen the filter where a picture becomes smaller. The pipelines that resize
tensors do neither.

Source: torch, aten/src/ATen/native/UpSample.h and UpSampleKernel.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Curve = Literal["bilinear", "bicubic"]


def resample(
    x: np.ndarray,
    height: int,
    width: int,
    curve: Curve = "bilinear",
    *,
    antialias: bool = False,
    align_corners: bool = False,
) -> np.ndarray:
    """Resize floats.

    Args:
        x: (H, W, C).
        height, width: of the result.
        curve: of the filter.
        antialias: widen the filter by the factor by which a side becomes smaller.
        align_corners: the centres of the corner values keep their places (not with antialias).
    Returns: (height, width, C) float32.
    """
    x = np.asarray(x, np.float32)
    for axis, size in enumerate((height, width)):
        x = _along(x, axis, *_taps(x.shape[axis], size, curve, antialias, align_corners))
    return x


def blurred(x: np.ndarray, sigmas: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    """Smooth floats by a Gaussian; beyond its edges the picture is reflected.

    Args:
        x: (H, W, C).
        sigmas: standard deviation along the rows' and the columns' axis, in pixels.
        sizes: values of each kernel, an odd number.
    """
    x = np.asarray(x, np.float32)
    for axis, (sigma, size) in enumerate(zip(sigmas, sizes, strict=True)):
        reach = size // 2
        kernel = np.exp(-((np.arange(size) - reach) ** 2) / np.float32(2 * sigma * sigma))
        places = np.arange(x.shape[axis])[:, None] + np.arange(-reach, reach + 1)
        last = max(x.shape[axis] - 1, 1)
        places = np.abs(places) % (2 * last)  # reflected at both edges
        places = np.minimum(places, 2 * last - places) % x.shape[axis]
        weights = np.broadcast_to((kernel / kernel.sum()).astype(np.float32), places.shape)
        x = _along(x, axis, places, weights)
    return x


def _along(x: np.ndarray, axis: int, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum values along an axis: (size, taps) places and weights."""
    shape = [1] * x.ndim
    shape[axis] = len(places)
    total: np.ndarray | None = None
    for place, weight in zip(places.T, weights.T, strict=True):
        part = np.take(x, place, axis)
        part *= weight.reshape(shape)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None, "a filter has taps"
    return total


def _taps(
    before: int, after: int, curve: Curve, antialias: bool, align_corners: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The places that each new value is a sum of, and their weights: (after, taps) each."""
    at = np.arange(after, dtype=np.float64)
    reach = 1 if curve == "bilinear" else 2
    if antialias:
        scale = before / after
        wide = max(scale, 1.0)
        centre = scale * (at + 0.5)
        first = np.maximum((centre - reach * wide + 0.5).astype(int), 0)
        end = np.minimum((centre + reach * wide + 0.5).astype(int), before)
        places = first[:, None] + np.arange((end - first).max())
        weights = _curve((places - centre[:, None] + 0.5) / wide, curve, -0.5)
        weights[places >= end[:, None]] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
    else:
        if align_corners:
            centre = at * ((before - 1) / (after - 1) if after > 1 else 0.0)
        else:
            centre = (at + 0.5) * (before / after) - 0.5
        if curve == "bilinear":
            centre = np.maximum(centre, 0.0)
        first = np.floor(centre).astype(int) - (reach - 1)
        places = first[:, None] + np.arange(2 * reach)
        weights = _curve(places - centre[:, None], curve, -0.75)
    return np.clip(places, 0, before - 1), weights.astype(np.float32)


def _curve(distance: np.ndarray, curve: Curve, a: float) -> np.ndarray:
    """The filter's curve at a distance; ``a`` is the slope of the cubic one at 1."""
    d = np.abs(distance)
    if curve == "bilinear":
        return np.maximum(1.0 - d, 0.0)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))
