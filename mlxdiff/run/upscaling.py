"""Enlarge pictures by a network (ESRGAN and its kin), whole or in tiles.

A tile is enlarged with a border of its neighbours, and the border is cut off. Nothing is blended.
Where the border is as wide as what a pixel depends on (``config.reach``), tiles equal the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.convert import Component
from mlxdiff.errors import MlxdiffError, UsageError, argument
from mlxdiff.networks.config import UpscalerConfig
from mlxdiff.pictures.image import ImageLike, is_grey, load_alpha, load_image
from mlxdiff.run.memory import Device, network_bytes

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("mlxdiff")

EXACT = 64
"""Up to this reach, in pixels, tiles overlap by all of it."""
OVERLAP = 32
"""Overlap for networks that reach further."""
WORK, LOW_WORK = 1 << 30, 1 << 28
"""Bytes that the network may hold while it works; the second where memory is to be saved."""
LARGEST = 200_000_000
"""Pixels of the largest result."""
_SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 32)


@dataclass(frozen=True)
class Tiles:
    """How a picture is divided.

    Attributes:
        side: of a tile, in pixels of the small picture; None: it is not divided.
        overlap: width of the border around a tile, in the same pixels.
    """

    side: int | None
    overlap: int


def choose_tiles(
    config: UpscalerConfig,
    device: Device,
    height: int,
    width: int,
    *,
    low_memory: bool = False,
    side: int | None = None,
    overlap: int | None = None,
) -> Tiles:
    """Choose tiles that keep the memory of the network within bounds.

    Args:
        config: of the network.
        device: what computes.
        height, width: of the small picture.
        low_memory: save memory rather than time.
        side: side of a tile; 0: the whole picture; None: as large as memory allows.
        overlap: None: all that a pixel depends on, up to EXACT, else OVERLAP.
    """
    if overlap is None:
        overlap = config.reach if config.reach <= EXACT else OVERLAP
    most = LOW_WORK if low_memory else WORK

    def fits(rows: int, columns: int) -> bool:
        return network_bytes(config, device, rows, columns) <= most

    if side is None and not fits(height, width):
        with_border = (one + 2 * overlap for one in _SIDES)
        side = next((s for s, n in zip(_SIDES, with_border, strict=True) if fits(n, n)), _SIDES[-1])
    if not side or (side >= height and side >= width):
        return Tiles(None, overlap)
    return Tiles(side, overlap)


def enlarge(
    network: Any,
    backend: Any,
    pixels: np.ndarray,
    side: int | None = None,
    overlap: int = 0,
    on_tile: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """Enlarge a picture.

    Args:
        network: loaded on the backend.
        backend: what computes.
        pixels: (H, W, 3) float32 in [0, 1].
        side, overlap: as ``Tiles`` has them.
        on_tile: called with the number of finished tiles, and of all.
    Returns: (s * H, s * W, 3) float32, nominally in [0, 1], not clipped.
    """
    config = network.config
    scale, unit = config.scale, config.shuffle
    height, width = pixels.shape[:2]
    # As in the reference: what the network reads in squares is filled up by reflection.
    padded = np.pad(pixels, ((0, -height % unit), (0, -width % unit), (0, 0)), mode="reflect")
    rows, columns = padded.shape[:2]
    out = np.empty((scale * rows, scale * columns, 3), np.float32)
    side = max(rows, columns) if side is None else side + -side % unit
    overlap += -overlap % unit
    tiles = list(_tiles(rows, columns, side))
    for done, (top, left) in enumerate(tiles, 1):
        bottom, right = min(top + side, rows), min(left + side, columns)
        first, start = max(top - overlap, 0), max(left - overlap, 0)
        tile = padded[first : bottom + overlap, start : right + overlap]
        large = backend.to_numpy(network(backend.asarray(np.ascontiguousarray(tile[None]))))[0]
        down, across = scale * (top - first), scale * (left - start)
        out[scale * top : scale * bottom, scale * left : scale * right] = large[
            down : down + scale * (bottom - top), across : across + scale * (right - left)
        ]
        if on_tile is not None:
            on_tile(done, len(tiles))
    return out[: scale * height, : scale * width]


def _tiles(rows: int, columns: int, side: int) -> Iterator[tuple[int, int]]:
    """Upper left corners of all tiles."""
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            yield top, left


class NetworkUpscaler:
    """A network that enlarges pictures.

    Args:
        component: the network.
        backend: what computes.
        load: returns the loaded network; called for each picture.
        widen: compute in float32 from now on; returns False if it was so before.
        low_memory: save memory rather than time.
        side, overlap: of tiles, as ``choose_tiles`` takes them.
    """

    def __init__(
        self,
        component: Component,
        backend: Any,
        load: Callable[[], Any],
        widen: Callable[[], bool],
        *,
        low_memory: bool = False,
        side: int | None = None,
        overlap: int | None = None,
    ) -> None:
        self.config: UpscalerConfig = component.config
        self.backend, self._load, self._widen = backend, load, widen
        self.low_memory, self.side, self.overlap = low_memory, side, overlap

    @property
    def scale(self) -> int:
        """How many times larger the result is."""
        return self.config.scale

    def values(
        self, pixels: np.ndarray, on_tile: Callable[[int, int], object] | None = None
    ) -> np.ndarray:
        """Enlarge a picture without rounding.

        Args:
            pixels: (H, W, 3) float32 in [0, 1].
            on_tile: as for ``enlarge``.
        Returns: (s * H, s * W, 3) float32, clipped to [0, 1].
        Raises: UsageError if the result is too large; MlxdiffError if it is not finite.
        """
        height, width = pixels.shape[:2]
        if height * width * self.scale**2 > LARGEST:
            raise UsageError(
                f"{width}x{height} pixels, enlarged {self.scale} times, are more than "
                f"{LARGEST // 1_000_000} megapixels; make the picture smaller first"
            )
        backend = self.backend
        tiles = choose_tiles(
            self.config,
            Device(backend.name, backend.has_gpu(), backend.dtype),
            height,
            width,
            low_memory=self.low_memory,
            side=self.side,
            overlap=self.overlap,
        )
        if tiles.side is not None and tiles.overlap < self.config.reach:
            logger.warning(
                "the picture is enlarged in tiles that overlap by %d pixels; this network sees up "
                "to %d, so a result can differ a little from that of the whole picture (tile 0)",
                tiles.overlap,
                self.config.reach,
            )
        for _ in range(2):
            out = enlarge(self._load(), backend, pixels, tiles.side, tiles.overlap, on_tile)
            if np.isfinite(out).all():
                clipped: np.ndarray = np.clip(out, 0.0, 1.0)
                return clipped
            if not self._widen():
                break
        raise MlxdiffError(
            "the enlarged picture is not finite: the weights are damaged, or the computation "
            f"overflowed; verify the file, or use {argument('dtype', 'float32')}"
        )

    def picture(
        self,
        source: ImageLike,
        on_tile: Callable[[int, int], object] | None = None,
        scale: float | None = None,
    ) -> Image.Image:
        """Enlarge a picture; its transparency is enlarged by the same network, and grey stays grey.

        Args:
            source: path, Pillow image or array, as ``pictures.image.load_image`` takes it.
            on_tile: as for ``enlarge``.
            scale: size of the result, as times that of the picture: the network's result is
                resized with Pillow's Lanczos filter. None: the network's own.
        Raises: UsageError, MlxdiffError.
        """
        from PIL import Image

        alpha = load_alpha(source)
        large = Image.fromarray(_levels(self.values(_values(load_image(source)), on_tile)))
        if is_grey(source):
            large = large.convert("L")
        if alpha is not None:
            if alpha.min() == alpha.max():
                veil = np.full(large.size[::-1], alpha.flat[0], np.uint8)
            else:
                grey = np.repeat(alpha[..., None], 3, axis=2)
                veil = _levels(self.values(_values(grey), on_tile).mean(axis=2))
            large.putalpha(Image.fromarray(veil))
        if scale is None or scale == self.scale:
            return large
        width, height = (max(1, round(side * scale / self.scale)) for side in large.size)
        return large.resize((width, height), Image.Resampling.LANCZOS)


def _values(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


def _levels(values: np.ndarray) -> np.ndarray:
    levels: np.ndarray = (values * np.float32(255)).round().astype(np.uint8)
    return levels
