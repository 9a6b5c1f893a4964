"""The denoising U-Net without text in NumPy (Ho et al. 2020): pixels in, pixels out. Mirrors
models/unet_2d.py.

Its blocks are those of unet.py, with attention of every pixel to all others in place of
transformers. Shape letters as there.
Source: diffusers models/unets/unet_2d.py and unet_2d_blocks.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.config import BlockSpec, UNet2DConfig
from mlxdiff.reference.blocks import Attention, TimestepEmbedding
from mlxdiff.reference.layers import (
    Conv2d,
    Embedding,
    GroupNorm,
    Module,
    timestep_embedding,
)
from mlxdiff.reference.unet import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)


class AttnDownBlock2D(CrossAttnDownBlock2D):
    """Resnets, each followed by self-attention, then a downsampler where the block has one."""

    def __init__(self, block: BlockSpec, config: UNet2DConfig) -> None:
        super().__init__(block, config)
        groups = config.norm_num_groups
        self.attentions = [_attention(block, config, groups) for _ in self.resnets]


class UNetMidBlock2DAttn(UNetMidBlock2DCrossAttn):
    """Two resnets with self-attention between them."""

    def __init__(self, block: BlockSpec, config: UNet2DConfig) -> None:
        super().__init__(block, config)
        self.attentions = [_attention(block, config, config.mid_norm_num_groups)]


class AttnUpBlock2D(CrossAttnUpBlock2D):
    """Resnets that each take a skip and are followed by self-attention, then an upsampler."""

    def __init__(self, block: BlockSpec, config: UNet2DConfig) -> None:
        super().__init__(block, config)
        groups = config.norm_num_groups
        self.attentions = [_attention(block, config, groups) for _ in self.resnets]


class UNet2DModel(Module):
    """Predicts from noisy pixels what the config's schedule is trained on: noise, v or the sample.

    Args:
        sample: (B, H, W, in_channels); any height and width.
        timesteps: (B,), or one number for all.
        class_labels: (B,) numbers of the classes, int32; with class_embed_type timestep any
            numbers, float32; with identity vectors, (B, E) float32. None for a model without.
    Returns: (B, H, W, out_channels), float32.
    Raises: UsageError where the model needs class_labels and does not get them, or the other way
        round.
    """

    def __init__(self, config: UNet2DConfig) -> None:
        self.config = config
        first, temb = config.block_out_channels[0], config.time_embed_dim
        self.conv_in = Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, temb)
        self.class_embedding: Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(first, temb)
        elif config.class_embed_type is None and config.num_class_embeds is not None:
            self.class_embedding = Embedding(config.num_class_embeds, temb)
        self.down_blocks = [_BLOCKS[block.type](block, config) for block in config.down_blocks]
        self.mid_block = None
        if config.mid_block is not None:
            self.mid_block = _BLOCKS[config.mid_block.type](config.mid_block, config)
        self.up_blocks = [_BLOCKS[block.type](block, config) for block in config.up_blocks]
        self.conv_norm_out = GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = Conv2d(first, config.out_channels, 3, padding=1)

    def __call__(
        self,
        sample: np.ndarray,
        timesteps: np.ndarray | float,
        class_labels: np.ndarray | None = None,
    ) -> np.ndarray:
        timesteps = np.broadcast_to(np.asarray(timesteps, np.float32), len(sample))
        return self.predict(sample, Condition(self.embed(timesteps, class_labels)))

    def embed(self, timesteps: np.ndarray, class_labels: np.ndarray | None = None) -> np.ndarray:
        """The timestep embedding with that of the class: (N,), (N,) -> (N, E)."""
        if self.config.takes_label != (class_labels is not None):
            needs = "needs class_labels" if class_labels is None else "takes no class_labels"
            raise UsageError(f"this U-Net {needs} (num_class_embeds, class_embed_type)")
        temb = self.time_embedding(self._embed(timesteps))
        if class_labels is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self._embed(class_labels)
            if self.class_embedding is not None:
                class_labels = self.class_embedding(class_labels)
            temb = temb + class_labels
        return temb

    def predict(self, sample: np.ndarray, temb: Condition) -> np.ndarray:
        """Run the network, with B rows of what ``embed`` gives."""
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, temb, None, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, temb, None)
        for block in self.up_blocks:
            x = block(x, temb, None, skips)
        return self.conv_out(self.conv_norm_out.silu(x))

    def _embed(self, numbers: np.ndarray) -> np.ndarray:
        """Timesteps, or labels as such, (B,) -> (B, C)."""
        config = self.config
        return timestep_embedding(
            numbers, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )


_BLOCKS: dict[str, Any] = {
    block.__name__: block
    for block in (
        DownBlock2D,
        AttnDownBlock2D,
        UNetMidBlock2D,
        UNetMidBlock2DAttn,
        UpBlock2D,
        AttnUpBlock2D,
    )
}


def _attention(block: BlockSpec, config: UNet2DConfig, groups: int | None) -> Attention:
    return Attention(
        block.out_channels,
        block.num_attention_heads,
        bias=True,
        norm_num_groups=groups,
        eps=config.norm_eps,
    )
