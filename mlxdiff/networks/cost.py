"""What a network costs at a size: multiply-adds, exactly, and the values it holds meanwhile.

A network's layers are walked in the order in which they run, from its config alone; nothing is
loaded or computed. Counted as arithmetic are convolutions, linear maps and the two products of
attention, as the plain network has them: what an implementation adds (zero-padded heads) or saves
(keys and values of the prompt kept from step to step) does not change the count. Sums,
normalizations and activations are not counted: they are a thousandth of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    BlockSpec,
    CLIPTextConfig,
    CLIPVisionConfig,
    ComponentConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
    UNetConfig,
)

TOKENS = 77  # of a prompt, as CLIP takes it


@dataclass(frozen=True)
class Operation:
    """One layer's work.

    Attributes:
        kind: "convolution", "linear", "attention", or "elementwise" (norms and activations).
        macs: multiply-adds.
        weights: number of weight values that it multiplies with, biases left out.
        held: values that others need later: skips, shortcuts, the text.
        inputs, outputs: values that it reads and writes.
        scratch: values that it would unfold its input to (convolution), or its scores (attention).
        row: those of them that cannot be split: for a line of output, or a query of each head.
    """

    kind: str
    macs: int
    weights: int
    held: int
    inputs: int
    outputs: int
    scratch: int = 0
    row: int = 0


def operations(
    config: ComponentConfig,
    height: int = 1,
    width: int = 1,
    *,
    batch: int = 1,
    tokens: int = TOKENS,
    encode: bool = False,
) -> list[Operation]:
    """The work of one evaluation of a network, in the order in which it is done.

    Args:
        config: of the network.
        height, width: of what goes into it: latents for a U-Net and for a VAE that decodes, pixels
            for one that encodes or for a U-Net that draws pixels. CLIP has none.
        batch: how many at once: 2 for a U-Net under guidance.
        tokens: length of a text.
        encode: a VAE's encoder, in place of its decoder.
    """
    walk = _Walk(batch)
    if isinstance(config, CLIPTextConfig):
        _clip(walk, config, tokens)
    elif isinstance(config, CLIPVisionConfig):
        _clip_vision(walk, config)
    elif isinstance(config, (UNet2DConditionConfig, UNet2DConfig)):
        _unet(walk, config, height, width, tokens)
    elif isinstance(config, AutoencoderTinyConfig):
        (_tiny_encoder if encode else _tiny_decoder)(walk, config, height, width)
    elif isinstance(config, AutoencoderKLConfig):
        (_encoder if encode else _decoder)(walk, config, height, width)
    else:
        raise TypeError(f"the work of a {type(config).__name__} is not worked out")
    return walk.operations


def multiply_adds(
    config: ComponentConfig,
    height: int = 1,
    width: int = 1,
    *,
    batch: int = 1,
    tokens: int = TOKENS,
    encode: bool = False,
) -> int:
    """Multiply-adds of one evaluation; arguments as for ``operations``."""
    work = operations(config, height, width, batch=batch, tokens=tokens, encode=encode)
    return sum(operation.macs for operation in work)


class _Walk:
    """Collects operations; each method adds one kind of layer. Sizes are (height, width)."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.held = 0
        self.operations: list[Operation] = []

    @contextmanager
    def holding(self, values: int) -> Iterator[None]:
        """Values that stay in memory while the block's operations run."""
        self.held += values
        yield
        self.held -= values

    def add(
        self, kind: str, macs: int, weights: int, inputs: int, outputs: int, *work: int
    ) -> None:
        self.operations.append(Operation(kind, macs, weights, self.held, inputs, outputs, *work))

    def elementwise(self, values: int) -> None:
        self.add("elementwise", 0, 0, values, values)

    def linear(self, vectors: int, inputs: int, outputs: int) -> None:
        weights = inputs * outputs
        self.add("linear", vectors * weights, weights, vectors * inputs, vectors * outputs)

    def conv(
        self,
        size: tuple[int, int],
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int | None = None,
    ) -> tuple[int, int]:
        """Adds a convolution; the size of what it gives. Padding None keeps the size."""
        (height, width), weights = size, kernel * kernel * inputs * outputs
        padding = kernel // 2 if padding is None else padding
        out = tuple((side + 2 * padding - kernel) // stride + 1 for side in size)
        pixels = self.batch * out[0] * out[1]
        unfolded = 0 if kernel == stride == 1 else kernel * kernel * inputs
        self.add(
            "convolution",
            pixels * weights,
            weights,
            self.batch * height * width * inputs,
            pixels * outputs,
            pixels * unfolded,
            out[1] * unfolded,
        )
        return out[0], out[1]

    def scores(self, queries: int, keys: int, width: int, heads: int) -> None:
        """The two products of attention, for each sample: (queries, width) with (keys, width)."""
        self.add(
            "attention",
            2 * self.batch * queries * keys * width,
            0,
            self.batch * (queries + 2 * keys) * width,
            self.batch * queries * width,
            self.batch * heads * queries * keys,
            keys,
        )

    def attention(self, queries: int, width: int, heads: int, keys: int, context: int) -> None:
        """Attention of (queries, width) to (keys, context), with its four projections."""
        q, kv = self.batch * queries * width, self.batch * keys * width
        self.linear(self.batch * queries, width, width)
        with self.holding(q):
            self.linear(self.batch * keys, context, width)
            with self.holding(kv):
                self.linear(self.batch * keys, context, width)
        with self.holding(q):  # the normalized input, which its caller still has
            self.scores(queries, keys, width, heads)
        self.linear(self.batch * queries, width, width)

    def resnet(
        self,
        size: tuple[int, int],
        inputs: int,
        outputs: int,
        temb: int | None = None,
        scale_shift: bool = False,
    ) -> None:
        pixels = self.batch * size[0] * size[1]
        with self.holding(pixels * inputs):  # for the shortcut
            self.elementwise(pixels * inputs)
            self.conv(size, inputs, outputs)
            if temb is not None:
                self.linear(self.batch, temb, (1 + scale_shift) * outputs)
            with self.holding(pixels * outputs):
                self.elementwise(pixels * outputs)
                self.conv(size, outputs, outputs)
        if inputs != outputs:
            with self.holding(pixels * outputs):
                self.conv(size, inputs, outputs, 1)

    def pixel_attention(self, size: tuple[int, int], width: int, heads: int) -> None:
        """Attention of every pixel of a feature map to all others, added to it."""
        pixels = size[0] * size[1]
        with self.holding(self.batch * pixels * width):
            self.attention(pixels, width, heads, pixels, width)

    def transformer(
        self, size: tuple[int, int], block: BlockSpec, layers: int, tokens: int
    ) -> None:
        pixels, width = size[0] * size[1], block.out_channels
        vectors, heads, text = (
            self.batch * pixels,
            block.num_attention_heads,
            block.cross_attention_dim,
        )
        own = (tokens, text) if block.only_cross_attention else (pixels, width)
        with self.holding(vectors * width):
            self.linear(vectors, width, width)
            with self.holding(vectors * width):
                for _ in range(layers):
                    self.attention(pixels, width, heads, *own)
                    self.attention(pixels, width, heads, tokens, text)
                    with self.holding(vectors * width):
                        self.linear(vectors, width, 8 * width)
                        self.elementwise(vectors * 8 * width)
                        self.linear(vectors, 4 * width, width)
            self.linear(vectors, width, width)

    def downsample(self, size: tuple[int, int], channels: int, padding: int) -> tuple[int, int]:
        """Convolution of stride 2; padding 0 is a row and a column of zeros at two edges."""
        if padding == 0:
            size = size[0] + 1, size[1] + 1
        return self.conv(size, channels, channels, 3, 2, padding)

    def upsample(
        self, size: tuple[int, int], channels: int, target: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Nearest-neighbour upsampling and a convolution; the size of what it gives."""
        target = (2 * size[0], 2 * size[1]) if target is None else target
        with self.holding(self.batch * size[0] * size[1] * channels):
            return self.conv(target, channels, channels)


# ------------------------------------------------------------------------------------------- U-Nets


def _unet(walk: _Walk, config: UNetConfig, height: int, width: int, tokens: int) -> None:
    batch, temb, first = walk.batch, config.time_embed_dim, config.block_out_channels[0]
    size, kernels = (height, width), (3, 3)
    walk.linear(batch, first, temb)
    walk.linear(batch, temb, temb)
    if isinstance(config, UNet2DConditionConfig):
        kernels = config.conv_in_kernel, config.conv_out_kernel
        if config.time_cond_proj_dim is not None:
            walk.linear(batch, config.time_cond_proj_dim, first)
        if config.addition_embed_type and config.projection_class_embeddings_input_dim is not None:
            walk.linear(batch, config.projection_class_embeddings_input_dim, temb)
            walk.linear(batch, temb, temb)
    elif config.class_embed_type == "timestep":
        walk.linear(batch, first, temb)
        walk.linear(batch, temb, temb)

    walk.conv(size, config.in_channels, first, kernels[0])
    skips = [(size, first)]

    def keep(size: tuple[int, int], channels: int) -> None:
        skips.append((size, channels))
        walk.held += batch * size[0] * size[1] * channels

    walk.held += batch * height * width * first
    for block in config.down_blocks:
        channels = block.in_channels
        for i in range(block.num_layers):
            _unet_layer(walk, config, block, i, size, channels, tokens)
            channels = block.out_channels
            keep(size, channels)
        if block.resample:
            size = walk.downsample(size, channels, config.downsample_padding)
            keep(size, channels)
    if (mid := config.mid_block) is not None:
        _unet_layer(walk, config, mid, 0, size, mid.in_channels, tokens)
        for _ in range(mid.num_layers - 1):
            _resnet(walk, config, size, mid.out_channels, mid.out_channels)
    for block in config.up_blocks:
        channels = block.in_channels
        for i, skip in enumerate(block.skip_channels):
            below, _ = skips.pop()
            walk.held -= batch * below[0] * below[1] * skip
            with walk.holding(batch * size[0] * size[1] * channels):
                _unet_layer(walk, config, block, i, size, channels + skip, tokens)
            channels = block.out_channels
        if block.resample:
            size = walk.upsample(size, channels, skips[-1][0])
    walk.elementwise(batch * height * width * first)
    walk.conv(size, first, config.out_channels, kernels[1])


def _resnet(
    walk: _Walk, config: UNetConfig, size: tuple[int, int], inputs: int, outputs: int
) -> None:
    scale_shift = config.resnet_time_scale_shift == "scale_shift"
    walk.resnet(size, inputs, outputs, config.time_embed_dim, scale_shift)


def _unet_layer(
    walk: _Walk,
    config: UNetConfig,
    block: BlockSpec,
    index: int,
    size: tuple[int, int],
    inputs: int,
    tokens: int,
) -> None:
    """A resnet of a block, and the attention that follows it there."""
    _resnet(walk, config, size, inputs, block.out_channels)
    if index < len(block.transformer_layers):
        walk.transformer(size, block, block.transformer_layers[index], tokens)
    elif block.type in ("AttnDownBlock2D", "AttnUpBlock2D", "UNetMidBlock2DAttn"):
        walk.pixel_attention(size, block.out_channels, block.num_attention_heads)


# --------------------------------------------------------------------------------------------- VAEs


def _mid(walk: _Walk, config: AutoencoderKLConfig, size: tuple[int, int], width: int) -> None:
    walk.resnet(size, width, width)
    if config.mid_block_add_attention:
        walk.pixel_attention(size, width, 1)
    walk.resnet(size, width, width)


def _encoder(walk: _Walk, config: AutoencoderKLConfig, height: int, width: int) -> None:
    widths, size = config.block_out_channels, (height, width)
    channels = widths[0]
    walk.conv(size, config.in_channels, channels)
    for i, out in enumerate(widths):
        for _ in range(config.layers_per_block):
            walk.resnet(size, channels, out)
            channels = out
        if i < len(widths) - 1:
            size = walk.downsample(size, out, 0)
    _mid(walk, config, size, channels)
    walk.elementwise(walk.batch * size[0] * size[1] * channels)
    walk.conv(size, channels, 2 * config.latent_channels)
    if config.use_quant_conv:
        walk.conv(size, 2 * config.latent_channels, 2 * config.latent_channels, 1)


def _decoder(walk: _Walk, config: AutoencoderKLConfig, height: int, width: int) -> None:
    widths, size = config.block_out_channels[::-1], (height, width)
    if config.use_post_quant_conv:
        walk.conv(size, config.latent_channels, config.latent_channels, 1)
    channels = widths[0]
    walk.conv(size, config.latent_channels, channels)
    _mid(walk, config, size, channels)
    for i, out in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            walk.resnet(size, channels, out)
            channels = out
        if i < len(widths) - 1:
            size = walk.upsample(size, out)
    walk.elementwise(walk.batch * size[0] * size[1] * channels)
    walk.conv(size, channels, config.out_channels)


def _tiny_blocks(walk: _Walk, size: tuple[int, int], count: int, width: int) -> None:
    for _ in range(count):
        with walk.holding(walk.batch * size[0] * size[1] * width):
            for _ in range(3):
                walk.conv(size, width, width)


def _tiny_encoder(walk: _Walk, config: AutoencoderTinyConfig, height: int, width: int) -> None:
    size, channels = (height, width), config.encoder_block_out_channels[0]
    for level, count in enumerate(config.num_encoder_blocks):
        if level == 0:
            walk.conv(size, config.in_channels, channels)
        else:
            size = walk.conv(size, channels, channels, 3, 2)
        _tiny_blocks(walk, size, count, channels)
    walk.conv(size, channels, config.latent_channels)


def _tiny_decoder(walk: _Walk, config: AutoencoderTinyConfig, height: int, width: int) -> None:
    size, channels = (height, width), config.decoder_block_out_channels[0]
    walk.conv(size, config.latent_channels, channels)
    for level, count in enumerate(config.num_decoder_blocks):
        _tiny_blocks(walk, size, count, channels)
        if level < len(config.num_decoder_blocks) - 1:
            size = walk.upsample(size, channels)
    walk.conv(size, channels, config.out_channels)


# ------------------------------------------------------------------------------------ text encoders


def _clip(walk: _Walk, config: CLIPTextConfig, tokens: int) -> None:
    _clip_layers(walk, config, tokens)
    if config.with_projection:
        walk.linear(walk.batch, config.hidden_size, config.projection_dim)


def _clip_vision(walk: _Walk, config: CLIPVisionConfig) -> None:
    side, patch = config.image_size, config.patch_size
    rows, columns = walk.conv((side, side), 3, config.hidden_size, patch, patch, 0)
    _clip_layers(walk, config, rows * columns + 1)
    walk.linear(walk.batch, config.hidden_size, config.projection_dim)


def _clip_layers(walk: _Walk, config: CLIPTextConfig | CLIPVisionConfig, tokens: int) -> None:
    width, vectors = config.hidden_size, walk.batch * tokens
    for _ in range(config.num_hidden_layers):
        walk.held += vectors * width  # every layer's output is kept
        walk.attention(tokens, width, config.num_attention_heads, tokens, width)
        walk.linear(vectors, width, config.intermediate_size)
        walk.elementwise(vectors * config.intermediate_size)
        walk.linear(vectors, config.intermediate_size, width)
