"""CLIP's image encoder in NumPy (Radford et al. 2021). Mirrors models/clip_vision.py.

Shape letters: B batch, S side of the picture, T patches and the class token, D hidden_size, P
projection_dim.
Source: transformers models/clip/modeling_clip.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxdiff.networks.config import CLIPVisionConfig
from mlxdiff.reference.clip import CLIPEncoder
from mlxdiff.reference.layers import Conv2d, Embedding, LayerNorm, Linear, Module


class CLIPVisionOutput(NamedTuple):
    """What an image encoder says about a picture.

    Attributes:
        image_embeds: (B, P), the class token, normalized and projected.
        hidden_states: num_hidden_layers + 1 arrays (B, T, D); the first is what the layers get.
    """

    image_embeds: np.ndarray
    hidden_states: tuple[np.ndarray, ...]


class CLIPVisionEmbeddings(Module):
    """A picture cut into patches, a class token before them: (B, S, S, 3) -> (B, T, D)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = np.zeros((width,), np.float32)
        self.patch_embedding = Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = Embedding((config.image_size // patch) ** 2 + 1, width)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        token = np.broadcast_to(self.class_embedding, (len(patches), 1, patches.shape[-1]))
        positions = np.arange(patches.shape[1] + 1)
        return np.concatenate([token, patches], axis=1) + self.position_embedding(positions)


class CLIPVisionTransformer(Module):
    """Embeddings, encoder, and the layer norms before and after."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # named so
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        hidden_states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), None)
        return self.post_layernorm(hidden_states[-1][:, 0]), hidden_states


class CLIPVisionModel(Module):
    """The image encoder with its projection.

    Args:
        pixels: (B, S, S, 3), by ``mlxdiff.pictures.image.to_clip``.
    Returns: CLIPVisionOutput, in the dtype of the weights.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        self.vision_model = CLIPVisionTransformer(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, pixels: np.ndarray) -> CLIPVisionOutput:
        pooled, hidden_states = self.vision_model(pixels)
        return CLIPVisionOutput(self.visual_projection(pooled), tuple(hidden_states))
