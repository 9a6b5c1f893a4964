"""What additions share that follow a control picture: ControlNets and T2I-Adapters.

Each has a picture of its own. Pictures are resized by Pillow's Lanczos filter, and the share of the
run in which an addition acts is counted by evaluations, as in diffusers' pipelines.
"""

from __future__ import annotations

import logging
import math
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image

from mlxdiff.convert import Component
from mlxdiff.errors import UsageError, argument
from mlxdiff.pictures.control_modes import MODES
from mlxdiff.pictures.image import load_image, resize
from mlxdiff.pictures.preprocess import MAPS, PREPROCESSORS
from mlxdiff.pictures.videos import load_video
from mlxdiff.run.additions import Addition, named
from mlxdiff.run.values import listed

logger = logging.getLogger("mlxdiff")


@dataclass(frozen=True)
class Control:
    """The picture of one addition, and how strongly the addition acts in a run.

    Attributes:
        image: uint8 (height, width, 3), of the picture's size, preprocessed; of a video
            (frames, height, width, 3).
        image_name: the name of its file, or "(pixels)".
        scale: factor of everything that is added.
        start, end: the addition acts between these shares of the run, 0 to 1.
        preprocess: how the image was preprocessed: a name of ``preprocess.PREPROCESSORS`` or
            ``preprocess.MAPS``.
        original: the picture, or the frames, that maps are still to be made of, uint8 (H, W, 3)
            each; else ().
        mode: type of the image, for a ControlNet-Union: a name of ``control_modes.MODES``.
    """

    image: np.ndarray = field(repr=False, compare=False)
    image_name: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str = "none"
    mode: str | None = None
    original: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)

    @property
    def type(self) -> int | None:
        """The number of ``mode`` among the types of a ControlNet-Union."""
        return None if self.mode is None else MODES.index(self.mode)

    @property
    def pixels(self) -> np.ndarray:
        """The image as networks take it: (1, height, width, 3) float32, 0 to 1.

        There is one for each frame of a video.
        """
        values = self.image.astype(np.float32) / np.float32(255)
        return values if values.ndim == 4 else values[None]

    @property
    def grey(self) -> np.ndarray:
        """The same of its brightness alone: (1, height, width, 1) float32, 0 to 1."""
        brightness = PIL.Image.fromarray(self.image).convert("L")
        return (np.asarray(brightness, np.float32) / np.float32(255))[None, :, :, None]

    def counts(self, index: int, total: int) -> bool:
        """Return True if the addition takes part in evaluation ``index`` of ``total``."""
        within = index / total >= self.start and (index + 1) / total <= self.end
        return within and self.scale != 0


@dataclass(frozen=True, eq=False)
class Controlled(Addition):
    """An addition that follows a control picture.

    Attributes:
        component: its network.
        network: name of its network.
        noun: what it is, in messages.
    """

    network: ClassVar[str]
    noun: ClassVar[str]

    component: Component = field(repr=False)

    @property
    def networks(self) -> Mapping[str, Component]:
        """See ``Addition.networks``."""
        return {self.network: self.component}

    @abstractmethod
    def check_size(self, width: int, height: int) -> None:
        """Raise UsageError unless it takes a control picture of this size."""

    @property
    def takes_mode(self) -> bool:
        """True if it must know the type of its control picture."""
        return False

    def check_mode(self, mode: str | None) -> None:
        """Raise UsageError unless it takes a control picture of this type."""
        if mode is not None:
            raise UsageError(
                f"{argument('control_mode')} is for a ControlNet-Union, and this {self.noun} knows "
                "one type of picture; leave the mode out"
            )

    @classmethod
    def describe(cls, items: Sequence[Controlled], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``. Every kind gives the values of all controls."""
        controls: Sequence[Control] = settings.controls
        said: dict[str, Any] = {
            cls.part: [named(one.component.provenance) for one in items],
            "control_image": [c.image_name for c in controls],
            "control_scale": [c.scale for c in controls],
            "control_start": [c.start for c in controls],
            "control_end": [c.end for c in controls],
        }
        if any(c.preprocess != "none" for c in controls):
            said["control_preprocess"] = [c.preprocess for c in controls]
        if any(c.mode for c in controls):
            said["control_mode"] = [c.mode for c in controls]
        return said


def resolve_controls(
    controlled: Sequence[Controlled],
    sizes: Sequence[tuple[int, int]],
    *,
    control_image: Any = None,
    control_scale: Any = None,
    control_start: Any = None,
    control_end: Any = None,
    control_preprocess: Any = None,
    control_mode: Any = None,
    frames: int | None = None,
) -> list[tuple[Control, ...]]:
    """Match the options of a run to the additions that follow a picture; open each picture once.

    Each value has been checked by itself (``run.options``).

    Args:
        controlled: the additions.
        sizes: (width, height) of the picture, and of what a hires pass makes of it.
        control_image: a picture for each addition, in their order; for one, the picture.
        control_scale, control_start, control_end, control_preprocess, control_mode: one value for
            all additions, or one for each; modes are for those that take one.
        frames: of the video that is drawn, whose controls may be videos; None: it is a picture.
    Returns: for each size, the controls of all additions.
    Raises: UsageError.
    """
    given = {
        "control_image": control_image,
        "control_scale": control_scale,
        "control_start": control_start,
        "control_end": control_end,
        "control_preprocess": control_preprocess,
        "control_mode": control_mode,
    }
    count = len(controlled)
    if count == 0:
        if names := [name for name, value in given.items() if value is not None]:
            raise UsageError(
                f"{', '.join(map(argument, names))}: there is no ControlNet and no T2I-Adapter; "
                f"give one ({argument('controlnets')}, {argument('t2i_adapters')})"
            )
        return [() for _ in sizes]
    counts = Counter(one.noun for one in controlled)
    nets = " and ".join(f"{n} {noun}{'s' * (n > 1)}" for noun, n in counts.items())
    images = listed(control_image)
    if len(images) != count:
        found = {0: "no control image", 1: "1 control image"}
        order = "in the same order" if len(counts) == 1 else f"those of {next(iter(counts))}s first"
        raise UsageError(
            f"{nets} and {found.get(len(images), f'{len(images)} control images')}: give one for "
            f"each, {order} ({argument('control_image')})"
        )

    def each(name: str, default: Any, count: int = count) -> list[Any]:
        values = listed(given[name]) or [default]
        if len(values) not in (1, count):
            raise UsageError(
                f"{len(values)} values of {argument(name)} for {nets}: give one, or one for each"
            )
        return values * (count // len(values))

    scales, kinds = each("control_scale", 1.0), each("control_preprocess", "none")
    starts, ends = each("control_start", 0.0), each("control_end", 1.0)
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise UsageError(
                f"{argument('control_start')} {start:g} must be less than "
                f"{argument('control_end')} {end:g}"
            )
    takers = [one for one in controlled if one.takes_mode] or list(controlled)
    chosen = dict(zip(takers, each("control_mode", None, len(takers)), strict=True))
    modes = [chosen.get(one) for one in controlled]
    for one, mode in zip(controlled, modes, strict=True):
        one.check_mode(mode)
        for width, height in sizes:
            one.check_size(width, height)
    if frames is None:
        opened = [[load_image(image)] for image in images]
    else:
        opened = [load_video(image, frames) for image in images]
    for pixels in opened:
        for width, height in sizes:
            _note_stretched(pixels[0], width, height)

    def shown(pixels: list[np.ndarray], kind: str, width: int, height: int) -> np.ndarray:
        prepare = PREPROCESSORS.get(kind, _as_it_is)
        made = [prepare(resize(one, width, height)) for one in pixels]
        return made[0] if len(made) == 1 else np.stack(made)

    return [
        tuple(
            Control(
                image=shown(pixels, kind, width, height),
                image_name=_name_of(image),
                scale=scale,
                start=start,
                end=end,
                preprocess=kind,
                mode=mode,
                original=tuple(pixels) if kind in MAPS else (),
            )
            for image, pixels, scale, start, end, kind, mode in zip(
                images, opened, scales, starts, ends, kinds, modes, strict=True
            )
        )
        for width, height in sizes
    ]


def _as_it_is(pixels: np.ndarray) -> np.ndarray:
    return pixels


def check_multiple(factor: int, width: int, height: int, noun: str) -> None:
    """Raise UsageError unless both sides are multiples of a factor that an addition needs."""
    for name, value in (("width", width), ("height", height)):
        if value % factor:
            below = value // factor * factor
            near = f"{below} or {below + factor}" if below else str(factor)
            raise UsageError(
                f"{name} {value} is not a multiple of {factor}, which this {noun} needs; "
                f"nearest: {near}"
            )


def _name_of(image: Any) -> str:
    return Path(image).name if isinstance(image, (str, os.PathLike)) else "(pixels)"


def _note_stretched(pixels: np.ndarray, width: int, height: int) -> None:
    rows, columns = pixels.shape[:2]
    if abs(math.log(columns * height / (rows * width))) > 0.02:
        logger.warning(
            "the control image, %dx%d pixels, is stretched to %dx%d; to keep its proportions say "
            "width and height",
            columns,
            rows,
            width,
            height,
        )
