"""A model that draws pixels, without text encoder and VAE: a UNet2DModel (Ho et al. 2020).

It has the stages of ``model.Model`` that such a model has. What is a latent there is a pixel here,
in [-1, 1]. The defaults are those of diffusers' DDPMPipeline and DDIMPipeline, which take no label:
where a model wants one, it is handed to its U-Net beside what they hand to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff import samplers
from mlxdiff.errors import UsageError
from mlxdiff.networks.config import UNet2DConfig
from mlxdiff.pictures.image import to_pil
from mlxdiff.run.model import Networks
from mlxdiff.store.folder import ModelSource

if TYPE_CHECKING:
    import PIL.Image

DDPM_STEPS = 1000
OTHER_STEPS = 50


class PixelModel(Networks):
    """The network of such a model, loaded when first needed and kept.

    Attributes:
        unet_config: its config.
    Raises: UsageError where what it draws is no picture.
    """

    def __init__(self, source: ModelSource, backend: Any) -> None:
        super().__init__(source, backend)
        self.unet_config: UNet2DConfig = source.config("unet")
        channels = self.unet_config.in_channels, self.unet_config.out_channels
        if channels not in ((1, 1), (3, 3)):
            raise UsageError(
                f"{source.path}: its U-Net takes {channels[0]} channels and gives {channels[1]}; "
                "a picture has 1 or 3"
            )

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels, of all pictures of this model."""
        if self.unet_config.sample_size is None:
            raise UsageError("this model's config gives no sample_size: say width and height")
        return self.unet_config.sample_size

    @property
    def default_sampler(self) -> str:
        """What the pipeline of the model's class samples with."""
        name = self.source.scheduler_config.get("_class_name")
        if self.source.model_index.get("_class_name") == "DDIMPipeline":
            name = "DDIMScheduler"
        return samplers.of_class(name) or "checkpoint"

    def default_steps(self, sampler: str) -> int:
        """1000 for ``ddpm``, or as many as the model was trained with; 50 for the others."""
        config = self.source.scheduler_config
        trained = config.get("num_train_timesteps", DDPM_STEPS)
        ddpm = samplers.reference_class(config, sampler) == "DDPMScheduler"
        steps = DDPM_STEPS if ddpm else OTHER_STEPS
        return min(steps, trained) if isinstance(trained, int) and trained > 0 else steps

    def check_size(self, *, width: int, height: int) -> None:
        """Raise UsageError unless it is the model's own size, if the model has one."""
        if min(width, height) < 1 or self.unet_config.sample_size not in (None, (height, width)):
            own_height, own_width = self.default_size
            raise UsageError(
                f"{width}x{height} pixels: this model draws {own_width}x{own_height} only"
            )

    def check_label(self, label: Any) -> None:
        """Raise UsageError unless the model takes this label, or None."""
        config = self.unet_config
        if not config.takes_label:
            if label is not None:
                raise UsageError(f"label {label}: this model has no classes")
        elif config.class_embed_type == "identity":
            raise UsageError(
                "the classes of this model are vectors (class_embed_type identity), which have no "
                "number; call its U-Net with class_labels (pipe.model.component('unet'))"
            )
        else:
            count = config.num_class_embeds if config.class_embed_type is None else None
            known = "a whole number of at least 0" if count is None else f"0 to {count - 1}"
            if label is None:
                raise UsageError(f"this model needs a label (--label), the class to draw: {known}")
            sound = isinstance(label, int) and not isinstance(label, bool) and label >= 0
            if not sound or (count is not None and label >= count):
                raise UsageError(f"label is {label!r}; expected {known}")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return height, width, self.unet_config.in_channels

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
