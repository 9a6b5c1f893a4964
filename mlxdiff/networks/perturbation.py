"""Changes to single blocks of a U-Net for some of its evaluations, its weights untouched.

A change stands in a ``Condition``, under the block that it changes. The block asks for it, so a run
with changes and one without can share a network.

Sources: Ahn et al. 2024 (arXiv 2403.17377), Hong 2024 (arXiv 2408.00760), Hyung et al. 2024 (arXiv
2411.18664), Si et al. 2023, "FreeU" (arXiv 2309.11497). Equal to diffusers' PAG attention
processors, its smoothed energy hook, and apply_freeu.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.networks.layers import Array


class Skip:
    """Leave a transformer block out."""

    skips: ClassVar[bool] = True


class Identity:
    """Self-attention in which every token attends to itself alone."""

    skips: ClassVar[bool] = False

    def attend(self, attention: Any, tokens: Array, shape: tuple[int, ...]) -> Array:
        """Return what ``attention(tokens)`` would be.

        Args:
            tokens: (B * H * W, C), normalized.
            shape: (B, H, W, C).
        """
        return attention.to_out[0](attention.to_v(tokens))


class Blur:
    """Self-attention with queries that are blurred over the feature map.

    Args:
        sigma: standard deviation in pixels; inf: all queries are their mean.
    """

    skips: ClassVar[bool] = False

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def attend(self, attention: Any, tokens: Array, shape: tuple[int, ...]) -> Array:
        """As ``Identity.attend``."""
        nn, (batch, height, width, channels) = attention.nn, shape
        q, k, v = attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)
        down, across = (
            nn.cast(nn.asarray(blur_matrix(size, self.sigma), nn.float32), attention.dtype)
            for size in (height, width)
        )
        q = down @ q.reshape(batch, height, width * channels)
        q = across @ q.reshape(batch * height, width, channels)
        out = nn.attention(q.reshape(tokens.shape), k, v, attention.heads, batch=batch)
        return attention.to_out[0](out)


@lru_cache(maxsize=32)
def blur_matrix(size: int, sigma: float) -> np.ndarray:
    """Return the matrix that blurs a row of pixels: (size, size) float32.

    The kernel is a Gaussian of about six deviations, no longer than the row, and the row is
    mirrored at its ends.
    """
    if math.isinf(sigma) or size < 2:
        return np.full((size, size), 1.0 / size, np.float32)
    length = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    half = min(length, size - (size % 2 - 1)) // 2
    at = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (at / sigma) ** 2) if sigma > 0.0 else (at == 0).astype(float)
    matrix = np.zeros((size, size))
    for row in range(size):
        for offset, weight in zip(at.tolist(), (kernel / kernel.sum()).tolist(), strict=True):
            place = abs(row + offset)
            matrix[row, place if place < size else 2 * (size - 1) - place] += weight
    return matrix.astype(np.float32)


class FreeU:
    """Strengthen what an up block is given from below, and weaken the low frequencies of its skip.

    Args:
        backbone: factor of the first half of the channels from below.
        skip: factor of the lowest frequencies of the skip.
    """

    def __init__(self, backbone: float, skip: float) -> None:
        self.backbone, self.skip = backbone, skip

    def join(self, nn: Any, x: Array, skip: Array) -> Array:
        """Join both, as the block takes them: (B, H, W, C + C')."""
        half = x.shape[-1] // 2
        parts = [self.backbone * x[..., :half], x[..., half:], self._filtered(nn, skip)]
        return nn.concatenate(parts, axis=-1)

    def _filtered(self, nn: Any, x: Array) -> Array:
        batch, height, width, channels = x.shape
        waves = nn.cast(nn.asarray(low_waves(height, width), nn.float32), x.dtype)
        flat = x.reshape(batch, height * width, channels)
        low = waves.T @ (waves @ flat)
        return (flat + (self.skip - 1.0) * low).reshape(x.shape)


@lru_cache(maxsize=32)
def low_waves(height: int, width: int) -> np.ndarray:
    """Return the waves of the lowest frequencies, (8 or fewer, height * width) float32.

    FreeU scales the square of 2 x 2 frequencies -1 and 0 around the middle of the shifted
    spectrum. The real part of their inverse transform is ``waves.T @ waves @ x``.
    """
    rows, columns = np.arange(height)[:, None] / height, np.arange(width)[None] / width
    waves = []
    for u, v in itertools.product(range(min(height, 2)), range(min(width, 2))):
        phase = 2 * np.pi * (u * rows + v * columns)
        waves += [np.cos(phase), np.sin(phase)]
    scale = math.sqrt(height * width)
    return (np.stack(waves).reshape(len(waves), -1) / scale).astype(np.float32)


def blocks_named(unet: Any, words: str) -> list[Any]:
    """Return the transformer blocks with self-attention whose names begin with one of the words.

    Args:
        words: beginnings of names, joined by `+`: mid, down.1, up_blocks.0.attentions.2.
    Raises: UsageError if a word names no block.
    """
    known = dict(_named(unet))
    found: dict[int, Any] = {}
    for word in words.split("+"):
        plain = _plain(word)
        matching = [
            block for name, block in known.items() if f"{_plain(name)}.".startswith(f"{plain}.")
        ]
        if not plain or not matching:
            places = sorted({".".join(_plain(name).split(".")[:2]) for name in known})
            tops = [place.removesuffix(".attentions") for place in places]
            raise UsageError(
                f"guider: no self-attention in layer {word!r}; there is in {', '.join(tops)}"
            )
        found |= {id(block): block for block in matching}
    return list(found.values())


def _plain(name: str) -> str:
    return name.strip(".").replace("_blocks", "").replace("_block", "")


def _named(unet: Any) -> Iterable[tuple[str, Any]]:
    middle = [] if unet.mid_block is None else [("mid", unet.mid_block)]
    parts = [
        *((f"down.{i}", block) for i, block in enumerate(unet.down_blocks)),
        *middle,
        *((f"up.{i}", block) for i, block in enumerate(unet.up_blocks)),
    ]
    for name, part in parts:
        for i, attention in enumerate(part.attentions):
            for j, block in enumerate(attention.transformer_blocks):
                if not block.only_cross_attention:
                    yield f"{name}.attentions.{i}.transformer.{j}", block
