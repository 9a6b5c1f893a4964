"""ControlNets in a run: what each is shown and told, and what they add to the U-Net together.

The order of things is that of diffusers' ControlNet pipelines: pictures are resized by Pillow's
Lanczos filter; the share of the way on which a net counts goes by evaluations; guess mode, under
guidance, leaves the prediction for the negative prompt alone.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.networks.condition import Condition
from mlxdiff.pictures.image import load_image, resize
from mlxdiff.pictures.preprocess import PREPROCESSORS
from mlxdiff.run.model import Model
from mlxdiff.run.values import finite_number, listed

logger = logging.getLogger("mlxdiff")


@dataclass(frozen=True)
class Control:
    """What one ControlNet is shown and told.

    Attributes:
        image: uint8 (height, width, 3), of the picture's size, preprocessed.
        image_name: the name of its file, or what it was given as.
        scale: times all that the net adds.
        start, end: the share of the way from which, and up to which, it counts.
        preprocess: what was made of the image: a name of ``preprocess.PREPROCESSORS``.
    """

    image: np.ndarray = field(repr=False, compare=False)
    image_name: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str = "none"

    def counts(self, index: int, total: int) -> bool:
        """Whether it has a part in evaluation ``index`` of ``total``."""
        within = index / total >= self.start and (index + 1) / total <= self.end
        return within and self.scale != 0


def resolve_controls(
    count: int,
    sizes: Sequence[tuple[int, int]],
    *,
    control_image: Any = None,
    control_scale: Any = None,
    control_start: Any = None,
    control_end: Any = None,
    control_preprocess: Any = None,
) -> list[tuple[Control, ...]]:
    """Check the arguments of ``generate`` for ControlNets; open each picture once.

    Args:
        count: how many ControlNets there are.
        sizes: (width, height) of the picture, and of what a hires pass makes of it.
        control_image: a picture for each net, in their order; for one net, the picture.
        control_scale, control_start, control_end, control_preprocess: one value for all nets, or
            one for each.
    Returns: for each size, the controls of all nets.
    Raises: UsageError.
    """
    given = {
        "control_image": control_image,
        "control_scale": control_scale,
        "control_start": control_start,
        "control_end": control_end,
        "control_preprocess": control_preprocess,
    }
    if count == 0:
        if names := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{', '.join(names)}: there is no ControlNet; give one (--controlnet)")
        return [() for _ in sizes]
    nets = "1 ControlNet" if count == 1 else f"{count} ControlNets"
    images = listed(control_image)
    if len(images) != count:
        found = {0: "no control image", 1: "1 control image"}
        raise UsageError(
            f"{nets} and {found.get(len(images), f'{len(images)} control images')}: give one for "
            "each net, in the same order (--control-image)"
        )

    def each(name: str, default: Any, check: Callable[[str, Any], Any]) -> list[Any]:
        values = listed(given[name]) or [default]
        if len(values) not in (1, count):
            raise UsageError(
                f"{len(values)} values of {name} for {nets}: give one, or one for each"
            )
        return [check(name, value) for value in values] * (count // len(values))

    scales = each("control_scale", 1.0, finite_number)
    starts, ends = each("control_start", 0.0, _share), each("control_end", 1.0, _share)
    kinds = each("control_preprocess", "none", _preprocessor)
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise UsageError(f"control_start {start:g} must be less than control_end {end:g}")
    opened = [load_image(image) for image in images]
    for pixels in opened:
        for width, height in sizes:
            _note_stretched(pixels, width, height)
    return [
        tuple(
            Control(
                image=PREPROCESSORS[kind](resize(pixels, width, height)),
                image_name=_name_of(image),
                scale=scale,
                start=start,
                end=end,
                preprocess=kind,
            )
            for image, pixels, scale, start, end, kind in zip(
                images, opened, scales, starts, ends, kinds, strict=True
            )
        )
        for width, height in sizes
    ]


def _name_of(image: Any) -> str:
    return Path(image).name if isinstance(image, (str, os.PathLike)) else "(pixels)"


def describe(controls: Sequence[Control], names: Sequence[str], guess_mode: bool) -> dict[str, Any]:
    """What a picture's metadata says of its ControlNets: arguments of ``generate`` by name.

    Args:
        controls: of the run.
        names: of the nets.
        guess_mode: whether it was on.
    """
    if not controls:
        return {}
    said: dict[str, Any] = {
        "controlnet": list(names),
        "control_image": [c.image_name for c in controls],
        "control_scale": [c.scale for c in controls],
        "control_start": [c.start for c in controls],
        "control_end": [c.end for c in controls],
    }
    if any(c.preprocess != "none" for c in controls):
        said["control_preprocess"] = [c.preprocess for c in controls]
    return said | ({"guess_mode": True} if guess_mode else {})


class ControlNets:
    """The ControlNets of a model, at work.

    Args:
        model: whose ControlNets they are.
        controls: what each is shown and told.
        guess_mode: see ``Settings``.
        text: states of the prompt (1, L, D), or of the negative prompt and the prompt.
        added: SDXL's text_embeds and time_ids, of as many rows.
    """

    def __init__(
        self,
        model: Model,
        controls: Sequence[Control],
        guess_mode: bool,
        text: Any,
        added: Mapping[str, Any],
    ) -> None:
        self.backend = model.backend
        self.controls = controls
        self.nets = [model.component(name) for name in model.controlnets]
        # A net that adds the same everywhere asks for guess mode; the first decides for all.
        self.guess_mode = guess_mode or self.nets[0].config.global_pool_conditions
        self.texts = [net.read(text) for net in self.nets]
        self.added = {k: v for k, v in added.items() if k in ("text_embeds", "time_ids")}
        self.rows = len(text)
        self.conditions = []
        for net, control in zip(self.nets, controls, strict=True):
            pixels = (control.image.astype(np.float32) / np.float32(255))[None]
            self.conditions.append(net.embed_image(self.backend.asarray(pixels)))
        self.backend.evaluate(*self.conditions)

    def counting(self, index: int, total: int) -> list[int]:
        """Which of them have a part in an evaluation."""
        return [i for i, control in enumerate(self.controls) if control.counts(index, total)]

    def __call__(
        self, x: Any, t: float, index: int, total: int, guided: bool, shallow: bool = False
    ) -> list[Any] | None:
        """What they add to the U-Net's way down, the mid block last; None: nothing.

        Args:
            x: latents (1, h, w, C), as the U-Net is given them.
            t, index, total: the evaluation.
            guided: whether there is a prediction for the negative prompt, too.
            shallow: whether no more of the U-Net runs than takes the first of what they add: then
                that alone.
        """
        both = guided and not self.guess_mode
        start = 0 if both else self.rows - 1  # the prompt comes last
        sample = self.backend.concatenate([x, x], 0) if both else x
        timesteps = self.backend.asarray(np.full(len(sample), t, np.float32))
        told = {name: values[start:] for name, values in self.added.items()}
        sums: list[Any] | None = None
        for i in self.counting(index, total):
            net, last = self.nets[i], (self.conditions[i], self.controls[i].scale, self.guess_mode)
            if shallow:
                more = [net.predict_first(sample, *last)]
            else:
                temb = Condition(net.embed(timesteps, **told))
                more = net.predict(sample, temb, self.texts[i].rows(start, self.rows), *last)
            sums = more if sums is None else [a + b for a, b in zip(sums, more, strict=True)]
        if sums is not None and guided and not both:
            return [self.backend.concatenate([0 * a, a], 0) for a in sums]
        return sums


def _share(name: str, value: Any) -> float:
    value = finite_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} is {value:g}; expected 0 to 1, a share of the way")
    return value


def _preprocessor(name: str, value: Any) -> str:
    if value not in PREPROCESSORS:
        raise UsageError(
            f"{name} {value!r} does not exist; there are {', '.join(PREPROCESSORS)}. For another "
            "kind of ControlNet give a picture that is made for it already"
        )
    return str(value)


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
