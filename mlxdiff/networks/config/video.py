"""Stable Video Diffusion: its U-Net and its VAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxdiff.networks.config.reader import ConfigReader, is_int
from mlxdiff.networks.config.unet import DOWN_TYPES, UP_TYPES, UNet2DConditionConfig
from mlxdiff.networks.config.vae import AutoencoderKLConfig


@dataclass(frozen=True)
class UNetSpatioTemporalConfig(UNet2DConditionConfig):
    """The U-Net of Stable Video Diffusion, as diffusers' UNetSpatioTemporalConditionModel.

    Its blocks are those of a picture's U-Net, each with a layer among frames; ``Block2D`` in the
    names of types stands for ``BlockSpatioTemporal``.

    Attributes:
        num_frames: of the videos that it was trained on.

    Source: Blattmann et al. 2023 (arXiv 2311.15127).
    """

    num_frames: int = field(kw_only=True)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "unet/config.json"
    ) -> UNetSpatioTemporalConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("UNetSpatioTemporalConditionModel",))
        own: dict[str, Any] = {"norm_num_groups": 32, "use_linear_projection": True}
        for way, types in (("down", DOWN_TYPES), ("up", UP_TYPES)):
            names = tuple(name.replace("2D", "SpatioTemporal") for name in types)
            default = (names[1],) * 3 + names[:1]
            found = reader.choices(
                f"{way}_block_types", default[:: 1 if way == "down" else -1], names
            )
            own[f"{way}_block_types"] = [name.replace("SpatioTemporal", "2D") for name in found]
        for key, value in (
            ("in_channels", 8),
            ("num_attention_heads", [5, 10, 20, 20]),
            ("cross_attention_dim", 1024),
            ("addition_time_embed_dim", 256),
            ("projection_class_embeddings_input_dim", 768),
        ):
            own[key] = reader.take(key, value)
        numbers, width = (
            own["addition_time_embed_dim"],
            own["projection_class_embeddings_input_dim"],
        )
        if not is_int(numbers) or width != 3 * numbers:
            raise reader.fail(
                "projection_class_embeddings_input_dim", width, "3 times addition_time_embed_dim"
            )
        frames = reader.integer("num_frames", 25, most=1024)
        unet = UNet2DConditionConfig.from_dict(reader.left | own, where)
        return cls(**vars(unet), num_frames=frames)


@dataclass(frozen=True)
class AutoencoderKLTemporalDecoderConfig(AutoencoderKLConfig):
    """The autoencoder of Stable Video Diffusion, as diffusers' AutoencoderKLTemporalDecoder.

    Source: Blattmann et al. 2023 (arXiv 2311.15127).
    """

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "vae/config.json"
    ) -> AutoencoderKLTemporalDecoderConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("AutoencoderKLTemporalDecoder",))
        widths = reader.left.get("block_out_channels", (64,))
        count = len(widths) if isinstance(widths, (list, tuple)) else 1
        own = {"up_block_types": ["UpDecoderBlock2D"] * count, "use_post_quant_conv": False}
        own |= {"force_upcast": reader.flag("force_upcast", True)}
        for key in own.keys() & reader.left.keys():
            raise reader.fail(key, reader.left[key], "no such key in this class")
        return cls(**vars(AutoencoderKLConfig.from_dict(reader.left | own, where)))
