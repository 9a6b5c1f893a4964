"""What is repainted of a picture and what is kept: masks, wider canvases, the way back.

Mask and picture are prepared as diffusers' VaeImageProcessor does: resized by Pillow's Lanczos
filter, the mask made grey and cut at one half; white is repainted. A plain model repaints by
blending: after every step the kept part is put back as the forward process has it there (Lugmayr et
al. 2022, equation 8, without their resampling); an inpainting model sees mask and masked picture
beside the latents (Rombach et al. 2022, section 4.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import ImageLike, load_image, resize, to_model

if TYPE_CHECKING:
    from PIL import Image

Borders = tuple[int, int, int, int]
"""Pixels to the left, top, right and bottom."""
HALF = 128  # the lowest 8-bit grey that is not below one half


@dataclass(frozen=True)
class Canvas:
    """A picture and what of it is repainted, both at the size of the run.

    Attributes:
        image: uint8 (H, W, 3).
        mask: bool (H, W), true where it is repainted.
        cover: uint8 (H, W), 255 where the drawn picture is wanted and 0 where the given one is:
            the mask in greys.
    """

    image: np.ndarray
    mask: np.ndarray
    cover: np.ndarray

    @property
    def masked_image(self) -> np.ndarray:
        """float32 (1, H, W, 3) in [-1, 1]: mid-grey where it is repainted."""
        return to_model(self.image) * ~self.mask[None, ..., None]

    def latent_mask(self, factor: int) -> np.ndarray:
        """float32 (1, H/f, W/f, 1), 1 where it is repainted: of each latent its first pixel."""
        return self.mask[None, ::factor, ::factor, None].astype(np.float32)

    def paste_original(self, drawn: Image.Image) -> Image.Image:
        """The drawn picture with the kept part as it was, to the bit; greys blend.

        Source: diffusers' VaeImageProcessor.apply_overlay.
        """
        from PIL import Image, ImageOps

        kept = ImageOps.invert(Image.fromarray(self.cover))
        over = Image.new("RGBa", drawn.size)
        over.paste(Image.fromarray(self.image).convert("RGBA").convert("RGBa"), mask=kept)
        result = drawn.convert("RGBA")
        result.alpha_composite(over.convert("RGBA"))
        return result.convert("RGB")


def load_mask(source: ImageLike) -> np.ndarray:
    """A mask as uint8 (H, W, 3): read as pictures are; an array may also be of bools.

    Raises: UsageError as ``image.load_image`` does.
    """
    if getattr(source, "dtype", None) == np.bool_:
        source = np.asarray(source).astype(np.uint8) * 255
    try:
        return load_image(source)
    except UsageError as error:
        raise UsageError(f"the mask: {error}") from None


def check_borders(borders: Any) -> Borders:
    """The borders of ``outpaint``. Raises: UsageError."""
    try:
        left, top, right, bottom = borders
    except (TypeError, ValueError):
        raise UsageError(
            f"outpaint is {borders!r}; expected four numbers of pixels: left, top, right, bottom"
        ) from None
    for value in (left, top, right, bottom):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UsageError(f"outpaint is {borders!r}; expected whole numbers of at least 0")
    if not any((left, top, right, bottom)):
        raise UsageError("outpaint is 0 on all sides: it adds nothing to the picture")
    return left, top, right, bottom


def extend(image: np.ndarray, borders: Borders) -> np.ndarray:
    """uint8 (H, W, 3) on a canvas that is wider by the borders; its edge pixels fill these."""
    left, top, right, bottom = borders
    return np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge")


def make_canvas(
    image: np.ndarray,
    mask: np.ndarray | None,
    width: int,
    height: int,
    factor: int,
    borders: Borders | None = None,
) -> Canvas:
    """Picture and mask at the size of the run.

    Args:
        image: uint8 (H, W, 3).
        mask: uint8 (H', W', 3), as ``load_mask`` gives it; None: nothing but the borders.
        width, height: of the run, in pixels.
        factor: pixels to a latent.
        borders: what is added around image and mask. As latents are repainted whole, so is the edge
            of the picture up to the next latent (not in ``cover``).
    Raises: UsageError where nothing would be repainted.
    """
    from PIL import Image

    cover = np.zeros((height, width), np.uint8)
    if borders is None:
        assert mask is not None, "neither mask nor borders"
        cover = np.array(Image.fromarray(resize(mask, width, height)).convert("L"))
        if cover.max() < HALF:
            raise UsageError(
                "the mask is black: nothing would be repainted. White is repainted; transparency "
                "does not count"
            )
        repainted = cover >= HALF
    else:
        inner = _inner(image, borders, width, height)
        left, top, right, bottom = inner
        if mask is not None:
            mask = np.pad(
                resize(mask, image.shape[1], image.shape[0]),
                ((borders[1], borders[3]), (borders[0], borders[2]), (0, 0)),
            )
            cover = np.array(Image.fromarray(resize(mask, width, height)).convert("L"))
        repainted = cover >= HALF
        cover = _outside(cover, inner, 255)
        whole = (
            -(-left // factor) * factor,
            -(-top // factor) * factor,
            right // factor * factor,
            bottom // factor * factor,
        )
        repainted = _outside(repainted, whole, True)
        image = extend(image, borders)
    canvas = Canvas(resize(image, width, height), repainted, cover)
    if not canvas.latent_mask(factor).any():
        raise UsageError(
            f"the mask is too fine: one pixel of each {factor}x{factor} (its first) says whether "
            "that latent is repainted, and none of these is white; widen the strokes"
        )
    return canvas


def _inner(image: np.ndarray, borders: Borders, width: int, height: int) -> Borders:
    """Where the picture lies on its canvas at the size of the run: left, top, right, bottom."""
    rows, columns = image.shape[:2]
    across = width / (columns + borders[0] + borders[2])
    down = height / (rows + borders[1] + borders[3])
    return (
        round(borders[0] * across),
        round(borders[1] * down),
        round((borders[0] + columns) * across),
        round((borders[1] + rows) * down),
    )


def _outside(values: np.ndarray, box: Borders, value: Any) -> np.ndarray:
    """`values` (H, W) with `value` outside the box left, top, right, bottom."""
    left, top, right, bottom = box
    result = np.full_like(values, value)
    result[top:bottom, left:right] = values[top:bottom, left:right]
    return result
