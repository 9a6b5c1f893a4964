"""ControlNets: networks that see a picture and add to the U-Net what they make of it.

The order of things is that of diffusers' ControlNet pipelines: pictures are resized by Pillow's
Lanczos filter; the share of the way on which a net counts goes by evaluations; guess mode, under
guidance, leaves the prediction for the negative prompt alone.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlxdiff.convert import Component, open_controlnet
from mlxdiff.errors import UsageError, argument
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.cost import operations
from mlxdiff.pictures.control_modes import MODES
from mlxdiff.pictures.image import load_image, resize
from mlxdiff.pictures.preprocess import PREPROCESSORS
from mlxdiff.run.additions import Acting, Addition, Fetch, Prompted, named
from mlxdiff.run.kind import Kind
from mlxdiff.run.memory import SIZES, UNetRun, Work
from mlxdiff.run.values import listed

logger = logging.getLogger("mlxdiff")

NETWORK = "controlnet"


@dataclass(frozen=True)
class Control:
    """The picture of one ControlNet, and how strongly the net acts in a run.

    Attributes:
        image: uint8 (height, width, 3), of the picture's size, preprocessed.
        image_name: the name of its file, or "(pixels)".
        scale: factor of everything that the net adds.
        start, end: the net acts between these shares of the run, 0 to 1.
        preprocess: how the image was preprocessed: a name of ``preprocess.PREPROCESSORS``.
        mode: type of the image, for a ControlNet-Union: a name of ``control_modes.MODES``.
    """

    image: np.ndarray = field(repr=False, compare=False)
    image_name: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str = "none"
    mode: str | None = None

    @property
    def type(self) -> int | None:
        """The number of ``mode`` among the types of a ControlNet-Union."""
        return None if self.mode is None else MODES.index(self.mode)

    def counts(self, index: int, total: int) -> bool:
        """Return True if the net takes part in evaluation ``index`` of ``total``."""
        within = index / total >= self.start and (index + 1) / total <= self.end
        return within and self.scale != 0


def resolve_controls(
    configs: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    *,
    control_image: Any = None,
    control_scale: Any = None,
    control_start: Any = None,
    control_end: Any = None,
    control_preprocess: Any = None,
    control_mode: Any = None,
) -> list[tuple[Control, ...]]:
    """Match the options of a run to the ControlNets; open each picture once.

    Each value has been checked by itself (``run.options``).

    Args:
        configs: of the ControlNets.
        sizes: (width, height) of the picture, and of what a hires pass makes of it.
        control_image: a picture for each net, in their order; for one net, the picture.
        control_scale, control_start, control_end, control_preprocess, control_mode: one value for
            all nets, or one for each.
    Returns: for each size, the controls of all nets.
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
    count = len(configs)
    if count == 0:
        if names := [name for name, value in given.items() if value is not None]:
            raise UsageError(
                f"{', '.join(map(argument, names))}: there is no ControlNet; give one "
                f"({argument('controlnets')})"
            )
        return [() for _ in sizes]
    nets = "1 ControlNet" if count == 1 else f"{count} ControlNets"
    images = listed(control_image)
    if len(images) != count:
        found = {0: "no control image", 1: "1 control image"}
        raise UsageError(
            f"{nets} and {found.get(len(images), f'{len(images)} control images')}: give one for "
            f"each net, in the same order ({argument('control_image')})"
        )

    def each(name: str, default: Any) -> list[Any]:
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
    modes = [
        _mode_of(config, mode)
        for config, mode in zip(configs, each("control_mode", None), strict=True)
    ]
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
                mode=mode,
            )
            for image, pixels, scale, start, end, kind, mode in zip(
                images, opened, scales, starts, ends, kinds, modes, strict=True
            )
        )
        for width, height in sizes
    ]


def _mode_of(config: Any, mode: str | None) -> str | None:
    """Check the mode of one net. Raises: UsageError."""
    if config.types is None:
        if mode is not None:
            raise UsageError(
                f"{argument('control_mode')} is for a ControlNet-Union, and this ControlNet knows "
                "one type of picture; leave the mode out"
            )
        return None
    known = MODES[: config.types.count]
    if mode not in known:
        said = "needs the type of its picture" if mode is None else f"has no mode {mode!r}"
        raise UsageError(
            f"this ControlNet-Union {said}; give {argument('control_mode')} with one "
            f"of {', '.join(known)}"
        )
    return mode


def _name_of(image: Any) -> str:
    return Path(image).name if isinstance(image, (str, os.PathLike)) else "(pixels)"


@dataclass(frozen=True, eq=False)
class ControlNet(Addition):
    """A network that sees a picture and adds to the U-Net what it makes of it."""

    part: ClassVar[str] = "controlnet"

    component: Component = field(repr=False)

    @classmethod
    def open(
        cls, paths: Iterable[str | os.PathLike[str]], model: Kind, fetch: Fetch
    ) -> tuple[ControlNet, ...]:
        """Open ControlNets for a model.

        Args:
            paths: as ``convert.open_controlnet`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        opened = []
        for path in paths:
            one = open_controlnet(
                path,
                model.unet_config,
                fetch.variant,
                fetch.progress,
                lambda: model.source.tensors("unet"),
            )
            _check_latents(one.config, model, path)
            opened.append(cls(one))
        return tuple(opened)

    @property
    def networks(self) -> Mapping[str, Component]:
        """See ``Addition.networks``."""
        return {NETWORK: self.component}

    def work(self, run: UNetRun) -> Work:
        """Count the residuals for each skip: they are held until the U-Net takes them."""
        unet = operations(run.unet, *run.latent, batch=run.batch)
        return Work(beside=SIZES[run.device.dtype] * max(op.held for op in unet))

    @classmethod
    def describe(cls, items: Sequence[ControlNet], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        controls: Sequence[Control] = settings.controls
        said: dict[str, Any] = {
            "controlnet": [named(one.component.provenance) for one in items],
            "control_image": [c.image_name for c in controls],
            "control_scale": [c.scale for c in controls],
            "control_start": [c.start for c in controls],
            "control_end": [c.end for c in controls],
        }
        if any(c.preprocess != "none" for c in controls):
            said["control_preprocess"] = [c.preprocess for c in controls]
        if any(c.mode for c in controls):
            said["control_mode"] = [c.mode for c in controls]
        if settings.guess_mode:
            said["guess_mode"] = True
        return said

    @classmethod
    def act(cls, items: Sequence[ControlNet], prompted: Prompted) -> Acting:
        """See ``Addition.act``."""
        return ControlNets(prompted)


class ControlNets:
    """The ControlNets of a model, in the evaluations of a prompt.

    Args:
        prompted: the prompt; its settings have a ``Control`` for each net.
    """

    def __init__(self, prompted: Prompted) -> None:
        settings, conditions = prompted.settings, prompted.conditions
        self.backend = prompted.backend
        self.controls: Sequence[Control] = settings.controls
        self.nets = [prompted.component(NETWORK, i) for i in range(len(self.controls))]
        # A net that adds the same everywhere asks for guess mode; the first decides for all.
        self.guess_mode = settings.guess_mode or self.nets[0].config.global_pool_conditions
        self.texts = [net.read(prompted.states) for net in self.nets]
        self.added = {k: v for k, v in conditions.items() if k in ("text_embeds", "time_ids")}
        self.rows = prompted.batch
        self.pictures = []
        types: list[Any] = []
        for net, control in zip(self.nets, self.controls, strict=True):
            pixels = (control.image.astype(np.float32) / np.float32(255))[None]
            self.pictures.append(net.embed_image(self.backend.asarray(pixels), control.type))
            types.append(None if control.type is None else net.embed_type(control.type))
        self.types = types
        # What is lazy belongs to the thread that made it, and each step may run in another.
        lazy = [*self.pictures, *(one for one in types if one is not None)]
        self.backend.evaluate(*lazy, *(text.values for text in self.texts))

    def counting(self, index: int, total: int) -> list[int]:
        """See ``Acting.counting``."""
        return [i for i, control in enumerate(self.controls) if control.counts(index, total)]

    def __call__(
        self, x: Any, t: float, index: int, total: int, guided: bool, shallow: bool
    ) -> list[Any] | None:
        """See ``Acting``."""
        both = guided and not self.guess_mode
        start = 0 if both else self.rows - 1  # the prompt comes last
        sample = self.backend.concatenate([x, x], 0) if both else x
        timesteps = self.backend.asarray(np.full(len(sample), t, np.float32))
        added = {name: values[start:] for name, values in self.added.items()}
        sums: list[Any] | None = None
        for i in self.counting(index, total):
            net, last = self.nets[i], (self.pictures[i], self.controls[i].scale, self.guess_mode)
            if shallow:
                more = [net.predict_first(sample, *last)]
            else:
                temb = net.embed(timesteps, **added)
                if self.types[i] is not None:
                    temb = temb + self.types[i]
                more = net.predict(
                    sample, Condition(temb), self.texts[i].rows(start, self.rows), *last
                )
            sums = more if sums is None else [a + b for a, b in zip(sums, more, strict=True)]
        if sums is not None and guided and not both:
            return [self.backend.concatenate([0 * a, a], 0) for a in sums]
        return sums


def _check_latents(controlnet: Any, model: Kind, path: Any) -> None:
    """Raise UsageError unless a ControlNet's config has the latents of this model."""
    vae = model.vae_config
    for name, found, expected in (
        ("latent channels", controlnet.in_channels, vae.latent_channels),
        ("pixels for each latent", controlnet.factor, vae.factor),
    ):
        if found != expected:
            raise UsageError(
                f"{path}: this ControlNet is for models with {found} {name}, this model has "
                f"{expected}; use one made for it"
            )


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
