"""A model that makes maps (Marigold), for the control pictures of another model.

The map is made of the picture as it is given, with a seed of its own, so that every picture of a
run follows the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.pictures.image import resize
from mlxdiff.pictures.maps import control_picture
from mlxdiff.pictures.preprocess import MAPS
from mlxdiff.run.additions import Addition, named
from mlxdiff.run.additions.control import Control
from mlxdiff.run.memory import Device, estimate
from mlxdiff.run.model import Model

if TYPE_CHECKING:
    from mlxdiff.run.settings import Settings

SEED = 0

Make = Callable[[Model, np.ndarray], np.ndarray]
"""Makes the map of a picture, uint8 (H, W, 3), with a model: (H, W, C) float32."""


@dataclass(frozen=True, eq=False)
class MapMaker(Addition):
    """A model that makes depth maps or normals of control pictures."""

    part: ClassVar[str] = "controlnet"

    model: Model

    @classmethod
    def open(cls, path: Any, opened: Model, model: Model) -> MapMaker:
        """Match a model that makes maps to a model that is controlled. Raises: UsageError."""
        opened.require("maps", f"{argument('map_models')} {path}")
        if opened.backend.name != model.backend.name:
            raise UsageError("the model that makes maps must be loaded with the same backend")
        return cls(opened)

    def stages(self, device: Device, height: int, width: int, low_memory: bool) -> dict[str, int]:
        """See ``Addition.stages``."""
        model: Any = self.model
        sides = model.default_resolution or max(height, width)
        bands = model.band_bytes(sides, sides, low_memory)
        needed = estimate(
            model, device, sides, sides, image=True, low_memory=low_memory, band_bytes=bands
        )
        return {"map": needed.peak}

    @classmethod
    def describe(cls, items: Sequence[MapMaker], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        return {"map_model": [named(one.model.source.provenance) for one in items]}


def makers_of(model: Model) -> dict[str, Model]:
    """The models that make maps for a model, by what they are called in ``control_preprocess``."""
    found = {str(one.model.maps): one.model for one in model.additions.of(MapMaker)}
    return {name: found[maps] for name, maps in MAPS.items() if maps in found}


def check_makers(model: Model, wanted: Sequence[str]) -> None:
    """Raise UsageError unless every map that is wanted can be made, and every maker is wanted."""
    makers = makers_of(model)
    for name in wanted:
        if name in MAPS and name not in makers:
            raise UsageError(
                f"{argument('control_preprocess')} {name}: there is no model that makes "
                f"{MAPS[name]}; give a Marigold model ({argument('map_models')})"
            )
    for name in makers:
        if name not in wanted:
            raise UsageError(
                f"{argument('map_models')}: a model that makes {MAPS[name]} has no effect without "
                f"{argument('control_preprocess', name)}"
            )


def with_maps(model: Model, settings: Settings, make: Make) -> Settings:
    """Return the settings with the maps in place of the pictures that they are made of."""
    makers, made = makers_of(model), dict[tuple[int, str], np.ndarray]()

    def picture(pixels: np.ndarray, kind: str) -> np.ndarray:
        key, maker = (id(pixels), kind), makers[kind]
        if key not in made:
            values = make(maker, pixels)
            made[key] = control_picture(values, getattr(maker, "near_is_large", False))
        return made[key]

    def mapped(control: Control) -> Control:
        if not control.original:
            return control
        height, width = control.image.shape[-3:-1]
        frames = [picture(pixels, control.preprocess) for pixels in control.original]
        shown = [resize(one, width, height) for one in frames]
        image = shown[0] if len(shown) == 1 else np.stack(shown)
        return replace(control, image=image, original=())

    controls = tuple(map(mapped, settings.controls))
    return replace(
        settings, controls=controls, hires_controls=tuple(map(mapped, settings.hires_controls))
    )
