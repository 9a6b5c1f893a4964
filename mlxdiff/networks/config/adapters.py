"""T2I-Adapters, ControlNet-LLLite and IP-Adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxdiff.networks.config.reader import MOST_LAYERS, ConfigReader

T2I_ADAPTERS = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter, as diffusers' T2IAdapter.

    Attributes:
        in_channels: of the control picture: 3, or 1 for grey.
        channels: of the feature maps; of a light adapter without the last, which has the same.
        num_res_blocks: in each level.
        downscale_factor: pixels for each place of the largest map, along a side.
        adapter_type: a name of ``T2I_ADAPTERS``.

    Source: Mou et al. 2023 (arXiv 2302.08453).
    """

    in_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    downscale_factor: int
    adapter_type: str

    @property
    def is_light(self) -> bool:
        """True for a light adapter."""
        return self.adapter_type == "light_adapter"

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each feature map, the largest map first."""
        return (*self.channels, self.channels[-1]) if self.is_light else self.channels

    @property
    def halves(self) -> tuple[bool, ...]:
        """For each level, whether it halves the sides first."""
        levels = range(len(self.feature_channels))
        if self.adapter_type == "full_adapter_xl":
            return tuple(level == 2 for level in levels)
        return tuple(level > 0 for level in levels)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "t2i_adapter/config.json"
    ) -> T2IAdapterConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("T2IAdapter",))
        config = cls(
            in_channels=reader.only("in_channels", 3, 1, 3),
            channels=reader.integers("channels", (320, 640, 1280, 1280)),
            num_res_blocks=reader.integer("num_res_blocks", 2, most=MOST_LAYERS),
            downscale_factor=reader.integer("downscale_factor", 8, most=64),
            adapter_type=reader.only("adapter_type", "full_adapter", *T2I_ADAPTERS),
        )
        if config.is_light and any(width % 4 for width in config.channels):
            raise reader.fail("channels", list(config.channels), "multiples of 4")
        if config.adapter_type == "full_adapter_xl" and (
            config.channels[2:] != config.channels[2:3] * len(config.channels[2:])
        ):
            raise reader.fail("channels", list(config.channels), "the same from the third on")
        reader.finish({})
        return config


@dataclass(frozen=True)
class LLLiteModuleConfig:
    """A module of a ControlNet-LLLite.

    Attributes:
        target: the linear layer of the U-Net whose input it changes, by its parameter name without
            ``.weight``.
        in_dim: width of that input.
        mlp_dim: width of the module.
        cond_emb_dim: width of the embedded control picture.
        depth: 1, 2 or 3: the picture is embedded at 1/8, 1/16 or 1/32 of its sides.
    """

    target: str
    in_dim: int
    mlp_dim: int
    cond_emb_dim: int
    depth: int

    @property
    def factor(self) -> int:
        """Pixels for each place of the embedded picture, along a side."""
        return int(4 * 2**self.depth)


@dataclass(frozen=True)
class LLLiteConfig:
    """A ControlNet-LLLite. Its files have no config: shapes tell all of it (``convert.lllite``).

    Source: networks/control_net_lllite.py of kohya's sd-scripts.
    """

    modules: tuple[LLLiteModuleConfig, ...]
    types: ClassVar[None] = None

    @property
    def factor(self) -> int:
        """Pixels of which both sides of the picture must be multiples."""
        return max(module.factor for module in self.modules)


@dataclass(frozen=True)
class IPAdapterConfig:
    """An IP-Adapter. Its files have no config: shapes tell all of it (``convert.ip_adapter``).

    Attributes:
        kind: "image" (one vector of the picture becomes tokens), "plus" (all its vectors,
            resampled) or "full" (each becomes a token).
        feature_dim: width of CLIP's vectors: its projection_dim for "image", else its hidden_size.
        cross_attention_dim: width of the text states.
        num_tokens: for each picture; 0 for "full", where there are as many as vectors.
        layer_widths: of the U-Net's layers that attend to the text, in the order of the way down,
            the way up, the middle.
        hidden_dim, inner_dim, ff_dim, depth: of the resampler: width, that of its attention and its
            feed-forward, layers; 0 where there is none.

    Source: Ye et al. 2023 (arXiv 2308.06721).
    """

    kind: str
    feature_dim: int
    cross_attention_dim: int
    num_tokens: int
    layer_widths: tuple[int, ...]
    hidden_dim: int = 0
    inner_dim: int = 0
    ff_dim: int = 0
    depth: int = 0

    @property
    def num_attention_heads(self) -> int:
        """Heads of the resampler; all published ones are 64 wide."""
        return self.inner_dim // 64
