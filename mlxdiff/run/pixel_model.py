"""A model that draws pixels, without text encoder and VAE: a UNet2DModel (Ho et al. 2020).

What is a latent elsewhere is a pixel here, in [-1, 1]. diffusers' DDPMPipeline and DDIMPipeline
take no label: where a model wants one, its U-Net takes it beside what they hand to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import to_pil
from mlxdiff.run.kind import PixelKind
from mlxdiff.run.model import Model
from mlxdiff.run.options import RunOptions
from mlxdiff.run.settings import Settings, filled

if TYPE_CHECKING:
    import PIL.Image


class PixelModel(Model, PixelKind):
    """A model that draws pixels. For the arguments see ``Model``."""

    def _set_up(self) -> None:
        PixelKind.__init__(self, self.source)

    def resolve(self, asked: RunOptions, refiner: Model | None) -> Settings:
        """See ``Model.resolve``."""
        self.check_label(asked.label)
        width, height = asked.width, asked.height
        if width is None or height is None:
            own_height, own_width = self.default_size
            width = own_width if width is None else width
            height = own_height if height is None else height
        self.check_size(width=width, height=height)
        return filled(asked, width=width, height=height)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise UsageError: there is no text encoder."""
        raise UsageError(f"{self.source.path}: this model has no text encoder")

    def encode_image(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise UsageError: there is no VAE."""
        raise UsageError(f"{self.source.path}: this model has no VAE")

    prompt_timeline = encode_prompt
    image_latents = encode_image
    encode_pixels = encode_image

    def load_decoder(self) -> None:
        """Do nothing: pixels need no decoder."""

    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """Return pictures of pixels (B, H, W, 1 or 3) in [-1, 1]; values outside are clipped."""
        return [to_pil(one) for one in latents]

    def decode_pixels(self, latents: np.ndarray) -> np.ndarray:
        """Return the pixels."""
        return latents

    def sketch(self, latents: np.ndarray) -> PIL.Image.Image:
        """Return a picture of pixels (H, W, 1 or 3) in [-1, 1]."""
        return to_pil(latents)
