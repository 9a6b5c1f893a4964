"""CLIP's image encoder in MLX (Radford et al. 2021). Mirrors reference/clip_vision.py.

Shape letters: B batch, S side of the picture, T patches and the class token, D hidden_size, P
projection_dim.
Source: transformers models/clip/modeling_clip.py.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlxdiff.models.clip import CLIPEncoder
from mlxdiff.models.layers import Conv2d, Embedding, LayerNorm, Linear, Module
from mlxdiff.networks.config import CLIPVisionConfig


class CLIPVisionOutput(NamedTuple):
    """What an image encoder says about a picture.

    Attributes:
        image_embeds: (B, P), the class token, normalized and projected.
        hidden_states: num_hidden_layers + 1 arrays (B, T, D); the first is what the layers get.
    """

    image_embeds: mx.array
    hidden_states: tuple[mx.array, ...]


class CLIPVisionEmbeddings(Module):
    """A picture cut into patches, a class token before them: (B, S, S, 3) -> (B, T, D)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = mx.zeros((width,))
        self.patch_embedding = Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = Embedding((config.image_size // patch) ** 2 + 1, width)

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels.astype(self.class_embedding.dtype))
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        token = mx.broadcast_to(self.class_embedding, (len(patches), 1, patches.shape[-1]))
        positions = mx.arange(patches.shape[1] + 1)
        return mx.concatenate([token, patches], axis=1) + self.position_embedding(positions)


class CLIPVisionTransformer(Module):
    """Embeddings, encoder, and the layer norms before and after."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # named so
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> tuple[mx.array, list[mx.array]]:
        hidden_states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), None)
        return self.post_layernorm(hidden_states[-1][:, 0]), hidden_states


class CLIPVisionModel(Module):
    """The image encoder with its projection.

    Args:
        pixels: (B, S, S, 3), by ``mlxdiff.pictures.image.to_clip``.
    Returns: CLIPVisionOutput, in the dtype of the weights.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.vision_model = CLIPVisionTransformer(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, pixels: mx.array) -> CLIPVisionOutput:
        pooled, hidden_states = self.vision_model(pixels)
        return CLIPVisionOutput(self.visual_projection(pooled), tuple(hidden_states))
