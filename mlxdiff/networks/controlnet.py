"""ControlNet (Zhang et al. 2023).

A copy of the U-Net's first half that also sees a picture, and adds what it makes of it to the
outputs of the U-Net's own, through convolutions that were zero when its training began.
Source: diffusers models/controlnets/controlnet.py.
"""

from __future__ import annotations

from itertools import pairwise

from mlxdiff.networks.condition import Condition
from mlxdiff.networks.config import ControlNetConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes
from mlxdiff.networks.unet import UNetEncoder


class ControlNetConditioningEmbedding(Module):
    """A picture as a feature map of the latents' size.

    Args:
        image: (B, H, W, 3) in [0, 1].
    Returns: (B, H / factor, W / factor, channels).
    """

    def __init__(self, nn: Layers, config: ControlNetConfig) -> None:
        super().__init__(nn)
        widths = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = []
        for width, out in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, out, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1)

    def __call__(self, image: Array) -> Array:
        x = self.nn.silu(self.conv_in(image))
        for block in self.blocks:
            x = self.nn.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(UNetEncoder):
    """Predicts arrays to add inside the U-Net, so that its picture follows a control image."""

    config: ControlNetConfig

    def __init__(self, nn: Layers, config: ControlNetConfig) -> None:
        super().__init__(nn, config)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(nn, config)
        self.controlnet_down_blocks = [nn.Conv2d(c, c, 1) for c in config.residual_channels]
        last = config.block_out_channels[-1]
        self.controlnet_mid_block = nn.Conv2d(last, last, 1)

    def embed_image(self, image: Array) -> Array:
        """The picture (B, H, W, 3), RGB in [0, 1], as ``condition``: the same in every step."""
        if self.config.channel_order == "bgr":
            image = image[..., ::-1]
        return self.controlnet_cond_embedding(self.nn.cast(image, self.dtype))

    def predict(
        self,
        sample: Array,
        temb: Condition,
        text: Condition,
        condition: Array,
        scale: float = 1.0,
        guess_mode: bool = False,
    ) -> list[Array]:
        """Run the network.

        Args:
            sample: (B, H, W, in_channels).
            temb, text: B rows of the results of ``embed`` and ``read``, as for the U-Net.
            condition: the picture, by ``embed_image``; (1, H, W, C) for all of the batch.
            scale: factor of all results.
            guess_mode: scale the results from 0.1, at the first layer, to 1, at the mid block.
        Returns: one array for each output of the U-Net's way down, and one for the mid block, to
            add to it: (B, H', W', C'), or (B, 1, 1, C') if the config has
            ``global_pool_conditions``.
        """
        x = self.conv_in(self.nn.cast(sample, self.dtype)) + condition
        x, skips = self.encode(x, temb, text)
        outputs = [
            conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)
        ]
        outputs.append(self.controlnet_mid_block(x))
        return self._scaled(outputs, scale, guess_mode)

    def predict_first(
        self,
        sample: Array,
        condition: Array,
        scale: float = 1.0,
        guess_mode: bool = False,
    ) -> Array:
        """Return the first result of ``predict``. Only the first layer runs."""
        x = self.conv_in(self.nn.cast(sample, self.dtype)) + condition
        return self._scaled([self.controlnet_down_blocks[0](x)], scale, guess_mode)[0]

    def run_once(self, sizes: Sizes) -> list[Array]:
        config, batch = self.config, sizes.batch
        factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        height, width = sizes.height, sizes.width
        image = sizes.array(1, factor * height, factor * width, config.conditioning_channels)
        text = sizes.array(batch, sizes.tokens, config.cross_attention_dim[0])
        return self.predict(
            sizes.array(batch, height, width, config.in_channels),
            Condition(self.embed(sizes.array(batch), **self.conditions(sizes))),
            self.read(text),
            self.embed_image(image),
        )

    def _scaled(self, outputs: list[Array], scale: float, guess_mode: bool) -> list[Array]:
        """Scale all outputs, or the first of them."""
        if self.config.global_pool_conditions:
            outputs = [x.mean(axis=(1, 2), keepdims=True) for x in outputs]
            guess_mode = False
        count = len(self.controlnet_down_blocks) + 1
        scales = guess_scales(count) if guess_mode else [1.0] * count
        return [x * (scale * s) for x, s in zip(outputs, scales, strict=False)]


def guess_scales(count: int) -> list[float]:
    """From 0.1 to 1, evenly in the logarithm: for each of ``count`` outputs in guess mode."""
    return [float(10 ** (i / (count - 1) - 1)) for i in range(count)]
