"""The U-Net of pixels, without text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxdiff.networks.config.reader import MOST_LAYERS, TRAINING, ConfigReader
from mlxdiff.networks.config.unet import BlockSpec, up_path

UNET_2D_NO_EFFECT: dict[str, str] = {
    "dropout": TRAINING,
    "num_train_timesteps": "belongs to time_embedding_type 'learned', which is refused",
}


@dataclass(frozen=True)
class UNet2DConfig:
    """The denoising U-Net without text, as diffusers' UNet2DModel.

    Here ``attention_head_dim`` is what it says, the width of a head; None is one head. A label, for
    the models that take one, is a number below ``num_class_embeds``, or any number
    (``class_embed_type`` timestep), or a vector as wide as the timestep embedding (identity).

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B.
    """

    sample_size: tuple[int, int] | None
    in_channels: int
    out_channels: int
    flip_sin_to_cos: bool
    freq_shift: float
    time_embedding_dim: int | None
    down_block_types: tuple[str, ...]
    mid_block_type: str | None
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    downsample_padding: int
    attention_head_dim: int | None
    norm_num_groups: int
    attn_norm_num_groups: int | None
    norm_eps: float
    resnet_time_scale_shift: str
    add_attention: bool
    class_embed_type: str | None
    num_class_embeds: int | None

    @property
    def time_embed_dim(self) -> int:
        """Width of the timestep embedding that the resnets are given."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def takes_label(self) -> bool:
        """Return True if the model is conditioned on a class."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def mid_norm_num_groups(self) -> int | None:
        """Groups of the group norm before the mid block's attention; None where there is none."""
        if self.attn_norm_num_groups is None and self.resnet_time_scale_shift == "default":
            return self.norm_num_groups
        return self.attn_norm_num_groups

    @property
    def down_blocks(self) -> tuple[BlockSpec, ...]:
        """The down path, from the input on."""
        specs: list[BlockSpec] = []
        channels = self.block_out_channels[0]
        for kind, width in zip(self.down_block_types, self.block_out_channels, strict=True):
            specs.append(
                BlockSpec(
                    type=kind,
                    in_channels=channels,
                    out_channels=width,
                    num_layers=self.layers_per_block,
                    num_attention_heads=self._heads(width),
                    resample=len(specs) < len(self.block_out_channels) - 1,
                )
            )
            channels = width
        return tuple(specs)

    @property
    def mid_block(self) -> BlockSpec | None:
        """The block at the lowest resolution; None for models without one."""
        if self.mid_block_type is None:
            return None
        width = self.block_out_channels[-1]
        return BlockSpec(
            type="UNetMidBlock2DAttn" if self.add_attention else "UNetMidBlock2D",
            in_channels=width,
            out_channels=width,
            num_layers=2,
            num_attention_heads=self._heads(width),
        )

    @property
    def up_blocks(self) -> tuple[BlockSpec, ...]:
        """The up path, from the lowest resolution on."""
        widths = self.block_out_channels
        path = up_path(widths, (self.layers_per_block,) * len(widths))
        return tuple(
            BlockSpec(
                type=kind,
                in_channels=channels,
                out_channels=out,
                num_layers=len(skips),
                skip_channels=skips,
                num_attention_heads=self._heads(out),
                resample=level > 0,
            )
            for kind, (level, channels, out, skips) in zip(self.up_block_types, path, strict=True)
        )

    def _heads(self, width: int) -> int:
        return width // (self.attention_head_dim or width)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "unet/config.json") -> UNet2DConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("UNet2DModel",))
        only = reader.only
        # Variants of the class that belong to other models (score SDE, consistency models).
        only("center_input_sample", False, False)
        only("act_fn", "silu", "silu", "swish")
        only("mid_block_scale_factor", 1, 1, 1.0)
        only("time_embedding_type", "positional", "positional")
        only("downsample_type", "conv", "conv")
        only("upsample_type", "conv", "conv")

        channels = reader.integers("block_out_channels", (224, 448, 672, 896))
        down_kinds, up_kinds = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")
        down = reader.choices("down_block_types", down_kinds[:1] + down_kinds[1:] * 3, down_kinds)
        up = reader.choices("up_block_types", up_kinds[1:] * 3 + up_kinds[:1], up_kinds)
        for key, types in (("down_block_types", down), ("up_block_types", up)):
            if len(types) != len(channels):
                raise reader.fail(
                    key, list(types), f"one for each of the {len(channels)} block_out_channels"
                )
        groups = reader.integer("norm_num_groups", 32)
        if any(width % groups for width in channels):
            raise reader.fail("norm_num_groups", groups, "a divisor of all block_out_channels")
        attention_groups = reader.integer("attn_norm_num_groups", None)
        if attention_groups is not None and channels[-1] % attention_groups:
            raise reader.fail(
                "attn_norm_num_groups", attention_groups, "a divisor of the last block_out_channels"
            )
        # An absent key is the class's 8, a null one head.
        default = None if "attention_head_dim" in data else 8
        head_dim = reader.integer("attention_head_dim", default)
        config = cls(
            sample_size=reader.size("sample_size"),
            in_channels=reader.integer("in_channels", 3),
            out_channels=reader.integer("out_channels", 3),
            flip_sin_to_cos=reader.flag("flip_sin_to_cos", True),
            freq_shift=reader.number("freq_shift", 0),
            time_embedding_dim=reader.integer("time_embedding_dim", None),
            down_block_types=down,
            mid_block_type=only("mid_block_type", "UNetMidBlock2D", None, "UNetMidBlock2D"),
            up_block_types=up,
            block_out_channels=channels,
            layers_per_block=reader.integer("layers_per_block", 2, most=MOST_LAYERS),
            downsample_padding=only("downsample_padding", 1, 0, 1),
            attention_head_dim=head_dim,
            norm_num_groups=groups,
            attn_norm_num_groups=attention_groups,
            norm_eps=reader.number("norm_eps", 1e-5),
            resnet_time_scale_shift=only(
                "resnet_time_scale_shift", "default", "default", "scale_shift"
            ),
            add_attention=reader.flag("add_attention", True),
            class_embed_type=only("class_embed_type", None, None, "timestep", "identity"),
            num_class_embeds=reader.integer("num_class_embeds", None),
        )
        reader.finish(UNET_2D_NO_EFFECT)
        blocks = (*config.down_blocks, config.mid_block, *config.up_blocks)
        for width in {b.out_channels for b in blocks if b is not None and "Attn" in b.type}:
            if width % (head_dim or width):
                raise reader.fail(
                    "attention_head_dim", head_dim, f"a divisor of the {width} block_out_channels"
                )
        return config
