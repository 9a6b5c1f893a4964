"""Networks that enlarge a picture: ESRGAN's RRDBNet, and Real-ESRGAN's compact network.

Pixels are in [0, 1]. Shape letters: B batch, H W sides, C channels, s scale.
Sources: Wang et al. 2018 (arXiv 1809.00219) and 2021 (arXiv 2107.10833); BasicSR archs/rrdbnet_arch
and srvgg_arch; Rakotonirina and Rasoanaivo 2020 (arXiv 2001.08073) for the shortcut of ESRGAN+.
"""

from __future__ import annotations

from mlxdiff.networks.config import CompactConfig, RRDBNetConfig
from mlxdiff.networks.layers import Array, Layer, Layers, Module, Sizes

SLOPE = 0.2  # of negative values
SHARE = 0.2  # of a block's result that is added to its input


class ResidualDenseBlock(Module):
    """Five convolutions, each on all results before it: (B, H, W, C) -> the same."""

    def __init__(self, nn: Layers, config: RRDBNetConfig) -> None:
        super().__init__(nn)
        width, growth = config.width, config.growth
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(width + i * growth, growth, 3, padding=1) for i in range(4)
        )
        self.conv5 = nn.Conv2d(width + 4 * growth, width, 3, padding=1)
        self.conv1x1 = nn.Conv2d(width, growth, 1, bias=False) if config.plus else None

    def __call__(self, x: Array) -> Array:
        seen, second = [x], None
        for i, conv in enumerate((self.conv1, self.conv2, self.conv3, self.conv4)):
            out = self.nn.leaky_relu(conv(self.nn.concatenate(seen, axis=-1)), SLOPE)
            if self.conv1x1 is not None and i == 1:
                out = second = out + self.conv1x1(x)
            elif second is not None and i == 3:
                out = out + second
            seen.append(out)
        return x + SHARE * self.conv5(self.nn.concatenate(seen, axis=-1))


class RRDB(Module):
    """Three dense blocks in a row beside a shortcut: (B, H, W, C) -> the same."""

    def __init__(self, nn: Layers, config: RRDBNetConfig) -> None:
        super().__init__(nn)
        self.rdb1 = ResidualDenseBlock(nn, config)
        self.rdb2 = ResidualDenseBlock(nn, config)
        self.rdb3 = ResidualDenseBlock(nn, config)

    def __call__(self, x: Array) -> Array:
        return x + SHARE * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(Module):
    """ESRGAN's network: dense blocks at the small size, then one convolution for each doubling.

    Args:
        x: (B, H, W, 3); where the network reads squares of pixels (``config.shuffle``), their side
            divides H and W.
    Returns: (B, s * H, s * W, 3) float32, nominally in [0, 1], not clamped.
    """

    def __init__(self, nn: Layers, config: RRDBNetConfig) -> None:
        super().__init__(nn)
        self.config = config
        width = config.width
        self.conv_first = nn.Conv2d(3 * config.shuffle**2, width, 3, padding=1)
        self.body = [RRDB(nn, config) for _ in range(config.blocks)]
        self.conv_body = nn.Conv2d(width, width, 3, padding=1)
        for i in range(config.doublings):
            setattr(self, f"conv_up{i + 1}", nn.Conv2d(width, width, 3, padding=1))
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)

    def __call__(self, x: Array) -> Array:
        x = self.nn.cast(x, self.dtype)
        first = self.conv_first(pixel_unshuffle(x, self.config.shuffle))
        x = first
        for block in self.body:
            x = block(x)
        x = self.conv_body(x, first)
        for i in range(self.config.doublings):
            x = self.nn.upsample_nearest(x, 2 * x.shape[1], 2 * x.shape[2])
            x = self.nn.leaky_relu(getattr(self, f"conv_up{i + 1}")(x), SLOPE)
        x = self.conv_last(self.nn.leaky_relu(self.conv_hr(x), SLOPE))
        return self.nn.cast(x, self.nn.float32)

    def run_once(self, sizes: Sizes) -> Array:
        return self(sizes.array(sizes.batch, sizes.height, sizes.width, 3))


class PReLU(Module):
    """Keep positive values, and multiply negative ones by a number of their channel."""

    def __init__(self, nn: Layers, channels: int) -> None:
        super().__init__(nn)
        self.weight = nn.parameter(channels)

    def __call__(self, x: Array) -> Array:
        return self.nn.leaky_relu(x, self.weight)


class CompactNet(Module):
    """Real-ESRGAN's compact network (SRVGGNetCompact): all convolutions at the small size.

    Args:
        x: (B, H, W, 3).
    Returns: (B, s * H, s * W, 3) float32, nominally in [0, 1], not clamped.
    """

    def __init__(self, nn: Layers, config: CompactConfig) -> None:
        super().__init__(nn)
        self.config = config
        width = config.width
        self.body: list[Layer] = [nn.Conv2d(3, width, 3, padding=1), PReLU(nn, width)]
        for _ in range(config.convolutions):
            self.body += [nn.Conv2d(width, width, 3, padding=1), PReLU(nn, width)]
        self.body.append(nn.Conv2d(width, 3 * config.scale**2, 3, padding=1))

    def __call__(self, x: Array) -> Array:
        small, scale = self.nn.cast(x, self.dtype), self.config.scale
        x = small
        for layer in self.body:
            x = layer(x)
        large = self.nn.upsample_nearest(small, scale * small.shape[1], scale * small.shape[2])
        return self.nn.cast(pixel_shuffle(x, scale) + large, self.nn.float32)

    def run_once(self, sizes: Sizes) -> Array:
        return self(sizes.array(sizes.batch, sizes.height, sizes.width, 3))


def pixel_shuffle(x: Array, scale: int) -> Array:
    """Lay the channels of a pixel out as a square: (B, H, W, C * s * s) -> (B, s * H, s * W, C)."""
    if scale == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // scale**2, scale, scale)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, height * scale, width * scale, channels // scale**2)


def pixel_unshuffle(x: Array, side: int) -> Array:
    """Take squares of pixels as channels: (B, H, W, C) -> (B, H / side, W / side, C * side²)."""
    if side == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, height // side, width // side, channels * side**2)
