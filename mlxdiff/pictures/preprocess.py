"""Make control images for ControlNets from pictures: edges, grey, tile.

All functions take and return uint8 (H, W, 3). Depth and normals are made by a model that is given
for it (``MAPS``). Other maps that need a network (poses, line art) users give ready.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode "L"
TILE = 8  # side of the block, in pixels, that "tile" averages


def edges(
    image: np.ndarray, low: float = 100.0, high: float = 200.0, sigma: float = 1.0
) -> np.ndarray:
    """Detect edges (Canny 1986); draw them white on black, one pixel wide.

    Args:
        image: uint8 (H, W, 3).
        low, high: thresholds for the gradient, the sum of both absolute Sobel responses to 0..255:
            an edge starts above ``high`` and continues while it stays above ``low``.
        sigma: standard deviation, in pixels, of the Gaussian that first smooths the picture; 0
            does not smooth.
    Returns: uint8 (H, W, 3), 0 or 255.
    """
    channels = np.moveaxis(image.astype(np.float32), 2, 0)
    if sigma > 0:
        channels = _gaussian(channels, sigma)
    gx = _correlate(_correlate(channels, (-1, 0, 1), 2), (1, 2, 1), 1)
    gy = _correlate(_correlate(channels, (-1, 0, 1), 1), (1, 2, 1), 2)
    # At each pixel, use the channel with the largest gradient.
    most = np.abs(gx) + np.abs(gy)
    channel = most.argmax(axis=0)[None]
    gx, gy, strength = (np.take_along_axis(a, channel, 0)[0] for a in (gx, gy, most))
    thin = _local_maxima(strength, gx, gy)
    found = _connected(thin & (strength > high), thin & (strength > low))
    return np.repeat(np.where(found, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def grey(image: np.ndarray) -> np.ndarray:
    """Convert a picture to grey."""
    level = np.clip(image.astype(np.float32) @ _LUMA + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.repeat(level[..., None], 3, axis=2)


def tile(image: np.ndarray) -> np.ndarray:
    """Remove detail: average 8x8 pixels, then enlarge (Pillow's box and bicubic filters).

    Colours and layout remain; a tile ControlNet draws new detail from them.
    """
    from PIL import Image

    height, width = image.shape[:2]
    small = max(1, width // TILE), max(1, height // TILE)
    picture = Image.fromarray(image).resize(small, Image.Resampling.BOX)
    return np.array(picture.resize((width, height), Image.Resampling.BICUBIC))


def _as_it_is(image: np.ndarray) -> np.ndarray:
    return image


PREPROCESSORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": _as_it_is,
    "edges": edges,
    "grey": grey,
    "tile": tile,
}

MAPS = {"depth": "depth", "normal": "normals"}
"""What a model that makes maps makes of a picture (``run.additions.map_maker``): its name here ->
the kind of map."""


def _gaussian(channels: np.ndarray, sigma: float) -> np.ndarray:
    radius = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = tuple(float(w) for w in kernel / kernel.sum())
    return _correlate(_correlate(channels, weights, 1), weights, 2)


def _correlate(x: np.ndarray, weights: tuple[float, ...], axis: int) -> np.ndarray:
    """Correlate along one axis; repeat the border."""
    radius, size = len(weights) // 2, x.shape[axis]
    padding = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
    padded = np.pad(x, padding, mode="edge")
    out = np.zeros_like(x)
    for i, weight in enumerate(weights):
        if weight:
            out += np.float32(weight) * np.take(padded, range(i, i + size), axis)
    return out


def _local_maxima(strength: np.ndarray, gx: np.ndarray, gy: np.ndarray) -> np.ndarray:
    """Find local maxima along the gradient, rounded to one of 4 directions."""
    angle = np.degrees(np.arctan2(gy, gx)) % 180
    direction = ((angle + 22.5) // 45).astype(int) % 4
    padded = np.pad(strength, 1)
    height, width = strength.shape

    def shifted(dy: int, dx: int) -> np.ndarray:
        return padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    keep = np.zeros(strength.shape, bool)
    for number, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        # Of two equal neighbours, keep one.
        above, below = shifted(dy, dx), shifted(-dy, -dx)
        keep |= (direction == number) & (strength > above) & (strength >= below)
    return keep


def _connected(strong: np.ndarray, weak: np.ndarray) -> np.ndarray:
    """Select the weak pixels that are connected to a strong one, diagonals included."""
    height, width = strong.shape
    found = np.pad(strong, 1)
    allowed = np.pad(weak, 1)
    front = np.argwhere(found)
    steps = np.array([(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx])
    while len(front):
        near = (front[:, None] + steps).reshape(-1, 2)
        near = near[allowed[near[:, 0], near[:, 1]] & ~found[near[:, 0], near[:, 1]]]
        front = np.unique(near, axis=0)
        found[front[:, 0], front[:, 1]] = True
    return found[1 : height + 1, 1 : width + 1]
