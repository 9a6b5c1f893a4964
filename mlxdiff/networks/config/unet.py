"""The U-Net of latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlxdiff.networks.config.motion import MotionAdapterConfig, MotionSpec
from mlxdiff.networks.config.reader import MOST_LAYERS, TRAINING, ConfigReader

UNET_NO_EFFECT: dict[str, str] = {
    "dropout": TRAINING,
    "addition_embed_type_num_heads": "belongs to addition_embed_type 'text', which is refused",
    "attention_head_dim": "num_attention_heads stands beside it and wins",
    "reverse_transformer_layers_per_block": "read with transformer_layers_per_block",
}
DOWN_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_TYPES = ("UpBlock2D", "CrossAttnUpBlock2D")
_MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")


@dataclass(frozen=True)
class BlockSpec:
    """One block of the U-Net, with everything that depends on its place worked out.

    Attributes:
        type: diffusers' class name; UNetMidBlock2DAttn for a UNetMidBlock2D with attention.
        in_channels: channels of the input of the first resnet (before a skip is concatenated).
        out_channels: channels of the output.
        num_layers: number of resnets.
        skip_channels: for an up block, the channels of the skip that each resnet concatenates;
            else ().
        transformer_layers: transformer blocks in the Transformer2DModel after each resnet (for the
            mid block: between its two resnets); () where there is no attention.
        num_attention_heads: heads of each attention.
        cross_attention_dim: width of encoder_hidden_states.
        only_cross_attention: attn1 attends to the text as well.
        resample: whether a down- or upsampler follows.
        motion: the motion modules after its layers; None: it has none.
    """

    type: str
    in_channels: int
    out_channels: int
    num_layers: int
    skip_channels: tuple[int, ...] = ()
    transformer_layers: tuple[int, ...] = ()
    num_attention_heads: int = 1
    cross_attention_dim: int = 0
    only_cross_attention: bool = False
    resample: bool = False
    motion: MotionSpec | None = None


def up_path(
    widths: tuple[int, ...], layers: tuple[int, ...]
) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """(level, in_channels, out_channels, skip_channels) of each up block, the lowest level first.

    Args:
        widths, layers: channels and resnets of each block of the down path.
    """
    channels = widths[-1]
    for level in reversed(range(len(widths))):
        out, below = widths[level], widths[max(level - 1, 0)]
        yield level, channels, out, (out,) * layers[level] + (below,)
        channels = out


@dataclass(frozen=True)
class UNet2DConditionConfig:
    """The denoising U-Net, as diffusers' UNet2DConditionModel.

    Values that a file may give once for all blocks are tuples with one entry for each block, from
    the input down. ``num_attention_heads`` is the number of heads: files call it
    ``attention_head_dim`` (a slip of diffusers that is kept for compatibility) unless they write
    ``num_attention_heads``. ``transformer_layers_per_block`` has for each block one entry for each
    resnet; the up path's are in ``up_transformer_layers_per_block``, in the order of the up blocks.

    ``num_class_embeds`` counts the classes that it can be told: an upscaler's levels of noise. If
    ``class_embed_type`` is "projection", a class is a vector: CLIP's embedding of a picture.

    Source: Rombach et al. 2022 (SD 1.x, 2.x); Podell et al. 2023 (SDXL).
    """

    sample_size: tuple[int, int] | None
    in_channels: int
    out_channels: int
    flip_sin_to_cos: bool
    freq_shift: float
    down_block_types: tuple[str, ...]
    mid_block_type: str | None
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    downsample_padding: int
    norm_num_groups: int
    norm_eps: float
    cross_attention_dim: tuple[int, ...]
    transformer_layers_per_block: tuple[tuple[int, ...], ...]
    up_transformer_layers_per_block: tuple[tuple[int, ...], ...]
    num_attention_heads: tuple[int, ...]
    only_cross_attention: tuple[bool, ...]
    use_linear_projection: bool
    upcast_attention: bool  # asks for scores in float32, in which attention keeps them anyway
    addition_embed_type: str | None
    addition_time_embed_dim: int | None
    projection_class_embeddings_input_dim: int | None
    time_cond_proj_dim: int | None
    class_embed_type: str | None
    num_class_embeds: int | None
    conv_in_kernel: int
    conv_out_kernel: int
    motion: MotionAdapterConfig | None = field(default=None, kw_only=True)  # in no file: added
    # What UNet2DConfig has beside these, at what it means here.
    resnet_time_scale_shift: ClassVar[str] = "default"

    @property
    def time_embed_dim(self) -> int:
        """Width of the timestep embedding that the resnets are given."""
        return 4 * self.block_out_channels[0]

    @property
    def down_blocks(self) -> tuple[BlockSpec, ...]:
        """The down path, from the input on."""
        specs, channels = [], self.block_out_channels[0]
        for i, kind in enumerate(self.down_block_types):
            attends = kind == "CrossAttnDownBlock2D"
            specs.append(
                BlockSpec(
                    type=kind,
                    in_channels=channels,
                    out_channels=self.block_out_channels[i],
                    num_layers=self.layers_per_block[i],
                    transformer_layers=self.transformer_layers_per_block[i] if attends else (),
                    num_attention_heads=self.num_attention_heads[i],
                    cross_attention_dim=self.cross_attention_dim[i],
                    only_cross_attention=self.only_cross_attention[i],
                    resample=i < len(self.down_block_types) - 1,
                    motion=None if self.motion is None else self.motion.down(i),
                )
            )
            channels = self.block_out_channels[i]
        return tuple(specs)

    @property
    def mid_block(self) -> BlockSpec | None:
        """The block at the lowest resolution; None for models without one (BK-SDM small, tiny)."""
        if self.mid_block_type is None:
            return None
        attends = self.mid_block_type == "UNetMidBlock2DCrossAttn"
        return BlockSpec(
            type=self.mid_block_type,
            in_channels=self.block_out_channels[-1],
            out_channels=self.block_out_channels[-1],
            num_layers=2 if attends else 1,
            transformer_layers=self.transformer_layers_per_block[-1][:1] if attends else (),
            num_attention_heads=self.num_attention_heads[-1],
            cross_attention_dim=self.cross_attention_dim[-1],
            motion=None if self.motion is None else self.motion.mid(),
        )

    @property
    def cross_attentions(self) -> tuple[BlockSpec, ...]:
        """The block of each layer that attends to the text: on the way down, up, in the middle."""
        blocks = [*self.down_blocks, *self.up_blocks]
        if self.mid_block is not None:
            blocks.append(self.mid_block)
        return tuple(block for block in blocks for _ in range(sum(block.transformer_layers)))

    @property
    def up_blocks(self) -> tuple[BlockSpec, ...]:
        """The up path, from the lowest resolution on."""
        specs: list[BlockSpec] = []
        for level, channels, out, skips in up_path(self.block_out_channels, self.layers_per_block):
            i = len(specs)
            attends = self.up_block_types[i] == "CrossAttnUpBlock2D"
            specs.append(
                BlockSpec(
                    type=self.up_block_types[i],
                    in_channels=channels,
                    out_channels=out,
                    num_layers=len(skips),
                    skip_channels=skips,
                    transformer_layers=self.up_transformer_layers_per_block[i] if attends else (),
                    num_attention_heads=self.num_attention_heads[level],
                    cross_attention_dim=self.cross_attention_dim[level],
                    only_cross_attention=self.only_cross_attention[level],
                    resample=level > 0,
                    motion=None if self.motion is None else self.motion.up(level),
                )
            )
        return tuple(specs)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "unet/config.json"
    ) -> UNet2DConditionConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("UNet2DConditionModel",))
        only = reader.only
        # Variants of the class that no Stable Diffusion checkpoint of these families uses.
        only("center_input_sample", False, False)
        only("act_fn", "silu", "silu", "swish")
        only("mid_block_scale_factor", 1, 1, 1.0)
        only("dual_cross_attention", False, False)
        only("resnet_time_scale_shift", "default", "default")
        only("resnet_skip_time_act", False, False)
        only("resnet_out_scale_factor", 1.0, 1.0, 1)
        only("time_embedding_type", "positional", "positional")
        only("attention_type", "default", "default")
        only("class_embeddings_concat", False, False)
        only("mid_block_only_cross_attention", None, None, False)
        for key in (
            "encoder_hid_dim encoder_hid_dim_type time_embedding_dim "
            "time_embedding_act_fn timestep_post_act cross_attention_norm"
        ).split():
            only(key, None, None)

        channels = reader.integers("block_out_channels", (320, 640, 1280, 1280))
        n = len(channels)
        down = reader.choices(
            "down_block_types", ("CrossAttnDownBlock2D",) * 3 + DOWN_TYPES[:1], DOWN_TYPES
        )
        up = reader.choices("up_block_types", UP_TYPES[:1] + ("CrossAttnUpBlock2D",) * 3, UP_TYPES)
        for key, types in (("down_block_types", down), ("up_block_types", up)):
            if len(types) != n:
                raise reader.fail(key, list(types), f"one for each of the {n} block_out_channels")
        layers = reader.per_block("layers_per_block", 2, n, most=MOST_LAYERS)
        # Both spellings mean the number of heads; the right name wins where both are given.
        spelling = "num_attention_heads"
        if reader.left.get(spelling) is None:
            spelling = "attention_head_dim"
        heads = reader.per_block(spelling, 8, n)
        reader.left.pop("num_attention_heads", None)
        for width, count in zip(channels, heads, strict=True):
            if width % count:
                raise reader.fail(spelling, list(heads), "divisors of block_out_channels")
        depth = reader.per_block_depths("transformer_layers_per_block", 1, layers)
        up_layers = tuple(count + 1 for count in reversed(layers))
        if reader.left.get("reverse_transformer_layers_per_block") is None:
            reader.left.pop("reverse_transformer_layers_per_block", None)
            if any(len(set(d)) > 1 for d in depth):
                raise reader.fail(
                    "reverse_transformer_layers_per_block",
                    None,
                    "a list, since transformer_layers_per_block differs inside a block",
                )
            up_depth = tuple((d[0],) * c for d, c in zip(reversed(depth), up_layers, strict=True))
        else:
            up_depth = reader.per_block_depths("reverse_transformer_layers_per_block", 1, up_layers)

        groups = reader.integer("norm_num_groups", 32)
        if any(width % groups for width in channels):
            raise reader.fail("norm_num_groups", groups, "a divisor of all block_out_channels")
        embed_type = only("addition_embed_type", None, None, "text_time")
        embed_dim = reader.integer("addition_time_embed_dim", None)
        embed_in = reader.integer("projection_class_embeddings_input_dim", None)
        if embed_type is not None and (embed_dim is None or embed_in is None):
            raise reader.fail(
                "addition_embed_type",
                embed_type,
                "addition_time_embed_dim and projection_class_embeddings_input_dim beside it",
            )
        class_type = only("class_embed_type", None, None, "projection")
        classes = reader.integer("num_class_embeds", None)
        others = embed_type is not None or classes is not None
        if class_type is not None and (others or embed_in is None):
            raise reader.fail(
                "class_embed_type",
                class_type,
                "projection_class_embeddings_input_dim beside it, and neither num_class_embeds nor "
                "addition_embed_type",
            )
        kernels = [reader.integer(key, 3) for key in ("conv_in_kernel", "conv_out_kernel")]
        if any(k % 2 == 0 for k in kernels):
            raise reader.fail("conv_in_kernel, conv_out_kernel", kernels, "odd numbers")
        config = cls(
            sample_size=reader.size("sample_size"),
            in_channels=reader.integer("in_channels", 4),
            out_channels=reader.integer("out_channels", 4),
            flip_sin_to_cos=reader.flag("flip_sin_to_cos", True),
            freq_shift=reader.number("freq_shift", 0),
            down_block_types=down,
            mid_block_type=only("mid_block_type", _MID_TYPES[0], None, *_MID_TYPES),
            up_block_types=up,
            block_out_channels=channels,
            layers_per_block=layers,
            downsample_padding=only("downsample_padding", 1, 0, 1),
            norm_num_groups=groups,
            norm_eps=reader.number("norm_eps", 1e-5),
            cross_attention_dim=reader.per_block("cross_attention_dim", 1280, n),
            transformer_layers_per_block=depth,
            up_transformer_layers_per_block=up_depth,
            num_attention_heads=heads,
            only_cross_attention=reader.per_block("only_cross_attention", False, n, bool),
            use_linear_projection=reader.flag("use_linear_projection", False),
            upcast_attention=reader.flag("upcast_attention", False),
            addition_embed_type=embed_type,
            addition_time_embed_dim=embed_dim,
            projection_class_embeddings_input_dim=embed_in,
            time_cond_proj_dim=reader.integer("time_cond_proj_dim", None),
            class_embed_type=class_type,
            num_class_embeds=classes,
            conv_in_kernel=kernels[0],
            conv_out_kernel=kernels[1],
        )
        reader.finish(UNET_NO_EFFECT)
        return config
