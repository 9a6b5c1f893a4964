"""CLIP's image encoder (Radford et al. 2021).

Shape letters: B batch, S side of the picture, T patches and the class token, D hidden_size, P
projection_dim.
Source: transformers models/clip/modeling_clip.py.
"""

from __future__ import annotations

from typing import NamedTuple

from mlxdiff.networks.clip import CLIPEncoder
from mlxdiff.networks.config import CLIPVisionConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes


class CLIPVisionOutput(NamedTuple):
    """The states of an image encoder for a picture.

    Attributes:
        image_embeds: (B, P), the class token, normalized and projected.
        hidden_states: num_hidden_layers + 1 arrays (B, T, D); the first is what the layers get.
    """

    image_embeds: Array
    hidden_states: tuple[Array, ...]


class CLIPVisionEmbeddings(Module):
    """A picture cut into patches, a class token before them: (B, S, S, 3) -> (B, T, D)."""

    def __init__(self, nn: Layers, config: CLIPVisionConfig) -> None:
        super().__init__(nn)
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.parameter(width)
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def __call__(self, pixels: Array) -> Array:
        patches = self.patch_embedding(self.nn.cast(pixels, self.class_embedding.dtype))
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        token = self.nn.broadcast_to(self.class_embedding, (len(patches), 1, patches.shape[-1]))
        positions = self.nn.arange(patches.shape[1] + 1)
        return self.nn.concatenate([token, patches], axis=1) + self.position_embedding(positions)


class CLIPVisionTransformer(Module):
    """Embeddings, encoder, and the layer norms before and after."""

    def __init__(self, nn: Layers, config: CLIPVisionConfig) -> None:
        super().__init__(nn)
        self.embeddings = CLIPVisionEmbeddings(nn, config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # named so
        self.encoder = CLIPEncoder(nn, config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: Array) -> tuple[Array, list[Array]]:
        hidden_states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), None)
        return self.post_layernorm(hidden_states[-1][:, 0]), hidden_states


class CLIPVisionModel(Module):
    """The image encoder with its projection.

    Args:
        pixels: (B, S, S, 3), by ``mlxdiff.pictures.image.to_clip``.
    Returns: CLIPVisionOutput, in the dtype of the weights.
    """

    def __init__(self, nn: Layers, config: CLIPVisionConfig) -> None:
        super().__init__(nn)
        self.image_size = config.image_size
        self.vision_model = CLIPVisionTransformer(nn, config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, pixels: Array) -> CLIPVisionOutput:
        pooled, hidden_states = self.vision_model(pixels)
        return CLIPVisionOutput(self.visual_projection(pooled), tuple(hidden_states))

    def run_once(self, sizes: Sizes) -> CLIPVisionOutput:
        return self(sizes.array(sizes.batch, self.image_size, self.image_size, 3))
