"""The autoencoder of pixels and latents (Rombach et al. 2022).

GroupNorm's eps is 1e-6 throughout. Shape letters: B batch, H W sides, C channels, f pixels for each
latent.
Source: diffusers models/autoencoders/vae.py and autoencoder_kl.py.
"""

from __future__ import annotations

from mlxdiff.networks.blocks import Attention, Downsample2D, ResnetBlock2D, Upsample2D
from mlxdiff.networks.config import AutoencoderKLConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes

_EPS = 1e-6


class DownEncoderBlock2D(Module):
    """Resnets, then a downsampler where ``resample`` is set: (B, H, W, C) -> (B, H', W', C')."""

    def __init__(
        self,
        nn: Layers,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        resample: bool,
    ) -> None:
        super().__init__(nn)
        self.resnets = _resnets(nn, in_channels, out_channels, num_layers, groups)
        self.downsamplers = [Downsample2D(nn, out_channels, padding=0)] if resample else []

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock2D(Module):
    """Resnets, then an upsampler where ``resample`` is set: (B, H, W, C) -> (B, H', W', C')."""

    def __init__(
        self,
        nn: Layers,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        resample: bool,
    ) -> None:
        super().__init__(nn)
        self.resnets = _resnets(nn, in_channels, out_channels, num_layers, groups)
        self.upsamplers = [Upsample2D(nn, out_channels)] if resample else []

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class UNetMidBlock2D(Module):
    """Two resnets, with one-headed self-attention over the pixels between them."""

    def __init__(self, nn: Layers, channels: int, groups: int, add_attention: bool) -> None:
        super().__init__(nn)
        self.resnets = _resnets(nn, channels, channels, 2, groups)
        self.attentions = []
        if add_attention:
            self.attentions = [Attention(nn, channels, heads=1, bias=True, norm_num_groups=groups)]

    def __call__(self, x: Array) -> Array:
        first, last = self.resnets
        for layer in (first, *self.attentions, last):
            x = layer(x)
        return x


class Encoder(Module):
    """Pixels to the mean and log-variance of latents: (B, H, W, 3) -> (B, H/f, W/f, 2 * C)."""

    def __init__(self, nn: Layers, config: AutoencoderKLConfig) -> None:
        super().__init__(nn)
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = [
            DownEncoderBlock2D(
                nn, widths[max(i - 1, 0)], width, config.layers_per_block, groups, i < last
            )
            for i, width in enumerate(widths)
        ]
        self.mid_block = UNetMidBlock2D(nn, widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out.silu(x))


class Decoder(Module):
    """Latents to pixels: (B, H, W, C) -> (B, f * H, f * W, 3)."""

    def __init__(self, nn: Layers, config: AutoencoderKLConfig) -> None:
        super().__init__(nn)
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = UNetMidBlock2D(nn, widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = [
            UpDecoderBlock2D(
                nn, widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, i < last
            )
            for i, width in enumerate(widths)
        ]
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def __call__(self, z: Array) -> Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out.silu(x))


class AutoencoderKL(Module):
    """The autoencoder. Scaling and shift of latents are the pipeline's business."""

    def __init__(self, nn: Layers, config: AutoencoderKLConfig) -> None:
        super().__init__(nn)
        self.config, channels = config, config.latent_channels
        self.encoder = Encoder(nn, config)
        self.quant_conv = self.post_quant_conv = None
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = Decoder(nn, config)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Mean and log-variance of the latents of a picture.

        Args:
            x: (B, H, W, 3) in [-1, 1]; H and W multiples of f.
        Returns: two float32 arrays (B, H/f, W/f, C); the log-variance is clamped to [-30, 20].
        """
        moments = self.encoder(self.nn.cast(x, self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = self.nn.split(self.nn.cast(moments, self.nn.float32), 2, axis=-1)
        return mean, self.nn.clip(logvar, -30.0, 20.0)

    def decode(self, z: Array) -> Array:
        """The picture that latents stand for.

        Args:
            z: (B, H, W, C), unscaled.
        Returns: (B, f * H, f * W, 3) float32, nominally in [-1, 1], not clamped.
        """
        return self.nn.cast(self.decoder(self.decoder_input(z)), self.nn.float32)

    def decoder_input(self, z: Array) -> Array:
        """Make the decoder's input of latents (B, H, W, C): the same shape."""
        z = self.nn.cast(z, self.dtype)
        return z if self.post_quant_conv is None else self.post_quant_conv(z)

    def run_once(self, sizes: Sizes) -> Array | tuple[Array, Array]:
        shape = sizes.batch, sizes.height, sizes.width
        if sizes.encode:
            return self.encode(sizes.array(*shape, self.config.in_channels))
        return self.decode(sizes.array(*shape, self.config.latent_channels))


def _resnets(
    nn: Layers, in_channels: int, out_channels: int, num_layers: int, groups: int
) -> list[ResnetBlock2D]:
    return [
        ResnetBlock2D(nn, out_channels if i else in_channels, out_channels, None, groups, _EPS)
        for i in range(num_layers)
    ]
