"""The tiny autoencoder TAESD in NumPy (Bohan 2023, github.com/madebyollin/taesd). Mirrors
models/taesd.py.

Inside, pixels are in [0, 1]. Shape letters: B batch, H W sides, C channels, f pixels for each
latent.
Source: diffusers models/autoencoders/autoencoder_tiny.py and vae.py.
"""

from __future__ import annotations

import numpy as np

from mlxdiff.networks.config import AutoencoderTinyConfig
from mlxdiff.reference.layers import Conv2d, Module, upsample_nearest


class ReLU(Module):
    """max(x, 0). A module, since it has a place in the parameter names."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)


class Upsample(Module):
    """Twice the sides: (B, H, W, C) -> (B, 2 * H, 2 * W, C)."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return upsample_nearest(x, 2 * x.shape[1], 2 * x.shape[2])


class AutoencoderTinyBlock(Module):
    """Three convolutions beside a shortcut: (B, H, W, C) -> the same."""

    def __init__(self, channels: int) -> None:
        convs = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = [convs[0], ReLU(), convs[1], ReLU(), convs[2]]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out = x
        for layer in self.conv:
            out = layer(out)
        return np.maximum(x + out, 0)


class EncoderTiny(Module):
    """Pixels in [-1, 1] to latents: (B, H, W, 3) -> (B, H/f, W/f, C)."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        width = config.encoder_block_out_channels[0]
        self.layers: list[Module] = []
        for level, count in enumerate(config.num_encoder_blocks):
            if level == 0:
                self.layers.append(Conv2d(config.in_channels, width, 3, padding=1))
            else:
                self.layers.append(Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            self.layers += [AutoencoderTinyBlock(width) for _ in range(count)]
        self.layers.append(Conv2d(width, config.latent_channels, 3, padding=1))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = (x + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class DecoderTiny(Module):
    """Latents to pixels, nominally in [-1, 1]: (B, H, W, C) -> (B, f * H, f * W, 3)."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        width = config.decoder_block_out_channels[0]
        self.layers: list[Module] = [Conv2d(config.latent_channels, width, 3, padding=1), ReLU()]
        for count in config.num_decoder_blocks[:-1]:
            self.layers += [AutoencoderTinyBlock(width) for _ in range(count)]
            self.layers += [Upsample(), Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers += [AutoencoderTinyBlock(width) for _ in range(config.num_decoder_blocks[-1])]
        self.layers.append(Conv2d(width, config.out_channels, 3, padding=1))

    def __call__(self, z: np.ndarray) -> np.ndarray:
        x = np.tanh(z / 3) * 3
        for layer in self.layers:
            x = layer(x)
        return x * 2 - 1


class AutoencoderTiny(Module):
    """The tiny autoencoder. Scaling and shift of latents are the pipeline's business."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        self.encoder = EncoderTiny(config)
        self.decoder = DecoderTiny(config)

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, None]:
        """The latents of a picture.

        Args:
            x: (B, H, W, 3) in [-1, 1]; H and W multiples of f.
        Returns: (B, H/f, W/f, C) float32; and None, for there is no variance.
        """
        return self.encoder(x), None

    def decode(self, z: np.ndarray) -> np.ndarray:
        """The picture that latents stand for.

        Args:
            z: (B, H, W, C), unscaled.
        Returns: (B, f * H, f * W, 3) float32, nominally in [-1, 1], not clamped.
        """
        return self.decoder(z)
