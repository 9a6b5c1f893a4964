"""Configs of components (config.json): frozen dataclasses, read strictly.

Fields carry the key names of diffusers and transformers. A key that is absent takes the default
of the reference class (as those libraries do). Every key of a file is one of three things: used,
known to have no effect on what is computed here (``*_NO_EFFECT``, with the reason beside it), or
an error. A value that would change the computation in a way that is not implemented is an error
too, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxdiff.networks.config.adapters import (
    IPAdapterConfig,
    LLLiteConfig,
    LLLiteModuleConfig,
    T2IAdapterConfig,
)
from mlxdiff.networks.config.controlnet import ControlNetConfig, ControlTypes
from mlxdiff.networks.config.led import POSE, CCProjectionConfig, ImageNormalizerConfig
from mlxdiff.networks.config.motion import MotionAdapterConfig, MotionSpec
from mlxdiff.networks.config.text import CLIP_NO_EFFECT, CLIPTextConfig, CLIPVisionConfig
from mlxdiff.networks.config.unet import UNET_NO_EFFECT, BlockSpec, UNet2DConditionConfig
from mlxdiff.networks.config.unet_2d import UNET_2D_NO_EFFECT, UNet2DConfig
from mlxdiff.networks.config.upscaler import CompactConfig, RRDBNetConfig
from mlxdiff.networks.config.vae import (
    TINY_VAE_NO_EFFECT,
    VAE_NO_EFFECT,
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
)
from mlxdiff.networks.config.video import (
    AutoencoderKLTemporalDecoderConfig,
    UNetSpatioTemporalConfig,
)

__all__ = [
    "CLIP_NO_EFFECT",
    "POSE",
    "TINY_VAE_NO_EFFECT",
    "UNET_2D_NO_EFFECT",
    "UNET_NO_EFFECT",
    "VAE_NO_EFFECT",
    "AutoencoderKLConfig",
    "AutoencoderKLTemporalDecoderConfig",
    "AutoencoderTinyConfig",
    "BlockSpec",
    "CCProjectionConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "CompactConfig",
    "ComponentConfig",
    "ControlNetConfig",
    "ControlTypes",
    "IPAdapterConfig",
    "ImageNormalizerConfig",
    "LLLiteConfig",
    "LLLiteModuleConfig",
    "MotionAdapterConfig",
    "MotionSpec",
    "RRDBNetConfig",
    "T2IAdapterConfig",
    "UNet2DConditionConfig",
    "UNet2DConfig",
    "UNetConfig",
    "UNetSpatioTemporalConfig",
    "UpscalerConfig",
    "VAEConfig",
    "read_unet",
    "read_vae",
]

VAEConfig = AutoencoderKLConfig | AutoencoderTinyConfig
UNetConfig = UNet2DConditionConfig | UNet2DConfig
UpscalerConfig = RRDBNetConfig | CompactConfig
ComponentConfig = (
    CLIPTextConfig
    | CLIPVisionConfig
    | ImageNormalizerConfig
    | CCProjectionConfig
    | UNetConfig
    | ControlNetConfig
    | MotionAdapterConfig
    | T2IAdapterConfig
    | LLLiteConfig
    | IPAdapterConfig
    | VAEConfig
    | UpscalerConfig
)


def read_unet(data: Mapping[str, Any], where: str = "unet/config.json") -> UNetConfig:
    """The config of a U-Net, of the class that it names. Raises: ConfigError."""
    kinds = {
        "UNet2DModel": UNet2DConfig,
        "UNetSpatioTemporalConditionModel": UNetSpatioTemporalConfig,
    }
    kind: Any = kinds.get(str(data.get("_class_name")), UNet2DConditionConfig)
    found: UNetConfig = kind.from_dict(data, where)
    return found


def read_vae(data: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
    """The config of a VAE, of the class that it names. Raises: ConfigError."""
    kinds = {
        "AutoencoderTiny": AutoencoderTinyConfig,
        "AutoencoderKLTemporalDecoder": AutoencoderKLTemporalDecoderConfig,
    }
    kind: Any = kinds.get(str(data.get("_class_name")), AutoencoderKLConfig)
    found: VAEConfig = kind.from_dict(data, where)
    return found
