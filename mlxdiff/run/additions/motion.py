"""A motion adapter (AnimateDiff): lets a model of pictures draw videos.

Its modules are put into the U-Net, so LoRAs can change them, and a U-Net with them is one network.
A run then draws a video. The reference is diffusers' AnimateDiff pipelines.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from mlxdiff.convert import Component, open_motion_adapter
from mlxdiff.run.additions import Addition, Additions, Fetch, Path, named
from mlxdiff.run.kind import Kind
from mlxdiff.store.recipes import Recipe, find_recipe, recipe_of, rounded
from mlxdiff.weights.tensors import LazyTensor

logger = logging.getLogger("mlxdiff")

BITS = 8
"""Bits of an adapter's weights beside a quantized model, of whatever bits that is."""

SCHEDULE = {"beta_schedule": "linear"}
"""What all published adapters were trained with, whatever the model was."""


class Way(NamedTuple):
    """How an adapter is to be used.

    Attributes:
        sampler, schedule, steps, guidance, eta: its defaults; None: the model's.
    """

    sampler: str
    schedule: str
    steps: int | None = None
    guidance: float | None = None
    eta: float | None = None


# Part of a name -> how such an adapter is used. Files do not say it. Sources: the examples of the
# model cards ByteDance/AnimateDiff-Lightning (EulerDiscreteScheduler, trailing, guidance 1, the
# steps of the file) and wangfuyun/AnimateLCM (LCMScheduler, 6 steps, guidance 2), and diffusers
# 0.42.1, docs/source/en/api/pipelines/animatediff.md (AnimateLCM: 6 steps with guidance 1.5, 10
# with 2 or 2.5; the others: DDIMScheduler, linspace).
_LIGHTNING = re.compile(r"lightning_([1248])step", re.IGNORECASE)
_LCM = re.compile(r"animatelcm", re.IGNORECASE)
_USUAL = Way("ddim", "linspace")


@dataclass(frozen=True, eq=False)
class Motion(Addition):
    """The motion modules of a model.

    Attributes:
        component: their network.
        recipe: how its weights are rounded; None: they are as they are.
    """

    part: ClassVar[str] = "motion"
    adds_layers: ClassVar[bool] = True

    component: Component = field(repr=False)
    recipe: Recipe | None = None

    @classmethod
    def open(cls, paths: Iterable[Path], model: Kind, fetch: Fetch) -> tuple[Motion, ...]:
        """Open a motion adapter for a model.

        Args:
            paths: one, as ``convert.open_motion_adapter`` takes it.
        Raises: CheckpointError, ConfigError, HubError.
        """
        unet = model.source.config("unet")
        recipe = None if recipe_of(model.source) is None else find_recipe(BITS)
        return tuple(
            cls(open_motion_adapter(path, unet, fetch.variant, fetch.progress), recipe)
            for path in paths
        )

    @property
    def changes(self) -> Collection[str]:
        """The U-Net."""
        return ("unet",)

    @property
    def way(self) -> Way:
        """How it is used, by its name."""
        name = named(self.component.provenance)
        if found := _LIGHTNING.search(name):
            return Way("euler", "trailing", int(found[1]), 1.0)
        if _LCM.search(name):
            return Way("lcm", "normal", 6, 2.0)
        return _USUAL

    @classmethod
    def change(cls, items: Sequence[Motion], name: str, component: Component) -> Component:
        """See ``Addition.change``."""
        motion, recipe = items[-1].component, items[-1].recipe

        def tensors() -> dict[str, LazyTensor]:
            own = motion.tensors()
            return component.tensors() | (own if recipe is None else rounded(own, name, recipe))

        config = replace(component.config, motion=motion.config)
        return replace(component, config=config, tensors=tensors)

    @classmethod
    def describe(cls, items: Sequence[Motion], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        return {"motion_adapter": named(items[-1].component.provenance)}


def motion_of(additions: Additions) -> Motion | None:
    """Return the motion adapter of a model; None: it draws pictures."""
    return next(iter(additions.of(Motion)), None)
