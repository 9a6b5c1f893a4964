"""The denoising U-Net (Rombach et al. 2022, Podell et al. 2023).

Everything follows from the config, through ``config.BlockSpec``: one class for SD 1.x, 2.x, SDXL
and their distilled and inpainting variants. Shape letters: B batch, H W sides of the feature map, C
channels, L text tokens, D width of the text states, E width of the timestep embedding.
Source: diffusers models/unets/unet_2d_condition.py and unet_2d_blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mlxdiff.errors import UsageError
from mlxdiff.networks.blocks import (
    Attention,
    Downsample2D,
    FeedForward,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
)
from mlxdiff.networks.condition import Condition, Frames
from mlxdiff.networks.config import BlockSpec, UNet2DConditionConfig, UNetConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes
from mlxdiff.networks.motion import MotionModule

ALL, ALL_BUT_LAST, LAST = slice(None), slice(-1), slice(-1, None)  # layers of a block


class BasicTransformerBlock(Module):
    """Self-attention, attention to the text, feed-forward; each normalized first and added.

    Args:
        x: (B * H * W, C), the rows of all samples in one matrix.
        encoder_hidden_states: of (B, L, D).
        shape: (B, H, W, C).
    Returns: the shape of x.
    """

    def __init__(self, nn: Layers, block: BlockSpec) -> None:
        super().__init__(nn)
        width, heads, text = (
            block.out_channels,
            block.num_attention_heads,
            block.cross_attention_dim,
        )
        self.only_cross_attention = block.only_cross_attention
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(nn, width, heads, text if block.only_cross_attention else None)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(nn, width, heads, text)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(nn, width)

    def __call__(self, x: Array, encoder_hidden_states: Condition, shape: tuple[int, ...]) -> Array:
        context = encoder_hidden_states if self.only_cross_attention else None
        text = encoder_hidden_states
        batch = shape[0] // text.frames.count  # the frames of a video share their text
        change = text.change(self)
        if change is None:
            own = shape[0] if context is None else batch
            x = x + self.attn1(self.norm1(x), context, own, text)
        elif change.skips:
            return x
        else:
            x = x + change.attend(self.attn1, self.norm1(x), shape)
        x += self.attn2(self.norm2(x), text, batch, text)
        x += self.ff(self.norm3(x))
        return x


class Transformer2DModel(Module):
    """Transformer blocks over the pixels of a feature map, between two projections, added to it.

    Args:
        x: (B, H, W, C).
        encoder_hidden_states: of (B, L, D).
    Returns: (B, H, W, C).
    """

    def __init__(
        self, nn: Layers, block: BlockSpec, num_layers: int, config: UNet2DConditionConfig
    ) -> None:
        super().__init__(nn)
        width = block.out_channels
        # eps 1e-6 here whatever norm_eps says, as the reference.
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        # The two kinds of projection differ in the shape of their weight alone.
        project = nn.Linear if config.use_linear_projection else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = project(width, width)
        self.transformer_blocks = [BasicTransformerBlock(nn, block) for _ in range(num_layers)]
        self.proj_out = project(width, width)

    def __call__(self, x: Array, encoder_hidden_states: Condition) -> Array:
        h = self.proj_in(self.norm(x).reshape(-1, x.shape[-1]))
        for block in self.transformer_blocks:
            h = block(h, encoder_hidden_states, x.shape)
        h = self.proj_out(h).reshape(x.shape)
        h += x
        return h


class UNetBlock(Module):
    """The layers of a block of the U-Net, which other U-Nets make in ways of their own."""

    def __init__(self, nn: Layers, block: BlockSpec, config: UNetConfig) -> None:
        super().__init__(nn)
        self.resnets = []
        channels = block.in_channels
        for skip in block.skip_channels or (0,) * block.num_layers:
            self.resnets.append(self.make_resnet(nn, channels + skip, block, config))
            channels = block.out_channels
        self.attentions = self.make_attentions(nn, block, config)
        self.motion_modules: list[MotionModule] = []
        if (motion := block.motion) is not None:
            self.motion_modules = [
                MotionModule(nn, block.out_channels, layers, motion) for layers in motion.layers
            ]

    def make_resnet(
        self, nn: Layers, in_channels: int, block: BlockSpec, config: UNetConfig
    ) -> Any:
        """Make a resnet: (B, H, W, in_channels) -> (B, H, W, out_channels)."""
        return ResnetBlock2D(
            nn,
            in_channels,
            block.out_channels,
            config.time_embed_dim,
            config.norm_num_groups,
            config.norm_eps,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
        )

    def make_attentions(self, nn: Layers, block: BlockSpec, config: Any) -> list[Any]:
        """Make the layers that follow the resnets; none where the block does not attend."""
        return [Transformer2DModel(nn, block, n, config) for n in block.transformer_layers]


class DownBlock2D(UNetBlock):
    """Resnets, then a downsampler where the block has one.

    Args:
        x: (B, H, W, C).
        temb: of (B, E).
        encoder_hidden_states: not used; there so that all blocks are called alike.
        skips: every output is appended, for the up path.
        feature: is added to the last output; None: nothing.
    Returns: (B, H', W', out_channels), halved (rounded up) by the downsampler.
    """

    def __init__(self, nn: Layers, block: BlockSpec, config: UNetConfig) -> None:
        super().__init__(nn, block, config)
        self.downsamplers = []
        if block.resample:
            self.downsamplers = [Downsample2D(nn, block.out_channels, config.downsample_padding)]

    def __call__(
        self,
        x: Array,
        temb: Condition,
        encoder_hidden_states: Condition | None,
        skips: list[Array],
        feature: Array | None = None,
    ) -> Array:
        for i, resnet in enumerate(self.resnets):
            x = _in_parts(self.nn, resnet, [x], temb)
            x = _moved(self, i, x, encoder_hidden_states)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        if feature is not None:
            skips[-1] = x = x + feature
        return x


class CrossAttnDownBlock2D(DownBlock2D):
    """Resnets, each followed by a transformer, then a downsampler where the block has one.

    Args and result: as DownBlock2D, with encoder_hidden_states of (B, L, D) attended to, and
    feature added before the downsampler.
    """

    def __call__(
        self,
        x: Array,
        temb: Condition,
        encoder_hidden_states: Condition | None,
        skips: list[Array],
        feature: Array | None = None,
    ) -> Array:
        for i, (resnet, attention) in enumerate(zip(self.resnets, self.attentions, strict=True)):
            x = _in_parts(self.nn, resnet, [x], temb)
            x = _in_parts(self.nn, attention, [x], encoder_hidden_states)
            x = _moved(self, i, x, encoder_hidden_states)
            skips.append(x)
        if feature is not None:
            skips[-1] = x = x + feature
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x


class UNetMidBlock2D(UNetBlock):
    """Resnets at the lowest resolution: (B, H, W, C) -> (B, H, W, C)."""

    def __call__(self, x: Array, temb: Condition, encoder_hidden_states: Condition | None) -> Array:
        for resnet in self.resnets:
            x = resnet(x, temb)
        return x


class UNetMidBlock2DCrossAttn(UNetBlock):
    """Two resnets with a transformer between them: (B, H, W, C) -> (B, H, W, C)."""

    def __call__(self, x: Array, temb: Condition, encoder_hidden_states: Condition | None) -> Array:
        first, *rest = self.resnets
        x = _in_parts(self.nn, first, [x], temb)
        for i, (attention, resnet) in enumerate(zip(self.attentions, rest, strict=True)):
            x = _in_parts(self.nn, attention, [x], encoder_hidden_states)
            x = _moved(self, i, x, encoder_hidden_states)
            x = _in_parts(self.nn, resnet, [x], temb)
        return x


def _moved(block: Any, index: int, x: Array, text: Condition | None) -> Array:
    """The output of a layer after its motion module, where the block has them."""
    if not block.motion_modules or text is None:
        return x
    moved: Array = block.motion_modules[index](x, text.frames)
    return moved


def _in_parts(
    nn: Layers, layer: Callable[..., Array], inputs: list[Array], told: Condition | None
) -> Array:
    """The output of a layer, which to save memory sees some frames of a video at a time.

    Args:
        layer: maps the inputs and ``told`` to (N, H, W, C).
        inputs: (N, H, W, C) each; the list is emptied.
        told: of the layer; in parts it has one row.
    """
    if told is None or not told.frames.in_parts:
        return layer(*inputs, told)
    at_once, parts = told.frames.at_once or 1, []
    for start in range(0, len(inputs[0]), at_once):
        some = [one[start : start + at_once] for one in inputs]
        part = layer(*some, told.of_video(Frames(len(some[0]))))
        nn.evaluate(part)
        parts.append(part)
    inputs.clear()
    return nn.concatenate(parts)


def _joined_resnet(
    block: Any,
    index: int,
    x: Array,
    skips: list[Array],
    temb: Condition,
    text: Condition | None,
) -> Array:
    """A resnet on what comes from below and the last skip, which is removed."""
    resnet = block.resnets[index]
    if not temb.frames.in_parts:  # the skip is not held while the resnet runs
        return resnet(_joined(block, x, skips.pop(), text), temb)

    def join(x: Array, skip: Array, temb: Condition) -> Array:
        return resnet(_joined(block, x, skip, text), temb)

    return _in_parts(block.nn, join, [x, skips.pop()], temb)


def _upsampled(layer: Module, x: Array, size: tuple[int, ...], temb: Condition) -> Array:
    return _in_parts(layer.nn, lambda x, _: layer(x, size), [x], temb)


def _joined(block: Module, x: Array, skip: Array, text: Condition | None) -> Array:
    """Join what comes from below and a skip, which the text can change (FreeU)."""
    change = None if text is None else text.change(block)
    if change is not None:
        return change.join(block.nn, x, skip)
    return block.nn.concatenate([x, skip], axis=-1)


class UpBlock2D(UNetBlock):
    """Resnets that each take a skip as well, then an upsampler where the block has one.

    Args:
        x: (B, H, W, C).
        temb: of (B, E).
        encoder_hidden_states: not attended to; it can change how skips are taken.
        skips: outputs of the down path, the last first; those used are removed.
        layers: run only these of its layers, and the upsampler where no later ones are left.
    Returns: (B, H', W', out_channels), of the size of the next skip where it was upsampled.
    """

    def __init__(self, nn: Layers, block: BlockSpec, config: UNetConfig) -> None:
        super().__init__(nn, block, config)
        self.upsamplers = [Upsample2D(nn, block.out_channels)] if block.resample else []

    def __call__(
        self,
        x: Array,
        temb: Condition,
        encoder_hidden_states: Condition | None,
        skips: list[Array],
        layers: slice = ALL,
    ) -> Array:
        for i in range(len(self.resnets))[layers]:
            x = _joined_resnet(self, i, x, skips, temb, encoder_hidden_states)
            if self.attentions:
                x = _in_parts(self.nn, self.attentions[i], [x], encoder_hidden_states)
            x = _moved(self, i, x, encoder_hidden_states)
        for upsampler in self.upsamplers if layers.stop is None else []:
            x = _upsampled(upsampler, x, skips[-1].shape[1:3], temb)
        return x


class CrossAttnUpBlock2D(UpBlock2D):
    """Resnets that each take a skip and are followed by a transformer, then an upsampler.

    Args and result: as UpBlock2D, with encoder_hidden_states of (B, L, D) attended to.
    """


class UNetEncoder(Module):
    """The first half of the U-Net, of which a ControlNet is a copy: all but the way up."""

    def __init__(self, nn: Layers, config: UNet2DConditionConfig) -> None:
        super().__init__(nn)
        self.config = config
        first, temb = config.block_out_channels[0], config.time_embed_dim
        kernel = config.conv_in_kernel
        self.conv_in = nn.Conv2d(config.in_channels, first, kernel, padding=kernel // 2)
        self.time_embedding = TimestepEmbedding(nn, first, temb, config.time_cond_proj_dim)
        self.add_embedding = None
        embed_in = config.projection_class_embeddings_input_dim
        if config.addition_embed_type is not None and embed_in is not None:
            self.add_embedding = TimestepEmbedding(nn, embed_in, temb)
        self.class_embedding: Any = None
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, temb)
        elif config.class_embed_type == "projection" and embed_in is not None:
            self.class_embedding = TimestepEmbedding(nn, embed_in, temb)
        self.down_blocks = [self.make_block(nn, block, config) for block in config.down_blocks]
        self.mid_block = None
        if config.mid_block is not None:
            self.mid_block = self.make_block(nn, config.mid_block, config)

    def make_block(self, nn: Layers, block: BlockSpec, config: UNetConfig) -> Any:
        """Make a block of the way down, the middle or the way up."""
        return _BLOCKS[block.type](nn, block, config)

    def embed(
        self,
        timesteps: Array,
        text_embeds: Array | None = None,
        time_ids: Array | None = None,
        timestep_cond: Array | None = None,
        class_labels: Array | None = None,
    ) -> Array:
        """The timestep embedding with all that is added to it.

        Args: as for UNet2DConditionModel, timesteps (N,); the others of N rows, or of one for all.
        Returns: (N, E).
        """
        config, dtype = self.config, self.dtype
        temb = self.nn.timestep_embedding(
            timesteps, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        if timestep_cond is not None:
            timestep_cond = self.nn.cast(timestep_cond, dtype)
        temb = self.time_embedding(self.nn.cast(temb, dtype), timestep_cond)
        ids_dim = config.addition_time_embed_dim
        if self.add_embedding is not None and ids_dim is not None:
            if text_embeds is None or time_ids is None:
                raise UsageError(
                    "this network is conditioned on pooled text and sizes (addition_embed_type "
                    "text_time): give both text_embeds and time_ids"
                )
            ids = self.nn.timestep_embedding(
                time_ids.reshape(-1), ids_dim, config.flip_sin_to_cos, config.freq_shift
            ).reshape(len(time_ids), -1)
            added = self.nn.concatenate([self.nn.cast(text_embeds, self.nn.float32), ids], axis=-1)
            temb = temb + self.add_embedding(self.nn.cast(added, dtype))
        if (self.class_embedding is None) != (class_labels is None):
            needs = "needs class_labels" if class_labels is None else "takes no class_labels"
            raise UsageError(f"this U-Net {needs} (num_class_embeds, class_embed_type)")
        if self.class_embedding is not None and class_labels is not None:
            if config.class_embed_type == "projection":
                class_labels = self.nn.cast(class_labels, dtype)
            temb = temb + self.nn.cast(self.class_embedding(class_labels), dtype)
        return temb

    def read(self, encoder_hidden_states: Array) -> Condition:
        """Text states (B, L, D) as ``predict`` takes them."""
        return Condition(self.nn.cast(encoder_hidden_states, self.dtype))

    def conditions(self, sizes: Sizes) -> dict[str, Array]:
        """Everything that the config takes beside sample, timesteps and text; see ``embed``."""
        config, batch = self.config, sizes.batch
        given: dict[str, Array] = {}
        embed_in = config.projection_class_embeddings_input_dim
        ids_dim = config.addition_time_embed_dim
        if self.add_embedding is not None and embed_in is not None and ids_dim is not None:
            # Pooled text and sizes become one vector; how it is divided changes no layer's work.
            given["text_embeds"] = sizes.array(batch, embed_in - ids_dim)
            given["time_ids"] = sizes.array(batch, 1)
        if config.time_cond_proj_dim is not None:
            given["timestep_cond"] = sizes.array(batch, config.time_cond_proj_dim)
        if config.num_class_embeds is not None:
            given["class_labels"] = sizes.array(batch)
        elif self.class_embedding is not None:
            given["class_labels"] = sizes.array(batch, embed_in)
        return given

    def encode(
        self, x: Array, temb: Condition, text: Condition, features: Sequence[Array] = ()
    ) -> tuple[Array, list[Array]]:
        """The way down.

        Args:
            x: output of conv_in, (B, H, W, C).
            temb, text: B rows of the results of ``embed`` and ``read``.
            features: what T2I-Adapters add to each block, and then to the mid block.
        Returns: output of the mid block; x and the output of every layer of the down path.
        """
        skips = [x]
        left = list(features)
        for block in self.down_blocks:
            x = block(x, temb, text, skips, left.pop(0) if left else None)
        if self.mid_block is not None:
            x = self.mid_block(x, temb, text)
            if left:
                x = x + left[0]
        return x, skips


class UNet2DConditionModel(UNetEncoder):
    """Predicts from noisy latents what the config's schedule is trained on: noise, v or the sample.

    Args:
        sample: (B, H, W, in_channels); any height and width.
        timesteps: (B,), or one number for all.
        encoder_hidden_states: (B, L, D).
        text_embeds: pooled text, (B, P); SDXL only.
        time_ids: sizes and crop, (B, 6); (B, 5) for the refiner; SDXL only.
        timestep_cond: (B, time_cond_proj_dim); models distilled over the guidance scale only.
        class_labels: (B,) numbers below num_class_embeds, int32 (upscalers), or vectors
            (B, projection_class_embeddings_input_dim) (Stable unCLIP).
        deep: what the last layer of the way up is given, by all the layers below it. An empty list
            is filled with it; a filled one is used in its place, and only that last layer runs (Ma
            et al. 2023, "DeepCache": it changes little from one timestep to the next).
        residuals: what ControlNets add to each output of the way down, the mid block's last.
        features: what T2I-Adapters add inside the way down, to each block, and to the mid block.
    Returns: (B, H, W, out_channels), float32 for weights of any dtype: sampling is float32.
    Raises: UsageError where the model needs text_embeds and time_ids, or class_labels, and does not
        get them.
    """

    def __init__(self, nn: Layers, config: UNet2DConditionConfig) -> None:
        super().__init__(nn, config)
        self.up_blocks = [self.make_block(nn, block, config) for block in config.up_blocks]
        first, kernel = config.block_out_channels[0], config.conv_out_kernel
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, kernel, padding=kernel // 2)

    def __call__(
        self,
        sample: Array,
        timesteps: Array | float,
        encoder_hidden_states: Array,
        text_embeds: Array | None = None,
        time_ids: Array | None = None,
        timestep_cond: Array | None = None,
        class_labels: Array | None = None,
        deep: list[Array] | None = None,
        residuals: list[Array] | None = None,
        features: Sequence[Array] = (),
    ) -> Array:
        numbers = self.nn.asarray(timesteps, self.nn.float32)
        timesteps = self.nn.broadcast_to(numbers, (len(sample),))
        temb = self.embed(timesteps, text_embeds, time_ids, timestep_cond, class_labels)
        text = self.read(encoder_hidden_states)
        return self.predict(sample, Condition(temb), text, deep, residuals, features)

    def run_once(self, sizes: Sizes) -> Array:
        rows = sizes.batch * sizes.frames.count
        sample = sizes.array(rows, sizes.height, sizes.width, self.config.in_channels)
        text = sizes.array(sizes.batch, sizes.tokens, self.config.cross_attention_dim[0])
        temb = Condition(self.embed(sizes.array(sizes.batch), **self.conditions(sizes)))
        read, frames = self.read(text).of_video(sizes.frames), sizes.frames
        return self.predict(sample, temb.of_video(frames), read)

    def absorb(self, texts: Sequence[Condition]) -> None:
        """Make the keys and values of these texts, then drop the weights that make them.

        After this, ``predict`` takes these texts only.
        """
        mid = [] if self.mid_block is None else [self.mid_block]
        for part in (*self.down_blocks, *mid, *self.up_blocks):
            for transformer in part.attentions:
                for block in transformer.transformer_blocks:
                    block.attn2.absorb(texts)
                    if block.only_cross_attention:
                        block.attn1.absorb(texts)

    def cross_attentions(self) -> list[Attention]:
        """The layers that attend to the text: on the way down, up, in the middle."""
        middle = [] if self.mid_block is None else [self.mid_block]
        return [
            inner.attn2
            for block in (*self.down_blocks, *self.up_blocks, *middle)
            for attention in block.attentions
            for inner in attention.transformer_blocks
        ]

    def predict(
        self,
        sample: Array,
        temb: Condition,
        text: Condition,
        deep: list[Array] | None = None,
        residuals: list[Array] | None = None,
        features: Sequence[Array] = (),
    ) -> Array:
        """Run the network.

        Args:
            sample: (B, H, W, in_channels).
            temb: B rows of the result of ``embed``.
            text: B rows of the result of ``read``.
            deep, residuals, features: as when called.
        Returns: as when called.
        """
        x = self.conv_in(self.nn.cast(sample, self.dtype))
        last = self.up_blocks[-1]
        if deep:
            skips = [x if residuals is None else x + residuals[0]]
            x = deep[0]
        else:
            x, skips = self.encode(x, temb, text, features)
            if residuals is not None:
                *to_skips, to_mid = residuals
                skips = [skip + more for skip, more in zip(skips, to_skips, strict=True)]
                x = x + to_mid
            for block in self.up_blocks[:-1]:
                x = block(x, temb, text, skips)
            x = last(x, temb, text, skips, ALL_BUT_LAST)
            if deep is not None:
                deep.append(x)
        x = last(x, temb, text, skips, LAST)
        return self.nn.cast(self.conv_out(self.conv_norm_out.silu(x)), self.nn.float32)


_BLOCKS: dict[str, Any] = {
    block.__name__: block
    for block in (
        DownBlock2D,
        CrossAttnDownBlock2D,
        UNetMidBlock2D,
        UNetMidBlock2DCrossAttn,
        UpBlock2D,
        CrossAttnUpBlock2D,
    )
}
