"""Pictures made of pictures, for ControlNets to follow: edges, large areas, grey.

All take and give uint8 (H, W, 3). What needs a network of its own (depth, poses, line art) is not
here: such a picture is given ready.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode "L"
TILE = 8  # pixels along a side that "tile" makes into one


def edges(
    image: np.ndarray, low: float = 100.0, high: float = 200.0, sigma: float = 1.0
) -> np.ndarray:
    """White edges, one pixel wide, on black (Canny 1986).

    Args:
        image: uint8 (H, W, 3).
        low, high: of the gradient, the sum of both Sobel responses on 0..255: an edge begins where
            it is above ``high`` and goes on while it is above ``low``.
        sigma: of the Gaussian that smooths the picture first, in pixels; 0: none.
    """
    channels = np.moveaxis(image.astype(np.float32), 2, 0)
    if sigma > 0:
        channels = _gaussian(channels, sigma)
    gx = _correlate(_correlate(channels, (-1, 0, 1), 2), (1, 2, 1), 1)
    gy = _correlate(_correlate(channels, (-1, 0, 1), 1), (1, 2, 1), 2)
    # Of the three channels, at each place the one that changes most.
    most = np.abs(gx) + np.abs(gy)
    channel = most.argmax(axis=0)[None]
    gx, gy, strength = (np.take_along_axis(a, channel, 0)[0] for a in (gx, gy, most))
    thin = _local_maxima(strength, gx, gy)
    found = _connected(thin & (strength > high), thin & (strength > low))
    return np.repeat(np.where(found, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def grey(image: np.ndarray) -> np.ndarray:
    """Brightness alone."""
    level = np.clip(image.astype(np.float32) @ _LUMA + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.repeat(level[..., None], 3, axis=2)


def tile(image: np.ndarray) -> np.ndarray:
    """Without detail: the means of 8x8 pixels, enlarged again (Pillow's box and bicubic filters).

    What is left is colours and layout, as a tile ControlNet takes them to draw the detail anew.
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


def _gaussian(channels: np.ndarray, sigma: float) -> np.ndarray:
    radius = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = tuple(float(w) for w in kernel / kernel.sum())
    return _correlate(_correlate(channels, weights, 1), weights, 2)


def _correlate(x: np.ndarray, weights: tuple[float, ...], axis: int) -> np.ndarray:
    """Along one axis, the border repeated."""
    radius, size = len(weights) // 2, x.shape[axis]
    padding = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
    padded = np.pad(x, padding, mode="edge")
    out = np.zeros_like(x)
    for i, weight in enumerate(weights):
        if weight:
            out += np.float32(weight) * np.take(padded, range(i, i + size), axis)
    return out


def _local_maxima(strength: np.ndarray, gx: np.ndarray, gy: np.ndarray) -> np.ndarray:
    """Where nothing stronger stands on either side, along the gradient, in one of 4 directions."""
    angle = np.degrees(np.arctan2(gy, gx)) % 180
    direction = ((angle + 22.5) // 45).astype(int) % 4
    padded = np.pad(strength, 1)
    height, width = strength.shape

    def shifted(dy: int, dx: int) -> np.ndarray:
        return padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    keep = np.zeros(strength.shape, bool)
    for number, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        # Of two equal neighbours one is kept.
        above, below = shifted(dy, dx), shifted(-dy, -dx)
        keep |= (direction == number) & (strength > above) & (strength >= below)
    return keep


def _connected(strong: np.ndarray, weak: np.ndarray) -> np.ndarray:
    """The weak pixels that hang together with a strong one, corners included."""
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
