"""Motion modules (Guo et al. 2023, "AnimateDiff"): attention among the frames of a video.

One stands after each layer of the U-Net, and changes what the frames have at each place. Shape
letters: B batch, F frames, H W sides of the feature map, C channels.
Source: diffusers models/unets/unet_motion_model.py; for windows models/attention.py
(FreeNoiseTransformerBlock).
"""

from __future__ import annotations

from mlxdiff.networks.blocks import Attention, FeedForward
from mlxdiff.networks.condition import Frames
from mlxdiff.networks.config import MotionAdapterConfig, MotionSpec
from mlxdiff.networks.layers import Array, Layers, Module, Sizes


class MotionTransformerBlock(Module):
    """Two times self-attention among frames, then feed-forward; each normalized first and added.

    Args:
        x: (P * F, C), the frames of all places in one matrix.
        frames: of a place, all or some at a time.
    Returns: the shape of x.
    """

    def __init__(self, nn: Layers, width: int, heads: int) -> None:
        super().__init__(nn)
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(nn, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(nn, width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(nn, width)

    def __call__(self, x: Array, frames: Frames) -> Array:
        windows = frames.windows
        if len(windows) == 1:
            x = self._attend(x, frames.count)
        else:
            x = self._attend_in_windows(x, frames.count, windows)
        x += self.ff(self.norm3(x))
        return x

    def _attend(self, x: Array, count: int) -> Array:
        """Both attentions among ``count`` frames: (P * count, C) -> the same."""
        places, width = len(x) // count, x.shape[-1]
        positions = self._positions(count, width)

        def placed(y: Array) -> Array:
            return (y.reshape(places, count, width) + positions).reshape(-1, width)

        x = x + self.attn1(placed(self.norm1(x)), batch=places)
        x += self.attn2(placed(self.norm2(x)), batch=places)
        return x

    def _attend_in_windows(
        self, x: Array, count: int, windows: list[tuple[int, list[float]]]
    ) -> Array:
        """The weighted mean of the windows that see a frame."""
        width = x.shape[-1]
        x = x.reshape(-1, count, width)
        total = None
        for start, weights in windows:
            length = len(weights)
            seen = x[:, start : start + length].reshape(-1, width)
            found = self._attend(seen, length).reshape(-1, length, width)
            shares = self.nn.cast(self.nn.asarray(weights, self.nn.float32), self.dtype)
            found = self.nn.pad(
                found * shares.reshape(1, length, 1),
                [(0, 0), (start, count - start - length), (0, 0)],
            )
            total = found if total is None else total + found
        assert total is not None
        return total.reshape(-1, width)

    def _positions(self, count: int, width: int) -> Array:
        """Sines and cosines of the numbers of the frames, in turn: (count, C)."""
        nn = self.nn
        numbers = nn.cast(nn.arange(count), nn.float32)
        table = nn.timestep_embedding(numbers, width, False, 0.0)
        return nn.cast(
            table.reshape(count, 2, width // 2).transpose(0, 2, 1).reshape(count, width), self.dtype
        )


class MotionModule(Module):
    """Transformer blocks over the frames at each place, between two projections, added to x.

    Args:
        x: (B * F, H, W, C).
        frames: of each sample.
    Returns: the shape of x.
    """

    def __init__(self, nn: Layers, width: int, num_layers: int, motion: MotionSpec) -> None:
        super().__init__(nn)
        # eps 1e-6, as the reference. The statistics are those of all frames together.
        self.norm = nn.GroupNorm(motion.norm_num_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = [
            MotionTransformerBlock(nn, width, motion.num_attention_heads) for _ in range(num_layers)
        ]
        self.proj_out = nn.Linear(width, width)

    def __call__(self, x: Array, frames: Frames) -> Array:
        rows, height, width, channels = x.shape
        count = frames.count
        batch, places = rows // count, height * width
        h = self.norm(x.reshape(batch, count * height, width, channels))
        h = h.reshape(batch, count, places, channels)
        if not frames.in_parts:
            return x + self._moved(h, frames).reshape(x.shape)
        parts, at_once = [], max(1, places * (frames.at_once or 1) // count)
        for start in range(0, places, at_once):
            part = self._moved(h[:, :, start : start + at_once], frames)
            self.nn.evaluate(part)
            parts.append(part)
        del h
        return x + self.nn.concatenate(parts, axis=2).reshape(x.shape)

    def _moved(self, h: Array, frames: Frames) -> Array:
        """What is added at some places: (B, F, P, C) -> the same."""
        batch, count, places, channels = h.shape
        h = self.proj_in(h.transpose(0, 2, 1, 3).reshape(-1, channels))
        for block in self.transformer_blocks:
            h = block(h, frames)
        return self.proj_out(h).reshape(batch, places, count, channels).transpose(0, 2, 1, 3)


class MotionModules(Module):
    """The motion modules of a block."""

    def __init__(self, nn: Layers, width: int, motion: MotionSpec) -> None:
        super().__init__(nn)
        self.motion_modules = [MotionModule(nn, width, layers, motion) for layers in motion.layers]

    def __call__(self, x: Array, frames: Frames) -> Array:
        for module in self.motion_modules:
            x = module(x, frames)
        return x


class MotionAdapterModel(Module):
    """All motion modules of a U-Net, without the U-Net, as files have them.

    To draw, they are put into a U-Net (``config.UNet2DConditionConfig.motion``).
    """

    def __init__(self, nn: Layers, config: MotionAdapterConfig) -> None:
        super().__init__(nn)
        self.config = config
        widths = config.block_out_channels
        self.down_blocks = [
            MotionModules(nn, width, config.down(level)) for level, width in enumerate(widths)
        ]
        self.mid_block = None
        if (middle := config.mid()) is not None:
            self.mid_block = MotionModules(nn, widths[-1], middle)
        self.up_blocks = [
            MotionModules(nn, widths[level], config.up(level))
            for level in reversed(range(len(widths)))
        ]

    def run_once(self, sizes: Sizes) -> list[Array]:
        frames, rows = sizes.frames, sizes.batch * sizes.frames.count
        middle = [] if self.mid_block is None else [self.mid_block]
        widths = self.config.block_out_channels
        blocks = [*self.down_blocks, *middle, *self.up_blocks]
        channels = [*widths, *[widths[-1]] * len(middle), *widths[::-1]]
        return [
            block(sizes.array(rows, sizes.height, sizes.width, width), frames)
            for block, width in zip(blocks, channels, strict=True)
        ]
