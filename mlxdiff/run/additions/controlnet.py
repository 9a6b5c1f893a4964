"""ControlNets: networks that see a picture and add to the U-Net what they make of it.

As in diffusers' ControlNet pipelines, guess mode, under guidance, leaves the prediction for the
negative prompt alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from mlxdiff.convert import open_controlnet
from mlxdiff.errors import UsageError, argument
from mlxdiff.networks.condition import Change, Condition
from mlxdiff.networks.config import LLLiteConfig
from mlxdiff.networks.cost import operations
from mlxdiff.pictures.control_modes import MODES
from mlxdiff.run.additions import Acting, Added, Fetch, Prompted
from mlxdiff.run.additions.control import Control, Controlled, check_multiple
from mlxdiff.run.kind import Kind
from mlxdiff.run.memory import SIZES, UNetRun, Work, activation_bytes


@dataclass(frozen=True, eq=False)
class ControlNet(Controlled):
    """A network that sees a picture and adds to the U-Net what it makes of it."""

    part: ClassVar[str] = "controlnet"
    network: ClassVar[str] = "controlnet"
    noun: ClassVar[str] = "ControlNet"

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
                model.vae_config.factor,
            )
            if not isinstance(one.config, LLLiteConfig):
                _check_latents(one.config, model, path)
            opened.append(cls(one))
        return tuple(opened)

    def check_size(self, width: int, height: int) -> None:
        """See ``Controlled.check_size``. A ControlNet takes any size that the model draws."""
        if self.is_lllite:
            check_multiple(self.component.config.factor, width, height, "ControlNet-LLLite")

    @property
    def is_lllite(self) -> bool:
        """True for a ControlNet-LLLite, which changes the inputs of the U-Net's attention."""
        return isinstance(self.component.config, LLLiteConfig)

    @property
    def takes_mode(self) -> bool:
        """True for a ControlNet-Union."""
        return self.component.config.types is not None

    def check_mode(self, mode: str | None) -> None:
        """See ``Controlled.check_mode``."""
        if not self.takes_mode:
            super().check_mode(mode)
            return
        known = MODES[: self.component.config.types.count]
        if mode not in known:
            said = "needs the type of its picture" if mode is None else f"has no mode {mode!r}"
            raise UsageError(
                f"this ControlNet-Union {said}; give {argument('control_mode')} with one of "
                f"{', '.join(known)}"
            )

    def work(self, run: UNetRun) -> Work:
        """Count the residuals for each skip: they are held until the U-Net takes them.

        A ControlNet-LLLite keeps its embedded pictures.
        """
        if self.is_lllite:
            config, (height, width) = self.component.config, run.size
            places = (
                height * width // module.factor**2 * module.cond_emb_dim
                for module in config.modules
            )
            need = activation_bytes(config, run.device, height, width, batch=run.batch)
            return Work(before=need, beside=SIZES[run.device.dtype] * sum(places))
        unet = operations(run.unet, *run.latent, batch=run.batch)
        return Work(beside=SIZES[run.device.dtype] * max(op.held for op in unet))

    @classmethod
    def describe(cls, items: Sequence[Controlled], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        said = super().describe(items, settings)
        if settings.guess_mode:
            said["guess_mode"] = True
        return said

    @classmethod
    def act(cls, items: Sequence[ControlNet], prompted: Prompted) -> Sequence[Acting]:
        """See ``Addition.act``."""
        nets = [(i, item) for i, item in enumerate(items) if not item.is_lllite]
        lites = [(i, item) for i, item in enumerate(items) if item.is_lllite]
        acting: list[Acting] = [ControlNets(nets, prompted)] if nets else []
        return [*acting, LLLites(lites, prompted)] if lites else acting


class ControlNets:
    """The ControlNets of a model, in the evaluations of a prompt.

    Args:
        items: the ControlNets, each with its position among those of the model.
        prompted: the prompt.
    """

    def __init__(self, items: Sequence[tuple[int, ControlNet]], prompted: Prompted) -> None:
        settings, conditions = prompted.settings, prompted.conditions
        self.backend = prompted.backend
        self.controls: list[Control] = [prompted.controls[item] for _, item in items]
        self.nets = [prompted.component(ControlNet.network, i) for i, _ in items]
        # A net that adds the same everywhere asks for guess mode; the first decides for all.
        self.guess_mode = settings.guess_mode or self.nets[0].config.global_pool_conditions
        self.frames = prompted.text.frames
        self.texts = [net.read(prompted.states).of_video(self.frames) for net in self.nets]
        self.added = {k: v for k, v in conditions.items() if k in ("text_embeds", "time_ids")}
        self.rows = prompted.batch
        self.pictures = []
        types: list[Any] = []
        for net, control in zip(self.nets, self.controls, strict=True):
            pixels = self.backend.asarray(control.pixels)
            self.pictures.append(net.embed_image(pixels, control.type))
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
    ) -> Added | None:
        """See ``Acting``."""
        both = guided and not self.guess_mode
        start = 0 if both else self.rows - 1  # the prompt comes last
        sample = self.backend.concatenate([x, x], 0) if both else x
        batch = len(sample) // self.frames.count
        timesteps = self.backend.asarray(np.full(batch, t, np.float32))
        added = {name: values[start:] for name, values in self.added.items()}
        sums: list[Any] | None = None
        for i in self.counting(index, total):
            net, picture = self.nets[i], self.pictures[i]
            if len(picture) > 1:  # a frame for each sample
                picture = self.backend.concatenate([picture] * batch, 0)
            last = picture, self.controls[i].scale, self.guess_mode
            if shallow:
                more = [net.predict_first(sample, *last)]
            else:
                embedded = net.embed(timesteps, **added)
                if self.types[i] is not None:
                    embedded = embedded + self.types[i]
                temb = Condition(embedded).of_video(self.frames)
                text = self.texts[i].rows(start, self.rows)
                more = net.predict(sample, temb, text, *last)
            sums = more if sums is None else [a + b for a, b in zip(sums, more, strict=True)]
        if sums is None:
            return None
        if guided and not both:
            sums = [self.backend.concatenate([0 * a, a], 0) for a in sums]
        return Added(residuals=sums)


class LLLites:
    """The ControlNet-LLLites of a model, in the evaluations of a prompt.

    Args:
        items: the nets, each with its position among the ControlNets of the model.
        prompted: the prompt.
    """

    def __init__(self, items: Sequence[tuple[int, ControlNet]], prompted: Prompted) -> None:
        backend = prompted.backend
        self.controls: list[Control] = [prompted.controls[item] for _, item in items]
        self.changes: list[list[tuple[object, str, Change]]] = []
        for (i, item), control in zip(items, self.controls, strict=True):
            net = prompted.component(ControlNet.network, i)
            embedded = net.embed_image(backend.asarray(control.pixels))
            # What is lazy belongs to the thread that made it, and each step may run in another.
            backend.evaluate(*embedded)
            config: LLLiteConfig = item.component.config
            changes: list[tuple[object, str, Change]] = []
            for module, of, one in zip(net.lllites, config.modules, embedded, strict=True):
                layer, _, name = of.target.rpartition(".")
                change = partial(_changed, module, one, control.scale)
                changes.append((_layer(prompted.unet, layer), name, change))
            self.changes.append(changes)

    def counting(self, index: int, total: int) -> list[int]:
        """See ``Acting.counting``."""
        return [i for i, control in enumerate(self.controls) if control.counts(index, total)]

    def __call__(
        self, x: Any, t: float, index: int, total: int, guided: bool, shallow: bool
    ) -> Added | None:
        """See ``Acting``."""
        changes = [one for i in self.counting(index, total) for one in self.changes[i]]
        return Added(changes=tuple(changes))


def _changed(module: Any, condition: Any, scale: float, x: Any) -> Any:
    """The input of a layer, changed by a module."""
    return x + scale * module(x, condition)


def _layer(network: Any, path: str) -> Any:
    """The module of a network at this place."""
    for part in path.split("."):
        network = network[int(part)] if part.isdigit() else getattr(network, part)
    return network


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
