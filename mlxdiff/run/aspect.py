"""Sizes for a shape: the nearest one that a family of models is trained for."""

from __future__ import annotations

import math
from dataclasses import replace

from mlxdiff.errors import UsageError, argument
from mlxdiff.run.kind import Kind
from mlxdiff.run.options import RunOptions

_SDXL_LANDSCAPES = (
    (1024, 1024), (1088, 960), (1024, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832),
    (1280, 768), (1344, 768), (1344, 704), (1408, 704), (1472, 704), (1536, 640), (1600, 640),
    (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip
SDXL_SIZES = (*_SDXL_LANDSCAPES, *((h, w) for w, h in _SDXL_LANDSCAPES if w != h))
"""(width, height) that SDXL is trained for. Source: Podell et al. 2023, appendix I."""

_SIDE = 64  # sides are multiples of this: every level of a U-Net then has whole sizes
_AREA_WEIGHT = 0.5  # of an area's error in the logarithm, beside the shape's


def with_aspect(model: Kind, asked: RunOptions) -> RunOptions:
    """Return the options with width and height in place of the shape.

    Raises: UsageError where they are given as well, or the size follows from something else.
    """
    if asked.aspect is None:
        return asked
    for name in ("width", "height"):
        if getattr(asked, name) is not None:
            raise UsageError(
                f"{argument('aspect')} and {argument(name)} are both given; give one of them"
            )
    if asked.outpaint is not None:
        raise UsageError(
            f"{argument('aspect')}: the borders ({argument('outpaint')}) say the size; leave one "
            "of them out"
        )
    if model.upscales or model.maps is not None:
        raise UsageError(
            f"{argument('aspect')}: the picture gets the shape of the image; leave it out"
        )
    width, height = nearest_size(model, *asked.aspect)
    return replace(asked, width=width, height=height)


def nearest_size(model: Kind, width: int, height: int) -> tuple[int, int]:
    """Return the trained (width, height) nearest to a shape.

    SDXL has a list. Other models are trained on one size: those with about its area then.

    Raises: UsageError where a model gives no size.
    """
    own_height, own_width = model.default_size
    area, ratio = own_width * own_height, width / height
    if model.is_sdxl and (own_width, own_height) == (1024, 1024):
        sizes = SDXL_SIZES
    else:
        side = _SIDE if min(own_width, own_height) >= 4 * _SIDE else 8
        most = int(math.sqrt(area * max(ratio, 1 / ratio)) / side) + 2
        sides = range(side, side * most + 1, side)
        sizes = tuple(
            (near, other)
            for other in sides
            for near in (max(round(other * ratio / side), 1) * side,)
        )

    def distance(size: tuple[int, int]) -> float:
        shape = abs(math.log(size[0] / size[1] / ratio))
        return shape + _AREA_WEIGHT * abs(math.log(size[0] * size[1] / area))

    return min(sizes, key=distance)
