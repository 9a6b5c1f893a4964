"""T2I-Adapter (Mou et al. 2023): feature maps of a picture, added on the U-Net's way down.

The maps depend on the picture alone, so they are made once for a run. Shape letters: B batch, H W
sides, C channels, r pixels for each place of the first map.
Source: diffusers models/adapter.py.
"""

from __future__ import annotations

from itertools import pairwise

from mlxdiff.networks.config import T2IAdapterConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes


class AdapterResnetBlock(Module):
    """Two convolutions with a ReLU between them, added to x: (B, H, W, C) -> the same.

    Args:
        kernel: of the second convolution.
    """

    def __init__(self, nn: Layers, channels: int, kernel: int) -> None:
        super().__init__(nn)
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def __call__(self, x: Array) -> Array:
        return self.block2(self.nn.relu(self.block1(x)), x)


class AdapterBlock(Module):
    """A level of a full adapter: (B, H, W, in_channels) -> (B, H', W', out_channels).

    Args:
        down: halve the sides first (rounded up).
    """

    def __init__(
        self, nn: Layers, in_channels: int, out_channels: int, depth: int, down: bool
    ) -> None:
        super().__init__(nn)
        self.down = down
        self.in_conv = None
        if in_channels != out_channels:
            self.in_conv = nn.Conv2d(in_channels, out_channels, 1)
        self.resnets = [AdapterResnetBlock(nn, out_channels, 1) for _ in range(depth)]

    def __call__(self, x: Array) -> Array:
        if self.down:
            x = _halved(self.nn, x)
        if self.in_conv is not None:
            x = self.in_conv(x)
        for resnet in self.resnets:
            x = resnet(x)
        return x


class LightAdapterBlock(Module):
    """A level of a light adapter, which works in a quarter of its channels. See AdapterBlock."""

    def __init__(
        self, nn: Layers, in_channels: int, out_channels: int, depth: int, down: bool
    ) -> None:
        super().__init__(nn)
        self.down = down
        width = out_channels // 4
        self.in_conv = nn.Conv2d(in_channels, width, 1)
        self.resnets = [AdapterResnetBlock(nn, width, 3) for _ in range(depth)]
        self.out_conv = nn.Conv2d(width, out_channels, 1)

    def __call__(self, x: Array) -> Array:
        x = self.in_conv(_halved(self.nn, x) if self.down else x)
        for resnet in self.resnets:
            x = resnet(x)
        return self.out_conv(x)


class Adapter(Module):
    """All levels: a picture (B, H, W, C) -> a feature map of each level, the largest first."""

    def __init__(self, nn: Layers, config: T2IAdapterConfig) -> None:
        super().__init__(nn)
        self.factor = config.downscale_factor
        channels, depth = config.feature_channels, config.num_res_blocks
        first = config.in_channels * config.downscale_factor**2
        self.conv_in = None
        if config.is_light:
            widths = [first, *channels]
            self.body: list[Module] = [
                LightAdapterBlock(nn, before, width, depth, down)
                for (before, width), down in zip(pairwise(widths), config.halves, strict=True)
            ]
            return
        self.conv_in = nn.Conv2d(first, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.body = [
            AdapterBlock(nn, before, width, depth, down)
            for (before, width), down in zip(pairwise(widths), config.halves, strict=True)
        ]

    def __call__(self, image: Array) -> list[Array]:
        x = _unshuffled(image, self.factor)
        if self.conv_in is not None:
            x = self.conv_in(x)
        maps = []
        for block in self.body:
            x = block(x)
            maps.append(x)
        return maps


class T2IAdapterModel(Module):
    """Feature maps of a control picture, for each block of the U-Net's way down.

    Args:
        image: (B, H, W, in_channels) in [0, 1]; H and W are multiples of ``downscale_factor``.
    Returns: a map (B, H', W', C) for each block, the largest first; one more is for the mid block.
    """

    def __init__(self, nn: Layers, config: T2IAdapterConfig) -> None:
        super().__init__(nn)
        self.config = config
        self.adapter = Adapter(nn, config)

    def __call__(self, image: Array) -> list[Array]:
        maps: list[Array] = self.adapter(self.nn.cast(image, self.dtype))
        return maps

    def run_once(self, sizes: Sizes) -> list[Array]:
        return self(sizes.array(sizes.batch, sizes.height, sizes.width, self.config.in_channels))


def _unshuffled(x: Array, factor: int) -> Array:
    """Put each square of pixels into the channels: (B, H, W, C) -> (B, H/r, W/r, C * r * r)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, height // factor, width // factor, channels * factor**2)


def _halved(nn: Layers, x: Array) -> Array:
    """The mean of each 2x2 square: (B, H, W, C) -> (B, H', W', C), sides rounded up.

    At an odd edge it is the mean of the pixels that are there: the edge, repeated, has the same.
    """
    if x.shape[1] % 2:
        x = nn.concatenate([x, x[:, -1:]], axis=1)
    if x.shape[2] % 2:
        x = nn.concatenate([x, x[:, :, -1:]], axis=2)
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
