"""The tiny autoencoder TAESD in MLX (Bohan 2023, github.com/madebyollin/taesd). Mirrors
reference/taesd.py.

Inside, pixels are in [0, 1]. Shape letters: B batch, H W sides, C channels, f pixels for each
latent.
Source: diffusers models/autoencoders/autoencoder_tiny.py and vae.py.
"""

from __future__ import annotations

import mlx.core as mx

from mlxdiff.models.layers import Conv2d, Module, upsample_nearest
from mlxdiff.networks.config import AutoencoderTinyConfig


class ReLU(Module):
    """max(x, 0). A module, since it has a place in the parameter names."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.maximum(x, 0)


class Upsample(Module):
    """Twice the sides: (B, H, W, C) -> (B, 2 * H, 2 * W, C)."""

    def __call__(self, x: mx.array) -> mx.array:
        return upsample_nearest(x, 2 * x.shape[1], 2 * x.shape[2])


class AutoencoderTinyBlock(Module):
    """Three convolutions beside a shortcut: (B, H, W, C) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = [convs[0], ReLU(), convs[1], ReLU(), convs[2]]

    def __call__(self, x: mx.array) -> mx.array:
        out = x
        for layer in self.conv:
            out = layer(out)
        return mx.maximum(x + out, 0)


class EncoderTiny(Module):
    """Pixels in [-1, 1] to latents: (B, H, W, 3) -> (B, H/f, W/f, C)."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        width = config.encoder_block_out_channels[0]
        self.layers: list[Module] = []
        for level, count in enumerate(config.num_encoder_blocks):
            if level == 0:
                self.layers.append(Conv2d(config.in_channels, width, 3, padding=1))
            else:
                self.layers.append(Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            self.layers += [AutoencoderTinyBlock(width) for _ in range(count)]
        self.layers.append(Conv2d(width, config.latent_channels, 3, padding=1))

    def __call__(self, x: mx.array) -> mx.array:
        x = (x + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class DecoderTiny(Module):
    """Latents to pixels, nominally in [-1, 1]: (B, H, W, C) -> (B, f * H, f * W, 3)."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        width = config.decoder_block_out_channels[0]
        self.layers: list[Module] = [Conv2d(config.latent_channels, width, 3, padding=1), ReLU()]
        for count in config.num_decoder_blocks[:-1]:
            self.layers += [AutoencoderTinyBlock(width) for _ in range(count)]
            self.layers += [Upsample(), Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers += [AutoencoderTinyBlock(width) for _ in range(config.num_decoder_blocks[-1])]
        self.layers.append(Conv2d(width, config.out_channels, 3, padding=1))

    def __call__(self, z: mx.array) -> mx.array:
        x = mx.tanh(z / 3) * 3
        for layer in self.layers:
            x = layer(x)
        return x * 2 - 1


class AutoencoderTiny(Module):
    """The tiny autoencoder. Scaling and shift of latents are the pipeline's business."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        self.encoder = EncoderTiny(config)
        self.decoder = DecoderTiny(config)

    def encode(self, x: mx.array) -> tuple[mx.array, None]:
        """The latents of a picture.

        Args:
            x: (B, H, W, 3) in [-1, 1]; H and W multiples of f.
        Returns: (B, H/f, W/f, C) float32; and None, for there is no variance.
        """
        x = x.astype(self.dtype)
        return self.encoder(x).astype(mx.float32), None

    def decode(self, z: mx.array) -> mx.array:
        """The picture that latents stand for.

        Args:
            z: (B, H, W, C), unscaled.
        Returns: (B, f * H, f * W, 3) float32, nominally in [-1, 1], not clamped.
        """
        z = z.astype(self.dtype)
        return self.decoder(z).astype(mx.float32)
