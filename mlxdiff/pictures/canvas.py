"""Prepare pictures for inpainting and outpainting: masks, larger canvases, pasting back.

Mask and picture are prepared as in diffusers' VaeImageProcessor: resized with Pillow's Lanczos
filter; the mask is converted to grey and thresholded at one half; white is repainted. A plain model
repaints by blending: after every step, the kept part is replaced by the noised original (Lugmayr et
al. 2022, equation 8, without their resampling). An inpainting model receives the mask and the
masked picture beside the latents (Rombach et al. 2022, section 4.5).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import UsageError, argument, quoted
from mlxdiff.pictures.image import MAX_PIXELS, ImageLike, load_with_alpha, resize, to_model

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("mlxdiff")

Borders = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""
HALF = 128  # the lowest 8-bit grey level that counts as white


@dataclass(frozen=True)
class Whole:
    """The picture that a canvas shows a part of.

    Attributes:
        image: uint8 (H, W, 3), of any size.
        cover: uint8 (H, W), the whole mask in grey levels.
        box: left, top, right and bottom of the part, in pixels of the picture.
    """

    image: np.ndarray
    cover: np.ndarray
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Canvas:
    """A picture and its repaint mask, both at the size of the run.

    Attributes:
        image: uint8 (H, W, 3).
        mask: bool (H, W), True where the picture is repainted.
        cover: uint8 (H, W), the mask in grey levels: 255 shows the drawn picture, 0 the original.
        whole: the picture that this is a part of; None: it is all of it.
    """

    image: np.ndarray
    mask: np.ndarray
    cover: np.ndarray
    whole: Whole | None = None

    @property
    def masked_image(self) -> np.ndarray:
        """The picture, float32 (1, H, W, 3) in [-1, 1]; mid-grey where it is repainted."""
        return to_model(self.image) * ~self.mask[None, ..., None]

    def latent_mask(self, factor: int) -> np.ndarray:
        """Sample the mask at the first pixel of each latent.

        Args:
            factor: pixels per latent along a side.
        Returns: float32 (1, H/f, W/f, 1), 1 where the latent is repainted.
        """
        return self.mask[None, ::factor, ::factor, None].astype(np.float32)

    def paste_original(self, drawn: Image.Image) -> Image.Image:
        """Restore the kept part of the drawn picture exactly; grey parts of the mask blend.

        Source: diffusers' VaeImageProcessor.apply_overlay.
        """
        if self.whole is None:
            return _overlaid(drawn, self.image, self.cover)
        from PIL import Image

        left, top, right, bottom = self.whole.box
        height, width = self.whole.cover.shape
        base = Image.new("RGB", (width, height))
        part = _fitted(drawn, right - left, bottom - top, covers=True)
        base.paste(part, (left, top))
        return _overlaid(base, self.whole.image, self.whole.cover)


def _overlaid(drawn: Image.Image, original: np.ndarray, cover: np.ndarray) -> Image.Image:
    """Lay the original over a drawn picture where the mask is not white."""
    from PIL import Image, ImageOps

    kept = ImageOps.invert(Image.fromarray(cover))
    over = Image.new("RGBa", drawn.size)
    over.paste(Image.fromarray(original).convert("RGBA").convert("RGBa"), mask=kept)
    result = drawn.convert("RGBA")
    result.alpha_composite(over.convert("RGBA"))
    return result.convert("RGB")


def _fitted(picture: Image.Image, width: int, height: int, *, covers: bool) -> Image.Image:
    """Resize a picture to a size and keep its shape, in the middle.

    Args:
        covers: it covers the size, and what stands out is cut off; else it lies within, and its
            edges are repeated outwards.
    Source: diffusers' VaeImageProcessor, resize modes crop and fill.
    """
    from PIL import Image

    wider = picture.width * height > width * picture.height
    across = width if wider != covers else picture.width * height // picture.height
    down = height if wider == covers else picture.height * width // picture.width
    resized = picture.resize((max(across, 1), max(down, 1)), Image.Resampling.LANCZOS)
    result = Image.new("RGB", (width, height))
    left, top = width // 2 - resized.width // 2, height // 2 - resized.height // 2
    result.paste(resized, (left, top))
    wide, high = resized.size
    if not covers and top > 0:
        for edge, place in ((0, 0), (high, top + high)):
            result.paste(resized.resize((width, top), box=(0, edge, width, edge)), (0, place))
    if not covers and left > 0:
        for edge, place in ((0, 0), (wide, left + wide)):
            result.paste(resized.resize((left, height), box=(edge, 0, edge, height)), (place, 0))
    return result


def load_mask(source: ImageLike) -> np.ndarray:
    """Load a mask as uint8 (H, W, 3), in the way of ``image.load_image``; accept bool arrays too.

    A mask that is white all over has its shape in its alpha, as layers of drawing programs do: what
    is opaque is white. Other alpha is ignored, with a note.

    Raises: UsageError in the same cases as ``image.load_image``.
    """
    if getattr(source, "dtype", None) == np.bool_:
        source = np.asarray(source).astype(np.uint8) * 255
    try:
        pixels, alpha = load_with_alpha(source)
    except UsageError as error:
        raise UsageError(f"the mask: {error}") from None
    if alpha is None:
        return pixels
    if pixels.min() >= HALF and alpha.max() >= HALF:
        logger.warning(
            "the mask is white all over, and partly transparent: what is opaque is repainted"
        )
        return np.repeat(alpha[..., None], 3, axis=2)
    if pixels.max() >= HALF:
        logger.warning("the mask's transparency is ignored: what is white is repainted")
    return pixels


def check_borders(borders: Any) -> Borders:
    """Check and return the borders of ``outpaint``. Raises: UsageError."""
    try:
        left, top, right, bottom = borders
    except (TypeError, ValueError):
        raise UsageError(
            f"{argument('outpaint')} is {borders!r}; expected four numbers in pixels: left, top, "
            "right, bottom"
        ) from None
    for value in (left, top, right, bottom):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UsageError(
                f"{argument('outpaint')} is {borders!r}; expected whole numbers of at least 0"
            )
    if not any((left, top, right, bottom)):
        raise UsageError(
            f"{argument('outpaint')} is 0 on all sides and adds nothing; give at least one side a "
            "size above 0"
        )
    return left, top, right, bottom


def extend(image: np.ndarray, borders: Borders) -> np.ndarray:
    """Extend a picture, uint8 (H, W, 3), by the borders; fill them with its edge pixels."""
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
    """Bring picture and mask to the size of the run.

    Args:
        image: uint8 (H, W, 3).
        mask: uint8 (H', W', 3) from ``load_mask``, or None to repaint only the borders.
        width, height: size of the run, in pixels.
        factor: pixels per latent along a side.
        borders: pixels to add around image and mask, or None. Latents are repainted whole, so the
            repainted area also covers the edge of the picture up to the next latent (``cover``
            does not).
    Raises: UsageError if nothing would be repainted, or the borders are too wide.
    """
    from PIL import Image

    cover = np.zeros((height, width), np.uint8)
    if borders is None:
        assert mask is not None, "neither mask nor borders"
        cover = np.array(Image.fromarray(resize(mask, width, height)).convert("L"))
        if cover.max() < HALF:
            raise _black()
        repainted = cover >= HALF
    else:
        rows, columns, _ = image.shape
        rows, columns = rows + borders[1] + borders[3], columns + borders[0] + borders[2]
        if rows * columns > MAX_PIXELS:
            raise UsageError(
                f"{argument('outpaint')} makes a picture of {quoted(columns)}x{quoted(rows)} "
                f"pixels; at most {MAX_PIXELS // 1_000_000} megapixels are drawn on"
            )
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
            f"the mask is too fine: the first pixel of each {factor}x{factor} block decides "
            "whether that latent is repainted, and none of these is white; widen the strokes"
        )
    return canvas


def crop_region(mask: np.ndarray, width: int, height: int, padding: int) -> Borders:
    """Return the box around all that a mask repaints, in the shape of the run if there is room.

    Args:
        mask: uint8 (H, W); what is not 0 lies in the box.
        width, height: of the run.
        padding: pixels around it.
    Returns: left, top, right and bottom, in pixels.
    Source: diffusers' VaeImageProcessor.get_crop_region, A1111's masking.expand_crop_region.
    """
    rows, columns = mask.shape
    across, down = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, right = max(int(across[0]) - padding, 0), min(int(across[-1]) + 1 + padding, columns)
    top, bottom = max(int(down[0]) - padding, 0), min(int(down[-1]) + 1 + padding, rows)
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _widened(top, bottom, (right - left) / (width / height), rows)
    else:
        left, right = _widened(left, right, (bottom - top) * (width / height), columns)
    return left, top, right, bottom


def _widened(start: int, end: int, wanted: float, most: int) -> tuple[int, int]:
    """Widen a span to a length, in the middle; move it and cut it to lie within 0 and ``most``."""
    more = int(wanted - (end - start))
    start, end = start - more // 2, end + more - more // 2
    if end >= most:
        start, end = start - (end - most), most
    if start < 0:
        start, end = 0, end - start
    return start, min(end, most)


def crop_canvas(
    image: np.ndarray, mask: np.ndarray, width: int, height: int, factor: int, padding: int
) -> Canvas:
    """Bring the part of a picture that is repainted to the size of the run.

    Args:
        image: uint8 (H, W, 3).
        mask: uint8 (H', W', 3) from ``load_mask``.
        width, height: size of the run, in pixels.
        factor: pixels per latent along a side.
        padding: pixels of the picture around what is repainted, that the model sees.
    Raises: UsageError if nothing would be repainted.
    """
    from PIL import Image

    mask = resize(mask, image.shape[1], image.shape[0])
    cover = np.array(Image.fromarray(mask).convert("L"))
    if not cover.any():
        raise _black()
    box = crop_region(cover, width, height, padding)
    parts = (Image.fromarray(one).crop(box) for one in (image, mask))
    part, shown = (np.array(_fitted(one, width, height, covers=False)) for one in parts)
    canvas = make_canvas(part, shown, width, height, factor)
    return replace(canvas, whole=Whole(image, cover, box))


def _black() -> UsageError:
    return UsageError(
        "the mask is black, so nothing would be repainted; paint the area to repaint white "
        "(transparency is ignored)"
    )


def _inner(image: np.ndarray, borders: Borders, width: int, height: int) -> Borders:
    """Return the box of the picture on the canvas at the size of the run."""
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
    """Return `values` (H, W) with `value` outside the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    result = np.full_like(values, value)
    result[top:bottom, left:right] = values[top:bottom, left:right]
    return result
