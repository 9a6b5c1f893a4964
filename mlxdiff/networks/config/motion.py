"""Motion modules of AnimateDiff."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxdiff.networks.config.reader import MOST_LAYERS, ConfigReader


@dataclass(frozen=True)
class MotionSpec:
    """The motion modules of a block.

    Attributes:
        layers: transformer blocks of each module.
        num_attention_heads: heads of each attention.
        norm_num_groups: of each module's norm.
    """

    layers: tuple[int, ...]
    num_attention_heads: int
    norm_num_groups: int


@dataclass(frozen=True)
class MotionAdapterConfig:
    """Motion modules for a U-Net, as diffusers' MotionAdapter.

    Values that a file may give once for all blocks are tuples with one entry for each block, from
    the input down. The way up has the same of each, and one module more.

    Attributes:
        block_out_channels: channels of each block.
        motion_layers_per_block: motion modules of each block of the way down.
        motion_transformer_layers_per_block: transformer blocks of each of them.
        motion_transformer_layers_per_mid_block: of the one in the middle.
        motion_num_attention_heads: heads of each attention.
        motion_norm_num_groups: of the norms.
        motion_max_seq_length: the most frames that it was made for.
        use_motion_mid_block: there is one in the middle.

    Source: Guo et al. 2023 (arXiv 2307.04725).
    """

    block_out_channels: tuple[int, ...]
    motion_layers_per_block: tuple[int, ...]
    motion_transformer_layers_per_block: tuple[int, ...]
    motion_transformer_layers_per_mid_block: int
    motion_num_attention_heads: tuple[int, ...]
    motion_norm_num_groups: int
    motion_max_seq_length: int
    use_motion_mid_block: bool

    def down(self, level: int) -> MotionSpec:
        """The motion modules of a block of the way down."""
        return self._spec(level, self.motion_layers_per_block[level])

    def up(self, level: int) -> MotionSpec:
        """The motion modules of the block of the way up at this level."""
        return self._spec(level, self.motion_layers_per_block[level] + 1)

    def mid(self) -> MotionSpec | None:
        """The motion modules in the middle; None: there are none."""
        if not self.use_motion_mid_block:
            return None
        layers = (self.motion_transformer_layers_per_mid_block,)
        return MotionSpec(layers, self.motion_num_attention_heads[-1], self.motion_norm_num_groups)

    def _spec(self, level: int, modules: int) -> MotionSpec:
        return MotionSpec(
            (self.motion_transformer_layers_per_block[level],) * modules,
            self.motion_num_attention_heads[level],
            self.motion_norm_num_groups,
        )

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "motion_adapter/config.json"
    ) -> MotionAdapterConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("MotionAdapter",))
        # A U-Net has one layer with attention in the middle.
        reader.only("motion_mid_block_layers_per_block", 1, 1)
        # PIA's U-Net sees a picture beside the latents, through a first convolution of its own.
        reader.only("conv_in_channels", None, None)
        channels = reader.integers("block_out_channels", (320, 640, 1280, 1280))
        n = len(channels)
        config = cls(
            block_out_channels=channels,
            motion_layers_per_block=reader.per_block(
                "motion_layers_per_block", 2, n, most=MOST_LAYERS
            ),
            motion_transformer_layers_per_block=reader.per_block(
                "motion_transformer_layers_per_block", 1, n, most=MOST_LAYERS
            ),
            motion_transformer_layers_per_mid_block=reader.integer(
                "motion_transformer_layers_per_mid_block", 1, most=MOST_LAYERS
            ),
            motion_num_attention_heads=reader.per_block("motion_num_attention_heads", 8, n),
            motion_norm_num_groups=reader.integer("motion_norm_num_groups", 32),
            motion_max_seq_length=reader.integer("motion_max_seq_length", 32, most=1 << 12),
            use_motion_mid_block=reader.flag("use_motion_mid_block", True),
        )
        groups = config.motion_norm_num_groups
        for width, heads in zip(channels, config.motion_num_attention_heads, strict=True):
            if width % heads or width % 2:
                raise reader.fail(
                    "motion_num_attention_heads", heads, "divisors of block_out_channels"
                )
            if width % groups:
                raise reader.fail(
                    "motion_norm_num_groups", groups, "a divisor of all block_out_channels"
                )
        reader.finish({})
        return config
