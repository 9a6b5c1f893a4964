"""Upscalers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class RRDBNetConfig:
    """An ESRGAN network (``networks.upscaler.RRDBNet``). Its files have no config: see
    ``convert.upscaler``.

    Attributes:
        width, growth: channels of the features, and of each convolution in a dense block.
        blocks: number of RRDBs.
        doublings: times that the features double their sides.
        shuffle: side of the squares of pixels that the network reads as one; 1: it reads pixels.
        plus: ESRGAN+, whose dense blocks have one more shortcut.
    """

    width: int = 64
    growth: int = 32
    blocks: int = 23
    doublings: int = 2
    shuffle: int = 1
    plus: bool = False

    @property
    def scale(self) -> int:
        """How many times larger the result is."""
        return 2**self.doublings // self.shuffle

    @property
    def reach(self) -> int:
        """Pixels of the small picture around a pixel that its results depend on, at most."""
        at_the_end = sum(2.0**-i for i in range(1, self.doublings + 1)) + 2 * 2.0**-self.doublings
        return self.shuffle * math.ceil(2 + 15 * self.blocks + at_the_end)

    @property
    def description(self) -> str:
        """Its structure in words."""
        name = "ESRGAN+" if self.plus else "ESRGAN"
        reads = f", reads squares of {self.shuffle}x{self.shuffle} pixels" * (self.shuffle > 1)
        return f"{name} (RRDBNet), {self.blocks} blocks of {self.width} channels{reads}"


@dataclass(frozen=True)
class CompactConfig:
    """A compact network of Real-ESRGAN (``networks.upscaler.CompactNet``).

    Attributes:
        width: channels of the features.
        convolutions: number of convolutions between the first and the last.
        scale: how many times larger the result is.
    """

    width: int = 64
    convolutions: int = 32
    scale: int = 4
    shuffle: ClassVar[int] = 1

    @property
    def reach(self) -> int:
        """Pixels of the small picture around a pixel that its results depend on, at most."""
        return self.convolutions + 2

    @property
    def description(self) -> str:
        """Its structure in words."""
        return (
            f"Real-ESRGAN compact (SRVGGNetCompact), {self.convolutions} convolutions of "
            f"{self.width} channels"
        )
