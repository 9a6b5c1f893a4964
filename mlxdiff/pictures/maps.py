"""Maps of pictures: depth and surface normals, as Marigold models predict them.

A map is float32 (H, W, C): depth has one channel, 0 to 1, normals have three, unit vectors whose
axes point right, up and to the viewer.

Source: Ke et al. 2024 (arXiv 2312.02145); diffusers pipelines/marigold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlxdiff.pictures.image import to_model
from mlxdiff.pictures.resampling import resample

if TYPE_CHECKING:
    from PIL import Image

DEPTH_FORMS = ("grey", "near", "colors")
"""Forms of a depth picture: 16 bits of grey as predicted, the same with near bright, colours."""

_SPECTRAL = "9e0142 d53e4f f46d43 fdae61 fee08b ffffbf e6f598 abdda4 66c2a5 3288bd 5e4fa2"
"""Brewer's diverging colours from red to violet, of which each depth is a mixture of two."""

_ROUNDS = 20
"""Of the alignment of depth maps: each fits all maps to their mean."""


def processed_size(rows: int, columns: int, resolution: int) -> tuple[int, int]:
    """Return the size in which a picture is looked at: its longer side is ``resolution``.

    Args:
        rows, columns: of the picture.
        resolution: in pixels; 0: the picture's own.
    """
    if resolution == 0:
        return rows, columns
    longer = max(rows, columns)
    return rows * resolution // longer, columns * resolution // longer


def padded_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """Return a size, enlarged to multiples of a factor."""
    return height + -height % factor, width + -width % factor


def prepare(image: np.ndarray, resolution: int, factor: int) -> np.ndarray:
    """Prepare a picture for a model that makes maps: resized, its lower and right edge repeated.

    Args:
        image: uint8 (H, W, 3).
        resolution: see ``processed_size``.
        factor: of the model's VAE.
    Returns: (1, H', W', 3) float32 in [-1, 1], the sides multiples of the factor.
    """
    pixels = to_model(image)[0]
    if resolution:
        size = processed_size(image.shape[0], image.shape[1], resolution)
        pixels = resample(pixels, *size, "bilinear", antialias=True)
    rows, columns = pixels.shape[:2]
    height, width = padded_size(rows, columns, factor)
    return np.pad(pixels, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")[None]


def depth_of(pixels: np.ndarray) -> np.ndarray:
    """Return the depth (H, W, 1) of decoded pixels (H, W, 3)."""
    grey = pixels.astype(np.float32).mean(axis=-1, keepdims=True)
    return (np.clip(grey, -1.0, 1.0) + np.float32(1)) / np.float32(2)


def normals_of(pixels: np.ndarray, full_z_range: bool) -> np.ndarray:
    """Return the normals (H, W, 3) of decoded pixels (H, W, 3).

    Args:
        full_z_range: False: the third values stand for 0 to 1.
    """
    normals = np.clip(pixels.astype(np.float32), -1.0, 1.0)
    if not full_z_range:
        normals[..., 2] = normals[..., 2] * np.float32(0.5) + np.float32(0.5)
    return unit(normals)


def unit(normals: np.ndarray) -> np.ndarray:
    """Return vectors (..., 3) of length 1."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True).astype(np.float32)
    return normals / np.maximum(length, np.float32(1e-6))


def resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a map; normals keep their length."""
    values = resample(values, height, width, "bilinear")
    return unit(values) if values.shape[-1] == 3 else values


def join_depths(maps: Sequence[np.ndarray], scale: bool, shift: bool) -> np.ndarray:
    """Return the median of depth maps of one picture, after they are aligned, in [0, 1].

    Each map is scaled and shifted so that it comes closest to the mean of all, by least squares,
    again and again. diffusers aligns by a search with finite differences, whose steps are below
    the resolution of its float32 sums; the results agree closely, not to the bit.

    Args:
        maps: (H, W, 1) each.
        scale, shift: what the model leaves open; both: depth up to scale and shift.
    """
    values = np.stack(maps).astype(np.float64).reshape(len(maps), -1)
    low = values.min(axis=1, keepdims=True) if shift else np.zeros((len(maps), 1))
    aligned = values
    if scale:
        aligned = (values - low) / np.maximum(values.max(axis=1, keepdims=True) - low, 1e-6)
        for _ in range(_ROUNDS):
            mean = aligned.mean(axis=0)
            aligned = np.stack([_fitted(one, mean, shift) for one in aligned])
    joined = np.median(aligned, axis=0)
    if scale:
        least = joined.min() if shift else 0.0
        joined = (joined - least) / max(joined.max() - least, 1e-6)
    return joined.reshape(maps[0].shape).astype(np.float32)


def _fitted(values: np.ndarray, mean: np.ndarray, shift: bool) -> np.ndarray:
    """Scale, and shift, values so that they come closest to the mean; flat ones stay."""
    centre, goal = (values.mean(), mean.mean()) if shift else (0.0, 0.0)
    around = values - centre
    spread = float(around @ around)
    if spread == 0.0:
        return values
    return np.asarray(around * (float(around @ (mean - goal)) / spread) + goal)


def join_normals(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Return, at each pixel, the normal of those of all maps that is closest to their mean."""
    normals = np.stack(maps)
    mean = unit(normals.mean(axis=0, dtype=np.float32))
    closest = np.clip((mean * normals).sum(axis=-1), -1, 1).argmax(axis=0)
    return np.take_along_axis(normals, closest[None, ..., None], axis=0)[0]


def grey_levels(depth: np.ndarray) -> np.ndarray:
    """Return depth (H, W, 1) as uint16 (H, W)."""
    return (depth[..., 0] * np.float32(2**16 - 1)).astype(np.uint16)


def colors_of_depth(depth: np.ndarray) -> np.ndarray:
    """Paint depth (H, W, 1): uint8 (H, W, 3), from red (0) over yellow to violet (1)."""
    table = np.array([[*bytes.fromhex(one)] for one in _SPECTRAL.split()], np.float32) / 255
    place = np.clip(depth[..., 0], 0, 1) * np.float32(len(table) - 1)
    left = place.astype(int)
    right = np.minimum(left + 1, len(table) - 1)
    part = (place - left)[..., None].astype(np.float32)
    return (((1 - part) * table[left] + part * table[right]) * 255).astype(np.uint8)


def colors_of_normals(normals: np.ndarray) -> np.ndarray:
    """Paint normals (H, W, 3): uint8 (H, W, 3), -1 to 1 as 0 to 255."""
    return ((normals + np.float32(1)) * np.float32(0.5) * 255).astype(np.uint8)


def control_picture(values: np.ndarray, near_is_large: bool) -> np.ndarray:
    """Return a map as the ControlNets for it take it: uint8 (H, W, 3).

    Args:
        values: depth, of which near becomes white, or normals.
        near_is_large: of depth.
    """
    if values.shape[-1] == 3:
        return colors_of_normals(values)
    near = values if near_is_large else 1 - values
    return np.repeat((near * 255).astype(np.uint8), 3, axis=-1)


def paint(values: np.ndarray, form: str | None, near_is_large: bool) -> Image.Image:
    """Make the picture of a map.

    Args:
        values: depth or normals.
        form: of depth, one of DEPTH_FORMS.
        near_is_large: of depth.
    Returns: a picture of 16 bits of grey, or of colours.
    """
    from PIL import Image

    if values.shape[-1] == 3:
        return Image.fromarray(colors_of_normals(values))
    if form == "colors":
        return Image.fromarray(colors_of_depth(values))
    turned = form == "near" and not near_is_large
    return Image.fromarray(grey_levels(1 - values if turned else values))
