"""What stands between CLIP's embedding of a picture and the U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxdiff.networks.config.reader import ConfigReader


@dataclass(frozen=True)
class ImageNormalizerConfig:
    """Mean and deviation of CLIP's embeddings, as diffusers' StableUnCLIPImageNormalizer."""

    embedding_dim: int = 768

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "image_normalizer/config.json"
    ) -> ImageNormalizerConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("StableUnCLIPImageNormalizer",))
        config = cls(embedding_dim=reader.integer("embedding_dim", 768))
        reader.finish({})
        return config


POSE = 4
"""Numbers of a camera that Zero-1-to-3 reads beside CLIP's embedding."""


@dataclass(frozen=True)
class CCProjectionConfig:
    """What makes one token of CLIP's embedding and a camera, as CCProjection of diffusers' pipeline
    for Zero-1-to-3."""

    in_channel: int = 772
    out_channel: int = 768

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "cc_projection/config.json"
    ) -> CCProjectionConfig:
        """Read a config.json. Raises: ConfigError."""
        reader = ConfigReader(data, where, ("CCProjection",))
        config = cls(
            in_channel=reader.integer("in_channel", 772, least=POSE + 1),
            out_channel=reader.integer("out_channel", 768),
        )
        reader.finish({})
        return config
