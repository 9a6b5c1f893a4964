"""A model that draws pixels, without text encoder and VAE: a UNet2DModel (Ho et al. 2020).

It has the stages of ``model.Model`` that such a model has. What is a latent there is a pixel here,
in [-1, 1]. The defaults are those of diffusers' DDPMPipeline and DDIMPipeline, which take no label:
where a model wants one, it is handed to its U-Net beside what they hand to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import to_pil
from mlxdiff.run.kind import PixelKind
from mlxdiff.run.model import Networks
from mlxdiff.store.folder import ModelSource

if TYPE_CHECKING:
    import PIL.Image


class PixelModel(PixelKind, Networks):
    """The network of such a model, loaded when first needed and kept."""

    def __init__(self, source: ModelSource, backend: Any) -> None:
        PixelKind.__init__(self, source)
        Networks.__init__(self, source, backend)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Raise UsageError: there is no text encoder."""
        raise UsageError(f"{self.source.path}: this model has no text encoder")

    def encode_image(self, *args: Any, **kwargs: Any) -> Any:
        """Raise UsageError: there is no VAE."""
        raise UsageError(f"{self.source.path}: this model has no VAE")

    image_latents = encode_image

    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """Pictures of pixels (B, H, W, 1 or 3) in [-1, 1]; values outside are clipped."""
        return [to_pil(one) for one in latents]

    def sketch(self, latents: np.ndarray) -> PIL.Image.Image:
        """A picture of pixels (H, W, 1 or 3) in [-1, 1]."""
        return to_pil(latents)
