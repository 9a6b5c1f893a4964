"""ControlNets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxdiff.networks.config.reader import ConfigReader
from mlxdiff.networks.config.unet import BlockSpec, UNet2DConditionConfig


@dataclass(frozen=True)
class ControlTypes:
    """What a ControlNet-Union has beside a ControlNet: it knows several types of picture.

    Attributes:
        count: number of types.
        channels: width of the vector that stands for a type.
        layers: transformer layers on it.
    """

    count: int
    channels: int
    layers: int


@dataclass(frozen=True)
class ControlNetConfig(UNet2DConditionConfig):
    """A ControlNet, as diffusers' ControlNetModel: the first half of a U-Net, and what it is shown.

    The fields of the U-Net's second half are there and mean nothing.

    Attributes:
        conditioning_channels: of the picture that it is shown.
        conditioning_embedding_out_channels: widths of the convolutions that bring the picture to
            the size of the latents; each after the first halves it.
        channel_order: "rgb", or "bgr" where the picture's channels are to be turned round.
        global_pool_conditions: what it adds is the same at every place (the mean over all).
        types: the types of picture that a ControlNet-Union knows; None for a ControlNet.

    Source: Zhang et al. 2023 (arXiv 2302.05543).
    """

    conditioning_channels: int
    conditioning_embedding_out_channels: tuple[int, ...]
    channel_order: str
    global_pool_conditions: bool
    types: ControlTypes | None

    @property
    def up_blocks(self) -> tuple[BlockSpec, ...]:
        """There are none."""
        return ()

    @property
    def residual_channels(self) -> tuple[int, ...]:
        """Channels of each output of the way down, and of the residual added to it."""
        channels = [self.block_out_channels[0]]
        for block in self.down_blocks:
            channels += [block.out_channels] * (block.num_layers + block.resample)
        return tuple(channels)

    @property
    def factor(self) -> int:
        """Pixels for each latent, along a side."""
        return int(2 ** (len(self.conditioning_embedding_out_channels) - 1))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "controlnet/config.json"
    ) -> ControlNetConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("ControlNetModel", "ControlNetUnionModel"))
        types = None
        if data.get("_class_name") == "ControlNetUnionModel":
            types = ControlTypes(
                reader.integer("num_control_type", 6),
                reader.integer("num_trans_channel", 320),
                reader.integer("num_trans_layer", 1),
            )
            reader.integer("num_trans_head", 8)  # no effect: see networks.controlnet
            reader.integer("num_proj_channel", 320)  # the first width, or the shapes do not fit
        own: dict[str, Any] = {
            "types": types,
            "conditioning_channels": reader.only("conditioning_channels", 3, 3),
            "conditioning_embedding_out_channels": reader.integers(
                "conditioning_embedding_out_channels", (16, 32, 96, 256)
            ),
            "channel_order": reader.only(
                "controlnet_conditioning_channel_order", "rgb", "rgb", "bgr"
            ),
            "global_pool_conditions": reader.flag("global_pool_conditions", False),
        }
        reader.only("num_class_embeds", None, None)
        reader.only("class_embed_type", None, None)
        down = reader.left.get("down_block_types")
        if isinstance(down, (list, tuple)):
            mirrored = [str(kind).replace("Down", "Up") for kind in reversed(down)]
            reader.left["up_block_types"] = mirrored
        if reader.left.get("mid_block_type", "") is None:
            raise reader.fail("mid_block_type", None, "a mid block")
        unet = UNet2DConditionConfig.from_dict(reader.left, where)
        return cls(**vars(unet), **own)
