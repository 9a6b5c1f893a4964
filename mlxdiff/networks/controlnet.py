"""ControlNet (Zhang et al. 2023).

A copy of the U-Net's first half that also sees a picture, and adds what it makes of it to the
outputs of the U-Net's own, through convolutions that were zero when its training began.
Source: diffusers models/controlnets/controlnet.py.
"""

from __future__ import annotations

from itertools import pairwise

from mlxdiff.networks.blocks import TimestepEmbedding
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


class ControlTypeAttention(Module):
    """The attention among the rows of a batch, as a ControlNet-Union has it.

    All rows show the same picture and the same latents, so each attends to a value that is its own.
    """

    def __init__(self, nn: Layers, width: int) -> None:
        super().__init__(nn)
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def __call__(self, x: Array) -> Array:
        return self.out_proj(self.nn.split(self.in_proj(x), 3, axis=-1)[2])


class ControlTypeMlp(Module):
    """Two linear layers with a quick GELU between them."""

    def __init__(self, nn: Layers, width: int) -> None:
        super().__init__(nn)
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def __call__(self, x: Array) -> Array:
        return self.c_proj(self.nn.activation("quick_gelu")(self.c_fc(x)))


class ControlTypeLayer(Module):
    """A transformer layer on the vector (B, C) of a control picture."""

    def __init__(self, nn: Layers, width: int) -> None:
        super().__init__(nn)
        self.attn = ControlTypeAttention(nn, width)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = ControlTypeMlp(nn, width)
        self.ln_2 = nn.LayerNorm(width)

    def __call__(self, x: Array) -> Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ControlNetModel(UNetEncoder):
    """Predicts arrays to add inside the U-Net, so that its picture follows a control image.

    A ControlNet-Union (xinsir 2024; diffusers models/controlnets/controlnet_union.py) knows several
    types of control image. The type changes the timestep embedding, and, with the mean of the
    picture's features, what is added to them at every place.
    """

    config: ControlNetConfig

    def __init__(self, nn: Layers, config: ControlNetConfig) -> None:
        super().__init__(nn, config)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(nn, config)
        self.controlnet_down_blocks = [nn.Conv2d(c, c, 1) for c in config.residual_channels]
        last = config.block_out_channels[-1]
        self.controlnet_mid_block = nn.Conv2d(last, last, 1)
        types = config.types
        if types is not None:
            first, ids = config.block_out_channels[0], config.addition_time_embed_dim or 256
            self.task_embedding = nn.parameter(types.count, types.channels)
            self.transformer_layes = [
                ControlTypeLayer(nn, types.channels) for _ in range(types.layers)
            ]
            self.spatial_ch_projs = nn.Linear(types.channels, first)
            self.control_add_embedding = TimestepEmbedding(nn, ids * types.count, 4 * first)

    def embed_image(self, image: Array, mode: int | None = None) -> Array:
        """Embed a control image, the same in every step.

        Args:
            image: (B, H, W, 3), RGB in [0, 1].
            mode: number of its type, for a ControlNet-Union.
        Returns: ``condition``, (B, H / factor, W / factor, C).
        """
        if self.config.channel_order == "bgr":
            image = image[..., ::-1]
        features = self.controlnet_cond_embedding(self.nn.cast(image, self.dtype))
        if self.config.types is None or mode is None:
            return features
        x = features.mean(axis=(1, 2)) + self.task_embedding[mode]
        for layer in self.transformer_layes:
            x = layer(x)
        return features + self.spatial_ch_projs(x)[:, None, None, :]

    def embed_type(self, mode: int) -> Array:
        """Embed a type of control image (1, E), to be added to the timestep embedding."""
        config = self.config
        assert config.types is not None
        chosen = self.nn.asarray(
            [float(i == mode) for i in range(config.types.count)], self.nn.float32
        )
        ids = self.nn.timestep_embedding(
            chosen, config.addition_time_embed_dim or 256, config.flip_sin_to_cos, config.freq_shift
        )
        return self.control_add_embedding(self.nn.cast(ids.reshape(1, -1), self.dtype))

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
        temb = self.embed(sizes.array(batch), **self.conditions(sizes))
        mode = None if config.types is None else 0
        if mode is not None:
            temb = temb + self.embed_type(mode)
        return self.predict(
            sizes.array(batch, height, width, config.in_channels),
            Condition(temb),
            self.read(text),
            self.embed_image(image, mode),
        )

    def _scaled(self, outputs: list[Array], scale: float, guess_mode: bool) -> list[Array]:
        """Scale all outputs, or the first of them."""
        if self.config.global_pool_conditions:
            outputs = [self._pooled(x) for x in outputs]
            guess_mode = False
        count = len(self.controlnet_down_blocks) + 1
        scales = guess_scales(count) if guess_mode else [1.0] * count
        return [x * (scale * s) for x, s in zip(outputs, scales, strict=False)]

    def _pooled(self, x: Array) -> Array:
        """The mean over all pixels. In float32: a sum in float16 overflows at 65504."""
        wide = self.nn.cast(x, self.nn.float32)
        return self.nn.cast(wide.mean(axis=(1, 2), keepdims=True), self.dtype)


def guess_scales(count: int) -> list[float]:
    """From 0.1 to 1, evenly in the logarithm: for each of ``count`` outputs in guess mode."""
    return [float(10 ** (i / (count - 1) - 1)) for i in range(count)]
