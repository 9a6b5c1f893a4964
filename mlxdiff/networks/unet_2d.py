"""The denoising U-Net without text (Ho et al. 2020): pixels in, pixels out.

Its blocks are those of unet.py, with attention of every pixel to all others in place of
transformers. Shape letters as there.
Source: diffusers models/unets/unet_2d.py and unet_2d_blocks.py.
"""

from __future__ import annotations

from typing import Any

from mlxdiff.errors import UsageError
from mlxdiff.networks.blocks import Attention, TimestepEmbedding
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.config import BlockSpec, UNet2DConfig
from mlxdiff.networks.layers import Array, Layer, Layers, Module, Sizes
from mlxdiff.networks.unet import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetBlock,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)


class _AttnBlock(UNetBlock):
    """Self-attention after each resnet."""

    def make_attentions(self, nn: Layers, block: BlockSpec, config: Any) -> list[Any]:
        return [
            _attention(nn, block, config, config.norm_num_groups) for _ in range(block.num_layers)
        ]


class AttnDownBlock2D(_AttnBlock, CrossAttnDownBlock2D):
    """Resnets, each followed by self-attention, then a downsampler where the block has one."""


class UNetMidBlock2DAttn(UNetMidBlock2DCrossAttn):
    """Two resnets with self-attention between them."""

    def make_attentions(self, nn: Layers, block: BlockSpec, config: Any) -> list[Any]:
        return [_attention(nn, block, config, config.mid_norm_num_groups)]


class AttnUpBlock2D(_AttnBlock, CrossAttnUpBlock2D):
    """Resnets that each take a skip and are followed by self-attention, then an upsampler."""


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

    def __init__(self, nn: Layers, config: UNet2DConfig) -> None:
        super().__init__(nn)
        self.config = config
        first, temb = config.block_out_channels[0], config.time_embed_dim
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(nn, first, temb)
        self.class_embedding: Layer | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(nn, first, temb)
        elif config.class_embed_type is None and config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, temb)
        self.down_blocks = [_BLOCKS[block.type](nn, block, config) for block in config.down_blocks]
        self.mid_block = None
        if config.mid_block is not None:
            self.mid_block = _BLOCKS[config.mid_block.type](nn, config.mid_block, config)
        self.up_blocks = [_BLOCKS[block.type](nn, block, config) for block in config.up_blocks]
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def __call__(
        self,
        sample: Array,
        timesteps: Array | float,
        class_labels: Array | None = None,
    ) -> Array:
        numbers = self.nn.asarray(timesteps, self.nn.float32)
        timesteps = self.nn.broadcast_to(numbers, (len(sample),))
        return self.predict(sample, Condition(self.embed(timesteps, class_labels)))

    def embed(self, timesteps: Array, class_labels: Array | None = None) -> Array:
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
            temb = temb + self.nn.cast(class_labels, temb.dtype)
        return temb

    def predict(self, sample: Array, temb: Condition) -> Array:
        """Run the network, with B rows of the result of ``embed``."""
        x = self.conv_in(self.nn.cast(sample, self.dtype))
        skips = [x]
        for block in self.down_blocks:
            x = block(x, temb, None, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, temb, None)
        for block in self.up_blocks:
            x = block(x, temb, None, skips)
        return self.nn.cast(self.conv_out(self.conv_norm_out.silu(x)), self.nn.float32)

    def run_once(self, sizes: Sizes) -> Array:
        config, batch = self.config, sizes.batch
        vectors = config.class_embed_type == "identity"
        labels = sizes.array(batch, config.time_embed_dim) if vectors else sizes.array(batch)
        return self(
            sizes.array(batch, sizes.height, sizes.width, config.in_channels),
            sizes.array(batch),
            labels if config.takes_label else None,
        )

    def _embed(self, numbers: Array) -> Array:
        """Timesteps, or labels as such, (B,) -> (B, C)."""
        config = self.config
        embedding = self.nn.timestep_embedding(
            numbers, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        return self.nn.cast(embedding, self.dtype)


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


def _attention(nn: Layers, block: BlockSpec, config: UNet2DConfig, groups: int | None) -> Attention:
    return Attention(
        nn,
        block.out_channels,
        block.num_attention_heads,
        bias=True,
        norm_num_groups=groups,
        eps=config.norm_eps,
    )
