"""The U-Net and the VAE of Stable Video Diffusion (Blattmann et al. 2023).

Each layer of a picture's network is followed by one among the frames of the video, and a learned
number mixes the two. Frames stand in a batch one after the other. Shape letters: B videos, F frames
of each, H W sides of the feature map, C channels, E width of the timestep embedding.

A convolution among frames sees three of them at one place. It is a linear layer here: its weight
(C', 3 * C) holds that of the frame before, of the frame itself and of the frame after.

Source: diffusers models/unets/unet_spatio_temporal_condition.py, unet_3d_blocks.py,
models/transformers/transformer_temporal.py, models/resnet.py and
models/autoencoders/autoencoder_kl_temporal_decoder.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mlxdiff.networks.blocks import (
    Attention,
    FeedForward,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
)
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.config import (
    AutoencoderKLTemporalDecoderConfig,
    BlockSpec,
    UNetConfig,
    UNetSpatioTemporalConfig,
)
from mlxdiff.networks.layers import Array, Layer, Layers, Module, Sizes
from mlxdiff.networks.unet import (
    BasicTransformerBlock,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNet2DConditionModel,
    UNetBlock,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from mlxdiff.networks.vae import AutoencoderKL

GROUPS = 32  # of all norms
LARGE = 1 << 24
"""Values of a frame from which on layers see one frame at a time, where they can (the VAE)."""
AMONG_FRAMES = re.compile(r"\.temporal_res_block\.conv\d\.weight$|\.time_conv_out\.weight$")
"""Names of the weights of convolutions among frames."""


class TimeMixer(Module):
    """Mixes what a layer of the picture and one among frames give, by a learned share.

    Args:
        turned: the share is that of the layer among frames (the VAE).
    """

    def __init__(self, nn: Layers, turned: bool = False) -> None:
        super().__init__(nn)
        self.turned = turned
        self.mix_factor = nn.parameter(1)

    def __call__(self, spatial: Array, temporal: Array) -> Array:
        share = 0.5 * self.nn.tanh(0.5 * self.mix_factor) + 0.5  # the logistic function
        if self.turned:
            share = 1 - share
        return share * spatial + (1 - share) * temporal


class TemporalResnetBlock(Module):
    """Two normalized convolutions among frames with a timestep shift between them, added to x.

    Args:
        x: (B * F, H, W, C).
        frames: F.
        temb: of (B, E); None in the VAE.
    Returns: the shape of x.
    """

    def __init__(self, nn: Layers, channels: int, temb_channels: int | None, eps: float) -> None:
        super().__init__(nn)
        self.norm1 = nn.GroupNorm(GROUPS, channels, eps)
        self.conv1 = nn.Linear(3 * channels, channels)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, channels)
        self.norm2 = nn.GroupNorm(GROUPS, channels, eps)
        self.conv2 = nn.Linear(3 * channels, channels)

    def __call__(self, x: Array, frames: int, temb: Condition | None) -> Array:
        rows, height, width, channels = x.shape
        # The statistics are those of all frames together.
        tall = rows // frames, frames * height, width, channels
        h = self.norm1.silu(x.reshape(tall)).reshape(x.shape)
        h = among_frames(self.nn, self.conv1, h, frames).reshape(tall)
        if temb is not None:
            (shift,) = temb.made_by(self, self._shift)
            h = h + shift
        h = self.norm2.silu(h).reshape(x.shape)
        return x + among_frames(self.nn, self.conv2, h, frames)

    def _shift(self, temb: Array) -> tuple[Array]:
        """Make the shift of each channel: (B, E) -> (B, 1, 1, C)."""
        return (self.time_emb_proj(self.nn.silu(temb))[:, None, None, :],)


def among_frames(nn: Layers, convolution: Layer, x: Array, frames: int) -> Array:
    """Apply a convolution to each frame and its neighbours, zeros beyond the ends.

    Args:
        convolution: a linear layer of 3 * C inputs.
        x: (B * F, H, W, C).
        frames: F.
    Returns: (B * F, H, W, C').
    """
    rows, height, width, channels = x.shape
    videos, places = rows // frames, height * width
    h = x.reshape(videos, frames, places, channels)
    if places * channels < LARGE:
        h = nn.pad(h, [(0, 0), (1, 1), (0, 0), (0, 0)])
        h = nn.concatenate([h[:, :-2], h[:, 1:-1], h[:, 2:]], axis=-1)
        return convolution(h.reshape(-1, 3 * channels)).reshape(rows, height, width, -1)
    nothing, parts = 0 * h[:, 0], []
    for i in range(frames):
        near = (h[:, n] if 0 <= n < frames else nothing for n in (i - 1, i, i + 1))
        seen = nn.concatenate([*near], axis=-1)
        part = convolution(seen.reshape(-1, 3 * channels)).reshape(videos, 1, places, -1)
        nn.evaluate(part)
        parts.append(part)
    return nn.concatenate(parts, axis=1).reshape(rows, height, width, -1)


def one_by_one(nn: Layers, layer: Callable[[Array], Array], x: Array) -> Array:
    """Apply a layer that sees each frame alone: to all at once, or to one large one at a time.

    Args:
        x: (F, H, W, C).
    """
    rows, height, width, channels = x.shape
    if rows == 1 or height * width * channels < LARGE:
        return layer(x)
    parts = []
    for i in range(rows):
        parts.append(layer(x[i : i + 1]))
        nn.evaluate(parts[-1])
    return nn.concatenate(parts)


class SpatioTemporalResBlock(Module):
    """A resnet of the picture, one among frames, and their mixture.

    Args:
        x: (B * F, H, W, in_channels).
        temb: of (B, E); None in the VAE.
        frames: F, where there is no temb to tell it.
    Returns: (B * F, H, W, out_channels).
    """

    def __init__(
        self,
        nn: Layers,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None,
        eps: float,
        temporal_eps: float | None = None,
        turned: bool = False,
    ) -> None:
        super().__init__(nn)
        temporal_eps = eps if temporal_eps is None else temporal_eps
        self.spatial_res_block = ResnetBlock2D(
            nn, in_channels, out_channels, temb_channels, GROUPS, eps
        )
        self.temporal_res_block = TemporalResnetBlock(nn, out_channels, temb_channels, temporal_eps)
        self.time_mixer = TimeMixer(nn, turned)

    def __call__(self, x: Array, temb: Condition | None, frames: int = 1) -> Array:
        if temb is None:
            x = one_by_one(self.nn, self.spatial_res_block, x)
        else:
            x, frames = self.spatial_res_block(x, temb), temb.frames.count
        return self.time_mixer(x, self.temporal_res_block(x, frames, temb))


# -------------------------------------------------------------------------------------- the U-Net


class TemporalBasicTransformerBlock(Module):
    """Feed-forward, self-attention among frames, attention to the picture, feed-forward; each
    normalized first and added.

    Args:
        x: (B * P * F, C), the frames of each place one after the other.
        encoder_hidden_states: of (B, L, D).
    Returns: the shape of x.
    """

    def __init__(self, nn: Layers, block: BlockSpec) -> None:
        super().__init__(nn)
        width, heads = block.out_channels, block.num_attention_heads
        self.norm_in = nn.LayerNorm(width)
        self.ff_in = FeedForward(nn, width)
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(nn, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(nn, width, heads, block.cross_attention_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(nn, width)

    def __call__(self, x: Array, encoder_hidden_states: Condition, videos: int) -> Array:
        frames = encoder_hidden_states.frames.count
        x = x + self.ff_in(self.norm_in(x))
        x += self.attn1(self.norm1(x), batch=len(x) // frames)
        x += self.attn2(self.norm2(x), encoder_hidden_states, videos)
        x += self.ff(self.norm3(x))
        return x


class FramePositions(Module):
    """Two linear layers on the sines and cosines of the numbers of frames: F -> (F, C)."""

    def __init__(self, nn: Layers, width: int) -> None:
        super().__init__(nn)
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)

    def __call__(self, frames: int) -> Array:
        nn, width = self.nn, self.linear_2.bias.shape[0]  # type: ignore[attr-defined]
        numbers = nn.cast(nn.arange(frames), nn.float32)
        table = nn.cast(nn.timestep_embedding(numbers, width), self.dtype)
        return self.linear_2(nn.silu(self.linear_1(table)))


class TransformerSpatioTemporalModel(Module):
    """Pairs of transformer blocks, over pixels and over frames, each pair mixed; between two
    projections, added to x.

    Args:
        x: (B * F, H, W, C).
        encoder_hidden_states: of (B, L, D).
    Returns: the shape of x.
    """

    def __init__(self, nn: Layers, block: BlockSpec, num_layers: int) -> None:
        super().__init__(nn)
        width = block.out_channels
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = [BasicTransformerBlock(nn, block) for _ in range(num_layers)]
        self.temporal_transformer_blocks = [
            TemporalBasicTransformerBlock(nn, block) for _ in range(num_layers)
        ]
        self.time_pos_embed = FramePositions(nn, width)
        self.time_mixer = TimeMixer(nn)
        self.proj_out = nn.Linear(width, width)

    def __call__(self, x: Array, encoder_hidden_states: Condition) -> Array:
        rows, height, width, channels = x.shape
        frames, places = encoder_hidden_states.frames.count, height * width
        videos = rows // frames
        positions = self.time_pos_embed(frames)

        def turned(h: Array, first: int, second: int) -> Array:
            """Exchange two axes: frames and places."""
            h = h.reshape(videos, first, second, channels).transpose(0, 2, 1, 3)
            return h.reshape(-1, channels)

        h = self.proj_in(self.norm(x).reshape(-1, channels))
        blocks = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        for block, temporal in blocks:
            h = block(h, encoder_hidden_states, x.shape)
            mixed = turned(h, frames, places).reshape(-1, frames, channels) + positions
            mixed = temporal(mixed.reshape(-1, channels), encoder_hidden_states, videos)
            h = self.time_mixer(h, turned(mixed, places, frames))
        return x + self.proj_out(h).reshape(x.shape)


class _SpatioTemporalBlock(UNetBlock):
    """Layers of the picture, each mixed with one among frames."""

    eps = 1e-6  # of the norms; the blocks differ, as in the reference

    def make_resnet(
        self, nn: Layers, in_channels: int, block: BlockSpec, config: UNetConfig
    ) -> SpatioTemporalResBlock:
        return SpatioTemporalResBlock(
            nn, in_channels, block.out_channels, config.time_embed_dim, self.eps
        )

    def make_attentions(self, nn: Layers, block: BlockSpec, config: Any) -> list[Any]:
        return [TransformerSpatioTemporalModel(nn, block, n) for n in block.transformer_layers]


class DownBlockSpatioTemporal(_SpatioTemporalBlock, DownBlock2D):
    """As DownBlock2D, for frames."""

    eps = 1e-5


class CrossAttnDownBlockSpatioTemporal(_SpatioTemporalBlock, CrossAttnDownBlock2D):
    """As CrossAttnDownBlock2D, for frames."""


class UNetMidBlockSpatioTemporal(_SpatioTemporalBlock, UNetMidBlock2DCrossAttn):
    """As UNetMidBlock2DCrossAttn, for frames."""

    eps = 1e-5


class UpBlockSpatioTemporal(_SpatioTemporalBlock, UpBlock2D):
    """As UpBlock2D, for frames."""


class CrossAttnUpBlockSpatioTemporal(_SpatioTemporalBlock, CrossAttnUpBlock2D):
    """As CrossAttnUpBlock2D, for frames."""


class UNetSpatioTemporalConditionModel(UNet2DConditionModel):
    """Predicts from the noisy latents of a video what its config's schedule is trained on.

    Args: as of UNet2DConditionModel; samples are the frames of all videos, and
        time_ids: (B, 3): frames a second less one, the amount of motion, the picture's noise.
    """

    config: UNetSpatioTemporalConfig

    def __init__(self, nn: Layers, config: UNetSpatioTemporalConfig) -> None:
        super().__init__(nn, config)
        embed_in = config.projection_class_embeddings_input_dim
        assert embed_in is not None, "the config has it"
        self.add_embedding = TimestepEmbedding(nn, embed_in, config.time_embed_dim)

    def make_block(self, nn: Layers, block: BlockSpec, config: UNetConfig) -> Module:
        kind: Any = _BLOCKS[block.type]
        made: Module = kind(nn, block, config)
        return made

    def embed(self, timesteps: Array, *_: Any, time_ids: Array = None, **__: Any) -> Array:
        """The timestep embedding with that of the three numbers: (N,), (N, 3) -> (N, E)."""
        config, nn = self.config, self.nn
        temb = nn.timestep_embedding(timesteps, config.block_out_channels[0])
        temb = self.time_embedding(nn.cast(temb, self.dtype))
        ids, width = time_ids, config.addition_time_embed_dim
        assert self.add_embedding is not None and width is not None
        added = nn.timestep_embedding(ids.reshape(-1), width).reshape(len(ids), -1)
        return temb + self.add_embedding(nn.cast(added, self.dtype))

    def conditions(self, sizes: Sizes) -> dict[str, Array]:
        return {"time_ids": sizes.array(sizes.batch, 3)}


_BLOCKS = {
    "DownBlock2D": DownBlockSpatioTemporal,
    "CrossAttnDownBlock2D": CrossAttnDownBlockSpatioTemporal,
    "UNetMidBlock2DCrossAttn": UNetMidBlockSpatioTemporal,
    "UpBlock2D": UpBlockSpatioTemporal,
    "CrossAttnUpBlock2D": CrossAttnUpBlockSpatioTemporal,
}


# ---------------------------------------------------------------------------------------- the VAE


class MidBlockTemporalDecoder(Module):
    """Resnets, with self-attention over the pixels after the first."""

    def __init__(self, nn: Layers, channels: int, layers: int) -> None:
        super().__init__(nn)
        self.resnets = _decoder_resnets(nn, channels, channels, layers)
        self.attentions = [Attention(nn, channels, heads=1, bias=True, norm_num_groups=GROUPS)]

    def __call__(self, x: Array, frames: int) -> Array:
        first, *rest = self.resnets
        x = first(x, None, frames)
        # As the reference: no more attentions than there are, and none without a resnet after it.
        for attention, resnet in zip(self.attentions, rest, strict=False):
            x = resnet(attention(x), None, frames)
        return x


class UpBlockTemporalDecoder(Module):
    """Resnets, then an upsampler where ``resample`` is set."""

    def __init__(
        self, nn: Layers, in_channels: int, out_channels: int, layers: int, resample: bool
    ) -> None:
        super().__init__(nn)
        self.resnets = _decoder_resnets(nn, in_channels, out_channels, layers)
        self.upsamplers = [Upsample2D(nn, out_channels)] if resample else []

    def __call__(self, x: Array, frames: int) -> Array:
        for resnet in self.resnets:
            x = resnet(x, None, frames)
        for upsampler in self.upsamplers:
            x = one_by_one(self.nn, upsampler, x)
        return x


def _decoder_resnets(
    nn: Layers, in_channels: int, out_channels: int, layers: int
) -> list[SpatioTemporalResBlock]:
    return [
        SpatioTemporalResBlock(
            nn, out_channels if i else in_channels, out_channels, None, 1e-6, 1e-5, turned=True
        )
        for i in range(layers)
    ]


class TemporalDecoder(Module):
    """Latents of frames to pixels: (B * F, H, W, C) -> (B * F, f * H, f * W, 3)."""

    def __init__(self, nn: Layers, config: AutoencoderKLTemporalDecoderConfig) -> None:
        super().__init__(nn)
        widths, layers = config.block_out_channels[::-1], config.layers_per_block
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlockTemporalDecoder(nn, widths[0], layers)
        self.up_blocks = [
            UpBlockTemporalDecoder(nn, widths[max(i - 1, 0)], width, layers + 1, i < last)
            for i, width in enumerate(widths)
        ]
        self.conv_norm_out = nn.GroupNorm(GROUPS, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)
        self.time_conv_out = nn.Linear(3 * config.out_channels, config.out_channels)

    def __call__(self, z: Array, frames: int) -> Array:
        x = self.mid_block(self.conv_in(z), frames)
        for block in self.up_blocks:
            x = block(x, frames)
        x = one_by_one(self.nn, lambda frame: self.conv_out(self.conv_norm_out.silu(frame)), x)
        return among_frames(self.nn, self.time_conv_out, x, frames)


class AutoencoderKLTemporalDecoder(AutoencoderKL):
    """The autoencoder: pictures are encoded one by one, the frames of a video decoded together."""

    def __init__(self, nn: Layers, config: AutoencoderKLTemporalDecoderConfig) -> None:
        super().__init__(nn, config)
        self.decoder: Any = TemporalDecoder(nn, config)

    def decode(self, z: Array) -> Array:
        """The frames that latents stand for.

        Args:
            z: (F, H, W, C), unscaled, of one video.
        Returns: (F, f * H, f * W, 3) float32, nominally in [-1, 1], not clamped.
        """
        return self.nn.cast(self.decoder(self.decoder_input(z), len(z)), self.nn.float32)

    def run_once(self, sizes: Sizes) -> Array | tuple[Array, Array]:
        if sizes.encode:
            return super().run_once(sizes)
        shape = sizes.frames.count, sizes.height, sizes.width, self.config.latent_channels
        return self.decode(sizes.array(*shape))
