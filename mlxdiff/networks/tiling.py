"""The VAE's decoder a band of rows at a time: memory for the whole picture's features only twice.

Nothing is blended and nothing is approximate. A convolution needs one more row above and below its
band, and gets them from the neighbours. Attention, over all latents, is before any upsampling and
is not cut. Group norm needs the mean and the variance of the whole feature map: they are summed
over all bands first. So each layer goes over all bands before the next one begins, and the result
differs from the whole decoder's by the rounding of sums alone (tests/test_tiling.py holds it to
2e-5 of the picture's range).

It is written once for both backends, as the networks are (``networks.layers``). The caller says how
large a band may be: on a CPU it should fit into the cache; on a GPU each band costs kernels and a
wait (``run.memory.band_bytes``).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

from mlxdiff.networks.blocks import ResnetBlock2D
from mlxdiff.networks.layers import Array, Layers
from mlxdiff.networks.vae import AutoencoderKL

BAND_BYTES = 16 << 20
"""Default size of a band, for a CPU's cache."""

Bands: TypeAlias = list[
    Array
]  # of arrays (1, rows, W, C) of either backend; consumed: set to None as they go


def decode(vae: AutoencoderKL, z: Array, band_bytes: int | None = None) -> Array:
    """Decode as ``vae.decode`` does.

    Args:
        vae: the autoencoder.
        z: (1, H, W, C), unscaled latents.
        band_bytes: the approximate size of a band of a feature map, counted in float32. None:
            BAND_BYTES.
    Returns: (1, f * H, f * W, 3) float32, nominally in [-1, 1].
    """
    nn, decoder = vae.nn, vae.decoder
    run = _Runner(nn, BAND_BYTES if band_bytes is None else band_bytes)
    first, last = decoder.mid_block.resnets
    bands = run.resnet(first, run.split([decoder.conv_in(vae.decoder_input(z))]))
    for attention in decoder.mid_block.attentions:
        bands = run.split([attention(nn.concatenate(bands, axis=1))])
    bands = run.resnet(last, bands)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            bands = run.resnet(resnet, bands)
        for upsampler in block.upsamplers:
            bands = run.split(run.with_halo(bands, upsampler, 2))
    activate = decoder.conv_norm_out.silu_over(bands)
    out = run.with_halo(bands, lambda x: decoder.conv_out(activate(x)))
    return nn.cast(nn.concatenate(out, axis=1), nn.float32)


class _Runner:
    """Layers on bands."""

    def __init__(self, nn: Layers, band_bytes: int) -> None:
        self.nn = nn
        self.band_bytes = band_bytes

    def split(self, bands: Bands) -> Bands:
        """The same rows in bands of ``band_bytes``."""
        parts = []
        for i, band in enumerate(bands):
            bands[i] = None
            rows = max(4, self.band_bytes // (4 * band.shape[2] * band.shape[3]))
            # As even as can be: a band of few rows would be mostly its neighbours'.
            count = -(-band.shape[1] // rows)
            edges = [band.shape[1] * k // count for k in range(count + 1)]
            parts += [band[:, a:b] for a, b in pairwise(edges)]
        return parts

    def resnet(self, block: ResnetBlock2D, bands: Bands) -> Bands:
        """A ResnetBlock2D without timestep."""
        if len(bands) == 1:  # as a whole: fewer kernels, and no wait for the statistics
            bands[0], out = None, block(bands[0])
            self.nn.evaluate(out)
            return [out]
        first = block.norm1.silu_over(bands)
        h = self.with_halo(bands, lambda x: block.conv1(first(x)), keep=True)
        second = block.norm2.silu_over(h)
        shortcut = block.conv_shortcut

        def add(out: Array, i: int) -> Array:
            x, bands[i] = bands[i], None
            return out + (x if shortcut is None else shortcut(x))

        return self.with_halo(h, lambda x: block.conv2(second(x)), finish=add)

    def with_halo(
        self,
        bands: Bands,
        layer: Callable[[Array], Array],
        factor: int = 1,
        *,
        keep: bool = False,
        finish: Callable[[Array, int], Array] = lambda out, i: out,
    ) -> Bands:
        """A layer that looks one row up and down, on each band.

        Args:
            layer: pads with zeros at its edges; its output has ``factor`` times the rows.
            keep: leave the bands as they are.
            finish: given each result and its number.
        """
        results: Bands = []
        for i, band in enumerate(bands):
            above = bands[i - 1][:, -1:] if i else None
            below = bands[i + 1][:, :1] if i + 1 < len(bands) else None
            parts = [part for part in (above, band, below) if part is not None]
            out = layer(self.nn.concatenate(parts, axis=1) if len(parts) > 1 else band)
            start = 0 if above is None else factor
            out = finish(out[:, start : start + factor * band.shape[1]], i)
            self.nn.evaluate(out)
            results.append(out)
            if i and not keep:
                bands[i - 1] = None  # its last row was needed until here
        return results
