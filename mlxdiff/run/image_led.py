"""Models that the embedding of a picture leads: image variations, Zero-1-to-3, Stable unCLIP.

They see the picture through CLIP's image encoder and start from noise. An image variation model
reads the embedding in place of a text; Zero-1-to-3 reads one token of the embedding and a camera,
and sees the picture beside the latents; Stable unCLIP takes the embedding, noised, beside a text.
The negative prompt gets zeros in place of each.
Source: diffusers' StableDiffusionImageVariationPipeline, StableUnCLIPImg2ImgPipeline and
Zero1to3StableDiffusionPipeline (examples/community/pipeline_zero1to3.py).
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import ConfigError, UsageError, argument
from mlxdiff.networks.config import POSE
from mlxdiff.pictures.image import load_with_alpha, on_white, to_clip, to_clip_aligned
from mlxdiff.store.folder import CC_PROJECTION, IMAGE_ENCODER, IMAGE_NORMALIZER, ModelSource

if TYPE_CHECKING:
    from mlxdiff.run.model import Model
    from mlxdiff.run.options import RunOptions
    from mlxdiff.run.seeds import Draws
    from mlxdiff.run.settings import Settings

logger = logging.getLogger("mlxdiff")


# ------------------------------------------------------------------------------ facts about a model


def check(source: ModelSource) -> None:
    """Raise ConfigError unless the networks of such a model fit each other."""
    for part in (IMAGE_ENCODER, *([IMAGE_NORMALIZER] if _unclips(source) else [])):
        if part not in source.components:
            raise ConfigError(f"{source.path}: has no {part}, which its U-Net needs")
    width, unet = source.config(IMAGE_ENCODER).projection_dim, source.config("unet")
    seen = 2 if CC_PROJECTION in source.components else 1  # the latents; the picture beside them
    channels = seen * source.config("vae").latent_channels
    needs: list[tuple[str, Any, Any]] = [("in_channels of the U-Net", unet.in_channels, channels)]
    if _unclips(source):
        found = unet.projection_class_embeddings_input_dim
        needs.append(("projection_class_embeddings_input_dim of the U-Net", found, 2 * width))
        found = source.config(IMAGE_NORMALIZER).embedding_dim
        needs.append(("embedding_dim of the image_normalizer", found, width))
    elif CC_PROJECTION in source.components:
        projection = source.config(CC_PROJECTION)
        needs.append(("in_channel of the cc_projection", projection.in_channel, width + POSE))
        width = projection.out_channel
    if not _unclips(source):
        widths = set(unet.cross_attention_dim)
        needs.append(("cross_attention_dim of the U-Net", widths, {width}))
    for what, found, expected in needs:
        if found != expected:
            raise ConfigError(
                f"{source.path}: {what} is {found}; expected {expected}: the image encoder has a "
                f"projection_dim of {source.config(IMAGE_ENCODER).projection_dim}, the VAE "
                f"{source.config('vae').latent_channels} latent channels"
            )


def _unclips(source: ModelSource) -> bool:
    return bool(source.config("unet").class_embed_type == "projection")


def is_stable_zero123(source: ModelSource) -> bool:
    """Return True if the name of a model says that it is Stable Zero123.

    Nothing else in its files tells it from Zero-1-to-3, and it reads another number of a camera.
    """
    name = f"{source.provenance.get('source', '')} {source.path.name}".lower()
    return "zero123" in name and "stable" in name


def describe(turns: bool, unclips: bool) -> str:
    """The kind of model and its evidence, for messages."""
    if turns:
        return "this is a model that turns the object of a picture (it has a cc_projection)"
    if unclips:
        return (
            "this is a model that a picture leads beside the prompt (its U-Net takes CLIP's "
            "embedding of a picture)"
        )
    return "this is a model that a picture leads (it has an image encoder in place of a text one)"


# ----------------------------------------------------------------------------------------- settings


def check_task(model: Model, asked: RunOptions) -> None:
    """Refuse what such a model cannot draw from. Raises: UsageError."""
    if asked.image is None:
        raise UsageError(
            f"{model.source.path}: {model.description}: it needs a picture ({argument('image')})"
        )
    if asked.strength is not None:
        keeps = (
            f"; {argument('noise_level')} says how far to stray from it" if model.unclips else ""
        )
        raise UsageError(
            f"{argument('strength')}: {model.description}; it starts from noise and sees the "
            f"picture as a whole{keeps}"
        )
    if asked.picture_elevation is not None and asked.distance is not None:
        raise UsageError(
            f"{argument('picture_elevation')} and {argument('distance')}: a model reads one of the "
            "two (Stable Zero123 the first, Zero-1-to-3 the second); leave out the other"
        )
    if model.tells_elevation and asked.distance is not None:
        raise UsageError(
            f"{argument('distance')}: Stable Zero123 reads no distance; it reads the elevation of "
            f"the camera that took the picture ({argument('picture_elevation')})"
        )


def with_picture(
    settings: Settings, model: Model, asked: RunOptions, pixels: np.ndarray
) -> Settings:
    """Return the settings with the picture that leads, and how the model sees it."""
    if model.unclips:
        level = 0 if asked.noise_level is None else asked.noise_level
        model.check_noise_level(level)
        return replace(settings, leading=pixels, noise_level=level)
    if not model.turns:
        return replace(settings, leading=pixels)
    pixels, alpha = load_with_alpha(asked.image)
    shown = on_white(pixels, alpha, settings.width, settings.height)
    elevation = asked.picture_elevation
    if model.tells_elevation and elevation is None:
        elevation = 0.0
        logger.warning(
            "this model is Stable Zero123 by its name; it takes the picture as seen from an "
            "elevation of 0 degrees; say another one with %s",
            argument("picture_elevation"),
        )
    return replace(settings, image=shown, leading=shown, picture_elevation=elevation)


def pose(settings: Settings) -> np.ndarray:
    """The camera of a picture as Zero-1-to-3 reads it: (1, 4) float32.

    The polar angle grows downwards, so it is the elevation with the other sign. The fourth number
    is the change of distance, or the polar angle of the camera that took the picture, 90 degrees
    less its elevation (threestudio, threestudio/models/guidance/stable_zero123_guidance.py;
    ComfyUI, comfy_extras/nodes_stable3d.py, has an elevation of 0 there).
    """
    polar, azimuth = (
        math.radians(angle or 0.0) for angle in (settings.elevation, settings.azimuth)
    )
    last = settings.distance or 0.0
    if settings.picture_elevation is not None:
        last = math.radians(90 - settings.picture_elevation)
    return np.array([[-polar, math.sin(azimuth), math.cos(azimuth), last]], np.float32)


# ----------------------------------------------------------------------------------------- networks


def embedding(model: Model, settings: Settings) -> np.ndarray:
    """CLIP's embedding of the picture that leads: (1, D) float32."""
    assert settings.leading is not None
    encoder, backend = model.take(IMAGE_ENCODER), model.backend
    prepare = to_clip_aligned if model.turns else to_clip
    pixels = prepare(settings.leading, encoder.image_size)
    found: np.ndarray = backend.to_numpy(encoder(backend.asarray(pixels)).image_embeds)
    return found


def picture_prompt(model: Model, settings: Settings) -> tuple[np.ndarray, np.ndarray | None]:
    """What a model without text reads in its place.

    Returns: one token of the picture, (1, 1, D) float32; zeros for the negative prompt, None
        without guidance.
    """
    token = embedding(model, settings)
    if model.turns:
        projection, backend = model.take(CC_PROJECTION), model.backend
        joined = np.concatenate([token, pose(settings)], axis=-1)
        token = backend.to_numpy(projection(backend.asarray(joined)))
    token = token[:, None]
    return token, np.zeros_like(token) if settings.guides(model) else None


class Leading:
    """The picture that leads Stable unCLIP, encoded once for all pictures of a run.

    Args:
        model: whose networks encode and noise.
        settings: of the run.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self._backend = model.backend
        self._embeds = embedding(model, settings)
        self._normalizer = model.take(IMAGE_NORMALIZER)
        self._level = settings.noise_level or 0
        self._kept = float(model.image_noise_process[self._level])

    def noised(self, draws: Draws) -> np.ndarray:
        """Noise the embedding for a picture: (1, 2 D) float32."""
        noise, asarray = draws.vector(self._embeds.shape[-1]), self._backend.asarray
        found: np.ndarray = self._backend.to_numpy(
            self._normalizer(
                asarray(self._embeds),
                asarray(noise),
                self._kept**0.5,
                (1 - self._kept) ** 0.5,
                asarray(np.array([self._level], np.float32)),
            )
        )
        return found
