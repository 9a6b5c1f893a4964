"""CLIP's text encoder in NumPy (Radford et al. 2021), OpenCLIP's included. Mirrors models/clip.py.

Shape letters: B batch, T tokens, D hidden_size, P projection_dim.
Source: transformers models/clip/modeling_clip.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxdiff.networks.config import CLIPTextConfig, CLIPVisionConfig
from mlxdiff.reference.layers import Embedding, LayerNorm, Linear, Module, activation, attention

CLIPConfig = CLIPTextConfig | CLIPVisionConfig


class CLIPTextOutput(NamedTuple):
    """What a text encoder says about a prompt.

    Attributes:
        last_hidden_state: (B, T, D), after the final layer norm.
        hidden_states: num_hidden_layers + 1 arrays (B, T, D), before the final layer norm; the
            first is the embeddings.
        pooled: (B, D), last_hidden_state at the end of the text.
        text_embeds: (B, P), pooled and projected; None where the model has no projection.
    """

    last_hidden_state: np.ndarray
    hidden_states: tuple[np.ndarray, ...]
    pooled: np.ndarray
    text_embeds: np.ndarray | None


class CLIPTextEmbeddings(Module):
    """Token and position embeddings: (B, T) int -> (B, T, D).

    Ids beyond the vocabulary, and those below 0, take the rows of ``vectors`` (N, D), from the
    first on: ``vocab_size + k`` and ``-1 - k`` both take row k (textual inversion).
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        self.vocab_size = config.vocab_size
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, input_ids: np.ndarray, vectors: np.ndarray | None = None) -> np.ndarray:
        positions = self.position_embedding(np.arange(input_ids.shape[1]))
        if vectors is None:
            return self.token_embedding(input_ids) + positions
        beyond = input_ids >= self.vocab_size
        beside = beyond | (input_ids < 0)
        rows = np.where(beyond, input_ids - self.vocab_size, -1 - input_ids)
        tokens = self.token_embedding(np.where(beside, 0, input_ids))
        own = vectors[np.where(beside, rows, 0)].astype(tokens.dtype)
        return np.where(beside[..., None], own, tokens) + positions


class CLIPAttention(Module):
    """Multi-head self-attention: x (B, T, D), mask (T, T) or None -> (B, T, D)."""

    def __init__(self, config: CLIPConfig) -> None:
        self.heads = config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return self.out_proj(
            attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask)
        )


class CLIPMLP(Module):
    """Two linear layers with the config's activation between them."""

    def __init__(self, config: CLIPConfig) -> None:
        self.activation = activation(config.hidden_act)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(Module):
    """A transformer layer, normalized before attention and before the MLP."""

    def __init__(self, config: CLIPConfig) -> None:
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(Module):
    """All layers. Returns the input and the output of each layer, num_hidden_layers + 1 arrays."""

    def __init__(self, config: CLIPConfig) -> None:
        self.layers = [CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: np.ndarray, mask: np.ndarray | None) -> list[np.ndarray]:
        hidden_states = [x]
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1], mask))
        return hidden_states


class CLIPTextTransformer(Module):
    """Embeddings, causal encoder, final layer norm, and the state at the end of the text."""

    def __init__(self, config: CLIPTextConfig) -> None:
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, input_ids: np.ndarray, vectors: np.ndarray | None = None) -> CLIPTextOutput:
        causal = np.tri(input_ids.shape[1], dtype=bool)
        hidden_states = self.encoder(self.embeddings(input_ids, vectors), causal)
        last = self.final_layer_norm(hidden_states[-1])
        # argmax takes the first of equals; 0 where nothing equals eos_token_id. Configs with the
        # legacy eos_token_id 2 come with tokenizers whose end is the largest id.
        legacy = self.eos_token_id == 2
        end = (input_ids if legacy else input_ids == self.eos_token_id).argmax(axis=1)
        pooled = last[np.arange(len(last)), end]
        return CLIPTextOutput(last, tuple(hidden_states), pooled, None)


class CLIPTextModel(Module):
    """The text encoder, with a projection of the pooled state where the config has one.

    Args:
        input_ids: (B, T) int, T at most max_position_embeddings.
        vectors: (N, D), for ids that are not in the vocabulary; see CLIPTextEmbeddings.
    Returns: CLIPTextOutput, float32.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        self.text_model = CLIPTextTransformer(config)
        self.text_projection = None
        if config.with_projection:
            self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, input_ids: np.ndarray, vectors: np.ndarray | None = None) -> CLIPTextOutput:
        output = self.text_model(input_ids, vectors)
        if self.text_projection is None:
            return output
        return output._replace(text_embeds=self.text_projection(output.pooled))
