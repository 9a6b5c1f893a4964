"""Small networks between CLIP's embedding of a picture and a U-Net that the picture leads.

Shape letters: B batch, D width of CLIP's embedding.
Source: diffusers pipelines/stable_diffusion/stable_unclip_image_normalizer.py and
pipeline_stable_unclip_img2img.py (noise_image_embeddings); CCProjection in
examples/community/pipeline_zero1to3.py.
"""

from __future__ import annotations

from mlxdiff.networks.config import CCProjectionConfig, ImageNormalizerConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes


class StableUnCLIPImageNormalizer(Module):
    """Adds noise to embeddings at the scale that each of their numbers has in CLIP.

    Args:
        embeds: (B, D).
        noise: (B, D), standard normal.
        signal, sigma: factors of the normalized embeddings and of the noise (the forward process).
        levels: noise levels, (B,).
    Returns: (B, 2 D) float32: the noised embeddings, and their noise level as sines and cosines.
    """

    def __init__(self, nn: Layers, config: ImageNormalizerConfig) -> None:
        super().__init__(nn)
        self.mean = nn.parameter(1, config.embedding_dim)
        self.std = nn.parameter(1, config.embedding_dim)

    def __call__(
        self, embeds: Array, noise: Array, signal: float, sigma: float, levels: Array
    ) -> Array:
        nn = self.nn
        embeds, mean, std = (nn.cast(x, nn.float32) for x in (embeds, self.mean, self.std))
        noised = (signal * ((embeds - mean) / std) + sigma * noise) * std + mean
        return nn.concatenate([noised, nn.timestep_embedding(levels, noised.shape[-1])], axis=-1)

    def run_once(self, sizes: Sizes) -> Array:
        embeds, noise = (sizes.array(sizes.batch, self.mean.shape[-1]) for _ in range(2))
        return self(embeds, noise, 1.0, 0.0, sizes.array(sizes.batch))


class CCProjection(Module):
    """CLIP's embedding and a camera as one token: (B, D + 4) -> (B, out_channel).

    The camera is the change from the one that took the picture: the polar angle, sine and cosine
    of the azimuth, and the distance (Zero-1-to-3), or in its place the polar angle from which the
    picture was taken (Stable Zero123). Angles are in radians.
    """

    def __init__(self, nn: Layers, config: CCProjectionConfig) -> None:
        super().__init__(nn)
        self.in_channel = config.in_channel
        self.projection = nn.Linear(config.in_channel, config.out_channel)

    def __call__(self, x: Array) -> Array:
        return self.projection(self.nn.cast(x, self.dtype))

    def run_once(self, sizes: Sizes) -> Array:
        return self(sizes.array(sizes.batch, self.in_channel))
