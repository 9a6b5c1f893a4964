"""A model that makes a map of a picture, depth or surface normals: Marigold (Ke et al. 2024).

It is a latent model that sees the picture's latents before the noisy latents of the map, and the
empty text. Facts, defaults and the order of the work are those of diffusers' pipelines.

Source: diffusers pipelines/marigold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import ConfigError, UsageError, argument, quoted
from mlxdiff.pictures import maps
from mlxdiff.pictures.image import load_image
from mlxdiff.run.kind import MOST_PIXELS, PARTS, LatentKind, Reason
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.run.model import Model, PromptEmbeddings
from mlxdiff.run.options import RunOptions
from mlxdiff.run.settings import Settings, filled, named
from mlxdiff.store.folder import ModelSource

if TYPE_CHECKING:
    import PIL.Image

PIPELINES = {
    "MarigoldDepthPipeline": ("depth", ("depth", "disparity")),
    "MarigoldNormalsPipeline": ("normals", ("normals",)),
}
"""Pipeline class -> kind of map, and the prediction types that it may name."""

_HAS = ("image", "lora", "vae", "maps")


def makes_maps(source: ModelSource) -> bool:
    """Return True for a model that makes maps."""
    return source.model_index.get("_class_name") in PIPELINES


class MapKind(LatentKind):
    """Facts about a model that makes maps.

    Attributes:
        near_is_large: its depth grows towards the viewer (disparity).
        scale_invariant, shift_invariant: its depth is known up to a scale, up to a shift.
        full_z_range: its normals' third values are -1 to 1.
    Raises: ConfigError if its U-Net or its model_index.json is not that of such a model.
    """

    def _check(self) -> None:
        super()._check()
        source = self.source
        index, unet = source.model_index, self.unet_config
        where = f"{source.path}/model_index.json"
        self.maps, predictions = PIPELINES[str(index.get("_class_name"))]
        self.edits = False
        predicts = index.get("prediction_type", predictions[0]) or predictions[0]
        if predicts not in predictions:
            raise ConfigError(
                f"{where}: prediction_type is {quoted(predicts)}; expected "
                f"{' or '.join(predictions)}"
            )
        channels = 2 * self.vae_config.latent_channels
        if unet.in_channels != channels or unet.num_class_embeds is not None or self.is_sdxl:
            raise ConfigError(
                f"{source.path}: its U-Net takes {unet.in_channels} channels; expected {channels} "
                "(a picture's latents and those of a map), no classes and no sizes"
            )
        self.near_is_large = predicts == "disparity"
        self.scale_invariant = index.get("scale_invariant", True) is not False
        self.shift_invariant = index.get("shift_invariant", True) is not False
        self.full_z_range = index.get("use_full_z_range", True) is not False

    def lacks(self, part: str) -> Reason:
        """See ``Kind.lacks``."""
        if part not in PARTS:
            raise KeyError(part)
        if part in _HAS:
            return None
        return f"{self.description}; it has no part for that"

    @property
    def description(self) -> str:
        """See ``Kind.description``."""
        made = "a depth map" if self.maps == "depth" else "a map of surface normals"
        return f"this model makes {made} of a picture"

    @property
    def default_guidance(self) -> float:
        """1: there is no guidance."""
        return 1.0

    @property
    def default_sampler(self) -> str:
        """The class in the model's own file."""
        return "checkpoint"

    def default_steps(self, sampler: str) -> int:
        """Number of steps in model_index.json. Raises: UsageError if it gives none."""
        return self._whole("default_denoising_steps", "steps", 1)

    @property
    def default_resolution(self) -> int:
        """The longer side in which pictures are looked at. Raises: UsageError if there is none."""
        return self._whole("default_processing_resolution", "processing_resolution", 0)

    def _whole(self, key: str, option: str, least: int) -> int:
        value = self.source.model_index.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(
                f"{self.source.path}: its model_index.json gives no {key}; say {argument(option)}"
            )
        return value

    def processed_size(self, rows: int, columns: int, resolution: int) -> tuple[int, int]:
        """Return (height, width) in which a picture is looked at.

        Raises: UsageError if the factor of the VAE does not divide the resolution, or nothing is
            left of a side.
        """
        factor = self.vae_config.factor
        name = argument("processing_resolution")
        if resolution % factor or resolution > MOST_PIXELS:
            raise UsageError(
                f"{name} is {resolution}; expected a multiple of {factor}, at most {MOST_PIXELS}, "
                "or 0"
            )
        size = maps.processed_size(rows, columns, resolution)
        if min(size) < 1:
            raise UsageError(
                f"the image, {columns}x{rows} pixels, has less than one row or column at a longer "
                f"side of {resolution} ({name}); crop it"
            )
        return size

    def check_size(self, *, width: int, height: int) -> None:
        """Raise UsageError unless a map can have this size."""
        for name, value in (("width", width), ("height", height)):
            if not 1 <= value <= MOST_PIXELS:
                raise UsageError(f"{argument(name)} is {value}; expected 1 to {MOST_PIXELS}")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See ``Kind.latent_shape``."""
        factor = self.vae_config.factor
        height, width = maps.padded_size(height, width, factor)
        return height // factor, width // factor, self.vae_config.latent_channels


class MapModel(LatentModel, MapKind):
    """A model that makes maps, at work. For the arguments see ``Model``."""

    def resolve(self, asked: RunOptions, refiner: Model | None) -> Settings:
        """See ``Model.resolve``."""
        self._check_task(asked)
        pixels = load_image(asked.image)
        rows, columns = pixels.shape[:2]
        width = columns if asked.width is None else asked.width
        height = rows if asked.height is None else asked.height
        self.check_size(width=width, height=height)
        resolution = asked.processing_resolution
        resolution = self.default_resolution if resolution is None else resolution
        return filled(
            asked,
            width=width,
            height=height,
            image=pixels,
            image_name=named(asked.image),
            processing_resolution=resolution,
            processed=self.processed_size(rows, columns, resolution),
            depth_as=asked.depth_as or "grey" if self.maps == "depth" else None,
        )

    def _check_task(self, asked: RunOptions) -> None:
        """Refuse to make a map of no picture, and options that it has no use for."""
        if asked.image is None:
            raise UsageError(
                f"{self.source.path}: {self.description}: give one ({argument('image')})"
            )
        refused = {
            "strength": "it starts from noise, and keeps to the whole picture",
            "noise_size": "the noise has the shape of the picture",
        }
        for name, why in refused.items():
            if getattr(asked, name) is not None:
                raise UsageError(f"{argument(name)}: {self.description}; {why}; leave it out")
        if asked.depth_as is not None and self.maps != "depth":
            raise UsageError(
                f"{argument('depth_as')}: {self.description}, which has one form; leave it out"
            )

    def prompt_timeline(self, *args: Any, **options: Any) -> list[tuple[int, PromptEmbeddings]]:
        """Return the embedding of the empty text, start and end alone; there is no other."""
        return [(0, PromptEmbeddings(self.texts.unpadded("").embeds))]

    def encode_prompt(self, *args: Any, **options: Any) -> PromptEmbeddings:
        """See ``prompt_timeline``."""
        return self.prompt_timeline()[0][1]

    def seen(self, image: np.ndarray, resolution: int) -> np.ndarray:
        """Return the latents of a picture (H, W, 3) uint8 as the U-Net sees them."""
        pixels = maps.prepare(image, resolution, self.vae_config.factor)
        return self.encode_pixels(pixels).mean

    def map_of(self, latents: np.ndarray, height: int, width: int) -> np.ndarray:
        """Decode a map.

        Args:
            latents: (h, w, C).
            height, width: of the map, without what was added to the picture's edges.
        Returns: see ``pictures.maps``.
        """
        pixels = self.decode_pixels(latents)
        if self.maps == "depth":
            values = maps.depth_of(pixels)
        else:
            values = maps.normals_of(pixels, self.full_z_range)
        return values[:height, :width]

    def joined(self, found: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
        """Join the maps that were made of one picture, and bring the result to a size."""
        if len(found) == 1:
            values = found[0]
        elif self.maps == "depth":
            values = maps.join_depths(found, self.scale_invariant, self.shift_invariant)
        else:
            values = maps.join_normals(found)
        return maps.resize(values, height, width)

    def paint(self, values: np.ndarray, form: str | None) -> PIL.Image.Image:
        """Make the picture of a map, see ``pictures.maps.paint``."""
        return maps.paint(values, form, self.near_is_large)
