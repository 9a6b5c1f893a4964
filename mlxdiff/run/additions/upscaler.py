"""Upscalers: what enlarges a picture that is drawn, and what enlarges it for a hires pass.

An upscaler is a network (ESRGAN and its kin), or a model that enlarges (the x4 upscaler), which
draws from the same prompt and seed. It is given the finished picture, as a file holds it: so the
result is the same as that of a second command on the saved picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlxdiff.convert import Component
from mlxdiff.convert.upscaler import is_upscaler, open_upscaler
from mlxdiff.errors import UsageError
from mlxdiff.pictures.hires import Hires
from mlxdiff.pictures.image import resize_values
from mlxdiff.run.additions import Addition, Fetch, Path, named
from mlxdiff.run.kind import Network
from mlxdiff.run.memory import Device, estimate, network_bytes
from mlxdiff.run.model import Model
from mlxdiff.run.options import RunOptions
from mlxdiff.run.upscaling import NetworkUpscaler, choose_tiles

if TYPE_CHECKING:
    from PIL import Image

NETWORK, HIRES_NETWORK = "upscaler", "hires_upscaler"
MOST_PASSES = 3  # of a network whose scale is smaller than that of a hires pass, as in A1111
OPTIONS = ("upscaler_steps", "upscaler_guidance", "upscaler_noise_level")


@dataclass(frozen=True, eq=False)
class Upscaler(Addition):
    """What enlarges every finished picture: a network, or a model.

    Attributes:
        component: the network; None: it is a model.
        model: the model; None: it is a network.
    """

    part: ClassVar[str] = "upscaler"

    component: Component | None = None
    model: Model | None = None

    @classmethod
    def open(
        cls, path: Path, model: Model, open_model: Callable[[Path], Model], fetch: Fetch
    ) -> Upscaler:
        """Open an upscaler.

        Args:
            path: the file of a network, or a model.
            open_model: opens a model.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        if is_upscaler(path):
            return cls(component=open_upscaler(path, fetch.progress))
        opened = open_model(path)
        opened.require("upscales", f"upscaler {path}")
        if opened.backend.name != model.backend.name:
            raise UsageError("the upscaler must be loaded with the same backend")
        return cls(model=opened)

    @property
    def scale(self) -> int:
        """How many times larger the result is."""
        if self.component is not None:
            scale: int = self.component.config.scale
            return scale
        assert self.model is not None
        factor: int = self.model.vae_config.factor
        return factor

    @property
    def networks(self) -> Mapping[str, Component]:
        """See ``Addition.networks``."""
        return {} if self.component is None else {NETWORK: self.component}

    def stages(self, device: Device, height: int, width: int, low_memory: bool) -> dict[str, int]:
        """See ``Addition.stages``."""
        if self.component is not None:
            return {NETWORK: _tile_bytes(self.component, device, height, width, low_memory)}
        assert self.model is not None
        larger = self.scale * height, self.scale * width
        bands = self.model.band_bytes(*larger, low_memory)
        return {
            NETWORK: estimate(
                self.model, device, *larger, batch=2, low_memory=low_memory, band_bytes=bands
            ).peak
        }

    @classmethod
    def describe(cls, items: Sequence[Upscaler], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        one = items[-1]
        source = one.model.source if one.component is None and one.model else one.component
        assert source is not None
        return {"upscaler": named(source.provenance)}

    def asked(self, settings: Any, image: Any, seed: int) -> RunOptions:
        """Options of the run of a model that enlarges a picture of this run."""
        return RunOptions(
            prompt=settings.prompt,
            negative_prompt=settings.negative_prompt,
            prompt_syntax=settings.prompt_syntax,
            image=image,
            seed=seed,
            steps=settings.upscaler_steps,
            guidance=settings.upscaler_guidance,
            noise_level=settings.upscaler_noise_level,
        )


@dataclass(frozen=True, eq=False)
class HiresUpscaler(Addition):
    """A network that enlarges the first picture of a hires pass."""

    part: ClassVar[str] = "hires"

    component: Component

    @classmethod
    def open(cls, path: Path) -> HiresUpscaler:
        """Open the file of a network. Raises: CheckpointError, HubError; UsageError if it does not
        enlarge."""
        component = open_upscaler(path)
        if component.config.scale < 2:
            raise UsageError(f"hires_upscaler {path}: this network does not enlarge (scale 1)")
        return cls(component)

    @property
    def networks(self) -> Mapping[str, Component]:
        """See ``Addition.networks``."""
        return {HIRES_NETWORK: self.component}

    def stages(self, device: Device, height: int, width: int, low_memory: bool) -> dict[str, int]:
        """See ``Addition.stages``."""
        return {NETWORK: _tile_bytes(self.component, device, height, width, low_memory)}

    @classmethod
    def describe(cls, items: Sequence[HiresUpscaler], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        return {"hires_upscaler": named(items[-1].component.provenance)}


def _tile_bytes(
    component: Component, device: Device, height: int, width: int, low_memory: bool
) -> int:
    config = component.config
    tiles = choose_tiles(config, device, height, width, low_memory=low_memory)
    if tiles.side is not None:
        border = 2 * tiles.overlap
        height, width = (min(tiles.side + border, side) for side in (height, width))
    return network_bytes(config, device, height, width)


def upscaler_of(model: Model) -> Upscaler | None:
    """The upscaler of finished pictures, if there is one."""
    return next(iter(model.additions.of(Upscaler)), None)


def network_of(model: Model, name: str, component: Component) -> NetworkUpscaler:
    """A network of an addition, ready to enlarge.

    Args:
        name: of the network.
    """
    network = Network(name, 0)
    return NetworkUpscaler(
        component,
        model.backend,
        load=lambda: model.component(name, 0),
        widen=lambda: model.cache.widen(network, model.additions),
        low_memory=model.low_memory,
    )


def enlarged_for_hires(model: Model, hires: Hires, picture: np.ndarray) -> np.ndarray:
    """Enlarge the first picture of a hires pass by its network, then to the exact size.

    Args:
        picture: (H, W, 3) float32 in [-1, 1].
    Returns: (hires.height, hires.width, 3) float32 in [-1, 1].
    """
    (addition,) = model.additions.of(HiresUpscaler)
    network = network_of(model, HIRES_NETWORK, addition.component)
    values = (picture + 1) / 2
    for _ in range(MOST_PASSES):
        values = network.values(np.asarray(values, np.float32))
        if values.shape[0] >= hires.height and values.shape[1] >= hires.width:
            break
    pixels = np.asarray(values * 2 - 1, np.float32)
    if pixels.shape[:2] == (hires.height, hires.width):
        return pixels
    return resize_values(pixels, hires.width, hires.height)


def enlarged(
    model: Model, image: Image.Image, draw: Callable[[Model, RunOptions], Any], asked: RunOptions
) -> Image.Image:
    """Enlarge a finished picture.

    Args:
        model: what drew it, with its upscaler.
        draw: draws the picture of a run of a model.
        asked: of the run, for an upscaler that is a model.
    """
    upscaler = upscaler_of(model)
    assert upscaler is not None
    if upscaler.component is not None:
        return network_of(model, NETWORK, upscaler.component).picture(image)
    assert upscaler.model is not None
    if model.low_memory:
        model.cache.release_all()
    large: Image.Image = draw(upscaler.model, replace(asked, image=image.convert("RGB")))
    if model.low_memory:
        upscaler.model.cache.release_all()
    return large
