"""Every kind of network: which config makes which."""

from __future__ import annotations

from collections.abc import Callable

from mlxdiff.networks.clip import CLIPTextModel
from mlxdiff.networks.clip_vision import CLIPVisionModel
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderKLTemporalDecoderConfig,
    AutoencoderTinyConfig,
    CCProjectionConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    CompactConfig,
    ComponentConfig,
    ControlNetConfig,
    ImageNormalizerConfig,
    IPAdapterConfig,
    LLLiteConfig,
    MotionAdapterConfig,
    RRDBNetConfig,
    T2IAdapterConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
    UNetSpatioTemporalConfig,
)
from mlxdiff.networks.controlnet import ControlNetModel
from mlxdiff.networks.image_led import CCProjection, StableUnCLIPImageNormalizer
from mlxdiff.networks.ip_adapter import IPAdapterModel
from mlxdiff.networks.layers import Layers, Module
from mlxdiff.networks.lllite import LLLiteModel
from mlxdiff.networks.motion import MotionAdapterModel
from mlxdiff.networks.spatio_temporal import (
    AutoencoderKLTemporalDecoder,
    UNetSpatioTemporalConditionModel,
)
from mlxdiff.networks.t2i_adapter import T2IAdapterModel
from mlxdiff.networks.taesd import AutoencoderTiny
from mlxdiff.networks.unet import UNet2DConditionModel
from mlxdiff.networks.unet_2d import UNet2DModel
from mlxdiff.networks.upscaler import CompactNet, RRDBNet
from mlxdiff.networks.vae import AutoencoderKL

NETWORKS: dict[type[ComponentConfig], Callable[..., Module]] = {
    CLIPTextConfig: CLIPTextModel,
    CLIPVisionConfig: CLIPVisionModel,
    ImageNormalizerConfig: StableUnCLIPImageNormalizer,
    CCProjectionConfig: CCProjection,
    UNet2DConditionConfig: UNet2DConditionModel,
    UNet2DConfig: UNet2DModel,
    UNetSpatioTemporalConfig: UNetSpatioTemporalConditionModel,
    ControlNetConfig: ControlNetModel,
    LLLiteConfig: LLLiteModel,
    MotionAdapterConfig: MotionAdapterModel,
    T2IAdapterConfig: T2IAdapterModel,
    IPAdapterConfig: IPAdapterModel,
    AutoencoderKLConfig: AutoencoderKL,
    AutoencoderKLTemporalDecoderConfig: AutoencoderKLTemporalDecoder,
    AutoencoderTinyConfig: AutoencoderTiny,
    RRDBNetConfig: RRDBNet,
    CompactConfig: CompactNet,
}


def build(nn: Layers, config: ComponentConfig) -> Module:
    """The network of a config, built from these layers, without weights."""
    return NETWORKS[type(config)](nn, config)
