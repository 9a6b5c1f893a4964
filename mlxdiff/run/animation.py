"""Stable Video Diffusion: a model that lets a picture move (Blattmann et al. 2023).

It reads CLIP's embedding of the picture in place of a text, sees the noised picture's latents
beside those of every frame, and takes three numbers: frames a second, the amount of motion, and how
much the picture was noised. Guidance grows from the first frame to the last. Facts, defaults and
the order of the work are those of diffusers' StableVideoDiffusionPipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import ConfigError, UsageError, argument
from mlxdiff.networks.config import UNetSpatioTemporalConfig
from mlxdiff.pictures.image import CLIP_MEAN, CLIP_STD, load_image, resize, to_model, to_pil
from mlxdiff.pictures.resampling import blurred, resample
from mlxdiff.run import video
from mlxdiff.run.kind import PARTS, LatentKind, Reason
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.run.model import Model, PromptEmbeddings
from mlxdiff.run.options import RunOptions
from mlxdiff.run.settings import Settings, filled, named
from mlxdiff.store.folder import IMAGE_ENCODER, ModelSource

if TYPE_CHECKING:
    import PIL.Image

SIZE = 576, 1024  # (height, width) that all published models were trained on
GUIDANCE, LEAST_GUIDANCE, STEPS = 3.0, 1.0, 25
FPS, MOTION, AUGMENTATION = 7.0, 127, 0.02

_HAS = ("text", "image", "video", "animation")

# Options that such a model has no part for, though others that read a picture have.
_REFUSED = (
    "strength aspect guidance_rescale guidance_interval guider freeu seamless feature_reuse "
    "feature_reuse_error vary noise_size context_length context_stride style region eta step_noise"
).split()


def animates(source: ModelSource) -> bool:
    """Return True for a model that lets a picture move."""
    return isinstance(source.config("unet"), UNetSpatioTemporalConfig)


class AnimatingKind(LatentKind):
    """Facts about a model that lets a picture move.

    Raises: ConfigError if its networks do not fit each other.
    """

    unet_config: UNetSpatioTemporalConfig

    def _check(self) -> None:
        super()._check()
        source, unet, latent = self.source, self.unet_config, self.vae_config.latent_channels
        self.edits = False
        if (unet.in_channels, unet.out_channels) != (2 * latent, latent):
            raise ConfigError(
                f"{source.path}: its U-Net takes {unet.in_channels} channels and gives "
                f"{unet.out_channels}; expected {2 * latent} and {latent}"
            )
        width = source.config(IMAGE_ENCODER).projection_dim
        if set(unet.cross_attention_dim) != {width}:
            raise ConfigError(
                f"{source.path}: cross_attention_dim of the U-Net is "
                f"{sorted(set(unet.cross_attention_dim))}; expected {width}, the projection_dim of "
                "the image encoder"
            )

    def lacks(self, part: str) -> Reason:
        """See ``Kind.lacks``."""
        if part not in PARTS:
            raise KeyError(part)
        return None if part in _HAS else f"{self.description}; it has no part for that"

    @property
    def description(self) -> str:
        """See ``Kind.description``."""
        return "this model lets a picture move (Stable Video Diffusion)"

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) of the reference pipeline."""
        return SIZE

    @property
    def default_guidance(self) -> float:
        """Guidance scale of the last frame."""
        return GUIDANCE

    def default_steps(self, sampler: str) -> int:
        """Number of steps of the reference pipeline."""
        return STEPS


class AnimatingModel(LatentModel, AnimatingKind):
    """A model that lets a picture move, at work. For the arguments see ``Model``."""

    def resolve(self, asked: RunOptions, refiner: Model | None) -> Settings:
        """See ``Model.resolve``."""
        self._check_task(asked)
        pixels = load_image(asked.image)
        own_height, own_width = self.default_size
        width = own_width if asked.width is None else asked.width
        height = own_height if asked.height is None else asked.height
        self.check_size(width=width, height=height)
        low, added = asked.min_guidance, asked.noise_augmentation
        frames = self.unet_config.num_frames if asked.frames is None else asked.frames
        return filled(
            asked,
            width=width,
            height=height,
            min_guidance=LEAST_GUIDANCE if low is None else low,
            frames=frames,
            fps=FPS if asked.fps is None else asked.fps,
            motion_bucket=MOTION if asked.motion_bucket is None else asked.motion_bucket,
            noise_augmentation=AUGMENTATION if added is None else added,
            decode_chunk=frames if asked.decode_chunk is None else min(asked.decode_chunk, frames),
            image=resize(pixels, width, height),
            leading=pixels,
            image_name=named(asked.image),
        )

    def _check_task(self, asked: RunOptions) -> None:
        """Refuse what such a model cannot draw."""
        if asked.image is None:
            raise UsageError(
                f"{self.source.path}: {self.description}: give one ({argument('image')})"
            )
        for name in _REFUSED:
            value = getattr(asked, name)
            if value is not None and value != getattr(RunOptions(), name):
                raise UsageError(
                    f"{argument(name)}: {self.description}; it has no part for that; leave it out"
                )

    def band_bytes(self, height: int, width: int, low_memory: bool) -> int | None:
        """None: frames are decoded together, and not in bands."""
        return None

    def decode_frames(self, latents: np.ndarray, at_once: int) -> list[PIL.Image.Image]:
        """Decode the frames of a video.

        Args:
            latents: (F, h, w, C) as the U-Net draws them.
            at_once: frames that the VAE sees together.
        """
        scale = np.float32(self.vae_config.scaling_factor)
        frames = []
        for first in range(0, len(latents), at_once):
            z = self.backend.asarray((latents[first : first + at_once] / scale).astype(np.float32))
            frames += [to_pil(one) for one in self._decoded(z)]
            self.backend.clear_cache()
        return frames

    def decode_pixels(self, latents: np.ndarray) -> np.ndarray:
        """Decode one frame alone; see ``Model.decode_pixels``."""
        z = (latents / np.float32(self.vae_config.scaling_factor))[None].astype(np.float32)
        found: np.ndarray = self._decoded(self.backend.asarray(z))[0]
        return found

    def _decoded(self, z: Any) -> Any:
        (pixels,) = self._run_vae(lambda vae: (vae.decode(z),))
        return pixels


# ----------------------------------------------------------------------------------------- inputs


def picture_prompt(model: Any, settings: Settings) -> PromptEmbeddings:
    """What the model reads: one token of the picture, and zeros."""
    assert settings.leading is not None
    encoder, backend = model.take(IMAGE_ENCODER), model.backend
    pixels = to_clip_smoothed(settings.leading, encoder.image_size)
    token = backend.to_numpy(encoder(backend.asarray(pixels)).image_embeds)[:, None]
    return PromptEmbeddings(token, np.zeros_like(token) if settings.guides(model) else None)


def to_clip_smoothed(image: np.ndarray, size: int) -> np.ndarray:
    """Prepare a picture for CLIP's image encoder: all of it, smoothed, as a square.

    Args:
        image: uint8 (H, W, 3).
        size: input side of the encoder, in pixels.
    Returns: (1, size, size, 3) float32.
    Source: diffusers pipeline_stable_video_diffusion.py (``_resize_with_antialiasing``).
    """
    sigmas = [max((side / size - 1) / 2, 0.001) for side in image.shape[:2]]
    sizes = [int(max(4 * sigma, 3)) | 1 for sigma in sigmas]
    smooth = blurred(to_model(image)[0], sigmas, sizes)
    pixels = (resample(smooth, size, size, "bicubic", align_corners=True) + np.float32(1)) / 2
    mean, std = (np.array(numbers, np.float32) for numbers in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std).astype(np.float32)[None]


def noised_latents(model: Any, settings: Settings, draws: Any) -> np.ndarray:
    """Latents of the picture with noise of its own, for each frame: (1, F * h, w, C)."""
    assert settings.image is not None and settings.frames is not None
    pixels = to_model(settings.image)
    noise = draws.next(pixels.shape[1:])
    noised = pixels + np.float32(settings.noise_augmentation) * noise
    latents: np.ndarray = model.encode_pixels(noised, scaled=False).mean
    return np.concatenate([latents] * settings.frames, axis=1)


def first_noise(settings: Settings, draws: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """The first noise of a video, (1, F * h, w, C), drawn frame by frame."""
    assert settings.frames is not None
    rows, width, channels = shape
    frames = draws.frames(settings.frames, (rows // settings.frames, width, channels))
    return video.stacked(frames)


def guidance_of_frames(settings: Settings, rows: int) -> np.ndarray:
    """The guidance scale of each row of a video: (1, rows, 1, 1) float32."""
    assert settings.frames is not None and settings.min_guidance is not None
    low, high, count = settings.min_guidance, settings.guidance, settings.frames
    # As torch.linspace: from both ends, in float32.
    step = np.float32((high - low) / max(count - 1, 1))
    places = np.arange(count, dtype=np.float32)
    scales = np.where(
        places < count // 2,
        np.float32(low) + step * places,
        np.float32(high) - step * (count - 1 - places),
    )
    if count == 1:
        scales = np.array([low], np.float32)
    return np.repeat(scales.astype(np.float32), rows // count)[None, :, None, None]
