"""The tiny autoencoder TAESD (Bohan 2023, github.com/madebyollin/taesd).

Inside, pixels are in [0, 1]. Shape letters: B batch, H W sides, C channels, f pixels for each
latent.
Source: diffusers models/autoencoders/autoencoder_tiny.py and vae.py.
"""

from __future__ import annotations

from mlxdiff.errors import UsageError
from mlxdiff.networks.config import AutoencoderTinyConfig
from mlxdiff.networks.layers import Array, Layer, Layers, Module, Sizes


class ReLU(Module):
    """max(x, 0). A module, since it has a place in the parameter names."""

    def __call__(self, x: Array) -> Array:
        return self.nn.relu(x)


class Upsample(Module):
    """Twice the sides: (B, H, W, C) -> (B, 2 * H, 2 * W, C)."""

    def __call__(self, x: Array) -> Array:
        return self.nn.upsample_nearest(x, 2 * x.shape[1], 2 * x.shape[2])


class AutoencoderTinyBlock(Module):
    """Three convolutions beside a shortcut: (B, H, W, C) -> the same."""

    def __init__(self, nn: Layers, channels: int) -> None:
        super().__init__(nn)
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv: list[Layer] = [convs[0], ReLU(nn), convs[1], ReLU(nn), convs[2]]

    def __call__(self, x: Array) -> Array:
        out = x
        for layer in self.conv:
            out = layer(out)
        return self.nn.relu(x + out)


class EncoderTiny(Module):
    """Pixels in [-1, 1] to latents: (B, H, W, 3) -> (B, H/f, W/f, C)."""

    def __init__(self, nn: Layers, config: AutoencoderTinyConfig) -> None:
        super().__init__(nn)
        width = config.encoder_block_out_channels[0]
        self.layers: list[Layer] = []
        for level, count in enumerate(config.num_encoder_blocks):
            if level == 0:
                self.layers.append(nn.Conv2d(config.in_channels, width, 3, padding=1))
            else:
                self.layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            self.layers += [AutoencoderTinyBlock(nn, width) for _ in range(count)]
        self.layers.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def __call__(self, x: Array) -> Array:
        x = (x + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class DecoderTiny(Module):
    """Latents to pixels, nominally in [-1, 1]: (B, H, W, C) -> (B, f * H, f * W, 3)."""

    def __init__(self, nn: Layers, config: AutoencoderTinyConfig) -> None:
        super().__init__(nn)
        width = config.decoder_block_out_channels[0]
        self.layers: list[Layer] = [
            nn.Conv2d(config.latent_channels, width, 3, padding=1),
            ReLU(nn),
        ]
        for count in config.num_decoder_blocks[:-1]:
            self.layers += [AutoencoderTinyBlock(nn, width) for _ in range(count)]
            self.layers += [Upsample(nn), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers += [
            AutoencoderTinyBlock(nn, width) for _ in range(config.num_decoder_blocks[-1])
        ]
        self.layers.append(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def __call__(self, z: Array) -> Array:
        x = self.nn.tanh(z / 3) * 3
        for layer in self.layers:
            x = layer(x)
        return x * 2 - 1


class AutoencoderTiny(Module):
    """The tiny autoencoder. Scaling and shift of latents are the pipeline's business."""

    def __init__(self, nn: Layers, config: AutoencoderTinyConfig) -> None:
        super().__init__(nn)
        self.config = config
        if config.has_encoder:
            self.encoder = EncoderTiny(nn, config)
        self.decoder = DecoderTiny(nn, config)

    def encode(self, x: Array) -> tuple[Array, None]:
        """The latents of a picture.

        Args:
            x: (B, H, W, 3) in [-1, 1]; H and W multiples of f.
        Returns: (B, H/f, W/f, C) float32; and None, for there is no variance.
        Raises: UsageError for a decoder alone.
        """
        if not self.config.has_encoder:
            raise UsageError(
                "this VAE is TAESD's decoder alone, which cannot encode a picture; put TAESD's "
                "encoder (taesd_encoder) beside its file"
            )
        x = self.nn.cast(x, self.dtype)
        return self.nn.cast(self.encoder(x), self.nn.float32), None

    def decode(self, z: Array) -> Array:
        """The picture that latents stand for.

        Args:
            z: (B, H, W, C), unscaled.
        Returns: (B, f * H, f * W, 3) float32, nominally in [-1, 1], not clamped.
        """
        z = self.nn.cast(z, self.dtype)
        return self.nn.cast(self.decoder(z), self.nn.float32)

    def run_once(self, sizes: Sizes) -> Array | tuple[Array, None]:
        shape = sizes.batch, sizes.height, sizes.width
        if sizes.encode:
            return self.encode(sizes.array(*shape, self.config.in_channels))
        return self.decode(sizes.array(*shape, self.config.latent_channels))
